"""`bigbatch bench convert`: peak memory and seconds of `bigbatch convert` beside DeepSpeed's zero_to_fp32.

One untrained model, saved by this project and by DeepSpeed's own save_checkpoint, is converted by both in fresh
processes that take turns. Seconds are of the whole process, with what it imports; ours writes a Hugging Face folder,
DeepSpeed's a pickle that is not synced to disk. The whole verb, which is, and which compares with transformers' own
model, has rows of its own.
Memory is what lies above a bare interpreter with torch imported. Quoted are medians, and medians of the rounds' ratios.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core import checkpoint, runtime
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.parts import load_run
from bigbatch.tools.bench_checkpoint import known_facts, ready_engine, save_with_deepspeed
from bigbatch.tools.bench_convert_process import BARE, COMPARED, CONVERT, ZERO_TO_FP32

TARGETS = {"peak memory": 0.3, "seconds": 1.0}


class Turn(NamedTuple):
    """What one process took."""

    seconds: float
    peak_bytes: int


def bench_convert(run_dir: Path, rounds: int, as_json: bool) -> int:
    """Save the run's untrained model both ways under the run folder, convert it in turns and print a table."""
    num_parameters = _save(run_dir)
    sources = {CONVERT: run_dir, COMPARED: run_dir, ZERO_TO_FP32: run_dir / "deepspeed"}
    contestants = {f"{name}, {dtype}": (name, dtype) for name in (CONVERT, COMPARED) for dtype in ("fp32", "bf16")}
    contestants[ZERO_TO_FP32] = (ZERO_TO_FP32, "fp32")
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    bare = _turn(BARE, run_dir, run_dir / "converted", "fp32").peak_bytes
    for _ in range(rounds):
        for name, (program, dtype) in contestants.items():
            turns[name].append(_turn(program, sources[program], run_dir / "converted", dtype))
    facts = {"parameters": num_parameters, "bare_bytes": bare, "rounds": rounds}
    results = summarize(turns, bare)
    if as_json:
        print(json.dumps({**facts, "targets": TARGETS, "results": results}, indent=2))
    else:
        _print_table(results, facts)
    return EXIT_DONE


def summarize(turns: dict[str, list[Turn]], bare_bytes: int) -> dict[str, dict[str, float]]:
    """Return medians of each contestant, and of the rounds' ratios to zero_to_fp32."""
    theirs = turns[ZERO_TO_FP32]
    return {
        name: {
            "peak_bytes": statistics.median(turn.peak_bytes - bare_bytes for turn in own),
            "seconds": statistics.median(turn.seconds for turn in own),
            "peak_ratio": statistics.median(
                (turn.peak_bytes - bare_bytes) / (other.peak_bytes - bare_bytes)
                for turn, other in zip(own, theirs, strict=True)
            ),
            "seconds_ratio": statistics.median(
                turn.seconds / other.seconds for turn, other in zip(own, theirs, strict=True)
            ),
        }
        for name, own in turns.items()
    }


def _save(run_dir: Path) -> int:
    """Write the run's untrained model as both kinds of checkpoint; return its number of parameters."""
    run = load_run(run_dir)
    if run.config.recipe != "gpt":
        raise UserError("recipe", f"is {run.config.recipe!r}; bench convert takes a model of gpt")
    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    mesh = runtime.start_mesh()
    facts = {"end_of_text": 0, **known_facts(run), "tokenizer": str(tokenizer)}
    engine = ready_engine(run, mesh, facts)
    state = {"step": 1, "consumed_samples": 0, "content_id": run.content_id, "data_fingerprint": "none"}
    state |= {"run": run.config.model_dump(mode="json"), "facts": facts}
    checkpoint.save(run_dir, engine, mesh, state)
    save_with_deepspeed(engine, run_dir / "deepspeed")
    runtime.leave_mesh(mesh)
    return sum(parameter.numel() for parameter in engine.module.parameters())


def _turn(program: str, source: Path, out: Path, dtype: str) -> Turn:
    command = [sys.executable, "-m", "bigbatch.tools.bench_convert_process", program, str(source), str(out), dtype]
    begin = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out, ignore_errors=True)
    if result.returncode:
        raise RuntimeError(f"{program} failed: {result.stderr[-2000:]}")
    return Turn(seconds, int(result.stdout.splitlines()[-1]))


def _print_table(results: dict[str, dict[str, float]], facts: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("program", "peak MB", "of theirs", "s", "of theirs"):
        table.add_column(title, justify="left" if title == "program" else "right")
    for name, own in results.items():
        ratios = f"{own['peak_ratio']:.2f}", f"{own['seconds_ratio']:.2f}"
        table.add_row(name, f"{own['peak_bytes'] / 1e6:,.0f}", ratios[0], f"{own['seconds']:.2f}", ratios[1])
    Console().print(table)
    print(f"{facts['parameters']:,} parameters, medians of {facts['rounds']} rounds")
    print(f"memory above the {facts['bare_bytes'] / 1e6:,.0f} MB of a bare interpreter with torch imported")
    print(f"targets: at most {TARGETS['peak memory']} of its memory, {TARGETS['seconds']} of its seconds")
