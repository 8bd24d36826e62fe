"""Learning-rate factors against closed formulas written here, and the properties that every schedule has."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.recipes.core.config import ScheduleSection
from bigbatch.recipes.core.schedule import learning_rate_factor

NAMES = ("cosine", "linear", "constant", "wsd", "polynomial")


def factors(**settings) -> list[float]:
    schedule = ScheduleSection(**settings)
    return [learning_rate_factor(schedule, step) for step in range(schedule.total_steps)]


@st.composite
def schedules(draw) -> dict:
    total = draw(st.integers(3, 200))
    warmup = draw(st.integers(0, total - 2))
    decay = draw(st.none() | st.integers(1, total - warmup - 1))
    return {
        "name": draw(st.sampled_from(NAMES)),
        "total_steps": total,
        "warmup_steps": warmup,
        "final_ratio": draw(st.floats(0, 1)),
        "power": draw(st.floats(0.25, 4)),
        "decay_steps": decay,
    }


@given(schedules())
def test_every_schedule_rises_evenly_to_its_peak_and_never_rises_again(settings):
    found, warmup = factors(**settings), settings["warmup_steps"]
    for step in range(warmup):
        assert found[step] == pytest.approx((step + 1) / (warmup + 1))
    assert found[warmup] == pytest.approx(1.0)
    assert all(after <= before + 1e-12 for before, after in zip(found[warmup:], found[warmup + 1 :], strict=False))
    assert all(0 <= factor <= 1 + 1e-12 for factor in found)


@given(schedules())
def test_every_schedule_ends_at_its_final_ratio_and_stays_there(settings):
    end = 1.0 if settings["name"] == "constant" else settings["final_ratio"]
    assert factors(**settings)[-1] == pytest.approx(end, abs=1e-12)
    past_the_end = learning_rate_factor(ScheduleSection(**settings), settings["total_steps"] + 7)
    assert past_the_end == pytest.approx(end, abs=1e-12)


def test_cosine_follows_its_formula():
    found = factors(name="cosine", total_steps=101, warmup_steps=0, final_ratio=0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)]
    assert found == pytest.approx(expected)
    assert found[50] == pytest.approx(0.6)


def test_linear_falls_by_the_same_at_each_step():
    found = factors(name="linear", total_steps=25, warmup_steps=4, final_ratio=0.5)
    assert found[4:] == pytest.approx([1 - 0.5 * step / 20 for step in range(21)])


def test_polynomial_is_linear_at_power_one_and_its_square_at_two():
    linear = factors(name="linear", total_steps=30, warmup_steps=3, final_ratio=0.0)
    assert factors(name="polynomial", total_steps=30, warmup_steps=3, final_ratio=0.0) == pytest.approx(linear)
    squared = factors(name="polynomial", total_steps=30, warmup_steps=3, final_ratio=0.0, power=2.0)
    assert squared[3:] == pytest.approx([factor**2 for factor in linear[3:]])


def test_constant_stays_at_the_peak():
    assert set(factors(name="constant", total_steps=9, warmup_steps=0, final_ratio=0.1)) == {1.0}


def test_wsd_stays_at_the_peak_and_falls_evenly_in_its_last_steps():
    found = factors(name="wsd", total_steps=50, warmup_steps=5, final_ratio=0.0, decay_steps=10)
    assert found[5:40] == [1.0] * 35
    assert found[40:] == pytest.approx([1 - (step + 1) / 10 for step in range(10)])


def test_wsd_decays_over_a_tenth_by_default_but_never_into_its_warm_up():
    found = factors(name="wsd", total_steps=50, warmup_steps=5, final_ratio=0.0)
    assert found[44] == 1.0
    assert found[45:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    late = factors(name="wsd", total_steps=100, warmup_steps=96, final_ratio=0.0)
    assert late[96:] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


def test_a_run_of_one_step_takes_it_at_the_peak():
    assert factors(name="cosine", total_steps=1) == [1.0]
