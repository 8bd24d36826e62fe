"""Plans as arithmetic: places, groups, and what is legal."""

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.config import BatchSection, RampStage
from bigbatch.recipes.core.data.sampler import rank_slice
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection
from bigbatch.recipes.core.plan import (
    AXES,
    Coordinates,
    Job,
    ParallelPlan,
    broken_rules,
    distance,
    divisors,
    legal_plans,
    make_plan,
    nearest_legal,
)

DEGREE = st.integers(1, 4)
PLANS = st.builds(
    ParallelPlan,
    data=DEGREE,
    tensor=DEGREE,
    pipeline=DEGREE,
    sequence=DEGREE,
    micro_size=DEGREE,
    accumulation_steps=DEGREE,
)
LLAMA = DecoderSection(family="llama", num_layers=6, hidden_size=96, num_heads=12, num_key_value_heads=4)
JOB = Job(LLAMA, 1000, 128, BatchSection(global_size=48))


@given(PLANS)
def test_ranks_to_places_and_back_is_a_bijection(plan):
    places = [plan.coordinates(rank) for rank in range(plan.world_size)]
    sizes = [range(getattr(plan, axis)) for axis in AXES]
    assert places == [Coordinates(*place) for place in product(*sizes)]
    assert [plan.rank(place) for place in places] == list(range(plan.world_size))


@given(PLANS, st.lists(st.sampled_from(AXES), unique=True, min_size=1))
def test_groups_partition_the_ranks_and_differ_along_their_axes_alone(plan, axes):
    groups = plan.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
    for group in groups:
        assert len(group) == math.prod(getattr(plan, axis) for axis in axes)
        places = [plan.coordinates(rank) for rank in group]
        for axis in set(AXES) - set(axes):
            assert len({getattr(place, axis) for place in places}) == 1


@given(PLANS)
def test_neighbours_along_an_axis_are_a_stride_apart(plan):
    for axis in AXES:
        for group in plan.groups(axis):
            assert list(group) == list(range(group[0], group[-1] + 1, plan.stride(axis)))


@given(PLANS, DEGREE)
def test_tensor_ranks_are_neighbours_on_a_node(plan, groups_on_a_node):
    node = plan.tensor * groups_on_a_node
    for group in plan.groups("tensor"):
        assert group == tuple(range(group[0], group[0] + plan.tensor))
        assert group[0] // node == group[-1] // node


@given(PLANS)
def test_a_global_batch_is_computed_exactly_once(plan):
    replicas = [group[0] for group in plan.groups("pipeline", "sequence", "tensor")]
    seen = []
    for rank in replicas:
        data_rank = plan.coordinates(rank).data
        for micro in range(plan.accumulation_steps):
            seen += rank_slice(0, micro, plan.micro_size, data_rank, plan.data)
    assert sorted(seen) == list(range(plan.global_size))


MIXTURE = JOB._replace(model=LLAMA.model_copy(update={"num_experts": 6}), axes=("tensor", "pipeline", "expert"))


@given(st.integers(1, 24))
def test_plans_of_a_mixture_divide_its_experts_and_its_data_ranks_alone(world_size):
    plans = [plan for plan in legal_plans(MIXTURE, world_size) if plan.micro_size == 1]
    degrees = [degree for degree in (1, 2, 3, 6) if world_size % degree == 0]
    expected = [(stage, degree) for stage in (0, 1, 2) for degree in degrees] if 48 % world_size == 0 else []
    assert [(plan.zero_stage, plan.expert) for plan in plans] == expected
    for plan in plans:
        assert (plan.data, plan.world_size) == (world_size, world_size)
        assert sorted(rank for group in plan.expert_groups() for rank in group) == list(range(world_size))


def test_without_a_sequence_axis_ranks_lie_as_in_deepspeeds_own_topology():
    from bigbatch.recipes.core.engine import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    plan = ParallelPlan(data=3, tensor=2, pipeline=4)
    theirs = PipeModelDataParallelTopology(num_pp=4, num_mp=2, num_dp=3)
    for rank in range(24):
        place = plan.coordinates(rank)
        assert theirs.get_coord(rank) == (place.pipeline, place.data, place.tensor)
    assert theirs.get_axis_comm_lists("data") == [list(group) for group in plan.groups("data")]


