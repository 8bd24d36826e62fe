"""Run functions as ranks: forked from a process that has imported everything, so that a start takes no seconds.

Nothing distributed may live in the parent. Every child is a process of its own with a process group of its own making.
"""

import gc
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from bigbatch.recipes.core.engine import import_deepspeed


def import_everything() -> None:
    """Import what every child would, seconds each."""
    import_deepspeed()
    import deepspeed.runtime.zero.muon.muon_optimizer  # with it all of torch.compile  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage often


def run_forked(function: Callable[[], None], num_ranks: int, log: Path, timeout_seconds: float = 400.0) -> list[int]:
    """Call `function` in this many children; return their exit statuses (negative: the signal that ended it).

    What rank r prints goes to `log` with .r before its suffix. Children that are late are killed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    running = {_start(function, rank, num_ranks, port, log): rank for rank in range(num_ranks)}
    statuses = [0] * num_ranks
    deadline = time.monotonic() + timeout_seconds
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return statuses


def _start(function: Callable[[], None], rank: int, num_ranks: int, port: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(log.with_suffix(f".{rank}{log.suffix}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_PORT=str(port))
        os.environ["BIGBATCH_PARENT_PID"] = str(os.getppid())  # the kernel kills it with the parent
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # past the parent's own clean-up
