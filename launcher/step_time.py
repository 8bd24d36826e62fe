"""Predict the seconds of an optimizer step under a plan: arithmetic, communication, the update. No torch.

A model of peaks and volumes, not a simulation: it ranks plans, and is within ERROR_FACTOR of published throughputs.
"""

from typing import NamedTuple

from bigbatch.launcher.cards import Card
from bigbatch.launcher.memory import (
    Workload,
    layer_activation_bytes,
    rank_experts,
    rank_parameters,
    routed_rows,
    zero_share,
)
from bigbatch.launcher.predict import count_active_parameters, count_parameters
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection, padded_vocabulary
from bigbatch.recipes.core.plan import Axis, ParallelPlan

ERROR_FACTOR = 1.5
"""Published throughputs of llm-foundry (2023) and Megatron-LM (2021) lie within this factor of the prediction."""
LINK_FRACTION = 0.8
"""Of a link's rate that a collective of large messages reaches; NCCL's own tests show 75 to 85 %."""
LAYER_LAUNCH_SECONDS = 0.4e-3
"""Shortest forward and backward pass of a layer on a GPU: some seventy kernels, started in 6 microseconds each.

Twice as long at stage 3, whose hooks gather and drop the layer's weights."""
TOUCHES = 7
"""How often norms, activations and additions read or write what autograd keeps: fits llm-foundry's sizes on A100."""
SHOWING_FRACTION = 0.2
"""Of communication beside arithmetic, which it slows down (assumed)."""
UPDATE_BYTES = 30
"""Read and written by Adam for a parameter: masters and two moments both ways, gradient and weight."""
HOST_LINK, HOST_MEMORY = 25e9, 25e9
"""Bytes a second, a card's share: over PCIe 4, and of the host's memory, where an offloaded optimizer steps."""


class StepTime(NamedTuple):
    """Seconds of an optimizer step; what communication hides behind arithmetic does not count."""

    arithmetic: float
    bubble: float
    """Waiting at both ends of the pipeline."""
    tensor: float
    sequence: float
    pipeline: float
    data: float
    update: float
    expert: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class Volumes(NamedTuple):
    """Bytes that a rank sends in a step along each axis."""

    tensor: float
    sequence: float
    pipeline: float
    data: float
    expert: float


def predict_step(
    work: Workload, plan: ParallelPlan, card: Card, gpus_per_node: int, recompute: bool, offloads: bool
) -> StepTime:
    """Predict a step on the slowest rank."""
    micro = _micro_batch_seconds(work, plan, card, recompute)
    arithmetic = plan.accumulation_steps * micro
    volumes = communication(work, plan, recompute)

    def seconds(volume: float, *axes: Axis) -> float:
        return volume / (LINK_FRACTION * bandwidth(plan, card, gpus_per_node, *axes))

    data = seconds(volumes.data, "data", "sequence")
    # Stages 0 and 1 reduce beside the last backward pass; 2 beside every one; 3 gathers beside forward passes too.
    beside = {0: 2 / 3 * micro, 1: 2 / 3 * micro, 2: 2 / 3 * arithmetic, 3: arithmetic}[plan.zero_stage]
    # Fresh weights are gathered behind the update, where nothing hides it.
    behind = data / (1 + plan.accumulation_steps) if plan.zero_stage == 2 else data / 2 if plan.zero_stage == 1 else 0
    return StepTime(
        arithmetic,
        # (p - 1) of the micro-batches' time (https://arxiv.org/abs/2104.04473, section 2.2.1).
        (plan.pipeline - 1) * micro,
        seconds(volumes.tensor, "tensor"),
        seconds(volumes.sequence, "sequence"),
        seconds(volumes.pipeline, "pipeline"),
        behind + max(SHOWING_FRACTION * (data - behind), data - behind - beside),
        _update_seconds(work, plan, card, offloads),
        # All-to-all: what leaves the node has this card's share of the network alone.
        volumes.expert / LINK_FRACTION / (card.node_link if plan.expert <= gpus_per_node else card.network_link),
    )


def model_flops(work: Workload) -> tuple[float, float]:
    """Count a sample's operations forward and backward: of all layers, and of the head.

    6 a weight and token, and 12 L D T a token for attention (PaLM, https://arxiv.org/abs/2204.02311, appendix B); of a
    mixture of experts the chosen ones alone count.
    """
    model, length = work.model, work.sequence_length
    layers = 6.0 * _layer_weights(work) + 12.0 * model.num_layers * model.hidden_size * length
    return length * layers, length * work.target_fraction * 6.0 * _head_weights(work)


