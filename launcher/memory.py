"""Predict the memory of a rank under a plan: what it keeps, and the most it holds at once. No torch.

Letters: D hidden size, I inner size, H heads, K E heads of keys and values times their size, T tokens of a row,
V rows of the vocabulary. Sizes are of our own models under DeepSpeed 0.19.8: checked against what ranks on a CPU held
(tests/golden/memory.json), the activations also against what autograd keeps.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bigbatch.launcher.predict import OUTER_BYTES, checkpoint_bytes, expert_parameters
from bigbatch.recipes.core.config import OptimizerSection
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection, padded_vocabulary
from bigbatch.recipes.core.plan import ParallelPlan

ERROR_BOUND = 0.1
"""Largest error of the tensors' part against the measured peaks; of the framework's part nothing is measured."""
FRAMEWORK_BYTES = 1.5 * 2**30
"""Assumed for a GPU: CUDA's context, the libraries' work space and NCCL's buffers."""
CPU_FRAMEWORK_BYTES = 0.7 * 2**30
"""Resident size of a process that has imported PyTorch and DeepSpeed."""
WORKING_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
STAGE_0_BUCKET = 500_000_000
"""Elements of gradient that DeepSpeed averages at once at stage 0 (MEMORY_OPT_ALLREDUCE_SIZE)."""
CHUNK_BYTES, CPU_CHUNK_ROWS, CPU_BLOCK_BYTES = 2**28, 1024, 2**20  # of recipes/core/loss.py, which imports torch
FULLEST_EXPERT = 1.5
"""Assumed, where no token is dropped: an expert's buffer over its even share, as long as the fullest one needs."""
ROUTER_BYTES = 40
"""What a mixture keeps a token and expert: the probabilities and what is made of them."""
SHORT_TOKENS = 512  # on a CPU, recipes/core/layers.py keeps the probabilities of rows this short


class Workload(NamedTuple):
    """What a run computes, whatever its plan."""

    model: DecoderSection | EncoderSection
    vocabulary_size: int
    sequence_length: int
    dtype: str
    optimizer: OptimizerSection
    target_fraction: float = 1.0
    """Of the tokens: those whose logits are made."""
    has_mask: bool = False
    """Attention gets a mask of [T, T] a row."""
    on_cpu: bool = False
    trains_alone: bool = False
    """Ranks meet now and then alone: parallel.sync local_sgd."""
    saves_behind: bool = False
    """checkpoint.asynchronous."""

    @property
    def working_bytes(self) -> int:
        """Bytes of a weight, a gradient or an activation."""
        return WORKING_BYTES[self.dtype]


class Memory(NamedTuple):
    """Bytes that a rank holds at the moment of its peak."""

    phase: str
    """loss, backward, reduce, step or meeting: when that moment is."""
    weights: float
    gradients: float
    masters: float
    optimizer: float
    outer: float
    """Of ranks that train alone: the parameters of their last meeting, and the outer step's momentum."""
    snapshot: float
    """On a CPU, `snapshot_bytes`, which a GPU has in its host's memory."""
    activations: float
    logits: float
    """Of the loss: a chunk of logits with its statistics, and the gradients made with it."""
    buffers: float
    """For communication: buckets of gradients, gathered weights, flattened copies."""
    framework: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self[1:])


class States(NamedTuple):
    """Bytes that a rank keeps of a model's states."""

    weights: float
    gradients: float
    masters: float
    optimizer: float


def predict_memory(work: Workload, plan: ParallelPlan, zero: dict[str, Any], recompute: bool) -> Memory:
    """Predict the peak of the rank that holds most; `zero` is a DeepSpeed document's zero_optimization."""
    stages = {0, plan.pipeline - 1}  # the first has most micro-batches in flight, the last makes the loss
    peaks = [peak for stage in stages for peak in _peaks(work, plan, zero, recompute, stage)]
    return max(peaks, key=lambda peak: peak.total)


def model_states(parameters: float, zero_stage: int, ranks: int, working_bytes: int, moment_bytes: float) -> States:
    """Return what ZeRO leaves on each of `ranks` (https://arxiv.org/abs/1910.02054, section 3 and figure 1).

    In float32 the weights are their own masters at stage 0; at the others DeepSpeed keeps a copy.
    """
    whole = parameters * working_bytes
    shared = [1 if zero_stage < stage else ranks for stage in (3, 2, 1)]  # weights, gradients, the rest
    has_masters = working_bytes < 4 or zero_stage > 0
    return States(
        whole / shared[0],
        whole / shared[1],
        4 * parameters / shared[2] * has_masters,
        moment_bytes * parameters / shared[2],
    )


