"""What a run tells while it trains: metrics.jsonl, TensorBoard, and a progress bar or plain lines on standard error.

metrics.jsonl is the record that everything else is made from: one strict JSON object a line, with `kind` (train,
evaluation, text, event), `step` and `time` (seconds since 1970). A number that is not finite is null there, and
`non_finite` names it. A run that goes on after a kill appends: its first line carries `session`, and whatever an
earlier session wrote about later steps no longer counts.
"""

import itertools
import json
import math
import os
import resource
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.errors import UserError

if TYPE_CHECKING:  # the reader works on a machine without torch
    import torch
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
BAR_REFRESH_SECONDS = 0.5
UTILIZATION_FORMULA = "model FLOPs utilization = FLOPs a sample x samples/s / peak"  # PaLM (arXiv 2204.02311), app. B
KINDS = ("train", "evaluation", "text", "event")
NOT_A_METRIC = ("kind", "step", "time", "seconds", "non_finite")


class StepRecord(NamedTuple):
    """One optimizer step over all ranks, in plain Python numbers."""

    step: int
    loss: float
    """Mean over the step's targets."""
    learning_rate: float
    grad_norm: float
    num_targets: int
    num_samples: int
    consumed_samples: int
    """Since step 0, this step's included."""
    step_seconds: float
    """From batch to update, waiting for data included."""
    loss_scale: float | None = None
    skipped: bool = False
    """No update was made: loss and gradient norm stay out of the averages."""


