"""`bigbatch bench comm`: what the strategies of `parallel.sync` send over this machine's links, its share of a step.

Each rank is a process: `python -m bigbatch.tools.bench_comm RUN_DIR ROUNDS table|json`. All collectives take turns,
round after round, in an order that rotates; a time is that of the slowest rank, quoted are medians. The run's step is
measured on ranks that train alone, so that it has no gradients to send, and the communication beside it: a share is
what there would be with none of it hidden behind the backward pass. NCCL_ALGO=Ring in the environment measures NCCL's
ring.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core import runtime, train
from bigbatch.recipes.core.batch import plan_batch
from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from bigbatch.recipes.core.fragments import Fragment
from bigbatch.recipes.core.local_sgd import LocalSgd
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.parts import load_run
from bigbatch.recipes.core.precision import DTYPES
from bigbatch.recipes.core.process import die_with_parent

ALL_REDUCE, SHARDED, BROADCAST, LOCAL = "all_reduce", "sharded", "broadcast", "local_sgd"
WHAT = {
    ALL_REDUCE: "all-reduce",
    SHARDED: "reduce-scatter, all-gather",
    BROADCAST: "broadcast",
    LOCAL: "outer step in float32",
}
SIZES = (2**12, 2**16, 2**20, 2**24)  # bytes
GPU_SIZES = (*SIZES, 2**28)
STEP = "step without communication"
FORMULA = (
    "bus bandwidth = bytes / seconds x 2(n-1)/n, of broadcast x 1 "
    "(https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md)"
)

Act = Callable[[], Any]


class Transfer(NamedTuple):
    """One strategy's collectives over one size."""

    strategy: str
    bytes: int
    seconds: float
    bus_gigabytes_per_second: float


class StepShare(NamedTuple):
    """What one strategy's communication is of a step of the run."""

    strategy: str
    bytes: int
    """Sent at once: each step, with local_sgd every so many."""
    seconds: float
    """A step."""
    share: float
    """Of the step with it, none of it hidden behind computation."""


