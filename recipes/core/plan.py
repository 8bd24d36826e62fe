"""How a run's work is divided over its ranks: degrees, places, and what is legal. Pure arithmetic, no torch.

Four axes. data: other samples; its ranks share out the optimizer by ZeRO (https://arxiv.org/abs/1910.02054). tensor:
parts of each matrix (https://arxiv.org/abs/1909.08053). pipeline: consecutive layers (https://arxiv.org/abs/2104.04473).
sequence: parts of each row of tokens, in attention parts of the heads (Ulysses, https://arxiv.org/abs/2309.14509).
The data ranks of a mixture of experts may share out the experts too (https://arxiv.org/abs/2006.16668).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

from bigbatch.recipes.core.batch import check_batch
from bigbatch.recipes.core.config import BatchSection
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection, padded_vocabulary

Axis = Literal["data", "tensor", "pipeline", "sequence"]
AXES: tuple[Axis, ...] = ("pipeline", "data", "sequence", "tensor")
"""Slowest first: the ranks of a tensor group are neighbours. Without a sequence axis the order is DeepSpeed's own."""
PIPELINE_ZERO_STAGE = 1
"""At 0 DeepSpeed's pipeline takes the norm of one stage's gradients for that of all; 2 and 3 it refuses."""


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class ParallelPlan:
    """The degree of each axis, the ZeRO stage, and how a data rank's share of a batch is cut."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    zero_stage: int = 1
    micro_size: int = 1
    """Samples a forward pass."""
    accumulation_steps: int = 1
    expert: int = 1
    """Neighbouring data ranks that share out a mixture's experts."""
    tensor_sequence: bool = False
    """The tensor ranks divide what lies between the layers, too, along tokens."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data * self.tensor * self.pipeline * self.sequence

    @property
    def zero_ranks(self) -> int:
        """Ranks that ZeRO divides the same weights' state over."""
        return self.data * self.sequence

    @property
    def global_size(self) -> int:
        """Samples an optimizer step."""
        return self.data * self.micro_size * self.accumulation_steps

    def coordinates(self, rank: int) -> Coordinates:
        """Return a rank's place."""
        places = []
        for axis in reversed(AXES):
            rank, place = divmod(rank, getattr(self, axis))
            places.append(place)
        return Coordinates(*reversed(places))

    def rank(self, place: Coordinates) -> int:
        """Return the rank at a place."""
        rank = 0
        for axis, index in zip(AXES, place, strict=True):
            rank = rank * getattr(self, axis) + index
        return rank

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """List the groups of ranks whose places differ along these axes only, each in the order of its ranks."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            fixed = tuple(index for axis, index in zip(AXES, place, strict=True) if axis not in axes)
            groups.setdefault(fixed, []).append(rank)
        return [tuple(group) for group in groups.values()]

    def expert_groups(self) -> list[tuple[int, ...]]:
        """List the groups of data ranks that have all experts between them; DeepSpeed makes the same ones."""
        return [tuple(range(first, first + self.expert)) for first in range(0, self.world_size, self.expert)]

    def stride(self, axis: Axis) -> int:
        """Return how far apart in rank two neighbours along an axis are."""
        return math.prod(getattr(self, faster) for faster in AXES[AXES.index(axis) + 1 :])

    def __str__(self) -> str:
        names = [f"{axis} {getattr(self, axis)}" for axis in ("data", "tensor", "pipeline", "sequence", "expert")]
        degrees = " x ".join(name for name in names if not name.endswith(" 1"))
        return degrees + " with tensor_sequence" * self.tensor_sequence + f" at ZeRO stage {self.zero_stage}"


class Job(NamedTuple):
    """What is divided."""

    model: DecoderSection | EncoderSection | None
    """None: another kind of model, which no axis but data divides."""
    vocabulary_size: int
    sequence_length: int
    batch: BatchSection
    axes: tuple[str, ...] = ("tensor", "pipeline", "sequence")
    """Those that the recipe's model is written for, beside data."""
    tensor_sequence: bool = False
    """Whether tensor ranks, where there are some, are to divide what lies between the layers."""


class BrokenRule(NamedTuple):
    """What an illegal plan breaks."""

    path: str
    """JSON path of the setting to change."""
    message: str