class Reporter:
    """Write a run's progress; on a rank that is no writer every method does nothing.

    `num_samples` of the records, `flops_per_sample` and `tokens_per_sample` count whole samples, forward and backward;
    `peak_flops` is one rank's, in FLOP/s. `total_steps` is the last step that this process is to reach.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        *,
        is_writer: bool,
        total_steps: int,
        start_step: int = 0,
        num_ranks: int = 1,
        tokens_per_sample: int | None = None,
        flops_per_sample: float | None = None,
        peak_flops: float | None = None,
        start_up_seconds: float = 0.0,
    ) -> None:
        self._is_writer = is_writer
        if not is_writer:
            return
        self._every_steps = config.report.every_steps
        self._total_steps = total_steps
        self._last_step = start_step
        self._tokens_per_sample = tokens_per_sample
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops * num_ranks if peak_flops else None
        self._window = _Window()
        self._lines = _LineWriter(run_dir / METRICS_FILE)
        self._board = _open_tensorboard(run_dir / TENSORBOARD_FOLDER, start_step) if config.report.tensorboard else None
        self._terminal = _Terminal(start_step, total_steps)
        self._start_session(start_step, num_ranks, start_up_seconds)

    def step(self, record: StepRecord) -> None:
        """Take in a step; every `report.every_steps` the steps since the last report are averaged and written."""
        if not self._is_writer:
            return
        self._window.add(record)
        self._last_step = record.step
        if record.step % self._every_steps == 0 or record.step == self._total_steps:
            self._report_window()
        else:
            self._terminal.advance(record.step)

    def evaluation(self, step: int, values: dict[str, float], seconds: float = 0.0) -> None:
        """Write validation figures (`loss` among them) and the time that they took."""
        if not self._is_writer:
            return
        self._write("evaluation", step, values | {"seconds": seconds})
        shown = ", ".join(
            f"{name} {value:.5g}" for name, value in values.items() if "/" not in name
        )  # f1/spam and so on
        self._terminal.say(f"step {step:,}  validation: {shown}")

    def text(self, step: int, samples: list[dict[str, str]], seconds: float = 0.0) -> None:
        """Write outputs to look at, each {"prompt": ..., "text": ...}, and the time that they took."""
        if not self._is_writer:
            return
        self._lines.write({"kind": "text", "step": step, "samples": samples, "seconds": seconds})
        for index, sample in enumerate(samples):
            if self._board:
                self._board.add_text(f"text/{index}", _as_code(f"{sample['prompt']} | {sample['text']}"), step)
            if index == 0:
                self._terminal.say(f"step {step:,}  sample: {sample['prompt']!a} -> {_shorten(sample['text'])}")

    def report_steps(self) -> None:
        """Write the steps that wait for their report, so that a run resumed from here has no hole."""
        if self._is_writer:
            self._report_window()

    def event(self, step: int, kind: str, message: str = "", seconds: float = 0.0, **values: float) -> None:
        """Write that something happened (saved, signal, skipped, failed), the time that it took, and other figures.

        Steps that wait for their report are written first, unless it is about an earlier step.
        """
        if not self._is_writer:
            return
        if step >= self._last_step:
            self._report_window()
        self._write_event(step, kind, message, {"seconds": seconds, **values})
        if kind == "failed":  # told once, in one line, by who ends the process
            return
        took = f"  ({seconds:.1f} s)" if seconds else ""
        self._terminal.say(f"step {step:,}  {kind}{': ' if message else ''}{message}{took}")

    def close(self) -> None:
        """Write what is left, force it to the disk and give the terminal back; a second call does nothing."""
        if not self._is_writer:
            return
        self._is_writer = False
        self._report_window()
        self._write_event(self._last_step, "ended", f"at step {self._last_step:,} of {self._total_steps:,}", {})
        self._lines.close()
        if self._board:
            self._board.close()
        self._terminal.close()

    def _start_session(self, start_step: int, num_ranks: int, start_up_seconds: float) -> None:
        session = {
            "num_ranks": num_ranks,
            "total_steps": self._total_steps,
            "tokens_per_sample": self._tokens_per_sample,
            "flops_per_sample": self._flops_per_sample,
            "peak_flops": self._peak_flops,
        }
        kind, message = ("resumed", f"after step {start_step:,}") if start_step else ("started", "")
        self._write_event(start_step, kind, message, {"seconds": start_up_seconds, "session": session})
        if self._flops_per_sample and self._peak_flops:
            figures = f"{self._flops_per_sample:.4g} FLOPs a sample, peak {self._peak_flops / 1e12:.4g} TFLOP/s"
            self._terminal.say(f"{UTILIZATION_FORMULA} ({figures} of {num_ranks} rank{'s' * (num_ranks > 1)})")

    def _report_window(self) -> None:
        if not self._window.steps:
            return
        values = self._window.averages() | self._throughput()
        self._window = _Window()
        self._write("train", self._last_step, values)
        self._terminal.report(self._last_step, values)

    def _throughput(self) -> dict[str, float | int]:
        samples_per_second = self._window.num_samples / self._window.seconds
        values: dict[str, float | int] = {"samples_per_second": samples_per_second}
        if self._tokens_per_sample:
            values["tokens_per_second"] = samples_per_second * self._tokens_per_sample
        if self._flops_per_sample and self._peak_flops:
            values["model_flops_utilization"] = self._flops_per_sample * samples_per_second / self._peak_flops
        return values | {"memory_bytes": _peak_memory_bytes()}

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._lines.write(values | {"kind": kind, "step": step})
        if self._board:
            for name, value in values.items():
                if name not in NOT_A_METRIC and value is not None:
                    self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()

    def _write_event(self, step: int, kind: str, message: str, values: dict[str, Any]) -> None:
        self._lines.write({"kind": "event", "step": step, "event": kind, "message": message} | values)


@dataclass
class _Window:
    """Sums over the steps since the last report."""

    steps: int = 0
    seconds: float = 0.0
    num_samples: int = 0
    num_targets: int = 0
    skipped: int = 0
    weighted_loss: float = 0.0
    loss_targets: int = 0
    grad_norm: float = 0.0
    grad_norm_max: float = 0.0
    last: StepRecord | None = None

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        self.seconds += record.step_seconds
        self.num_samples += record.num_samples
        self.num_targets += record.num_targets
        self.last = record
        if record.skipped:
            self.skipped += 1
            return
        self.weighted_loss += record.loss * record.num_targets
        self.loss_targets += record.num_targets
        self.grad_norm += record.grad_norm
        # A plain max() would lose a NaN; here nothing is greater than one, so it stays.
        if record.grad_norm > self.grad_norm_max or math.isnan(record.grad_norm):
            self.grad_norm_max = record.grad_norm

    def averages(self) -> dict[str, Any]:
        """Return the window's figures; loss and gradient norm are None when every step was skipped."""
        assert self.last is not None
        updates = self.steps - self.skipped
        values = {
            "loss": self.weighted_loss / self.loss_targets if self.loss_targets else None,
            "learning_rate": self.last.learning_rate,
            "grad_norm": self.grad_norm / updates if updates else None,
            "grad_norm_max": self.grad_norm_max if updates else None,
            "steps": self.steps,
            "skipped": self.skipped,
            "num_targets": self.num_targets,
            "num_samples": self.num_samples,
            "consumed_samples": self.last.consumed_samples,
            "seconds": self.seconds,
        }
        return values | ({"loss_scale": self.last.loss_scale} if self.last.loss_scale is not None else {})


