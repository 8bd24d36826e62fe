"""Ranks that die, stop or hang: the others end in time, and failure.json names the one that it was."""

import json
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import pytest

from bigbatch.recipes.core import heartbeat, watchdog
from bigbatch.recipes.core.config import WatchdogSection
from bigbatch.recipes.core.heartbeat import Heartbeat

LIMIT_SECONDS = 5.0  # of the program
CULPRIT = 1
BAD_STEP = 3


class Case(NamedTuple):
    """What a case of lost_ranks.py left behind."""

    folder: Path
    statuses: list[int]
    seconds: float
    failure: dict[str, Any]


@pytest.fixture(scope="session")
def lost_ranks(run_program, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lost_ranks")
    run_program("lost_ranks.py", out)
    return out


@pytest.fixture(scope="session")
def case(lost_ranks):
    def read(name: str) -> Case:
        folder = lost_ranks / name
        result = json.loads((lost_ranks / f"{name}.json").read_text())
        failure = folder / "failure.json"
        return Case(folder, **result, failure=json.loads(failure.read_text()) if failure.exists() else {})

    return read


def stacks(folder: Path) -> dict[int, str]:
    """Return what each rank put down of its threads."""
    files = (folder / "log").glob("stacks_rank*.txt")
    return {int(file.stem.removeprefix("stacks_rank")): file.read_text() for file in files}


def pid_of(folder: Path, rank: int) -> int:
    return json.loads((folder / "log" / f"heartbeat_rank{rank}.json").read_text())["pid"]


@pytest.mark.parametrize("name", ["killed", "killed_unnoticed", "killed_elsewhere", "killed_elsewhere_unnoticed"])
def test_a_killed_rank_ends_the_others_and_is_named_by_them(case, name):
    folder, statuses, seconds, failure = case(name)
    assert statuses == [1, -9, 1]
    assert seconds < 40  # 60 is the promise, and most of it is the stand-in's own waiting
    assert (failure["rank"], failure["phase"], failure["pid"]) == (CULPRIT, "step", pid_of(folder, CULPRIT))
    assert failure["host"] == (f"host{CULPRIT}" if "elsewhere" in name else socket.gethostname())
    assert failure["step"] in (BAD_STEP, BAD_STEP + 1)  # those who wait in the next step cannot know better
    assert failure["noticed_by"] != CULPRIT
    assert f"bigbatch train {folder}" in failure["what_to_do"]
    assert "dmesg" in failure["what_to_do"]
    assert ("echo" in failure) == ("unnoticed" not in name)


def test_a_broken_connection_is_the_echo_in_the_dead_ranks_digest_and_not_the_cause(case):
    failure = case("killed").failure
    assert failure["exception"] == heartbeat.GONE
    assert "connection" in failure["echo"]["exception"].lower()
    assert failure["echo"]["rank"] == failure["noticed_by"]


def test_a_rank_killed_within_a_training_step_is_named_with_it_and_the_next_start_goes_on(lost_ranks):
    assert json.loads((lost_ranks / "trained.json").read_text()) == [[0], [1, -9], [0, 0]]
    failure = json.loads((lost_ranks / "trained" / "first_failure.json").read_text())
    assert (failure["rank"], failure["phase"], failure["step"]) == (CULPRIT, "step", BAD_STEP)
    assert not (lost_ranks / "trained" / "failure.json").exists()  # and a launch before the last does not haunt it
    assert stacks(lost_ranks / "trained") == {}


def test_an_ordinary_failure_stays_the_cause_though_the_others_lose_their_connections(case):
    _, statuses, _, failure = case("raising")
    assert statuses == [1, 1, 1]
    assert (failure["rank"], failure["exception"]) == (CULPRIT, "ValueError: the cause")


def test_a_rank_that_hangs_in_its_data_is_behind_and_all_stacks_are_written_down(case):
    folder, statuses, seconds, failure = case("sleeping")
    assert statuses == [1, 1, 1]
    assert LIMIT_SECONDS < seconds < LIMIT_SECONDS + 20
    assert (failure["rank"], failure["phase"], failure["step"]) == (CULPRIT, "step", BAD_STEP)
    assert failure["exception"].startswith("no progress for 5 s (watchdog.limit_seconds): rank 1 is behind the others")
    assert failure["exception"].endswith("read_from_a_dead_disk")
    assert [rank["in_collective"] for rank in failure["ranks"]] == [True, False, True]
    counts = [rank["collectives"] for rank in failure["ranks"]]
    assert counts[0] == counts[2] == counts[1] + 1
    assert "read_from_a_dead_disk" in failure["ranks"][CULPRIT]["stack"][0]
    written = stacks(folder)
    assert "read_from_a_dead_disk" in written[CULPRIT]
    assert all("in barrier" in written[rank] for rank in (0, 2))


def test_a_stopped_rank_is_named_though_it_cannot_speak_and_speaks_when_it_wakes(case):
    folder, statuses, _, failure = case("stopped")
    assert statuses == [1, 1, 1]
    assert (failure["rank"], failure["ranks"][CULPRIT]["state"]) == (CULPRIT, "silent")
    assert "does not answer" in failure["exception"]
    assert failure["pid"] == pid_of(folder, CULPRIT)
    assert "in stopped" in stacks(folder)[CULPRIT]


def test_a_call_that_keeps_the_interpreter_from_the_watchdog_is_ended_from_below(case):
    folder, statuses, seconds, failure = case("hogging")
    assert statuses == [1, 1]
    assert seconds < LIMIT_SECONDS + 25
    assert (failure["rank"], failure["ranks"][CULPRIT]["state"]) == (CULPRIT, "silent")
    assert "in hogging" in stacks(folder)[CULPRIT]


def test_ranks_that_all_hang_alike_accuse_none(case):
    _, statuses, _, failure = case("waiting")
    assert statuses == [1, 1]
    assert "no rank is behind; rank 0 is in" in failure["exception"]
    assert failure["exception"].endswith("waiting")


@pytest.mark.parametrize("name", ["slow", "suspended"])
def test_signs_of_life_and_a_suspended_job_do_not_end_a_run(case, name):
    folder, statuses, seconds, failure = case(name)
    assert (statuses, failure, stacks(folder)) == ([0, 0], {}, {})
    assert seconds > LIMIT_SECONDS + 1


def beat(rank: int, **changes: Any) -> Heartbeat:
    hung = Heartbeat(heartbeat.launch_id(), rank, "h", 100 + rank, 1.0, 9, "step", 7, 60.0, "hung", 40, True, ["a:1 f"])
    return hung._replace(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "silent", "step": 2},
        {"state": "silent", "step": 8},
        {"step": 6},
        {"in_collective": False},
        {"in_collective": False, "collectives": 41},  # its pipeline stage has others
        {"collectives": 39},  # where no wait is seen, as of a kernel on a GPU
    ],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_the_rank_that_the_others_wait_for_is_the_one_behind(tmp_path, rank, changes):
    ranks = [beat(number, **(changes if number == rank else {})) for number in range(3)]
    digest = watchdog.hang_digest(tmp_path, ranks, 60.0)
    assert (digest["rank"], digest["pid"]) == (rank, 100 + rank)
    assert "is behind the others" in digest["exception"]


