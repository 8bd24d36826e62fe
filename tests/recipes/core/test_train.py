"""The loop, through the worker and the GPT recipe: stopped, resumed, moved to other ranks, refused, diverging."""

import json
import re

import numpy as np
import pytest
import torch

from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir, committed, step_of
from bigbatch.recipes.core.data.sampler import chain_hash, sample_order
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR

STEPS, GLOBAL_SIZE = 10, 8


@pytest.fixture(scope="module")
def cases(run_program, tmp_path_factory):
    """Play all cases once; give a function from a case to (run folder, its starts)."""
    out = tmp_path_factory.mktemp("train_cases")
    run_program("train_cases.py", out)
    results = json.loads((out / "result.json").read_text())
    return lambda case: (out / case, results[case])


def train_rows(run_dir) -> dict[int, dict]:
    """Return what was reported of each step, without times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "learning_rate", "num_targets", "consumed_samples")
    return {row["step"]: {key: row[key] for key in keys} for row in rows if row["kind"] == "train"}


def same_tensors(run_dir, other) -> bool:
    readers = [Reader(checkpoint_dir(folder, STEPS)) for folder in (run_dir, other)]
    return all(
        torch.equal(readers[0].read(name, kind), readers[1].read(name, kind))
        for name in readers[1].tensors
        for kind in readers[1].kinds()
    )


def manifest(run_dir, step=STEPS) -> dict:
    return Reader(checkpoint_dir(run_dir, step)).manifest


def saved_steps(run_dir) -> list[int]:
    return sorted(step_of(folder) for folder in committed(run_dir))


def test_a_run_saves_and_evaluates_when_due_and_learns(cases):
    run_dir, (_, trained) = cases("whole_1")
    assert trained["statuses"] == [EXIT_DONE]
    assert saved_steps(run_dir) == [3, 6, 9, 10]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [5, 10]
    losses = [row["loss"] for row in train_rows(run_dir).values()]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3


def events(run_dir, kind) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "event" and row["event"] == kind]


def test_saves_that_are_waited_for_and_saves_behind_the_steps_leave_the_same(cases):
    (behind, _), (waited_for, _) = cases("whole_2"), cases("waited_for")
    assert train_rows(behind) == train_rows(waited_for)
    assert same_tensors(behind, waited_for)
    for run_dir in (behind, waited_for):
        saved = events(run_dir, "saved")
        assert [(row["step"], row["message"]) for row in saved] == [(n, f"step_{n:08d}") for n in (3, 6, 9, 10)]
        assert all(0 < row["seconds"] <= row["whole_seconds"] for row in saved)
    assert all(row["seconds"] == row["whole_seconds"] for row in events(waited_for, "saved"))
    assert any(row["seconds"] < row["whole_seconds"] for row in events(behind, "saved"))


def test_a_save_that_fails_behind_ends_the_run_at_a_later_step_on_every_rank(cases):
    run_dir, (blocked,) = cases("blocked")
    assert blocked["statuses"] == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    for printed in blocked["printed"]:
        assert "step_00000006: the checkpoint could not be written (Not a directory); the earlier ones" in printed
        assert "Traceback" not in printed
    assert saved_steps(run_dir) == [3]
    assert events(run_dir, "failed")[0]["message"].startswith("UserError: ")


def test_sigterm_to_one_rank_saves_on_all_and_asks_to_be_queued_again(cases):
    run_dir, (stopped, _) = cases("stopped_2")
    assert stopped["statuses"] == [EXIT_REQUEUE, EXIT_REQUEUE]
    step = int(
        re.search(
            r"step (\d+)\s+stopped: by a signal to another rank; everything is saved", "".join(stopped["printed"])
        )[1]
    )
    assert 2 <= step < STEPS
    assert step in saved_steps(run_dir)


def test_the_resumed_run_is_the_uninterrupted_one_number_for_number(cases):
    run_dir, (_, resumed) = cases("stopped_2")
    assert resumed["statuses"] == [EXIT_DONE, EXIT_DONE]
    step = int(re.search(r"resumed after step (\d+): samples 0\.\.(\d+) were seen", resumed["printed"][0])[1])
    assert f"samples 0..{8 * step - 1} were seen, next is {8 * step}" in resumed["printed"][0]
    whole, _ = cases("whole_2")
    assert train_rows(run_dir) == train_rows(whole)
    assert same_tensors(run_dir, whole)
    assert manifest(run_dir)["order_hash"] == manifest(whole)["order_hash"]


@pytest.mark.parametrize(("case", "start", "name"), [("moved", 0, "SIGUSR1"), ("cut_short", 1, "SIGINT")])
def test_the_other_signals_save_too(case, start, name, cases):
    _, starts = cases(case)
    assert starts[start]["statuses"] == [EXIT_REQUEUE]
    assert f"stopped: by {name}; everything is saved" in starts[start]["printed"][0]


def test_the_order_of_samples_is_the_same_for_any_ranks_and_through_a_move(cases):
    (one, _), (two, _), (moved, starts) = cases("whole_1"), cases("whole_2"), cases("moved")
    assert starts[1]["statuses"] == [EXIT_DONE, EXIT_DONE]
    hashes = {manifest(run_dir)["order_hash"] for run_dir in (one, two, moved)}
    facts = manifest(one)["facts"]
    assert facts["train_samples"] < STEPS * GLOBAL_SIZE  # into the second epoch
    order, digest = sample_order(0, facts["train_samples"], 0, STEPS * GLOBAL_SIZE), b""
    for step in range(STEPS):
        own = np.s_[step * GLOBAL_SIZE : (step + 1) * GLOBAL_SIZE]
        digest = chain_hash(digest, order.ids[own], order.epochs[own])
    assert hashes == {digest.hex()}


def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(cases):
    run_dir, (cut, _) = cases("cut_short")
    assert cut["statuses"] == [EXIT_DONE]
    assert 5 in saved_steps(run_dir)
    whole, _ = cases("whole_1")
    found, expected = train_rows(run_dir), train_rows(whole)
    assert len(found) > 5
    assert all(found[step] == expected[step] for step in found)


def test_data_that_changed_since_the_checkpoint_are_refused(cases):
    _, (_, refused) = cases("changed")
    assert refused["statuses"] == [EXIT_USER_ERROR]
    lines = [line for line in refused["printed"][0].splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.fullmatch(
        r"error: data: has changed since the checkpoint of step 10 \(fingerprint \w{12}, was \w{12}\): "
        "bring the data back, or train in a new run folder",
        lines[0],
    )
    assert "Traceback" not in refused["printed"][0]


def test_a_step_that_is_not_finite_stops_the_run_with_a_digest(cases):
    run_dir, (failed,) = cases("diverging")
    assert failed["statuses"] == [EXIT_FAILED]
    failure = json.loads((run_dir / "failure.json").read_text())
    assert (failure["rank"], failure["phase"], failure["step"]) == (0, "step", 1)
    assert failure["exception"].startswith("NonFiniteError: step 1: loss nan, gradient norm inf")
    assert "lower optimizer.learning_rate" in failure["what_to_do"]
    assert "Traceback" not in failed["printed"][0]
    assert saved_steps(run_dir) == []


def test_skipping_ends_after_the_allowed_number_in_a_row(cases):
    run_dir, (failed,) = cases("skipping")
    assert failed["statuses"] == [EXIT_FAILED, EXIT_FAILED]
    failure = json.loads((run_dir / "failure.json").read_text())
    assert failure["exception"] == (
        "NonFiniteError: step 3: 3 steps in a row were not finite (precision.max_skipped_steps)"
    )
    assert manifest(run_dir, 3)["skipped_in_a_row"] == 2


def test_evaluation_counts_each_sample_once_whatever_the_ranks(cases):
    whole, _ = cases("whole_2")
    _, starts = cases("evaluated")
    figures = [json.loads(start["printed"][0].splitlines()[-1]) for start in starts]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    reported = [row for row in rows if row["kind"] == "evaluation"][-1]
    assert [start["statuses"] for start in starts] == [[EXIT_DONE], [EXIT_DONE, EXIT_DONE]]
    assert figures[0]["num_targets"] == figures[1]["num_targets"]
    assert figures[0]["num_targets"] % (2 * 2 * 16) != 0  # the last round is not full on two ranks
    for key in ("loss", "perplexity", "bits_per_token"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=1e-6)
        assert figures[0][key] == pytest.approx(reported[key], rel=1e-6)
    assert figures[0]["step"] == STEPS