def bench_comm(run_dir: Path, rounds: int, as_json: bool) -> int:
    """Measure on the ranks of the environment and print a table or JSON. Collective: every rank must call it."""
    run = load_run(run_dir)
    mesh = runtime.start_mesh()
    sizes = SIZES if mesh.device.type == "cpu" else GPU_SIZES
    acts = {(name, size): act for size in sizes for name, act in collectives(run.config, mesh, size // 4)}
    seconds = take_turns(acts, rounds, mesh)
    transfers = [
        Transfer(name, size, times, bus_bandwidth(name, size, times, mesh.world_size))
        for (name, size), times in seconds.items()
    ]
    parameters, shares, step_seconds = step_shares(run, mesh, rounds)
    facts = {
        "ranks": mesh.world_size,
        "backend": dist.get_backend(),
        "device": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "formula": FORMULA,
        "content_id": run.content_id,
        "dtype": run.config.precision.dtype,
        "parameters": parameters,
        "every_steps": run.config.parallel.local_sgd.every_steps,
        "step_seconds": step_seconds,
    }
    if mesh.is_writer and as_json:
        rows = {"transfers": [row._asdict() for row in transfers], "shares": [row._asdict() for row in shares]}
        print(json.dumps({**facts, **rows}, indent=2))
    elif mesh.is_writer:
        _print_tables(transfers, shares, facts)
    runtime.leave_mesh(mesh)
    return EXIT_DONE


def bus_bandwidth(strategy: str, num_bytes: int, seconds: float, ranks: int) -> float:
    """Return gigabytes a second over the links, as nccl-tests counts them (FORMULA)."""
    factor = 1.0 if strategy == BROADCAST else 2 * (ranks - 1) / ranks
    return num_bytes / seconds * factor / 1e9


def collectives(
    config: RunConfig, mesh: Mesh, num_elements: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Act]]:
    """Yield each strategy's collectives over so many elements, and a broadcast; the outer step is in float32."""
    padded = -(-num_elements // mesh.world_size) * mesh.world_size
    whole = torch.ones(padded, dtype=dtype, device=mesh.device)
    share = torch.empty(padded // mesh.world_size, dtype=dtype, device=mesh.device)

    def scatter_and_gather() -> None:
        dist.reduce_scatter_tensor(share, whole)
        dist.all_gather_into_tensor(whole, share)

    masters = torch.ones(num_elements, device=mesh.device)
    fragment = Fragment("", (num_elements,), 0, masters, masters, 0, None)
    yield ALL_REDUCE, lambda: dist.all_reduce(whole)
    yield SHARDED, scatter_and_gather
    yield BROADCAST, lambda: dist.broadcast(whole, 0)
    yield LOCAL, LocalSgd(config, mesh, lambda: [fragment], lambda: None).meet


def take_turns(acts: dict[Any, Act], rounds: int, mesh: Mesh) -> dict[Any, float]:
    """Return the median seconds of each, of the slowest rank's in each round; a first round does not count."""
    names, seconds = list(acts), {name: [] for name in acts}
    counts = dict.fromkeys(names, 1)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found = _seconds(acts[name], counts[name], mesh)
            if turn:
                seconds[name].append(found)
            else:  # what is over in a moment is done several times
                counts[name] = max(1, min(20, int(0.02 / found)))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(act: Act, count: int, mesh: Mesh) -> float:
    mesh.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        act()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    taken = torch.tensor([(time.perf_counter() - begin) / count], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def step_shares(run: train.Run, mesh: Mesh, rounds: int) -> tuple[int, list[StepShare], float]:
    """Return the run's trained parameters, each strategy's share of its step, and that step's seconds without any."""
    config = run.config
    data = run.recipe.open_data(config)
    torch.manual_seed(config.seed)
    engine = Engine(run.recipe.build_model(config, data.facts), config, run.deepspeed, mesh)
    assert engine.local
    plan = plan_batch(config.batch, mesh.data_ranks)
    samples = range(plan.micro_size * plan.accumulation_steps)
    ids = torch.tensor(samples).add(mesh.rank * len(samples)).remainder(data.train.num_samples)
    batches = [data.train.batch(part.numpy(), part.numpy() * 0) for part in ids.split(plan.micro_size)]
    (num_targets,) = mesh.sum(sum(run.recipe.count_targets(batch) for batch in batches))
    parameters = sum(fragment.master.numel() for fragment in engine.fragments())
    dtype = DTYPES[config.precision.dtype]
    acts = {name: act for name, act in collectives(config, mesh, parameters, dtype) if name not in (BROADCAST, LOCAL)}
    acts[LOCAL] = engine.local.meet
    engine.local.settings = config.parallel.local_sgd.model_copy(update={"every_steps": 2})  # step 0 meets nobody
    acts[STEP] = lambda: engine.train_step(0, batches, run.recipe.loss, int(num_targets))
    seconds = take_turns(acts, rounds, mesh)
    alone = seconds.pop(STEP)
    seconds[LOCAL] /= config.parallel.local_sgd.every_steps
    sizes = {name: parameters * (4 if name == LOCAL else dtype.itemsize) for name in seconds}
    shares = [StepShare(name, sizes[name], taken, taken / (taken + alone)) for name, taken in seconds.items()]
    return parameters, shares, alone


def _print_tables(transfers: list[Transfer], shares: list[StepShare], facts: dict[str, Any]) -> None:
    table = _table("strategy", "what", "bytes", "ms", "bus GB/s")
    for name, num_bytes, seconds, bandwidth in transfers:
        table.add_row(name, WHAT[name], f"{num_bytes:,}", f"{seconds * 1e3:.3f}", f"{bandwidth:.3f}")
    Console().print(table)
    print(
        f"{facts['ranks']} ranks, {facts['backend']}, {facts['device']}, {facts['threads']} threads a rank; {FORMULA}"
    )
    print(f"the smallest size's time is the latency; medians of {facts['rounds']} rounds\n")
    table = _table("strategy", "bytes", "ms a step", "share")
    for name, num_bytes, seconds, share in shares:
        often = f" every {facts['every_steps']} steps" if name == LOCAL else ""
        table.add_row(name, f"{num_bytes:,}{often}", f"{seconds * 1e3:.2f}", f"{share:.2%}")
    Console().print(table)
    step = (
        f"{facts['step_seconds'] * 1e3:.1f} ms a step without it, {facts['parameters']:,} parameters, {facts['dtype']}"
    )
    print(f"{step}; nothing hidden behind computation")


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title in ("strategy", "what") else "right", no_wrap=True)
    return table


def main(arguments: list[str]) -> int:
    """Take part as one rank; return the exit status."""
    die_with_parent()
    run_dir, rounds, form = arguments
    try:
        with runtime.failure_digest(Path(run_dir), {"phase": "bench", "step": None}):
            return bench_comm(Path(run_dir), int(rounds), form == "json")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_status)  # a thread of torch's that outlives gloo now and then aborts the interpreter's own end
