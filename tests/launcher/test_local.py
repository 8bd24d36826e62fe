"""Processes on one host: started, signalled, ended together. Small real processes stand in for training."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bigbatch.launcher.local import StopSignals, run_ranks
from bigbatch.recipes.core.errors import EXIT_REQUEUE, EXIT_USER_ERROR


def program(body: str) -> list[str]:
    """Return the command of a small program that knows its rank."""
    head = "import os, signal, sys, time, pathlib\nrank = int(os.environ['RANK'])\n"
    return [sys.executable, "-c", head + textwrap.dedent(body)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def launcher(body: str, run_dir: Path, ranks: int = 2, grace_seconds: float = 20.0) -> subprocess.Popen:
    """Start the launcher itself as a process, so that it can be signalled."""
    code = (
        "import sys, json, pathlib\nfrom bigbatch.launcher.local import run_ranks\n"
        "sys.exit(run_ranks(json.loads(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]),"
        " grace_seconds=float(sys.argv[4])))"
    )
    command = [sys.executable, "-c", code, json.dumps(program(body)), str(ranks), str(run_dir), str(grace_seconds)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


# Each rank leaves its process id behind once it is ready for signals.
READY = "pathlib.Path(os.environ['PIDS'], str(rank)).write_text(str(os.getpid()))"


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "pids"
    folder.mkdir()
    monkeypatch.setenv("PIDS", str(folder))
    return folder


def ready(pids: Path, ranks: int = 2) -> list[int]:
    wait_for(lambda: sum(1 for file in pids.iterdir() if file.read_text()) == ranks)
    return [int(file.read_text()) for file in pids.iterdir()]


def test_every_rank_finds_its_place_and_its_peers_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT BIGBATCH_PARENT_PID"
    body = f"""
        import json
        names = "{names} OMP_NUM_THREADS".split()
        pathlib.Path({str(tmp_path)!r}, f"{{rank}}.json").write_text(json.dumps({{n: os.environ[n] for n in names}}))
    """
    assert run_ranks(program(body), 2, tmp_path) == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    port = int(first.pop("MASTER_PORT"))
    assert 1024 <= port < 65536
    assert first == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "BIGBATCH_PARENT_PID": str(os.getpid()),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
    }
    assert (second["RANK"], second["LOCAL_RANK"], second["MASTER_PORT"]) == ("1", "1", str(port))


def test_the_users_own_thread_count_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_ranks(program("sys.exit(os.environ['OMP_NUM_THREADS'] != '7')"), 1, tmp_path) == 0


def test_rank_0_writes_to_the_terminal_and_the_others_to_their_logs(tmp_path, capfd):
    assert run_ranks(program("print('here is', rank); print('progress', rank, file=sys.stderr)"), 2, tmp_path) == 0
    output = capfd.readouterr()
    assert (output.out, output.err) == ("here is 0\n", "progress 0\n")
    assert sorted((tmp_path / "log" / "rank1.txt").read_text().splitlines()) == ["here is 1", "progress 1"]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), EXIT_REQUEUE),
        ((0, 75), EXIT_REQUEUE),
        ((2, 2), EXIT_USER_ERROR),
        ((2, 0), EXIT_USER_ERROR),
        ((3, 0), 1),
        ((75, 3), 1),
    ],
)
def test_the_exit_status_for_all_follows_from_that_of_each(tmp_path, statuses, expected):
    assert run_ranks(program(f"sys.exit({statuses}[rank])"), 2, tmp_path) == expected


def test_a_failed_rank_ends_the_others_and_is_told_with_the_end_of_its_log(tmp_path, pids, capfd):
    body = f"""
        if rank == 1:
            print("the last words")
            while not pathlib.Path(os.environ['PIDS'], '0').exists(): time.sleep(0.01)
            sys.exit(7)
        {READY}
        time.sleep(60)
    """
    began = time.monotonic()
    assert run_ranks(program(body), 2, tmp_path) == 1
    assert time.monotonic() - began < 15  # SIGTERM was enough
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["exit_status"], failure["signal"]) == (1, 7, None)
    assert failure["log_tail"] == ["the last words"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: rank 1 on ")
    assert "exit status 7" in lines[0]


def test_a_rank_that_hangs_after_anothers_failure_is_killed_when_the_grace_is_over(tmp_path, pids):
    body = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        {READY}
        if rank == 1:
            while not pathlib.Path(os.environ['PIDS'], '0').exists(): time.sleep(0.01)
            sys.exit(1)
        time.sleep(60)
    """
    began = time.monotonic()
    assert run_ranks(program(body), 2, tmp_path, grace_seconds=0.5) == 1
    assert 0.5 < time.monotonic() - began < 15
    assert not any(map(is_alive, ready(pids)))


