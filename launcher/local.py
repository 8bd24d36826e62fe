"""One process or several on this host: start them, pass signals on, end them together, keep their exit status."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR, one_line
from bigbatch.recipes.core.heartbeat import heartbeat_path, resume_advice

POLL_SECONDS = 0.05
GRACE_SECONDS = 20.0  # for the ranks that are left when one has failed: they may wait for it in a collective
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOG_TAIL_LINES = 20


class Rank(NamedTuple):
    """A started process."""

    number: int
    process: subprocess.Popen
    log: Path | None
    """None: the rank writes to this terminal, and to its own log file."""


def run_ranks(
    command: Sequence[str],
    ranks: int,
    run_dir: Path,
    *,
    signals: "StopSignals | None" = None,
    answer: str = "saving after the current step",
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run `ranks` copies of the command to their common end and return the exit status for all.

    Rank 0 has this terminal; the others write to log/rankN.txt. A failure ends all, and is told in failure.json.
    `signals` are those of a caller that runs several commands: after one that asks to stop, none starts. `answer` tells
    the user what a signal brings about.
    """
    if signals is None:
        with StopSignals() as own:
            return run_ranks(command, ranks, run_dir, signals=own, answer=answer, grace_seconds=grace_seconds)
    (run_dir / "log").mkdir(parents=True, exist_ok=True)
    failure_file = run_dir / "failure.json"
    failure_file.unlink(missing_ok=True)
    with _started(command, ranks, run_dir, signals) as started:
        failed = _wait(started, signals, answer, grace_seconds)
    if signals.kill:
        print("stopped without saving; what was saved before stays", file=sys.stderr, flush=True)
    elif failed is not None and failed.process.returncode == EXIT_USER_ERROR:
        failure_file.unlink(missing_ok=True)  # of a rank that only noticed the other's end
        _tell_user_error(started[0], failed)
    elif failed is not None:
        _tell_failure(_keep_cause(failure_file, failed), failure_file)
    return _common_status([_status(rank, signals.received) for rank in started])


def default_ranks() -> int:
    """Return one rank a GPU that this process may use, else 1."""
    return max(1, count_gpus())