class _LineWriter:
    """Append JSON lines to a file that a killed run may have left with half a line at its end."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            _cut_torn_line(path)
        self._file = path.open("a", encoding="ascii")

    def write(self, line: dict[str, Any]) -> None:
        line = {"kind": line["kind"], "step": line["step"], "time": round(time.time(), 3)} | line
        non_finite = {k: str(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        if non_finite:
            line |= dict.fromkeys(non_finite) | {"non_finite": non_finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)


def _open_tensorboard(folder: Path, start_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  the reader works without torch

    return SummaryWriter(str(folder), purge_step=start_step + 1)


def _as_code(text: str) -> str:
    """Indent, so that TensorBoard's Markdown shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _shorten(text: str, num_characters: int = 60) -> str:
    """Return the text in one line of ASCII: what a model writes must not steer the terminal."""
    return ascii(text if len(text) <= num_characters else text[:num_characters] + "...")


def _peak_memory_bytes() -> int:
    import torch  # noqa: PLC0415  the reader works without torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Terminal:
    """A progress bar where somebody watches, else one line a report; both on standard error."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._start_step = start_step
        self._total_steps = total_steps
        self._started = self._refreshed = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = _open_bar(self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, facts="", left="")
            self._bar.refresh()

    def advance(self, step: int) -> None:
        """Move the bar, but redraw it no more than twice a second."""
        now = time.monotonic()
        if self._bar and now - self._refreshed > BAR_REFRESH_SECONDS:
            self._refreshed = now
            self._bar.update(self._task, completed=step, left=self._time_left(step), refresh=True)

    def report(self, step: int, values: dict[str, Any]) -> None:
        left = self._time_left(step)
        if self._bar:
            self._bar.update(self._task, completed=step, facts=_facts(values, short=True), left=left, refresh=True)
        else:
            self.say(f"step {step:,}/{self._total_steps:,}  {_facts(values, short=False)}  {left}")

    def say(self, line: str) -> None:
        self._console.print(line)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        """Tell the time to the last step at this process's pace so far, evaluating and saving included."""
        pace_seconds = (time.monotonic() - self._started) / max(step - self._start_step, 1)
        return f"{timedelta(seconds=round(pace_seconds * (self._total_steps - step)))} left"


def _open_bar(console: Console) -> Progress:
    # One column of text, so that a narrow window cuts its end and not the step.
    text = TextColumn(
        "{task.completed:,}/{task.total:,}  {task.fields[left]}  {task.fields[facts]}",
        table_column=Column(no_wrap=True),
    )
    # No refreshing thread: it would take time from the training process between reports.
    bar = Progress(BarColumn(bar_width=16, table_column=Column(min_width=8)), text, console=console, auto_refresh=False)
    bar.start()
    return bar


def _facts(values: dict[str, Any], *, short: bool) -> str:
    parts = ["loss -" if values["loss"] is None else f"loss {values['loss']:.4f}"]
    if not short:
        norm = values["grad_norm"]
        parts += [f"lr {values['learning_rate']:.3g}", "grad norm -" if norm is None else f"grad norm {norm:.3g}"]
    unit = "tokens" if "tokens_per_second" in values else "samples"
    parts.append(f"{values[f'{unit}_per_second']:,.{0 if unit == 'tokens' else 1}f} {unit}/s")
    if "model_flops_utilization" in values:
        parts.append(f"MFU {values['model_flops_utilization']:.1%}")
    parts.append(f"{values['memory_bytes'] / 2**30:.2f} GiB")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join(parts)


