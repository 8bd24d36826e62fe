"""A process's start and end: rank facts, device, process group, and a digest when it fails."""

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from bigbatch.recipes.core.engine import import_deepspeed
from bigbatch.recipes.core.errors import UserError, as_user_error
from bigbatch.recipes.core.heartbeat import GONE, death_digest, find_dead, resume_advice, this_rank, write_failure
from bigbatch.recipes.core.parallel import Mesh, build_mesh
from bigbatch.recipes.core.plan import ParallelPlan
from bigbatch.recipes.core.slurm_ranks import join_step

MIN_TIMEOUT_SECONDS = 1800.0
ECHOES = ("connection closed by peer", "connection reset", "broken pipe", "timed out")


def start_mesh(
    watch_seconds: float | None = None,
    tensor_ranks: int = 1,
    pipeline_ranks: int = 1,
    sequence_ranks: int = 1,
    expert_ranks: int = 1,
) -> Mesh:
    """Join the process group that the environment describes; alone when it describes none. Collective.

    `watch_seconds` is the watchdog's limit: the library's own, which knows less of the cause, comes well after it.
    """
    join_step()
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
    timeout = timedelta(seconds=max(MIN_TIMEOUT_SECONDS, 2 * (watch_seconds or 0.0)))
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timeout)
    data_ranks = int(os.environ["WORLD_SIZE"]) // (tensor_ranks * pipeline_ranks * sequence_ranks)
    plan = ParallelPlan(data_ranks, tensor_ranks, pipeline_ranks, sequence_ranks, expert=expert_ranks)
    return build_mesh(int(os.environ["RANK"]), plan, device)


def choose_algorithm(sync: str | None) -> None:
    """Have NCCL take its ring where `parallel.sync` is ring, before a group begins; gloo's all-reduce always is one."""
    if sync == "ring":
        os.environ["NCCL_ALGO"] = "Ring"


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
def failure_digest(run_dir: Path, phase: dict[str, Any]) -> Iterator[None]:
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
        digest = {
            "rank": this_rank(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": phase.get("phase"),
            "step": phase.get("step"),
            "exception": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
            "what_to_do": _advice(error, run_dir),
        }
        if _is_echo(error) and (dead := find_dead(run_dir)):
            digest = {**death_digest(run_dir, dead, GONE, this_rank(), phase), "echo": digest}
        if problem := write_failure(run_dir, digest):
            where = f"{run_dir / 'failure.json'} cannot be written: {problem.strerror}"
            print(f"error: {digest['exception']} ({where})", file=sys.stderr, flush=True)
        raise


def _is_echo(error: Exception) -> bool:
    """Tell whether an error may be no more than the news of another rank's end."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in ECHOES)


def _advice(error: Exception, run_dir: Path) -> str:
    if advice := getattr(error, "advice", ""):
        return advice
    text = str(error).lower()
    if "out of memory" in text or "can't allocate memory" in text:
        return "lower batch.micro_size, set model.recompute_activations, or raise parallel.zero_stage"
    if _is_echo(error):
        return f"another rank ended first: look at its log/rank*.txt; then {resume_advice(run_dir)}"
    return f"read the traceback; then {resume_advice(run_dir)}"