def count_gpus() -> int:
    """Count the NVIDIA GPUs that this process may use, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    try:
        answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return answer.stdout.count("GPU ") if answer.returncode == 0 else 0


def worker_command(action: str, run_dir: Path, *log_dir: Path) -> list[str]:
    """Return the command of one rank; action is prepare, train or evaluate.

    A `log_dir` is where a failure is told, in place of the run folder.
    """
    # -P: a file called random.py in the user's folder is not to be imported.
    return [sys.executable, "-P", "-m", "bigbatch.recipes.core.worker", action, *map(str, (run_dir, *log_dir))]


class StopSignals:
    """Handlers for the time of a run: what came goes on to the ranks once; a second Ctrl-C ends them at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.kill = False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._handle) for number in FORWARDED}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup has set
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        """Save when the terminal is closed, as on SIGTERM."""
        self._handle(signal.SIGTERM, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in self.received:
            self.received.append(number)
        elif number == signal.SIGINT:
            self.kill = True


@contextlib.contextmanager
def _started(command: Sequence[str], ranks: int, run_dir: Path, signals: StopSignals) -> Iterator[list[Rank]]:
    """Start the ranks; whatever happens, none outlives the context."""
    environment = _environment(ranks)
    started: list[Rank] = []
    try:
        for number in range(ranks):
            if signals.received:
                break  # stopped before all were up: the first ones would wait for the others in vain
            started.append(_start(command, number, environment, run_dir))
        yield started
    finally:
        for rank in started:
            _signal(rank, signal.SIGKILL)
            rank.process.wait()


def _start(command: Sequence[str], number: int, environment: Mapping[str, str], run_dir: Path) -> Rank:
    own = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
    # A session of its own: Ctrl-C reaches this process alone, which passes it on in order.
    if number == 0:
        sys.stdout.flush()
        return Rank(0, subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, start_new_session=True), None)
    path = run_dir / "log" / f"rank{number}.txt"
    with path.open("ab") as log:
        process = subprocess.Popen(
            command, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return Rank(number, process, path)


def _environment(ranks: int) -> dict[str, str]:
    """Return what every rank finds in its environment; the user's own settings stand."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "TOKENIZERS_PARALLELISM": "false"}
    if not count_gpus():
        # Gloo otherwise asks the host name for an interface, and waits where that name does not resolve.
        defaults |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
        # glibc: keep freed memory instead of giving it back and faulting it in again at each step; 15 % of a step here.
        defaults |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    fixed = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),  # the name that DeepSpeed's own launcher gives it
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "PYTHONUNBUFFERED": "1",
        "BIGBATCH_PARENT_PID": str(os.getpid()),  # a worker asks the kernel to end it when this process dies
    }
    return {**defaults, **os.environ, **fixed}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(started: list[Rank], signals: StopSignals, answer: str, grace_seconds: float) -> Rank | None:
    """Wait until all ranks have ended; return the first that failed."""
    forwarded = 0
    failed: Rank | None = None
    kill_time = float("inf")
    while any(rank.process.poll() is None for rank in started):
        for number in signals.received[forwarded:]:
            _tell_signal(number, answer)
            _signal_all(started, number)
            forwarded += 1
        if failed is None and (failed := _first_failed(started, signals.received)):
            _signal_all(started, signal.SIGTERM)
            _signal_all(started, signal.SIGCONT)  # one that is stopped wakes, and can say where it was
            kill_time = time.monotonic() + grace_seconds
        elif forwarded and kill_time == float("inf") and any(rank.process.poll() is not None for rank in started):
            # Ranks save and leave together; for one that ended before it had joined them, the others wait in vain.
            kill_time = time.monotonic() + grace_seconds
        if time.monotonic() > kill_time:
            signals.kill |= failed is None
            _signal_all(started, signal.SIGKILL)
        elif signals.kill:
            _signal_all(started, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return failed or _first_failed(started, signals.received)


def _first_failed(started: list[Rank], received: list[int]) -> Rank | None:
    fine = (None, EXIT_DONE, EXIT_REQUEUE)
    failed = [rank for rank in started if rank.process.poll() is not None and _status(rank, received) not in fine]
    # Of several that have ended since the last look: one that was killed is the cause, one that failed maybe its echo.
    return min(failed, key=lambda rank: (rank.process.returncode > 0, rank.number), default=None)


def _status(rank: Rank, received: list[int]) -> int:
    """Return the rank's exit status; a rank that a passed-on signal ended before it could handle it may start again."""
    status = rank.process.returncode
    if -status in received or (status == 128 + signal.SIGINT and signal.SIGINT in received):
        return EXIT_REQUEUE
    return status


def _common_status(statuses: list[int]) -> int:
    if not any(statuses):
        return EXIT_DONE if statuses else EXIT_REQUEUE
    if EXIT_USER_ERROR in statuses:
        return EXIT_USER_ERROR
    return EXIT_REQUEUE if set(statuses) <= {EXIT_DONE, EXIT_REQUEUE} else 1


def _signal_all(started: list[Rank], number: int) -> None:
    for rank in started:
        if rank.process.poll() is None:
            _signal(rank, number)


def _signal(rank: Rank, number: int) -> None:
    """Send a signal to the rank; SIGKILL to all that it started too, even when it has ended itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.process.pid, number) if number == signal.SIGKILL else rank.process.send_signal(number)


def _tell_signal(number: int, answer: str) -> None:
    name = signal.Signals(number).name
    again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
    print(f"\n{name}: {answer}{again}", file=sys.stderr, flush=True)


def _tell_user_error(first: Rank, failed: Rank) -> None:
    """Show the line of a rank whose words do not reach this terminal, unless rank 0 has said the same here."""
    if failed.log and first.process.returncode != EXIT_USER_ERROR:
        print(*_log_tail(failed.log)[-1:], file=sys.stderr, flush=True)


def _keep_cause(path: Path, rank: Rank) -> dict[str, Any]:
    """Return the digest; write the one that the failed rank could not: another's tells but of the broken connection."""
    own, status = _read_json(path), rank.process.returncode
    is_noticed = own.get("rank") == rank.number and "noticed_by" in own  # by a peer, which knows no exit status
    if own and not is_noticed and (own.get("rank") == rank.number or status > 0):
        return own
    log = rank.log or path.parent / "log" / "rank0.txt"
    digest: dict[str, Any] = {
        "rank": rank.number,
        "host": socket.gethostname(),
        "pid": rank.process.pid,
        **_place(path.parent, rank, own),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "exit_status": status if status >= 0 else None,
        "signal": signal.Signals(-status).name if status < 0 else None,
        "log_tail": _log_tail(log),
        "what_to_do": _advice(status, log),
        "echo": (own.get("echo") if is_noticed else own) or None,
    }
    with contextlib.suppress(OSError):  # a full disk is likely the failure itself
        path.write_text(json.dumps(digest, indent=2) + "\n")
    return digest


def _place(run_dir: Path, rank: Rank, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return phase and step of a rank's end: those of a peer, which was in step with it, or of its last heartbeat."""
    beat = _read_json(heartbeat_path(run_dir, rank.number))
    source = own or (beat if beat.get("pid") == rank.process.pid else {})
    return {"phase": source.get("phase"), "step": source.get("step")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):  # none, or its writer was killed over it
        return {}


def _log_tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 16384))
            return log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except FileNotFoundError:
        return []


def _advice(status: int, log: Path) -> str:
    stacks, go_on = log.with_name(f"stacks_{log.name}"), resume_advice(log.parents[1])
    if stacks.exists() and stacks.stat().st_size:
        return f"it stood still: log/{stacks.name} shows where; {go_on}"
    if status == -signal.SIGKILL:
        return (
            "the kernel may have ended it for lack of memory (dmesg | grep -i 'killed process' tells): "
            f"lower batch.micro_size, start fewer ranks, or set model.recompute_activations; {go_on}"
        )
    if status in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGABRT):
        return (
            "a crash in compiled code: run `bigbatch doctor`; SIGBUS may mean that /dev/shm or the disk is full; "
            + go_on
        )
    return f"read {f'log/{log.name}' if log.exists() else 'the lines above'}; {go_on}"


def _tell_failure(digest: dict[str, Any], path: Path) -> None:
    """Say in one line which rank failed and why."""
    how = digest.get("exception") or digest.get("signal") or f"exit status {digest['exit_status']}"
    where = f"rank {digest['rank']} on {digest['host']}"
    print(one_line(f"error: {where} failed: {how}; {digest['what_to_do']} ({path})"), file=sys.stderr, flush=True)
