"""A process's first moments: signals that come while torch is imported, and no process that outlives its launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigbatch.recipes.core import process
from bigbatch.recipes.core.errors import EXIT_REQUEUE


def catches(pid: int, number: int) -> bool:
    mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells when the worker is ready")
@pytest.mark.parametrize("part", ["prepare", "train", "evaluate"])
def test_a_signal_during_the_imports_ends_a_worker_in_order(tmp_path, part):
    """The folder says nothing of a run, so a worker that did not look at the signal would end with another status."""
    document = {"version": 1, "recipe": "gpt", "batch": {"global_size": 1}, "optimizer": {"learning_rate": 1.0}}
    document |= {"schedule": {"total_steps": 1}, "data": {"train": ["missing.txt"], "sequence_length": 8}}
    for name, content in (("run", document), ("deepspeed", {}), ("environment", {"content_id": "c"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    command = [sys.executable, "-m", "bigbatch.recipes.core.worker", part, str(tmp_path)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not catches(worker.pid, signal.SIGTERM):  # SIGINT is Python's own until then
        time.sleep(0.002)
    worker.send_signal(signal.SIGINT)
    printed = worker.communicate(timeout=60)[0]
    assert (worker.returncode, printed) == (EXIT_REQUEUE, "")


def test_a_signal_sets_the_flag_with_its_name_and_nothing_else():
    before = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            stop = process.StopFlag()
            stop.install()
            assert stop.signal_name == ""
            os.kill(os.getpid(), number)
            assert stop.signal_name == number.name
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SAY = """
import os, sys
from bigbatch.recipes.core import process
process.keep_streams_open()
print("to standard output", flush=True)
for line in range(3): print("to standard error", file=sys.stderr, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("redirection", ["2>/dev/full", ">&- 2>&-", "0<&- >&- 2>&-", "2>&1 >/dev/null | true"])
def test_a_process_outlives_its_standard_streams(redirection):
    """The reader of a pipe may end, the disk of a log may be full, a service may start us with nothing open."""
    command = f'set -o pipefail; "$0" -c "$1" {redirection}'
    ended = subprocess.run(["bash", "-c", command, sys.executable, SAY], timeout=60, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (7, b"")


CHILD = """
import os, sys, time
from bigbatch.recipes.core import process, runtime
process.die_with_parent()
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import os, subprocess, sys, time
environment = os.environ | {{"BIGBATCH_PARENT_PID": str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=environment)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_rank_dies_with_the_launcher_even_when_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = None
    try:
        word, pid = parent.stdout.readline().split()
        child = int(pid)
        assert word == "ready"
        assert is_alive(child)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(child)
    finally:
        parent.kill()
        parent.stdout.close()
        if child and is_alive(child):
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_rank_whose_launcher_was_gone_before_it_asked_ends_at_once():
    environment = os.environ | {"BIGBATCH_PARENT_PID": str(2**22 + 1)}  # above the kernel's largest process id
    ended = subprocess.run([sys.executable, "-c", CHILD], env=environment, timeout=60, capture_output=True, check=False)
    assert ended.returncode == 1
    assert ended.stdout == b""


def test_bars_of_libraries_stay_off_standard_error():
    script = (
        "from bigbatch.recipes.core.process import quiet_libraries; quiet_libraries()\n"
        "from tqdm.auto import tqdm; print(len(list(tqdm(range(3)))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
