"""`bigbatch bench train`: this project's train step against others on the same model, data and precision.

All contestants live in one process and take turns, a few steps each, round after round, so that a machine whose speed
drifts is equally unfair to all. Quoted are medians, and ratios of the rounds' medians.
"""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core import runtime
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.parts import load_run
from bigbatch.recipes.core.precision import DTYPES
from bigbatch.recipes.core.report import UTILIZATION_FORMULA, measured_peak_flops


class Contestant(Protocol):
    """Somebody's train step, set up and ready.

    One whose batches hold padding has an attribute `useful_tokens`: how many tokens of a step are none, on average.
    """

    name: str

    def steps(self, count: int) -> tuple[list[float], float]:
        """Take `count` optimizer steps; return the seconds of each and the last loss."""
        ...


class Work(NamedTuple):
    """What one step does, and how fast the machine multiplies matrices."""

    samples_per_step: int
    tokens_per_sample: int
    flops_per_sample: float
    peak_flops: float


class Result(NamedTuple):
    """One contestant's figures."""

    name: str
    step_seconds: float
    """Median over all steps."""
    tokens_per_second: float
    model_flops_utilization: float
    ratio: float
    """This project's useful tokens a second over this contestant's: median over the rounds."""
    loss: float
    """Of the last step, to see that all learn the same."""


def bench_train(run_dir: Path, rounds: int, steps: int, as_json: bool) -> int:
    """Measure the run's recipe against its rivals and print a table."""
    run = load_run(run_dir)
    if not hasattr(run.recipe, "contestants"):
        raise UserError("recipe", f"{run.config.recipe} has nobody to be measured against")
    mesh = runtime.start_mesh()
    contestants: list[Contestant] = run.recipe.contestants(run, mesh)
    seconds: dict[str, list[list[float]]] = {contestant.name: [] for contestant in contestants}
    losses = {}
    for contestant in contestants:
        contestant.steps(2)  # warm-up: allocations, thread pools, lazily made state
    for _ in range(rounds):
        for contestant in contestants:
            times, losses[contestant.name] = contestant.steps(steps)
            seconds[contestant.name].append(times)
    data = run.recipe.open_data(run.config)
    work = Work(
        run.config.batch.global_size,
        data.facts["tokens_per_sample"],
        run.recipe.flops_per_sample(run.config, data.facts),
        measured_peak_flops(DTYPES[run.config.precision.dtype]),
    )
    useful = {c.name: tokens for c in contestants if (tokens := getattr(c, "useful_tokens", None))}
    results = summarize(seconds, losses, work, useful)
    facts = {
        "content_id": run.content_id,
        "dtype": run.config.precision.dtype,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "steps": steps,
        **work._asdict(),
        "formula": UTILIZATION_FORMULA,
    }
    if as_json:
        print(json.dumps({**facts, "results": [result._asdict() for result in results]}, indent=2))
    else:
        _print_table(results, facts)
    runtime.leave_mesh(mesh)
    return EXIT_DONE


def summarize(
    seconds: dict[str, list[list[float]]],
    losses: dict[str, float],
    work: Work,
    useful_tokens: dict[str, float] | None = None,
) -> list[Result]:
    """Turn the seconds of each contestant's steps, round by round, into figures; the first one is the measure.

    `useful_tokens` a step are given for those whose batches hold padding, on which no operation counts.
    """
    all_tokens = work.samples_per_step * work.tokens_per_sample
    medians = {name: [statistics.median(times) for times in rounds] for name, rounds in seconds.items()}
    ours = next(iter(medians.values()))
    results = []
    for name, rounds in seconds.items():
        median = statistics.median(time for times in rounds for time in times)
        tokens = (useful_tokens or {}).get(name, all_tokens)
        ratio = statistics.median(other / own for own, other in zip(ours, medians[name], strict=True))
        utilization = work.flops_per_sample / work.tokens_per_sample * tokens / median / work.peak_flops
        results.append(Result(name, median, tokens / median, utilization, ratio * all_tokens / tokens, losses[name]))
    return results


def _print_table(results: list[Result], facts: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("trainer", "s/step", "tokens/s", "MFU", "bigbatch is", "loss"):
        table.add_column(title, justify="left" if title == "trainer" else "right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.step_seconds:.3f}",
            f"{result.tokens_per_second:,.0f}",
            f"{result.model_flops_utilization:.1%}",
            f"{result.ratio:.2f} x",
            f"{result.loss:.3f}",
        )
    Console().print(table)
    print(
        f"{facts['rounds']} rounds of {facts['steps']} steps, {facts['dtype']}, {facts['threads']} threads; "
        f"{UTILIZATION_FORMULA}; peak {facts['peak_flops'] / 1e12:.3f} TFLOP/s (measured matrix product)"
    )
