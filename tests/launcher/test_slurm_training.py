"""Training on a real cluster of four nodes: to the end in spite of a time limit, a preemption and a lost node.

Each run is the same, and ends in the same bytes as the one that nothing befell.
"""

import contextlib
import io
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bigbatch.launcher import cli, jobs
from bigbatch.launcher.job import read_events
from bigbatch.launcher.node_memory import bad_nodes

pytestmark = pytest.mark.slurm

STEPS, SAVED_EVERY = 40, 10
RUN = {
    "version": 1,
    "recipe": "gpt",
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32},
    "data": {"train": ["text.txt"], "tokenizer": {"kind": "character"}, "sequence_length": 32},
    # A step of many small passes: long enough to be interrupted, short enough to wait for.
    "batch": {"global_size": 32, "micro_size": 1},
    "precision": {"dtype": "fp32"},
    "optimizer": {"name": "adamw", "learning_rate": 3e-3},
    "schedule": {"total_steps": STEPS, "warmup_steps": 3},
    "checkpoint": {"every_steps": SAVED_EVERY},
    "report": {"every_steps": 1, "tensorboard": False},
    "sample": {"prompts": []},
}
LOSSES = ("loss", "grad_norm", "consumed_samples")


class Training(NamedTuple):
    """A submitted training."""

    slurm: Any
    job_id: str
    run_dir: Path

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines about steps, in the order written."""
        path = self.run_dir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"]
        return [line for line in lines if line["kind"] == "train"]

    def step(self) -> int:
        return max((line["step"] for line in self.lines()), default=0) if self._has("metrics.jsonl") else 0

    def _has(self, name: str) -> bool:
        return (self.run_dir / name).exists()

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir) if event["event"] == "start"]

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.run_dir / "log").glob("slurm-*.out"))

    def wait_for_step(self, step: int) -> None:
        self.slurm.wait_for(lambda: self.step() >= step, f"step {step}", seconds=600)

    def wait_for_end(self) -> None:
        def has_ended() -> bool:
            return self.slurm.state(self.job_id) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        self.slurm.wait_for(has_ended, f"the end of {self.run_dir.name}", seconds=600)
        told = self.log() + "".join(path.read_text() for path in (self.run_dir / "log").glob("rank*.txt"))
        assert self.slurm.state(self.job_id) == "COMPLETED", told
        assert jobs.status([self.run_dir])[0].state == "completed"

    def outcome(self) -> tuple[list[Any], dict[str, Any]]:
        """Return what each step said, the last time that it was done, and what the last checkpoint holds."""
        steps = {line["step"]: [line[name] for name in LOSSES] for line in self.lines()}
        manifest = json.loads((self.run_dir / "checkpoints" / f"step_{STEPS:08}" / "manifest.json").read_text())
        return list(steps.items()), {name: manifest[name] for name in ("files", "order_hash")}


@pytest.fixture(scope="module")
def train(slurm, tmp_path_factory) -> Iterator[Callable[..., Training]]:
    """Give a function that submits the run on two nodes."""
    folder = tmp_path_factory.mktemp("trainings")
    words = random.Random(0)
    lines = [" ".join(words.choice(["the", "cat", "sat", "on", "a", "mat"]) for _ in range(12)) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "run.json").write_text(json.dumps(RUN))
    shipped = json.loads((Path(jobs.__file__).parents[1] / "slurm" / "profiles" / "test.v1.json").read_text())

    def submit(name: str, *flags: str, nodes: str = "") -> Training:
        options = {"nodelist": nodes} if nodes else {}
        (folder / f"{name}_on.json").write_text(json.dumps({**shipped, "options": options}))
        command = ["submit", "run.json", "--profile", f"{name}_on.json", "--run-dir", name, *flags]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main(command) == 0
        return Training(slurm, said.getvalue().strip(), folder / name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield submit


@pytest.fixture(scope="module")
def limited(train) -> Training:
    """Start a run with two minutes to go, and have its ranks stand still until they are asked to save."""
    run = train("limited", "--time", "2", nodes="node[3-4]")
    run.wait_for_step(3)
    run.slurm.run("scancel", "--signal=STOP", run.job_id)

    def go_on_when_asked() -> None:
        run.slurm.wait_for(lambda: "saving" in run.log(), "the time to save")
        run.slurm.run("scancel", "--signal=CONT", run.job_id)

    threading.Thread(target=go_on_when_asked, daemon=True).start()
    return run


@pytest.fixture(scope="module")
def undisturbed(limited, train) -> Training:
    """Train to the end, while the other stands still."""
    run = train("undisturbed", nodes="node[1-2]")
    run.wait_for_end()
    return run


def test_two_nodes_train_to_the_end(undisturbed):
    assert [line["step"] for line in undisturbed.lines()] == list(range(1, STEPS + 1))
    beats = [json.loads((undisturbed.run_dir / "log" / f"heartbeat_rank{rank}.json").read_text()) for rank in (0, 1)]
    assert {beat["host"] for beat in beats} == {"node1", "node2"}
    assert [event["event"] for event in read_events(undisturbed.run_dir)] == ["start", "end"]
    assert undisturbed.lines()[-1]["loss"] < undisturbed.lines()[0]["loss"] / 1.2


def test_a_preempted_job_saves_comes_back_and_ends_as_if_nothing_had_been(undisturbed, train, tmp_path):
    run = train("preempted", nodes="node[1-2]")
    run.wait_for_step(12)
    script = tmp_path / "urgent"
    script.write_text("#!/bin/sh\nsleep 1\n")
    run.slurm.submit(script, "-p", "high", "--exclusive", "-w", "node[1-2]", "-t", "1", "-o", "/dev/null")
    run.wait_for_end()
    assert [start["restart_count"] for start in run.starts()] == [0, 1]
    assert 12 <= run.starts()[1]["step"] < STEPS
    assert [line["step"] for line in run.lines()] == list(range(1, STEPS + 1))
    assert run.outcome() == undisturbed.outcome()


def test_a_node_that_loses_power_is_left_behind_and_the_run_ends_as_if_nothing_had_been(undisturbed, train):
    run = train("crashed")
    run.wait_for_step(SAVED_EVERY + 2)
    lost = run.starts()[0]["nodes"][1]
    run.slurm.power_off(lost)
    try:
        run.wait_for_end()
    finally:
        run.slurm.power_on(lost)
    first, second = run.starts()[0], run.starts()[-1]
    assert lost in first["nodes"]
    assert lost not in second["nodes"]
    assert lost in bad_nodes(run.run_dir)
    assert first["job_id"] == second["job_id"]
    assert second["step"] >= SAVED_EVERY
    done = [line["step"] for line in run.lines()]
    assert sorted(set(done)) == list(range(1, STEPS + 1))
    assert done.count(second["step"]) == 1  # what was saved is not done again
    assert run.outcome() == undisturbed.outcome()


def test_a_job_out_of_time_saves_comes_back_and_ends_as_if_nothing_had_been(undisturbed, limited):
    limited.wait_for_end()
    starts = limited.starts()
    # Two minutes may be over before a busy host has started the ranks; such a start is repeated with its number.
    restarts = sorted({start["restart_count"] for start in starts})
    assert restarts == list(range(len(restarts)))
    assert len(restarts) > 1
    assert 3 <= starts[1]["step"] < STEPS  # saved where it was, not at the tenth step
    assert [line["step"] for line in limited.lines()] == list(range(1, STEPS + 1))  # none twice
    assert limited.outcome() == undisturbed.outcome()
