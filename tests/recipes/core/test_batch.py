"""Global size = micro size x accumulation x data ranks, and refusals whose numbers work when they are taken."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bigbatch.recipes.core.batch import check_batch, global_size_at, max_micro_size, plan_batch
from bigbatch.recipes.core.config import BatchSection, RampStage
from bigbatch.recipes.core.errors import UserError

SIZES = st.integers(1, 300)
RANKS = st.integers(1, 9)


def ramped(global_size: int, *stages: tuple[int, int], micro_size: int | None = None) -> BatchSection:
    ramp = tuple(RampStage(until_step=until, global_size=size) for until, size in stages)
    return BatchSection(global_size=global_size, micro_size=micro_size, ramp=ramp)


@given(SIZES, st.none() | st.integers(1, 12), RANKS)
def test_a_plan_multiplies_back_to_the_global_size(global_size, micro_size, ranks):
    batch = BatchSection(global_size=global_size, micro_size=micro_size)
    divides = global_size % (ranks * (micro_size or 1)) == 0
    try:
        plan = plan_batch(batch, ranks)
    except UserError:
        assert not divides
        return
    assert divides
    assert plan.micro_size * plan.accumulation_steps * plan.data_ranks == global_size == plan.global_size
    assert plan.data_ranks == ranks
    assert plan.micro_size == (micro_size or global_size // ranks)


@given(SIZES, st.lists(SIZES, max_size=3), st.none() | st.integers(1, 12), RANKS)
def test_every_refusal_names_numbers_that_work_when_all_are_taken(global_size, ramp_sizes, micro_size, ranks):
    stages = [(10 * (number + 1), size) for number, size in enumerate(ramp_sizes)]
    taken = dict(enumerate([*(size for _, size in stages), global_size]))
    for _ in range(2 * len(taken) + 1):
        batch = ramped(taken[len(stages)], *((until, taken[n]) for n, (until, _) in enumerate(stages)))
        batch = batch.model_copy(update={"micro_size": micro_size})
        try:
            check_batch(batch, ranks)
        except UserError as error:
            offered = [int(number) for number in re.findall(r"\d+", error.message.rpartition("right would be")[2])]
            assert offered
            if error.where == "batch.micro_size":
                micro_size = offered[-1]
                continue
            stage = re.fullmatch(r"batch\.ramp\[(\d)\]\.global_size", error.where)
            assert stage or error.where == "batch.global_size"
            taken[int(stage[1]) if stage else len(stages)] = offered[0]
        else:
            return
    pytest.fail(f"still refused with {taken}, micro size {micro_size}, {ranks} ranks")


def test_a_refusal_says_the_value_and_what_would_be_right():
    with pytest.raises(UserError) as refusal:
        plan_batch(ramped(10), 4)
    assert str(refusal.value) == "batch.global_size: 10 samples do not divide over 4 data ranks; right would be 8 or 12"
    with pytest.raises(UserError) as refusal:
        plan_batch(ramped(10, micro_size=3), 4)
    assert str(refusal.value).endswith("right would be 12")
    with pytest.raises(UserError) as refusal:
        plan_batch(ramped(24, micro_size=5), 2)
    assert str(refusal.value) == (
        "batch.micro_size: 5 does not divide a rank's share of 12 samples (global 24 / 2 ranks); "
        "right would be one of [1, 2, 3, 4, 6, 12]"
    )


def test_a_refusal_in_the_ramp_names_the_stage():
    with pytest.raises(UserError) as refusal:
        check_batch(ramped(8, (5, 4), (9, 3)), 2)
    assert refusal.value.where == "batch.ramp[1].global_size"
    assert "in the ramp until step 9: 3 samples" in refusal.value.message


def test_a_stage_smaller_than_the_ranks_is_refused_and_not_divided_by():
    batch = ramped(8, (5, 4), (9, 2))
    assert plan_batch(batch, 4).micro_size == 1
    with pytest.raises(UserError, match=r"ramp\[1\].*right would be 4"):
        check_batch(batch, 4)


@given(st.lists(SIZES, min_size=1, max_size=4), RANKS)
def test_the_largest_micro_size_divides_every_share_and_none_larger_does(sizes, ranks):
    shares = [size // ranks for size in sizes]
    assume(all(shares))
    batch = ramped(sizes[-1], *((n + 1, size) for n, size in enumerate(sizes[:-1])))
    common = [size for size in range(1, min(shares) + 1) if all(share % size == 0 for share in shares)]
    assert max_micro_size(batch, ranks) == max(common)


def test_the_ramp_gives_each_step_its_size():
    batch = ramped(32, (2, 8), (5, 16))
    assert [global_size_at(batch, step) for step in range(7)] == [8, 8, 16, 16, 16, 32, 32]
    plans = [plan_batch(batch, 2, step) for step in (1, 2, 5)]
    assert [(plan.micro_size, plan.accumulation_steps) for plan in plans] == [(4, 1), (4, 2), (4, 4)]
    assert plan_batch(batch, 2) == plans[-1]
