"""`bigbatch bench checkpoint`: what a save costs a run, beside the bare copy of the state and DeepSpeed's own save.

All save the same state in turns, round after round, in an order that rotates; each begins with the disk at rest and the
files of the one before gone. Quoted are medians, and medians of the rounds' ratios.
"""

import json
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core import checkpoint, runtime
from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.optim import set_state, state_keys
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.parts import load_run
from bigbatch.recipes.core.saver import Saved, Saver
from bigbatch.recipes.core.train import Run

STALL, SYNCHRONOUS, UNSYNCED = "asynchronous, the stall", "synchronous", "synchronous without fsync"
COPIED = "asynchronous, until copied"
BEHIND, COPY, DEEPSPEED = "asynchronous, until committed", "bare copy to kept host memory", "DeepSpeed save_checkpoint"
TARGETS = ((STALL, SYNCHRONOUS, 0.15), (COPIED, COPY, 2.0), (UNSYNCED, DEEPSPEED, 1.1))


class Ratio(NamedTuple):
    """One contestant's seconds over another's: the median of the rounds' ratios, and what it is to stay under."""

    name: str
    over: str
    ratio: float
    target: float


def bench_checkpoint(run_dir: Path, rounds: int, as_json: bool) -> int:
    """Measure saves of the run's state on one rank, under the run folder, and print a table."""
    run = load_run(run_dir)
    mesh = runtime.start_mesh()
    engine = ready_engine(run, mesh, known_facts(run))
    seconds = _measure(run_dir, engine, mesh, rounds)
    num_bytes = sum(part.values.nbytes for part in checkpoint.owned(engine, mesh))
    ratios = compare(seconds)
    if as_json:
        facts = {"content_id": run.content_id, "bytes": num_bytes, "rounds": rounds, "seconds": seconds}
        print(json.dumps({**facts, "ratios": [ratio._asdict() for ratio in ratios]}, indent=2))
    else:
        _print_table(seconds, ratios, num_bytes)
    runtime.leave_mesh(mesh)
    return EXIT_DONE


def compare(seconds: dict[str, list[float]]) -> list[Ratio]:
    """Return what the targets are about, from each contestant's seconds round by round."""
    return [
        Ratio(name, over, statistics.median(a / b for a, b in zip(seconds[name], seconds[over], strict=True)), target)
        for name, over, target in TARGETS
    ]


def known_facts(run: Run) -> dict[str, Any]:
    """Return the facts of the run's data; where these are not there, a language model's number of tokens will do."""
    data = getattr(run.config, "data", None)
    try:
        return run.recipe.open_data(run.config).facts
    except UserError:
        if not (size := getattr(getattr(data, "tokenizer", None), "vocabulary_size", None)):
            raise
        return {"vocabulary_size": size}


def ready_engine(run: Run, mesh: Mesh, facts: dict[str, Any]) -> Engine:
    """Build the run's engine with what its optimizer has after a step; what the numbers are is all the same."""
    engine = Engine(run.recipe.build_model(run.config, facts), run.config, run.deepspeed, mesh)
    for flat in {fragment.flat: None for fragment in engine.fragments()}:
        states = {key: torch.rand_like(flat, requires_grad=False) for key in state_keys(run.config.optimizer)}
        set_state(engine.optimizer, flat, states, 1.0)
    return engine


def _measure(run_dir: Path, engine: Engine, mesh: Mesh, rounds: int) -> dict[str, list[float]]:
    """Return each contestant's seconds, round by round; a first round, in which buffers are made, does not count."""
    told: list[Saved] = []
    config = engine.config.model_copy(
        update={"checkpoint": engine.config.checkpoint.model_copy(update={"asynchronous": True})}
    )
    engine.config = config
    saver = Saver(run_dir, engine, mesh, told.append)
    copy = _bare_copy(engine, mesh)
    contestants: dict[str, Callable[[], dict[str, float]]] = {
        SYNCHRONOUS: lambda: _timed(SYNCHRONOUS, lambda: checkpoint.save(run_dir, engine, mesh, {"step": 1})),
        UNSYNCED: lambda: _timed(UNSYNCED, lambda: checkpoint.save(run_dir, engine, mesh, {"step": 1}), _no_fsync()),
        STALL: lambda: _save_behind(saver, told),
        COPY: lambda: _timed(COPY, copy),
        DEEPSPEED: lambda: _timed(DEEPSPEED, lambda: save_with_deepspeed(engine, run_dir / "deepspeed")),
    }
    seconds: dict[str, list[float]] = {}
    names = list(contestants)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            os.sync()
            found = contestants[name]()
            for folder in (run_dir / "checkpoints", run_dir / "deepspeed"):
                shutil.rmtree(folder, ignore_errors=True)
            if turn:
                for key, value in found.items():
                    seconds.setdefault(key, []).append(value)
    return seconds


def _timed(name: str, act: Callable[[], Any], condition: Any = None) -> dict[str, float]:
    with condition or nullcontext():
        begin = time.perf_counter()
        act()
        return {name: time.perf_counter() - begin}


def _save_behind(saver: Saver, told: list[Saved]) -> dict[str, float]:
    begin = time.perf_counter()
    saver.save({"step": 1})
    stall = time.perf_counter() - begin
    saver.wait_for_copy()
    copied = time.perf_counter() - begin
    saver.wait()
    return {STALL: stall, COPIED: copied, BEHIND: told[-1].whole_seconds}


@contextmanager
def _no_fsync() -> Iterator[None]:
    """Have nothing forced to the disk, as DeepSpeed has it."""
    real = os.fsync
    os.fsync = lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real


def _bare_copy(engine: Engine, mesh: Mesh) -> Callable[[], None]:
    """Return a function that copies the tensors of the state, whole, as DeepSpeed keeps them."""
    flats = list({fragment.flat: None for fragment in engine.fragments()})
    sources = [flat.detach() for flat in flats]
    sources += [engine.optimizer.state[flat][key] for flat in flats for key in state_keys(engine.config.optimizer)]
    on_gpu = mesh.device.type == "cuda"
    targets = [torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu) for source in sources]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    return copy


def save_with_deepspeed(engine: Engine, folder: Path) -> None:
    """Save as DeepSpeed does."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        engine.deepspeed.save_checkpoint(str(folder), tag="step1")


def _print_table(seconds: dict[str, list[float]], ratios: list[Ratio], num_bytes: int) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("save", "s", "lowest", "GB/s"):
        table.add_column(title, justify="left" if title == "save" else "right")
    for name, times in seconds.items():
        median = statistics.median(times)
        table.add_row(name, f"{median:.3f}", f"{min(times):.3f}", f"{num_bytes / median / 1e9:.2f}")
    Console().print(table)
    for name, over, ratio, target in ratios:
        print(f"{name} / {over}: {ratio:.2f} (target: at most {target})")
    count = len(next(iter(seconds.values())))
    print(f"medians of {count} rounds, {num_bytes / 1e9:.2f} GB: masters and optimizer state in float32")
    print("the stall is all that a run waits where forward and backward pass take longer than the copy made meanwhile")
    print("DeepSpeed's own has the working weights besides, no hash and no fsync")
