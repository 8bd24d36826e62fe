"""A process's start and end: rank facts, device, process group, and a digest when it fails."""

import faulthandler
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

from bigbatch.recipes.core.engine import import_deepspeed
from bigbatch.recipes.core.errors import UserError, as_user_error
from bigbatch.recipes.core.parallel import Mesh


def start_mesh() -> Mesh:
    """Join the process group that the environment describes; alone when it describes none. Collective."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    return Mesh(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def leave_mesh(mesh: Mesh) -> None:
    """Leave the process group in step, so that no rank finds its peers gone. Collective."""
    mesh.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def failure_digest(run_dir: Path, phase: dict[str, object]) -> Iterator[None]:
    """Write failure.json if the block raises: which rank and host, in which phase and step, what, and what to do.

    `phase` is kept up to date by the block. A UserError passes, and a full disk becomes one: its one line says all.
    """
    faulthandler.enable()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if mistake := as_user_error(error, str(run_dir)):
            raise mistake from error
        rank = int(os.environ.get("RANK", "0"))
        digest = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **phase,
            "exception": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
            "what_to_do": _advice(error),
        }
        _write_first(run_dir / "failure.json", digest)
        raise


def _write_first(path: Path, digest: dict[str, object]) -> None:
    """Write the digest unless another rank already has: the first failure is the cause, later ones its echo."""
    try:
        with path.open("x") as file:
            json.dump(digest, file, indent=2)
    except FileExistsError:
        return
    except OSError as error:  # a full disk is likely the failure itself
        print(f"error: {digest['exception']} ({path} cannot be written: {error.strerror})", file=sys.stderr, flush=True)


def _advice(error: Exception) -> str:
    if advice := getattr(error, "advice", ""):
        return advice
    text = str(error).lower()
    if "out of memory" in text or "can't allocate memory" in text:
        return "lower batch.micro_size, set model.recompute_activations, or raise parallel.zero_stage"
    if "connection closed by peer" in text or "connection reset" in text or "timed out" in text:
        return "another rank ended first: look at its log/rank*.txt"
    return "read the traceback; then start the same command again: it goes on from the last checkpoint"