def test_ranks_that_all_wait_in_the_same_collective_accuse_none(tmp_path):
    digest = watchdog.hang_digest(tmp_path, [beat(0), beat(1)], 60.0)
    assert digest["exception"].endswith("no rank is behind; all wait in a collective")


def test_a_rank_alone_says_where_it_hangs(tmp_path):
    assert watchdog.hang_digest(tmp_path, [beat(0)], 60.0)["exception"].endswith("it is in a:1 f")


def test_the_heartbeat_of_another_launch_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("MASTER_PORT", "1")
    assert heartbeat.write_heartbeat(tmp_path, beat(0))
    assert heartbeat.read_heartbeat(tmp_path, 0) == beat(0)
    monkeypatch.setenv("MASTER_PORT", "2")
    assert heartbeat.read_heartbeat(tmp_path, 0) is None
    heartbeat.heartbeat_path(tmp_path, 0).write_text("")  # its writer is just at it
    assert heartbeat.read_heartbeat(tmp_path, 0) is None


def test_a_full_disk_takes_no_heartbeat_and_ends_no_run(tmp_path):
    (tmp_path / "log").mkdir()
    heartbeat.heartbeat_path(tmp_path, 0).symlink_to("/dev/full")
    assert not heartbeat.write_heartbeat(tmp_path, beat(0))


def test_a_process_of_another_user_is_not_gone(monkeypatch):
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    here = beat(0, state="running", host=socket.gethostname(), pid=os.getpid())
    assert not heartbeat.is_gone(here)
    assert heartbeat.is_gone(here._replace(pid=2**22 + 1))  # above the kernel's largest process id
    assert not heartbeat.is_gone(here._replace(pid=2**22 + 1, state="failed"))
    assert not heartbeat.is_gone(here._replace(pid=2**22 + 1, host="elsewhere"))
    monkeypatch.setattr(os, "kill", refuse)
    assert not heartbeat.is_gone(here)


def test_the_limit_is_half_an_hour_any_positive_time_or_none():
    assert WatchdogSection().limit_seconds == 1800
    assert WatchdogSection(limit_seconds=None).limit_seconds is None
    for wrong in (0, -1, "60"):
        with pytest.raises(pydantic.ValidationError):
            WatchdogSection.model_validate({"limit_seconds": wrong})


def test_a_heartbeat_is_whole_at_every_moment_and_a_shorter_one_leaves_nothing_of_a_longer(tmp_path):
    (tmp_path / "log").mkdir()
    for changes in ({}, {"step": 10**9}, {"stack": ["f" * 5000]}, {"state": "failed"}):
        assert heartbeat.write_heartbeat(tmp_path, beat(0, **changes))
        assert heartbeat.read_heartbeat(tmp_path, 0) == beat(0, **changes)
        if "stack" not in changes:
            assert heartbeat.heartbeat_path(tmp_path, 0).stat().st_size == heartbeat.USUAL_BYTES + 1
