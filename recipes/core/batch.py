"""Batch algebra: global size = micro size x accumulation steps x data ranks. Pure arithmetic, no torch."""

import math
from typing import NamedTuple

from bigbatch.recipes.core.config import BatchSection
from bigbatch.recipes.core.errors import UserError


class BatchPlan(NamedTuple):
    """How one optimizer step's samples fall on the ranks."""

    global_size: int
    micro_size: int
    accumulation_steps: int
    data_ranks: int


def plan_batch(batch: BatchSection, data_ranks: int, step: int | None = None) -> BatchPlan:
    """Divide the global batch of a step (default: after the ramp) over the ranks, or raise UserError."""
    global_size = batch.global_size if step is None else global_size_at(batch, step)
    if global_size % data_ranks:
        raise UserError(
            "batch.global_size",
            f"{global_size} samples do not divide over {data_ranks} data ranks; "
            f"right would be {_multiples_near(global_size, data_ranks * (batch.micro_size or 1))}",
        )
    share = global_size // data_ranks
    micro_size = batch.micro_size or max_micro_size(batch, data_ranks)
    if share % micro_size:
        raise UserError(
            "batch.micro_size",
            f"{micro_size} does not divide a rank's share of {share} samples "
            f"(global {global_size} / {data_ranks} ranks); "
            f"right would be one of {_divisors(max_micro_size(batch, data_ranks))}",
        )
    return BatchPlan(global_size, micro_size, share // micro_size, data_ranks)


def max_micro_size(batch: BatchSection, data_ranks: int) -> int:
    """Return the largest micro-batch that divides a rank's share at every stage of the ramp."""
    return math.gcd(*(size // data_ranks for size in _sizes(batch)))


def check_batch(batch: BatchSection, data_ranks: int) -> BatchPlan:
    """Check every stage of the ramp; return the plan after it."""
    for number, stage in enumerate(batch.ramp):
        try:
            plan_batch(batch, data_ranks, stage.until_step - 1)
        except UserError as error:
            where = error.where.replace("batch.global_size", f"batch.ramp[{number}].global_size")
            raise UserError(where, f"in the ramp until step {stage.until_step}: {error.message}") from None
    return plan_batch(batch, data_ranks)


def global_size_at(batch: BatchSection, step: int) -> int:
    """Return the samples of optimizer step `step` (0 is the first)."""
    return next((stage.global_size for stage in batch.ramp if step < stage.until_step), batch.global_size)


def _sizes(batch: BatchSection) -> list[int]:
    return [stage.global_size for stage in batch.ramp] + [batch.global_size]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _multiples_near(number: int, unit: int) -> str:
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