def test_a_stopped_rank_does_not_outlive_anothers_failure(tmp_path, pids):
    body = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        {READY}
        if rank == 1:
            while not pathlib.Path(os.environ['PIDS'], '0').exists(): time.sleep(0.01)
            time.sleep(0.2)
            sys.exit(1)
        while True: os.kill(os.getpid(), signal.SIGSTOP)
    """
    assert run_ranks(program(body), 2, tmp_path, grace_seconds=0.5) == 1
    assert not any(map(is_alive, ready(pids)))


def test_a_stopped_rank_is_woken_to_say_where_it_was(tmp_path, pids):
    body = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        {READY}
        if rank == 1:
            while not pathlib.Path(os.environ['PIDS'], '0').exists(): time.sleep(0.01)
            time.sleep(0.2)
            sys.exit(1)
        os.kill(os.getpid(), signal.SIGSTOP)
        pathlib.Path({str(tmp_path)!r}, "woken").touch()
    """
    began = time.monotonic()
    assert run_ranks(program(body), 2, tmp_path) == 1
    assert time.monotonic() - began < 15
    assert (tmp_path / "woken").exists()


def test_a_rank_killed_from_outside_gets_a_hint_at_memory(tmp_path, capfd):
    beat = '{"pid": %d, "phase": "step", "step": 41}'
    body = f"""
        pathlib.Path({str(tmp_path)!r}, "log", "heartbeat_rank0.json").write_text({beat!r} % os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_ranks(program(body), 1, tmp_path) == 1
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["signal"], failure["exit_status"]) == ("SIGKILL", None)
    assert (failure["phase"], failure["step"]) == ("step", 41)
    assert not is_alive(failure["pid"])
    assert "memory" in failure["what_to_do"]
    assert f"bigbatch train {tmp_path}" in failure["what_to_do"]
    assert "SIGKILL" in capfd.readouterr().err


def test_the_digest_that_a_rank_wrote_itself_is_kept_and_told(tmp_path, capfd):
    body = f"""
        digest = '{{"rank": 0, "host": "here", "exception": "ValueError: bad", "what_to_do": "mend it"}}'
        pathlib.Path({str(tmp_path)!r}, "failure.json").write_text(digest)
        sys.exit(1)
    """
    assert run_ranks(program(body), 1, tmp_path) == 1
    assert json.loads((tmp_path / "failure.json").read_text())["exception"] == "ValueError: bad"
    assert "rank 0 on here failed: ValueError: bad; mend it" in capfd.readouterr().err


def test_a_killed_rank_is_the_cause_though_another_told_of_its_broken_connection(tmp_path, capfd):
    body = f"""
        if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(0.5)
        digest = '{{"rank": 0, "host": "here", "step": 8, "exception": "closed by peer", "what_to_do": "look there"}}'
        pathlib.Path({str(tmp_path)!r}, "failure.json").write_text(digest)
        sys.exit(1)
    """
    assert run_ranks(program(body), 2, tmp_path) == 1
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["signal"], failure["step"]) == (1, "SIGKILL", 8)
    assert failure["echo"]["exception"] == "closed by peer"
    assert capfd.readouterr().err.startswith("error: rank 1 on ")


def test_what_a_peer_told_of_a_killed_rank_is_completed_by_its_signal_and_last_words(tmp_path, capfd):
    body = f"""
        if rank == 1:
            print("the last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(0.5)
        digest = '{{"rank": 1, "noticed_by": 0, "phase": "step", "step": 8, "exception": "?", "echo": {{"rank": 0}}}}'
        pathlib.Path({str(tmp_path)!r}, "failure.json").write_text(digest)
        sys.exit(1)
    """
    assert run_ranks(program(body), 2, tmp_path) == 1
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["signal"], failure["phase"], failure["step"]) == (1, "SIGKILL", "step", 8)
    assert (failure["log_tail"], failure["echo"]) == (["the last words"], {"rank": 0})
    assert "rank 1 on " in capfd.readouterr().err


def test_a_rank_that_was_ended_from_below_python_points_at_its_stacks(tmp_path, capfd):
    body = f"""
        pathlib.Path({str(tmp_path)!r}, "log", "stacks_rank0.txt").write_text("Timeout")
        sys.exit(1)
    """
    assert run_ranks(program(body), 1, tmp_path) == 1
    assert "it stood still: log/stacks_rank0.txt shows where" in capfd.readouterr().err


def test_the_digest_of_an_earlier_failure_does_not_outlive_a_good_run(tmp_path):
    run_ranks(program("sys.exit(1)"), 1, tmp_path)
    assert (tmp_path / "failure.json").exists()
    assert run_ranks(program(""), 1, tmp_path) == 0
    assert not (tmp_path / "failure.json").exists()


def test_a_users_mistake_found_by_another_rank_reaches_the_terminal(tmp_path, capfd):
    body = """
        if rank == 1:
            print("error: data.train: no such file", file=sys.stderr)
            sys.exit(2)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(0.5)
        digest = '{"rank": 0, "host": "here", "exception": "closed by peer", "what_to_do": "look there"}'
        pathlib.Path(RUN_DIR, "failure.json").write_text(digest)
        sys.exit(1)
    """.replace("RUN_DIR", repr(str(tmp_path)))
    assert run_ranks(program(body), 2, tmp_path) == EXIT_USER_ERROR
    assert capfd.readouterr().err == "error: data.train: no such file\n"
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once_and_their_saving_is_waited_for(tmp_path, pids, number):
    body = f"""
        received = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: received.append(number))
        {READY}
        while not received: time.sleep(0.01)
        time.sleep(0.3)
        pathlib.Path({str(tmp_path)!r}, f"saved{{rank}}").write_text(str(list(map(int, received))))
        sys.exit(75)
    """
    process = launcher(body, tmp_path)
    ready(pids)
    process.send_signal(number)
    process.send_signal(number if number != signal.SIGINT else signal.SIGCONT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == EXIT_REQUEUE
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [str([int(number)])] * 2
    assert number.name in error


def test_a_closed_terminal_saves_as_a_termination_does_unless_the_user_has_said_nohup(tmp_path, pids):
    body = f"""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
        {READY}
        time.sleep(60)
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # inherited by what starts now, whatever the tests run under
    try:
        process = launcher(body, tmp_path)
        ready(pids)
        process.send_signal(signal.SIGHUP)
        assert "SIGTERM" in process.communicate(timeout=20)[1]
        assert process.returncode == EXIT_REQUEUE
        for file in pids.iterdir():
            file.unlink()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        process = launcher(body, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    ready(pids)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    assert "SIGTERM" not in process.communicate(timeout=20)[1]
    assert process.returncode == EXIT_REQUEUE


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(tmp_path, pids):
    process = launcher(f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{READY}\ntime.sleep(60)", tmp_path)
    numbers = ready(pids)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert all(map(is_alive, numbers))
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert error.endswith("stopped without saving; what was saved before stays\n")
    assert not (tmp_path / "failure.json").exists()
    assert not any(map(is_alive, numbers))


def test_a_signal_during_one_command_keeps_the_next_from_starting(tmp_path):
    ends_well = f"os.kill(int(os.environ['BIGBATCH_PARENT_PID']), {int(signal.SIGINT)}); time.sleep(0.3)"
    leaves_a_mark = f"pathlib.Path({str(tmp_path)!r}, 'started').touch()"
    with StopSignals() as signals:
        ignoring = f"signal.signal(signal.SIGINT, signal.SIG_IGN); {ends_well}"
        assert run_ranks(program(ignoring), 1, tmp_path, signals=signals) == 0
        assert run_ranks(program(leaves_a_mark), 2, tmp_path, signals=signals) == EXIT_REQUEUE
    assert not (tmp_path / "started").exists()


def test_a_rank_that_waits_for_one_that_a_signal_ended_before_it_joined_is_not_waited_for(tmp_path, pids):
    body = f"""
        if rank == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
        {READY}
        time.sleep(60)
    """
    process = launcher(body, tmp_path, grace_seconds=0.5)
    numbers = ready(pids)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert error.endswith("stopped without saving; what was saved before stays\n")
    assert not any(map(is_alive, numbers))


def test_a_rank_that_ends_by_the_passed_on_signal_may_start_again(tmp_path, pids):
    process = launcher(f"{READY}\ntime.sleep(60)", tmp_path)
    ready(pids)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == EXIT_REQUEUE
    assert "Traceback" not in error
    assert not (tmp_path / "failure.json").exists()


def test_a_killed_rank_leaves_no_child_of_its_own_behind(tmp_path, pids):
    body = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path(os.environ['PIDS'], 'child').write_text(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 1: sys.exit(1)
        time.sleep(60)
    """
    assert run_ranks(program(body.replace("'child'", "f'child{rank}'")), 2, tmp_path, grace_seconds=0.2) == 1
    survivors = [int(file.read_text()) for file in pids.iterdir()]
    wait_for(lambda: not any(map(is_alive, survivors)), seconds=5)