@given(st.integers(1, 5000))
def test_divisors_are_all_of_them_in_order(number):
    assert divisors(number) == [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def test_the_data_degree_and_the_accumulation_follow_from_the_ranks():
    plan = make_plan(JOB._replace(batch=BatchSection(global_size=48, micro_size=4)), 12, tensor=2, pipeline=2)
    assert plan == ParallelPlan(3, 2, 2, 1, 1, micro_size=4, accumulation_steps=4)
    assert make_plan(JOB, 12, tensor=2, pipeline=2).micro_size == 16  # by default a rank's whole share
    assert str(plan) == "data 3 x tensor 2 x pipeline 2 at ZeRO stage 1"


@pytest.mark.parametrize(
    ("degrees", "path", "message"),
    [
        ({"tensor": 5}, "parallel.tensor", "tensor 5 x pipeline 1 x sequence 1 = 5 does not divide 24 ranks"),
        ({"tensor": 8}, "parallel.tensor", "8 does not divide num_heads 12; right is 6 or 12"),
        ({"tensor": 6}, "parallel.tensor", "6 does not divide num_key_value_heads 4; right is 4"),
        ({"pipeline": 4}, "parallel.pipeline", "4 does not divide num_layers 6; right is 3 or 6"),
        ({"sequence": 3}, "parallel.sequence", "3 does not divide data.sequence_length 128; right is 2 or 4"),
        (
            {"sequence": 4, "tensor": 2},
            "parallel.sequence",
            "4 does not divide num_heads 12 / tensor 2; right is 3 or 6",
        ),
        (
            {"pipeline": 2, "zero_stage": 3},
            "parallel.zero_stage",
            "3 with pipeline 2; right is 1",
        ),
        (
            {"pipeline": 2, "zero_stage": 2},
            "parallel.zero_stage",
            "2 with pipeline 2; right is 1",
        ),
        (
            {"pipeline": 2, "sequence": 2},
            "parallel.sequence",
            "2 with pipeline 2: DeepSpeed's pipeline has no sequence axis; right is 1",
        ),
    ],
)
def test_an_illegal_plan_is_refused_with_its_path_and_the_nearest_legal_ones(degrees, path, message):
    with pytest.raises(UserError) as caught:
        make_plan(JOB, 24, **degrees)
    assert caught.value.where == path
    told, _, offer = caught.value.message.partition("; legal and near: ")
    assert told == message
    assert offer.count("tensor") == 2


def test_what_is_offered_first_is_near():
    with pytest.raises(UserError, match="near: tensor 2, pipeline 1, sequence 1, zero_stage 3, micro_size 4, or"):
        make_plan(JOB, 24, tensor=2, pipeline=2, zero_stage=3)


def test_a_feed_forward_size_and_a_vocabulary_that_do_not_divide_are_refused():
    job = JOB._replace(model=LLAMA.model_copy(update={"feed_forward_size": 258, "vocabulary_multiple": 1}))
    told = [rule.message for rule in broken_rules(ParallelPlan(data=6, tensor=4), job, 24)]
    assert told == [
        "4 does not divide feed_forward_size 258; right is 3 or 6",
    ]
    told = [
        rule.message for rule in broken_rules(ParallelPlan(data=6, tensor=4), job._replace(vocabulary_size=998), 24)
    ]
    assert told[1] == "4 does not divide the padded vocabulary 998; right is 2 or 499"


@pytest.mark.parametrize(
    ("length", "degrees", "expected"),
    [
        (128, {}, "true, but parallel.tensor is 1; right is false"),
        (128, {"tensor": 2, "pipeline": 2}, "true, with pipeline 2; right is false"),
        (102, {"tensor": 4}, "true, but tensor 4 does not divide data.sequence_length 102; right is false"),
        (66, {"tensor": 2, "sequence": 2}, "true, but tensor 2 x sequence 2 does not divide data.sequence_length 66"),
    ],
)
def test_tokens_that_do_not_divide_over_the_tensor_ranks_are_refused(length, degrees, expected):
    with pytest.raises(UserError, match=expected) as caught:
        make_plan(JOB._replace(sequence_length=length, tensor_sequence=True), 24, **degrees)
    assert caught.value.where == "parallel.tensor_sequence"


def test_a_search_divides_tokens_wherever_there_are_tensor_ranks():
    plans = list(legal_plans(JOB._replace(tensor_sequence=True), 4))
    assert {(plan.tensor, plan.tensor_sequence) for plan in plans if plan.pipeline == 1} == {
        (1, False),
        (2, True),
        (4, True),
    }
    assert not any(plan.tensor_sequence for plan in plans if plan.pipeline > 1)


def test_a_batch_that_does_not_divide_is_refused_at_every_stage_of_the_ramp():
    batch = BatchSection(global_size=48, ramp=(RampStage(until_step=10, global_size=20),))
    with pytest.raises(
        UserError, match="in the ramp until step 10: 20 samples do not divide over 3 data ranks"
    ) as caught:
        make_plan(JOB._replace(batch=batch), 12, tensor=4)
    assert caught.value.where == "batch.ramp[0].global_size"
    sizes = {plan.micro_size for plan in legal_plans(JOB._replace(batch=batch), 4) if plan.data == 4}
    assert sizes == {1}  # the most that divides both 48 / 4 and 20 / 4


@pytest.mark.parametrize("job", [JOB._replace(model=None), JOB._replace(axes=())])
def test_a_model_that_is_not_divided_has_a_data_axis_alone(job):
    assert {plan.data for plan in legal_plans(job, 8)} == {8}
    message = r"parallel\.tensor: 2, but this recipe's model is not divided along this axis; right is 1"
    with pytest.raises(UserError, match=message):
        make_plan(job, 8, tensor=2)


def is_legal(model, world_size, data, tensor, pipeline, sequence, stage):
    """Say the rules once more, in one expression."""
    key_value_heads = getattr(model, "key_value_heads", model.num_heads)
    rows = 1024  # 1000, padded to a multiple of 64
    return (
        data * tensor * pipeline * sequence == world_size
        and all(size % tensor == 0 for size in (model.num_heads, key_value_heads, model.inner_size, rows))
        and model.num_layers % pipeline == 0
        and 128 % sequence == 0
        and key_value_heads % (tensor * sequence) == 0
        and model.num_heads % (tensor * sequence) == 0
        and (pipeline == 1 or (stage == 1 and sequence == 1))
        and 48 % data == 0
    )


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 48),
    st.sampled_from([LLAMA, EncoderSection(num_layers=12, hidden_size=64, num_heads=16)]),
)
def test_the_legal_plans_are_all_that_the_rules_allow(world_size, model):
    found = list(legal_plans(JOB._replace(model=model), world_size))
    degrees = {(plan.data, plan.tensor, plan.pipeline, plan.sequence, plan.zero_stage) for plan in found}
    sizes = divisors(world_size)
    every = {place for place in product(sizes, sizes, sizes, sizes, range(4)) if is_legal(model, world_size, *place)}
    assert degrees == every
    assert len(set(found)) == len(found)
    for plan in found:
        assert plan.global_size == 48
        assert not any(broken_rules(plan, JOB._replace(model=model), world_size))


@settings(max_examples=30, deadline=None)
@given(PLANS, st.integers(0, 3))
def test_the_nearest_legal_plan_is_legal_and_none_is_nearer(plan, stage):
    plan = replace(plan, zero_stage=stage)
    first, second = nearest_legal(plan, JOB, 24)
    every = list(legal_plans(JOB, 24))
    assert {first, second} < set(every)
    assert distance(plan, first) == min(distance(plan, legal) for legal in every)
    assert nearest_legal(first, JOB, 24)[0] == first