def snapshot_bytes(work: Workload, plan: ParallelPlan) -> float:
    """Return the most that a rank copies into kept host memory for checkpoint.asynchronous: its part of the state."""
    if not work.saves_behind:
        return 0
    parameters = max(rank_parameters(work.model, work.vocabulary_size, plan, stage) for stage in (0, plan.pipeline - 1))
    state, share = checkpoint_bytes(1, work.optimizer), zero_share(work.model, plan, parameters)
    return parameters * state / plan.sequence + share * OUTER_BYTES if work.trains_alone else share * state


def zero_share(model: DecoderSection | EncoderSection, plan: ParallelPlan, parameters: float) -> float:
    """Return the part of a rank's parameters that ZeRO leaves it the state of: experts are on fewer ranks."""
    experts = rank_experts(model, plan)
    return (parameters - experts) / plan.zero_ranks + experts / (plan.zero_ranks // plan.expert)


def rank_experts(model: DecoderSection | EncoderSection, plan: ParallelPlan) -> int:
    """Count the parameters of a rank's experts."""
    if not isinstance(model, DecoderSection) or not model.num_expert_layers:
        return 0
    return model.num_expert_layers * model.num_experts // plan.expert * expert_parameters(model)


def rank_parameters(
    model: DecoderSection | EncoderSection, vocabulary_size: int, plan: ParallelPlan, stage: int
) -> int:
    """Count the parameters of a rank in a pipeline stage; norms and the biases of row-parallel layers are never cut."""
    tensor, hidden = plan.tensor, model.hidden_size
    split, whole = _layer_parameters(model)
    count = model.num_layers // plan.pipeline * (split // tensor + whole)
    rows = padded_vocabulary(vocabulary_size, model) // tensor
    is_first, is_last = stage == 0, stage == plan.pipeline - 1
    if isinstance(model, EncoderSection):
        positions = model.max_positions if model.positions == "absolute" else 0
        embedding = (rows + positions + model.num_segments + 2) * hidden  # 2: the norm, wherever it stands
        head = hidden * hidden + 3 * hidden + rows
        is_tied = True
    else:
        positions = model.max_positions if model.family == "gpt2" else 0
        embedding = (rows + positions) * hidden
        head = (2 if model.family == "gpt2" else 1) * hidden
        is_tied = model.tie_embeddings
        if model.num_expert_layers:  # which no pipeline divides
            routers = model.num_experts * hidden - expert_parameters(model)
            count += model.num_expert_layers * routers + rank_experts(model, plan)
    own_table = is_last and not (is_tied and is_first)
    return count + is_first * embedding + is_last * head + own_table * rows * hidden


def layer_activation_bytes(work: Workload, plan: ParallelPlan) -> float:
    """Return what autograd keeps of one layer for each token of the rank's rows.

    For GPT-2 with dropout it is 34 D (https://arxiv.org/abs/2205.05198, section 4, without the 5 H T of attention that
    flash attention does not keep), under tensor parallelism (10 + 24 / t) D, which tensor_sequence makes 34 / t D
    (equation 4); other layers are counted alike. Sequence ranks keep what they exchanged: not the projections that it
    came from, but what attention made in both layouts.
    """
    model, size, is_exchanged = work.model, work.working_bytes, plan.sequence > 1
    hidden, inner, tensor = model.hidden_size, model.inner_size, plan.tensor
    mixture = 0.0
    if isinstance(model, DecoderSection) and model.num_expert_layers:
        kept = (2 if model.family == "gpt2" else 4) * inner
        # The experts' inputs and what they keep, what they give back, and the router's probabilities and input.
        rows = size * (routed_rows(model) * (hidden + kept) + model.experts_per_token * hidden - kept)
        router = 4 * hidden * (size < 4) + ROUTER_BYTES * model.num_experts
        mixture = model.num_expert_layers / model.num_layers * (rows + router)
    masks = 2 * hidden if model.dropout else 0
    if isinstance(model, DecoderSection) and model.family == "llama":
        key_value = model.head_size * model.key_value_heads
        # RMSNorm keeps its input in float32, the normed values and the result; in float32 the same three tensors.
        whole = 2 * hidden * (12 if size == 4 else 8)
        turned = (
            0 if _is_short(work) or is_exchanged else hidden + key_value
        )  # beside the projections, which the values keep alive
        split = size * (hidden + 2 * key_value + turned + hidden + 4 * inner)
    else:
        whole = 4 * hidden * size
        is_rotary = isinstance(model, EncoderSection) and model.positions == "rotary"
        turned = 2 * hidden if is_rotary and not _is_short(work) and not is_exchanged else 0
        split = size * (4 * hidden + turned + 2 * inner)
    if is_exchanged and not _probabilities(work):
        split += size * hidden
    return (whole + masks) / _spread(plan) + mixture + (split + _probabilities(work)) / tensor


def _spread(plan: ParallelPlan) -> int:
    """Return how many tensor ranks divide what lies between the layers."""
    return plan.tensor if plan.tensor_sequence else 1


def routed_rows(model: DecoderSection) -> float:
    """Return how many rows of the experts' buffers there are for each token."""
    return model.experts_per_token * (model.capacity_factor or FULLEST_EXPERT)


def _layer_parameters(model: DecoderSection | EncoderSection) -> tuple[int, int]:
    """Count a layer's parameters: those that tensor parallelism cuts, and the others."""
    hidden, inner = model.hidden_size, model.inner_size
    if isinstance(model, DecoderSection) and model.family == "llama":
        key_value = model.head_size * model.key_value_heads
        return 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner, 2 * hidden
    return 4 * hidden * hidden + 2 * hidden * inner + 3 * hidden + inner, 6 * hidden


def _is_short(work: Workload) -> bool:
    is_short = work.sequence_length <= SHORT_TOKENS and not work.model.dropout
    return work.on_cpu and is_short and work.dtype == "bf16"


def _probabilities(work: Workload) -> float:
    """Return the bytes of attention scores kept a token: on a CPU, where flash attention is not used for all rows."""
    scores = work.model.num_heads * work.sequence_length
    if _is_short(work):
        return scores * work.working_bytes
    # With dropout, in float32: the probabilities, which of them stay, and these; and queries and keys, scaled.
    return 12 * scores + 8 * work.model.hidden_size if work.on_cpu and work.model.dropout else 0


def _peaks(work: Workload, plan: ParallelPlan, zero: dict[str, Any], recompute: bool, stage: int) -> Iterator[Memory]:
    """Yield what a rank of a pipeline stage holds at each moment that may be its peak."""
    size, ranks, zero_stage = work.working_bytes, plan.zero_ranks, plan.zero_stage
    parameters = rank_parameters(work.model, work.vocabulary_size, plan, stage)
    moments = checkpoint_bytes(1, work.optimizer) - 4
    if work.optimizer.name == "adamw_8bit":
        moments /= 4
    experts, share = rank_experts(work.model, plan), zero_share(work.model, plan, parameters)
    dense = model_states(parameters - experts, zero_stage, ranks, size, moments)
    mixture = model_states(experts, zero_stage, ranks // plan.expert, size, moments)
    states = States(*(one + other for one, other in zip(dense, mixture, strict=True)))
    weights, _, masters, optimizer = _on_device(states, zero)
    outer = OUTER_BYTES * parameters if work.trains_alone else 0
    snapshot = snapshot_bytes(work, plan) if work.on_cpu else 0
    framework = CPU_FRAMEWORK_BYTES if work.on_cpu else FRAMEWORK_BYTES
    kept, bucket = _gradients_before(plan, states), _bucket_bytes(plan, zero, size)
    persistent = bucket if zero_stage == 3 or (zero_stage == 1 and plan.accumulation_steps > 1) else 0
    gathered = _gathered_bytes(work, plan, zero, parameters)
    activations, layer = _activation_bytes(work, plan, recompute, stage)
    is_last = stage == plan.pipeline - 1
    loss, loss_kept = _loss_bytes(work, plan) if is_last else (0, 0)

    def peak(phase: str, gradients: float, activations: float, logits: float, buffers: float) -> Memory:
        kept_states = (masters, optimizer, outer, snapshot)
        return Memory(phase, weights, gradients, *kept_states, activations, logits, buffers, framework)

    yield peak("loss", kept, activations, loss, persistent + gathered)
    yield peak("backward", kept, activations + layer, loss_kept, bucket + gathered)
    if zero_stage in (1, 2):  # the first gradients are reduced into a buffer of the rank's own ones
        yield peak("reduce", kept + size * share, activations + layer, 0, bucket)
    gradients, copies = _step_bytes(plan, zero, states, parameters, share, size, work.trains_alone)
    yield peak("step", gradients, 0, 0, copies)
    if work.trains_alone:  # the mean of all ranks' parameters, and the outer gradient
        yield peak("meeting", 0, 0, 0, OUTER_BYTES * parameters)


def _on_device(states: States, zero: dict[str, Any]) -> States:
    """Leave out what the DeepSpeed document offloads."""
    if zero.get("offload_optimizer"):
        states = states._replace(masters=0, optimizer=0)
    return states._replace(weights=0) if zero.get("offload_param") else states


def _gradients_before(plan: ParallelPlan, states: States) -> float:
    """Return the gradients that are there before the last micro-batch; stage 3 has a place for its own throughout."""
    return states.gradients if plan.accumulation_steps > 1 or plan.zero_stage == 3 else 0


def _bucket_bytes(plan: ParallelPlan, zero: dict[str, Any], size: int) -> float:
    if plan.zero_stage == 0:
        return 0
    count = 2 if plan.zero_stage < 3 and zero.get("overlap_comm") else 1
    return count * size * zero.get("reduce_bucket_size", 500_000_000)


def _gathered_bytes(work: Workload, plan: ParallelPlan, zero: dict[str, Any], parameters: int) -> float:
    """Return the whole weights that stage 3 has at hand in the middle of a step: those it will need again soon."""
    if plan.zero_stage < 3:
        return 0
    model = work.model
    table = padded_vocabulary(work.vocabulary_size, model) // plan.tensor * model.hidden_size
    layer = sum(_layer_parameters(model))
    live = max(table, layer, zero.get("stage3_max_live_parameters", 1_000_000_000))
    return work.working_bytes * min(parameters, live)


def _activation_bytes(work: Workload, plan: ParallelPlan, recompute: bool, stage: int) -> tuple[float, float]:
    """Return what autograd keeps of all micro-batches in flight, and what recomputing one layer adds."""
    tokens = plan.micro_size * work.sequence_length / plan.sequence
    model, size = work.model, work.working_bytes
    layers = model.num_layers // plan.pipeline
    # One forward, one backward: stage i has p - i micro-batches in flight (https://arxiv.org/abs/2104.04473, 2.2).
    in_flight = min(plan.pipeline - stage, plan.accumulation_steps)
    layer = tokens * layer_activation_bytes(work, plan)
    kept = tokens * layers * model.hidden_size * size / _spread(plan) if recompute else layers * layer
    last_norm = 0.0
    if stage == plan.pipeline - 1:
        is_rms = isinstance(model, DecoderSection) and model.family == "llama"
        norm = 12 if is_rms and size == 4 else 8 if is_rms else 2 * size
        # With the gradient of the last hidden states, which the loss makes.
        last_norm = tokens * work.target_fraction * model.hidden_size * (norm / _spread(plan) + size)
    mask = plan.micro_size * work.sequence_length**2 * size if work.has_mask else 0
    return in_flight * (kept + mask) + last_norm, layer if recompute else 0


def _loss_bytes(work: Workload, plan: ParallelPlan) -> tuple[float, float]:
    """Return the most that the chunked cross-entropy holds, and what it leaves for the backward pass."""
    size = work.working_bytes
    columns = padded_vocabulary(work.vocabulary_size, work.model) // plan.tensor
    rows = plan.micro_size * work.sequence_length / plan.sequence * work.target_fraction
    most = max(1, CHUNK_BYTES // (columns * size))
    chunk = min(rows, most, CPU_CHUNK_ROWS if work.on_cpu else most)
    statistics = min(chunk * columns * 4, CPU_BLOCK_BYTES if work.on_cpu else chunk * columns * 4)
    gradient = columns * work.model.hidden_size
    # The product of a chunk, before it is added up in float32.
    product = gradient * size if chunk < rows or size < 4 else 0
    return chunk * columns * size + max(statistics, product) + 4 * gradient, (4 + size) * gradient


def _step_bytes(
    plan: ParallelPlan, zero: dict[str, Any], states: States, parameters: int, share: float, size: int, alone: bool
) -> tuple[float, float]:
    """Return gradients and copies of them while the optimizer steps: flattened, and in float32."""
    ranks, in_float = plan.zero_ranks, 0 if size == 4 else 4
    if plan.zero_stage == 0:
        flat = size * min(parameters, STAGE_0_BUCKET) if ranks > 1 and not alone else 0
        return states.gradients, max(in_float * parameters, flat)
    if zero.get("offload_optimizer"):
        return states.gradients, 0
    own = size * share  # those of other ranks are dropped first
    if plan.zero_stage == 3:
        share = min(share, zero.get("sub_group_size", 1_000_000_000))
    return own, max(states.gradients - own, share * (size + in_float))