def make_plan(
    job: Job,
    world_size: int,
    tensor: int = 1,
    pipeline: int = 1,
    sequence: int = 1,
    zero_stage: int = 1,
    expert: int = 1,
) -> ParallelPlan:
    """Derive the data degree and the accumulation; raise UserError for an illegal plan, with the nearest legal ones."""
    others = tensor * pipeline * sequence
    data = world_size // others
    micro_size = job.batch.micro_size or max(1, job.batch.global_size // max(1, data))
    spreads = job.tensor_sequence
    plan = ParallelPlan(data, tensor, pipeline, sequence, zero_stage, micro_size, 1, expert, spreads)
    broken = next(broken_rules(plan, job, world_size), None)
    if broken is None:
        batch = check_batch(job.batch, data)
        return replace(plan, micro_size=batch.micro_size, accumulation_steps=batch.accumulation_steps)
    near = nearest_legal(plan, job, world_size)
    offer = "; legal and near: " + ", or ".join(map(_settings, near)) if near else ""
    raise UserError(broken.path, broken.message + offer)


def broken_rules(plan: ParallelPlan, job: Job, world_size: int) -> Iterator[BrokenRule]:
    """Yield every rule that a plan breaks, the batch algebra last."""
    yield from _broken_product(plan, world_size)
    if plan.pipeline > 1 and plan.zero_stage != PIPELINE_ZERO_STAGE:
        message = f"{plan.zero_stage} with pipeline {plan.pipeline}; right is {PIPELINE_ZERO_STAGE}"
        yield BrokenRule("parallel.zero_stage", message)
    if plan.pipeline > 1 and plan.sequence > 1:
        message = (
            f"{plan.sequence} with pipeline {plan.pipeline}: DeepSpeed's pipeline has no sequence axis; right is 1"
        )
        yield BrokenRule("parallel.sequence", message)
    if plan.tensor_sequence and (plan.tensor == 1 or plan.pipeline > 1):
        # DeepSpeed's pipeline takes what passes between stages for replicated: each tensor rank sends a part of it.
        found = f"with pipeline {plan.pipeline}" if plan.pipeline > 1 else "but parallel.tensor is 1"
        yield BrokenRule("parallel.tensor_sequence", f"true, {found}; right is false")
    for axis in ("tensor", "pipeline", "sequence"):
        if getattr(plan, axis) > 1 and (job.model is None or axis not in job.axes):
            message = f"{getattr(plan, axis)}, but this recipe's model is not divided along this axis; right is 1"
            yield BrokenRule(f"parallel.{axis}", message)
    yield from _broken_experts(plan, job)
    if job.model is not None:
        yield from _broken_by_model(plan, job, job.model)
    if plan.data >= 1:
        try:
            check_batch(job.batch, plan.data)
        except UserError as error:
            yield BrokenRule(error.where, error.message)


def legal_plans(job: Job, world_size: int) -> Iterator[ParallelPlan]:
    """Yield every legal plan for this many ranks, with each micro-batch that the batch algebra allows."""
    for tensor in divisors(world_size):
        for pipeline in divisors(world_size // tensor):
            for sequence in divisors(world_size // tensor // pipeline):
                data = world_size // (tensor * pipeline * sequence)
                for zero_stage, expert in product(range(4), divisors(data) if _num_experts(job) > 1 else [1]):
                    plan = ParallelPlan(data, tensor, pipeline, sequence, zero_stage, expert=expert)
                    plan = replace(plan, tensor_sequence=job.tensor_sequence and tensor > 1 and pipeline == 1)
                    yield from _with_micro_sizes(plan, job, world_size)


def nearest_legal(plan: ParallelPlan, job: Job, world_size: int, count: int = 2) -> list[ParallelPlan]:
    """Return the legal plans that differ least from one that may be illegal, of each set of degrees the nearest."""
    found: dict[tuple[int, ...], ParallelPlan] = {}
    for legal in sorted(legal_plans(job, world_size), key=lambda legal: distance(plan, legal)):
        found.setdefault((legal.tensor, legal.pipeline, legal.sequence, legal.zero_stage, legal.expert), legal)
        if len(found) == count:
            break
    return list(found.values())


def distance(one: ParallelPlan, other: ParallelPlan) -> float:
    """Say how much two plans differ: a doubling of a model axis counts as one ZeRO stage, of the micro-batch a tenth.

    The data degree follows from the others and counts as little as the micro-batch.
    """

    def doublings(name: str) -> float:
        return abs(math.log2(max(1, getattr(one, name)) / max(1, getattr(other, name))))

    far = sum(doublings(name) for name in ("tensor", "pipeline", "sequence", "expert"))
    return far + abs(one.zero_stage - other.zero_stage) + 0.1 * (doublings("micro_size") + doublings("data"))


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def _broken_product(plan: ParallelPlan, world_size: int) -> Iterator[BrokenRule]:
    if plan.world_size == world_size:
        return
    others = plan.tensor * plan.pipeline * plan.sequence
    degrees = f"tensor {plan.tensor} x pipeline {plan.pipeline} x sequence {plan.sequence} = {others}"
    axis = max(("tensor", "pipeline", "sequence"), key=lambda name: getattr(plan, name))
    yield BrokenRule(f"parallel.{axis}", f"{degrees} does not divide {world_size} ranks")


def _broken_experts(plan: ParallelPlan, job: Job) -> Iterator[BrokenRule]:
    """Yield what DeepSpeed 0.19.8's mixture of experts does not go with, and where its degree does not divide."""
    num_experts = _num_experts(job)
    if num_experts == 1:
        if plan.expert > 1:
            yield BrokenRule("parallel.expert", f"{plan.expert}, but the model has no experts; right is 1")
        return
    for axis, why in _WITHOUT_EXPERTS.items():
        if getattr(plan, axis) > 1:
            message = f"{getattr(plan, axis)} with model.num_experts {num_experts}: {why}; right is 1"
            yield BrokenRule(f"parallel.{axis}", message)
    if plan.zero_stage == 3:
        message = f"3 with model.num_experts {num_experts}, which DeepSpeed's layer has no stage 3 for; right is 2"
        yield BrokenRule("parallel.zero_stage", message)
    for name, size in {"model.num_experts": num_experts, "the data ranks": max(1, plan.data)}.items():
        if size % plan.expert:
            message = f"{plan.expert} does not divide {name} {size}; {_right(size, plan.expert)}"
            yield BrokenRule("parallel.expert", message)


def _num_experts(job: Job) -> int:
    return job.model.num_experts if isinstance(job.model, DecoderSection) else 1


_WITHOUT_EXPERTS = {
    "tensor": "DeepSpeed lays its groups of expert ranks over neighbours, which are tensor ranks here",
    "pipeline": "the load-balancing loss does not pass from stage to stage",
    "sequence": "the ranks of a row would count its tokens several times when they balance the load",
}


def _broken_by_model(plan: ParallelPlan, job: Job, model: DecoderSection | EncoderSection) -> Iterator[BrokenRule]:
    """Yield where a degree does not divide what its axis cuts."""
    heads = {"num_heads": model.num_heads}
    if isinstance(model, DecoderSection):
        heads["num_key_value_heads"] = model.key_value_heads
    vocabulary = {"the padded vocabulary": padded_vocabulary(job.vocabulary_size, model)}
    cut: dict[str, tuple[int, dict[str, int]]] = {
        "tensor": (plan.tensor, heads | {"feed_forward_size": model.inner_size} | vocabulary),
        "pipeline": (plan.pipeline, {"num_layers": model.num_layers}),
        "sequence": (plan.sequence, {"data.sequence_length": job.sequence_length}),
    }
    for axis, (degree, sizes) in cut.items():
        for name, size in sizes.items():
            if size % degree:
                message = f"{degree} does not divide {name} {size}; {_right(size, degree)}"
                yield BrokenRule(f"parallel.{axis}", message)
    if plan.tensor_sequence and job.sequence_length % (plan.tensor * plan.sequence):
        degrees = f"tensor {plan.tensor}" + (f" x sequence {plan.sequence}" if plan.sequence > 1 else "")
        message = f"true, but {degrees} does not divide data.sequence_length {job.sequence_length}; right is false"
        yield BrokenRule("parallel.tensor_sequence", message)
    for name, size in heads.items():
        if plan.sequence > 1 and size % plan.tensor == 0 and (size // plan.tensor) % plan.sequence:
            each = f"{name} {size}" + (f" / tensor {plan.tensor}" if plan.tensor > 1 else "")
            message = f"{plan.sequence} does not divide {each}; {_right(size // plan.tensor, plan.sequence)}"
            yield BrokenRule("parallel.sequence", message)


def _right(size: int, degree: int) -> str:
    all_right = divisors(size)
    below = max(right for right in all_right if right < degree)
    above = [right for right in all_right if right > degree]
    return f"right is {below}" + (f" or {above[0]}" if above else "")


def _with_micro_sizes(plan: ParallelPlan, job: Job, world_size: int) -> Iterator[ParallelPlan]:
    """Yield a legal plan with every micro-batch that divides a rank's share throughout the ramp."""
    free = job._replace(batch=job.batch.model_copy(update={"micro_size": None}))
    if any(broken_rules(plan, free, world_size)):
        return
    batch = check_batch(free.batch, plan.data)
    for micro_size in divisors(batch.micro_size):
        yield replace(plan, micro_size=micro_size, accumulation_steps=batch.global_size // plan.data // micro_size)


def _settings(plan: ParallelPlan) -> str:
    axes = ["tensor", "pipeline", "sequence", *["expert"] * (plan.expert > 1), "zero_stage"]
    names = [f"{axis} {getattr(plan, axis)}" for axis in axes]
    return f"{', '.join(names)}, micro_size {plan.micro_size}"
