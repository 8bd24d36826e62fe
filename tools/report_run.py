"""Read a run folder and work out the figures that a report begins with."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.report import NOT_A_METRIC, Metrics, read_metrics, session_seconds, time_spent


class Run(NamedTuple):
    """All that a run folder says about itself."""

    name: str
    document: dict[str, Any]
    deepspeed: dict[str, Any] | None
    environment: dict[str, Any] | None
    metrics: Metrics


class Summary(NamedTuple):
    """The headline figures; None where the run has not told."""

    last_step: int
    total_steps: int | None
    state: str
    mood: str
    """good, warn, bad or empty: the state's colour."""
    train_loss: float | None
    evaluation: dict[str, float | None]
    """The last one."""
    best_loss: float | None
    best_step: int | None
    num_samples: int
    num_tokens: int | None
    samples_per_second: float | None
    tokens_per_second: float | None
    utilization: float | None
    wall_seconds: float
    goodput: float | None
    restarts: int


def read_run(run_dir: Path) -> Run:
    """Read a run folder; what is not there yet is None or empty. Raises UserError when it holds no run.json."""
    if not (run_dir / "run.json").is_file():
        raise UserError(str(run_dir), "is no run folder: it holds no run.json; give one that bigbatch train made")
    document = _read_json(run_dir / "run.json")
    deepspeed, environment = _read_json(run_dir / "deepspeed.json"), _read_json(run_dir / "environment.json")
    return Run(run_dir.resolve().name, document or {}, deepspeed, environment, read_metrics(run_dir))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(path), f"is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise UserError(str(path), f"holds a {type(document).__name__} where an object belongs")
    return document


def summarize(run: Run) -> Summary:
    """Work out a run's headline figures."""
    train, evaluations = run.metrics.train, run.metrics.evaluation
    sessions = [line for line in run.metrics.events if "session" in line]
    session = sessions[-1]["session"] if sessions else {}
    tokens_per_sample, flops, peak = (
        session.get(key) for key in ("tokens_per_sample", "flops_per_sample", "peak_flops")
    )
    seconds = sum(line["seconds"] for line in train)
    speed = sum(line["num_samples"] for line in train) / seconds if seconds else None
    num_samples = train[-1]["consumed_samples"] if train else 0
    best = min((line for line in evaluations if line.get("loss") is not None), key=lambda x: x["loss"], default=None)
    spent = time_spent(run.metrics)
    last_step = train[-1]["step"] if train else 0
    total_steps = run.document.get("schedule", {}).get("total_steps") or session.get("total_steps")
    state, mood = _state(run.metrics, last_step, total_steps)
    return Summary(
        last_step=last_step,
        total_steps=total_steps,
        state=state,
        mood=mood,
        train_loss=train[-1]["loss"] if train else None,
        evaluation=figures(evaluations[-1]) if evaluations else {},
        best_loss=best["loss"] if best else None,
        best_step=best["step"] if best else None,
        num_samples=num_samples,
        num_tokens=num_samples * tokens_per_sample if tokens_per_sample else None,
        samples_per_second=speed,
        tokens_per_second=speed * tokens_per_sample if speed and tokens_per_sample else None,
        # Rank counts may differ between sessions, and peaks with them: each line has its own.
        utilization=_weighted(train, "model_flops_utilization") if flops and peak else None,
        wall_seconds=session_seconds(run.metrics) + spent["start-up"],
        goodput=spent["training"] / sum(spent.values()) if sum(spent.values()) else None,
        restarts=max(len(sessions) - 1, 0),
    )


def _weighted(lines: list[dict[str, Any]], name: str) -> float | None:
    """Average a rate over the lines that have it, by their time."""
    seconds = sum(line["seconds"] for line in lines if name in line)
    return sum(line[name] * line["seconds"] for line in lines if name in line) / seconds if seconds else None


def figures(line: dict[str, Any]) -> dict[str, float | None]:
    """Return what a line of validation tells; None is a figure that was not finite."""
    return {name: value for name, value in line.items() if name not in NOT_A_METRIC}


def _state(metrics: Metrics, last_step: int, total_steps: int | None) -> tuple[str, str]:
    if not metrics.events:
        return "not started", ""
    kinds: list[str] = []
    for line in metrics.events:
        kinds = [line["event"]] if "session" in line else [*kinds, line["event"]]
    if "failed" in kinds:
        return f"failed after step {last_step:,}", "bad"
    if total_steps is not None and last_step >= total_steps:
        return "finished", "good"
    if kinds[-1] == "ended":
        return f"stopped after step {last_step:,}", "warn"
    return "running or killed", "warn"


def clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """Write a time in its two largest units: 2 h 05 min, 3 min 20 s, 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24:02} h"
