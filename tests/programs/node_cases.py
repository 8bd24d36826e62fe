"""Four ranks check four nodes, one of them bad: `python node_cases.py OUT`, for tests/recipes/core/test_node_check.py.

A node is a process with its own view of the file system (a mount namespace), its own clock where that is asked for.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed  # seconds, once for all ranks
from forked_ranks import run_forked

from bigbatch.recipes.core import node_check, node_probes
from bigbatch.recipes.core.node_probes import Needs

NODES = 4
WAITING = ("stopped", "killed", "hangs", "absent", "rank_0_stopped")
LATE_SECONDS = 22.0  # after which a rank that has been stopped is killed; the others need 13 and what a busy host adds
NEEDS = Needs(checkpoint_bytes=2**20, retained_bytes=2**22, retained_files=10)
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000


def hide_folder(folder: Path, *options: str) -> None:
    """Put another file system over a folder, for this process alone."""
    flags = NEW_MOUNTS if os.geteuid() == 0 else NEW_MOUNTS | NEW_USER
    user = os.geteuid()
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


def stop_in(name: str, number: int = signal.SIGSTOP) -> None:
    """Have this process stop, or end, where it would begin a part of the check."""
    setattr(node_probes, name, lambda *_: (os.kill(os.getpid(), number), time.sleep(1000)))


def hang_in(name: str) -> None:
    """Have this rank wait for ever in a part of the check, as on a dead file system."""
    setattr(node_probes, name, lambda *_: time.sleep(1000))


def wrong_clock(seconds: float) -> None:
    """Set this process's clock."""
    real = time.time
    time.time = lambda: real() + seconds


def wrong_product() -> None:
    """Have the arithmetic unit err."""
    multiply = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda a, b: multiply(a, b) + (1 if b.ndim == 2 else 0)


def cases(folder: Path) -> dict[str, tuple[set[int], Callable[[], None]]]:
    """Return, by name, the ranks on bad nodes and what is wrong there."""
    everywhere, checkpoints = set(range(NODES)), folder / "checkpoints"
    return {
        "fine": (set(), lambda: None),
        "read_only": ({2}, lambda: hide_folder(checkpoints, "ro")),
        "full": ({1}, lambda: hide_folder(checkpoints, "size=512k")),
        "read_only_everywhere": (everywhere, lambda: hide_folder(checkpoints, "ro")),
        "own_disk_everywhere": (everywhere, lambda: hide_folder(checkpoints, "size=64m")),
        "few_inodes": ({0}, lambda: hide_folder(checkpoints, "nr_inodes=6")),
        "clock": ({2}, lambda: wrong_clock(120.0)),
        "clock_of_rank_0": ({0}, lambda: wrong_clock(-120.0)),
        "product": ({3}, wrong_product),
        "stopped": ({2}, lambda: stop_in("reduce_over_all")),
        "killed": ({1}, lambda: stop_in("exchange_in_pairs", signal.SIGKILL)),
        "hangs": ({3}, lambda: hang_in("write_and_read")),
        "absent": ({1}, lambda: os._exit(1)),
        "rank_0_stopped": ({0}, lambda: stop_in("read_witness")),
    }


def run_case(folder: Path, limits: node_check.Limits) -> None:
    """Run a case; leave statuses and seconds in its folder, which becomes a run folder."""
    (folder / "checkpoints").mkdir(parents=True)
    bad, make_bad = cases(folder)[folder.name]

    def rank_main() -> None:
        rank = int(os.environ["RANK"])
        os.environ |= {"SLURMD_NODENAME": f"node{rank + 1}", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        if rank in bad:
            make_bad()
        verdict = node_check.take_part(folder, node_check.read_facts(), limits, NEEDS)
        if rank == verdict["told_by"]:
            print("\n".join(node_check.describe(verdict)), flush=True)
        os._exit(node_check.STATUSES[verdict["status"]])

    begin = time.monotonic()
    statuses = run_forked(rank_main, NODES, folder / "log.txt", LATE_SECONDS if folder.name in WAITING else 120.0)
    outcome = {"statuses": statuses, "seconds": time.monotonic() - begin}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    print(folder.name, outcome, flush=True)


def main(out: Path) -> None:
    """Run the cases, those that wait most of the time side by side."""
    node_probes.PRODUCT_SECONDS, node_probes.FILE_BYTES = 0.05, 2**20
    node_check.SILENT_SECONDS, node_check.WITNESS_SECONDS, node_check.LEAVING_SECONDS = 5.0, 1.0, 1.0
    waiting = []
    for name in cases(out):
        if name not in WAITING:
            run_case(out / name, node_check.Limits(arrive=60.0, check=60.0))
        elif (child := os.fork()) == 0:
            run_case(out / name, node_check.Limits(arrive=6.0, check=6.0))
            os._exit(0)
        else:
            waiting.append(child)
    for child in waiting:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