def communication(work: Workload, plan: ParallelPlan, recompute: bool) -> Volumes:
    """Return what a rank sends in a step.

    tensor: four all-reduces a layer and micro-batch, six when the forward pass runs twice; of n bytes over t ranks each
    sends 2 n (t - 1) / t (https://arxiv.org/abs/1909.08053). With tensor_sequence each is a gathering and a scattering
    of n (t - 1) / t, and the backward pass gathers twice more (https://arxiv.org/abs/2205.05198, section 4.2.2).
    sequence: four all-to-alls each way, a rank sending (s - 1) / s of its part (https://arxiv.org/abs/2309.14509,
    section 3.2). pipeline: the states there, their gradient back. data: 2 P, at stage 3 3 P
    (https://arxiv.org/abs/1910.02054, section 7); stages 2 and 3 pay for every micro-batch, which DeepSpeed reduces at
    once. expert: an all-to-all of the experts' buffers there and one back, each
    way (https://arxiv.org/abs/2006.16668).
    """
    size, steps, model = work.working_bytes, plan.accumulation_steps, work.model
    states = plan.micro_size * work.sequence_length / plan.sequence * model.hidden_size * size
    layers = model.num_layers / plan.pipeline
    again = 1.5 if recompute else 1
    wide = 2 + 2 * model.key_value_heads / model.num_heads if isinstance(model, DecoderSection) else 4
    parameters, experts = _most_parameters(work, plan), rank_experts(model, plan)
    reduced = (parameters - experts) * (1 - 1 / plan.zero_ranks) + experts * (1 - plan.expert / plan.zero_ranks)
    exchanged = 0.0
    if isinstance(model, DecoderSection) and model.num_expert_layers:
        exchanged = steps * model.num_expert_layers * again * 4 * routed_rows(model) * states * (1 - 1 / plan.expert)
    times = {0: 2, 1: 2, 2: 1 + steps, 3: 3 * steps}[plan.zero_stage]
    return Volumes(
        tensor=steps * layers * (again * 4 * 2 + 2 * plan.tensor_sequence) * states * (1 - 1 / plan.tensor),
        sequence=steps * layers * again * 2 * wide * states / plan.tensor * (1 - 1 / plan.sequence),
        pipeline=steps * 2 * states if plan.pipeline > 1 else 0,
        data=times * size * reduced,
        expert=exchanged,
    )


def bandwidth(plan: ParallelPlan, card: Card, gpus_per_node: int, *axes: Axis) -> float:
    """Return the bytes a second that a rank can send along axes that stand side by side in the order of ranks.

    A ring over several nodes has the network shares of all its ranks of a node.
    """
    stride = min(plan.stride(axis) for axis in axes)
    degree = 1
    for axis in axes:
        degree *= getattr(plan, axis)
    if stride * degree <= gpus_per_node:
        return card.node_link
    on_a_node = max(1, min(degree, gpus_per_node // stride))
    return min(card.node_link, card.network_link * on_a_node)


def _layer_weights(work: Workload) -> int:
    model = work.model
    none = model.model_copy(update={"num_layers": 0})
    count = count_active_parameters if isinstance(model, DecoderSection) else count_parameters
    return count(model, work.vocabulary_size) - count(none, work.vocabulary_size)  # type: ignore[arg-type]


def _head_weights(work: Workload) -> int:
    """Count what makes logits: the (tied) table, and with it an encoder's transform, a decoder's last norm."""
    model, rows = work.model, padded_vocabulary(work.vocabulary_size, work.model)
    hidden = model.hidden_size
    if isinstance(model, EncoderSection):
        return rows * hidden + hidden * hidden + 3 * hidden + rows
    return rows * hidden + (2 if model.family == "gpt2" else 1) * hidden


def _micro_batch_seconds(work: Workload, plan: ParallelPlan, card: Card, recompute: bool) -> float:
    """Return a micro-batch's forward and backward pass through the slowest pipeline stage, the last."""
    layers, head = model_flops(work)
    rate = card.matrix_rates[work.dtype] * card.sustained_fraction
    cut = plan.micro_size / (plan.tensor * plan.sequence) / rate
    again = 4 / 3 if recompute else 1
    tokens = plan.micro_size * work.sequence_length / plan.sequence
    traffic = TOUCHES * tokens * work.model.num_layers * layer_activation_bytes(work, plan) / card.memory_bandwidth
    in_layers = again / plan.pipeline * (layers * cut + traffic)
    launches = again * work.model.num_layers / plan.pipeline * (2 if plan.zero_stage == 3 else 1)
    shortest = 0 if card.is_cpu else launches * LAYER_LAUNCH_SECONDS
    gradients = _most_parameters(work, plan) * work.working_bytes  # the old and the new ones read, their sum written
    return max(in_layers, shortest) + head * cut + 3 * gradients / card.memory_bandwidth


def _update_seconds(work: Workload, plan: ParallelPlan, card: Card, offloads: bool) -> float:
    parameters = _most_parameters(work, plan)
    share = zero_share(work.model, plan, parameters) if plan.zero_stage else parameters
    if offloads and plan.zero_stage:  # the gradient down, the weight up, and the update at the host's pace
        return share * (2 * work.working_bytes / HOST_LINK + UPDATE_BYTES / HOST_MEMORY)
    return share * UPDATE_BYTES / card.memory_bandwidth


def _most_parameters(work: Workload, plan: ParallelPlan) -> int:
    return max(rank_parameters(work.model, work.vocabulary_size, plan, stage) for stage in (0, plan.pipeline - 1))