def measured_peak_flops(dtype: "torch.dtype", seconds: float = 0.5) -> float:
    """Time matrix products of this dtype on this rank's device and return the best FLOP/s.

    8192 x 8192 on a GPU, which a smaller product does not fill; on a CPU up to 2048 x 2048, as far as the time allows.
    Let every rank call it at the same time: ranks that share cores then share them here too, and the ranks' peaks may
    be added up.
    """
    import torch  # noqa: PLC0415  the reader works without torch

    if torch.cuda.is_available():
        return 2 * 8192**3 / _product_seconds(8192, dtype, "cuda", seconds)
    end, best = time.perf_counter() + seconds, 0.0
    for size in (256, 512, 1024, 2048):
        remaining = end - time.perf_counter()
        if best and 2 * 2 * size**3 / best > remaining:  # twice: the first call also loads and plans
            break
        best = max(best, 2 * size**3 / _product_seconds(size, dtype, "cpu", remaining / 4))
    return best


def _product_seconds(size: int, dtype: "torch.dtype", device: str, seconds: float) -> float:
    """Return the shortest time of a product of two square matrices, tried for so many seconds, at least once."""
    import torch  # noqa: PLC0415

    left, right = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = math.inf
    end = time.perf_counter() + seconds
    with torch.no_grad():
        torch.mm(left, right, out=out)  # the first call also loads and plans
        while time.perf_counter() < end or best == math.inf:
            wait()
            begin = time.perf_counter()
            torch.mm(left, right, out=out)
            wait()
            best = min(best, time.perf_counter() - begin)
    return best


class Metrics(NamedTuple):
    """The lines of metrics.jsonl by kind; one a step for train, evaluation and text, ordered by step."""

    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    text: list[dict[str, Any]]
    events: list[dict[str, Any]]
    """All of them, in the order of the file."""
    superseded: list[dict[str, Any]]
    """What a killed session wrote about steps that a later session did again."""


def read_metrics(run_dir: Path) -> Metrics:
    """Read what a run has reported so far; all lists are empty when it has reported nothing.

    A half-written last line is left out. Raises UserError for any other line that is no JSON object.
    """
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "evaluation": {}, "text": {}}
    events: list[dict[str, Any]] = []
    superseded: list[dict[str, Any]] = []
    for line in _read_lines(run_dir / METRICS_FILE):
        if line["kind"] != "event":
            old = by_kind[line["kind"]].pop(line["step"], None)
            superseded += [old] if old else []
            by_kind[line["kind"]][line["step"]] = line
            continue
        events.append(line)
        if "session" in line:
            for lines in by_kind.values():
                superseded += [lines.pop(step) for step in sorted(lines) if step > line["step"]]
    train, evaluation, text = ([lines[step] for step in sorted(lines)] for lines in by_kind.values())
    return Metrics(train, evaluation, text, events, superseded)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *whole, _torn = path.read_bytes().split(b"\n")
    return [_parse_line(raw, f"{path}:{number}") for number, raw in enumerate(whole, start=1)]


def _parse_line(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    if not isinstance(line, dict) or line.get("kind") not in KINDS or not isinstance(line.get("step"), int):
        raise UserError(where, f"{raw[:60]!a} is no line of metrics; delete the line to read the others")
    return line


def time_spent(metrics: Metrics) -> dict[str, float]:
    """Divide the seconds of all of a run's sessions by what they were spent on; goodput is `training` over their sum.

    Waiting between sessions does not count; `other` is what nobody accounted for.
    """
    spent = {
        "training": sum(line["seconds"] for line in metrics.train),
        "repeated": sum(line["seconds"] for line in metrics.superseded if line["kind"] == "train"),
        "evaluation": sum(line["seconds"] for line in _all(metrics, "evaluation")),
        "saving": sum(line.get("seconds", 0) for line in metrics.events if line["event"] == "saved"),
        "samples of text": sum(line["seconds"] for line in _all(metrics, "text")),
        "start-up": sum(line["seconds"] for line in metrics.events if "session" in line),
    }
    return spent | {"other": max(session_seconds(metrics) + spent["start-up"] - sum(spent.values()), 0.0)}


def session_seconds(metrics: Metrics) -> float:
    """Add up the time from the first line of each session to its last."""
    times = [line["time"] for lines in metrics for line in lines]
    starts = [line["time"] for line in metrics.events if "session" in line]
    seconds = 0.0
    for start, until in itertools.pairwise([*starts, math.inf]):
        seconds += max((t for t in times if start <= t < until), default=start) - start
    return seconds


def _all(metrics: Metrics, kind: str) -> list[dict[str, Any]]:
    return [line for lines in metrics for line in lines if line["kind"] == kind]
