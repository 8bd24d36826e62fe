"""Ranks that die, stop or hang, each case with process groups of its own, all cases at once: `lost_ranks.py OUT`.

OUT/<case>/ is the run folder; OUT/<case>.json has the exit statuses and the seconds until all ranks had ended.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forked_ranks import import_everything, run_forked
from train_cases import TEXT, Cases

from bigbatch.recipes.core import runtime, watchdog
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.watchdog import watched
from bigbatch.recipes.gpt import recipe

LIMIT_SECONDS = 5.0
NEVER = 60.0  # seconds
STEPS = 5
BAD_STEP = 3
CULPRIT = 1
SILENT_SECONDS = 3.0  # instead of half a minute

Step = Callable[[Mesh, Path, dict[str, Any]], None]


def work(run_dir: Path, step: Step) -> None:
    """Be one rank: take the step a few times between sums over all ranks."""
    phase: dict[str, Any] = {"phase": "start", "step": None}
    status = 1
    # Below the ports that the system gives out, of which so many cases at once take a lot.
    os.environ["MASTER_PORT"] = str(10000 + os.getppid() % 20000)
    if step in ELSEWHERE:
        socket.gethostname = lambda: f"host{os.environ['RANK']}"
    try:
        with runtime.failure_digest(run_dir, phase), watched(run_dir, phase, LIMIT_SECONDS):
            mesh = runtime.start_mesh(LIMIT_SECONDS)
            for number in range(STEPS):
                phase.update(phase="step", step=number)
                mesh.barrier()
                step(mesh, run_dir, phase)
            runtime.leave_mesh(mesh)
            status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def is_time(mesh: Mesh, phase: dict[str, Any]) -> bool:
    """Tell whether this is the rank and the step of the mishap."""
    return mesh.rank == CULPRIT and phase["step"] == BAD_STEP


def killed(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Die in the middle of a step, where the others wait for this rank."""
    if is_time(mesh, phase):
        os.kill(os.getpid(), signal.SIGKILL)


def killed_unnoticed(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Die while the others are where no broken connection reaches them, as with NCCL."""
    killed(mesh, run_dir, phase)
    if phase["step"] == BAD_STEP:
        time.sleep(NEVER)


def killed_elsewhere(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Die on a host on which no other rank can look for the process."""
    killed(mesh, run_dir, phase)


def killed_elsewhere_unnoticed(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Die on another host, and no connection breaks."""
    killed_unnoticed(mesh, run_dir, phase)


def stopped(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Stand still until the run has failed, and wake then, as the launcher would have it."""
    if is_time(mesh, phase):
        pause((run_dir / "failure.json").exists)
        time.sleep(NEVER)


def suspended(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Stand still in all ranks for longer than the limit, as in a job that a scheduler suspends, and go on."""
    if phase["step"] == BAD_STEP:
        begin = time.monotonic()
        pause(lambda: time.monotonic() > begin + LIMIT_SECONDS + 2)
        time.sleep(0.5)


def pause(is_over: Callable[[], bool]) -> None:
    """Stop this process soon; a child of it makes it go on."""
    pid = os.getpid()
    if os.fork():
        return
    time.sleep(0.1)
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + NEVER
    while not is_over() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGCONT)
    os._exit(0)


def sleeping(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Hang in the data code."""
    if is_time(mesh, phase):
        read_from_a_dead_disk()


def read_from_a_dead_disk() -> None:
    """Be found here."""
    time.sleep(NEVER)


def hogging(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Hang in a call that keeps the interpreter from all threads, the watchdog's too."""
    if is_time(mesh, phase):
        re.match(r"(a+)+$", "a" * 60 + "b")


def slow(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Take longer than the limit for a step, with a sign of life now and then."""
    if is_time(mesh, phase):
        for batch in range(3):
            time.sleep(LIMIT_SECONDS / 2)
            phase["evaluated_batches"] = batch
    elif phase["step"] == BAD_STEP:
        threading.Thread(target=tick, args=(phase,), daemon=True).start()


def tick(phase: dict[str, Any]) -> None:
    """Give signs of life while this rank waits for the slow one."""
    for number in range(6):
        time.sleep(LIMIT_SECONDS / 3)
        phase["evaluated_batches"] = number


def raising(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Fail in the usual way."""
    if is_time(mesh, phase):
        raise ValueError("the cause")


def waiting(mesh: Mesh, run_dir: Path, phase: dict[str, Any]) -> None:
    """Stand still alike in all ranks, so that none is behind."""
    if phase["step"] == BAD_STEP:
        time.sleep(NEVER)


CASES: dict[Step, int] = {killed: 3, killed_unnoticed: 3, stopped: 3, suspended: 2, sleeping: 3, hogging: 2, slow: 2}
CASES |= {raising: 3, waiting: 2, killed_elsewhere: 3, killed_elsewhere_unnoticed: 3}
ELSEWHERE = (killed_elsewhere, killed_elsewhere_unnoticed)


def play(step: Step, num_ranks: int, out: Path) -> None:
    """Play one case in a child of its own."""
    run_dir = out / step.__name__
    run_dir.mkdir()
    begin = time.monotonic()
    statuses = run_forked(partial(work, run_dir, step), num_ranks, run_dir / "printed.txt", timeout_seconds=50.0)
    result = {"statuses": statuses, "seconds": time.monotonic() - begin}
    run_dir.with_suffix(".json").write_text(json.dumps(result))


def train(out: Path) -> None:
    """Train the GPT recipe through the worker; a rank dies between two micro-batches, and the next start goes on."""
    (out / "text.txt").write_text(TEXT)
    cases = Cases(out)
    cases.write("trained", 2, schedule={"total_steps": BAD_STEP + 1})
    cases.run("trained", 1, "prepare")
    whole_loss = recipe.loss
    recipe.loss = partial(deadly_loss, whole_loss, iter(range(99)))
    cases.run("trained", 2)
    (out / "trained" / "failure.json").rename(out / "trained" / "first_failure.json")
    (out / "trained" / "failure.json").write_text('{"launch": "an earlier one"}')
    recipe.loss = whole_loss
    cases.run("trained", 2)
    statuses = [start["statuses"] for start in cases.results["trained"]]
    (out / "trained.json").write_text(json.dumps(statuses))


def deadly_loss(whole_loss: Callable[..., Any], calls: Any, *arguments: Any) -> Any:
    """Die at the second of the two micro-batches of the bad step."""
    if next(calls) == 2 * BAD_STEP + 1 and os.environ["RANK"] == str(CULPRIT):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_loss(*arguments)


if __name__ == "__main__":
    import_everything()
    watchdog.SILENT_SECONDS = SILENT_SECONDS
    target = Path(sys.argv[1])
    children = []
    for action in (partial(train, target), *(partial(play, case, ranks, target) for case, ranks in CASES.items())):
        children.append(os.fork())
        if not children[-1]:
            action()
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
