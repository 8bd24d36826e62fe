"""The sections of a report page, as escaped HTML."""

import html
import json
import statistics
from collections.abc import Container, Iterable
from typing import Any

from bigbatch.recipes.core.report import UTILIZATION_FORMULA, Metrics, time_spent
from bigbatch.tools.report_chart import NUM_COLORS, Chart, Points, Series, compact, draw, smooth
from bigbatch.tools.report_run import Run, Summary, clock, duration, figures, summarize

# Told by the loss already: a curve of its own would be the same one, bent.
FUNCTIONS_OF_THE_LOSS = ("loss", "perplexity", "bits_per_character", "bits_per_byte", "bits_per_token")
MAX_SAMPLE_STEPS = 20
SPIKE_FACTOR = 20  # a curve whose peak is this many times its median is drawn on a logarithmic axis


def headline(run: Run, summary: Summary) -> str:
    if not run.metrics.train:
        return '<p class="panel">No training step has been reported yet.</p>'
    cards = _quality_cards(summary) + _work_cards(run, summary)
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}</dd><dd>{escape(remark)}</dd></div>" for name, value, remark in cards
    )
    return f'<dl class="facts">{listed}</dl>{_utilization_note(run, summary)}'


def _quality_cards(summary: Summary) -> list[tuple[str, str, str]]:
    """Return (name, value as HTML, remark) of what the model can do by now."""
    train = ("Training loss", _number(summary.train_loss, ".4f"), "last report")
    if not summary.evaluation:
        return [(*train[:2], "last report; not evaluated yet")]
    cards = []
    for name, value in summary.evaluation.items():
        if name != "loss":
            cards.append((_readable(name), _number(value, ".4g"), "validation, last"))
        elif summary.best_loss is None:
            cards.append(("Validation loss", "-", "never finite"))
        else:
            best = f"best {summary.best_loss:.4f} at step {summary.best_step:,}"
            cards.append(("Validation loss", _number(value, ".4f"), best))
    return [*cards, train]


def _work_cards(run: Run, summary: Summary) -> list[tuple[str, str, str]]:
    """Return (name, value as HTML, remark) of how much was done and how fast."""
    of_total = f"of {summary.total_steps:,}" if summary.total_steps else ""
    cards = [("Steps", f"{summary.last_step:,}", of_total)]
    if summary.num_tokens is not None:
        cards.append(("Tokens seen", compact(summary.num_tokens), f"{summary.num_samples:,} samples"))
    else:
        cards.append(("Samples seen", f"{summary.num_samples:,}", ""))
    if summary.tokens_per_second is not None:
        slower = f"{compact(summary.samples_per_second or 0)} samples/s"
        cards.append(("Throughput", f"{summary.tokens_per_second:,.0f} <small>tokens/s</small>", slower))
    elif summary.samples_per_second is not None:
        cards.append(("Throughput", f"{summary.samples_per_second:,.1f} <small>samples/s</small>", ""))
    if summary.utilization is not None:
        cards.append(("Model FLOPs utilization", f"{summary.utilization:.1%}", "of the measured peak"))
    memory = max(line["memory_bytes"] for line in run.metrics.train)
    goodput = "" if summary.goodput is None else f"goodput {summary.goodput:.1%}"
    cards.append(("Time", duration(summary.wall_seconds), goodput))
    repeated = len([line for line in run.metrics.superseded if line["kind"] == "train"])
    lost = f"{duration(time_spent(run.metrics)['repeated'])} of work repeated" if repeated else "nothing repeated"
    cards.append(("Restarts", f"{summary.restarts}", lost))
    return [*cards, ("Memory", f"{memory / 2**30:.2f} <small>GiB</small>", "peak of rank 0")]


def _utilization_note(run: Run, summary: Summary) -> str:
    if summary.utilization is None:
        return ""
    session = [line["session"] for line in run.metrics.events if "session" in line][-1]
    formula = UTILIZATION_FORMULA.replace(" x ", " &times; ")
    ranks = f"{session['num_ranks']} rank" + "s" * (session["num_ranks"] > 1)
    flops, peak = f"{session['flops_per_sample'] / 1e9:.4g} GFLOP", f"{session['peak_flops'] / 1e12:.4g} TFLOP/s"
    return (
        f'<p class="note">{formula}. Here: {flops} a sample (forward and backward), peak {peak}: that of the matrix '
        f"product as measured at the start on {ranks}. Throughput leaves out evaluating and saving.</p>"
    )


def curves(runs: list[Run]) -> str:
    several = len(runs) > 1
    resumed, saved = ((), ()) if several else _marks(runs[0].metrics)
    charts = [Chart("loss", "Loss", "mean over targets", _loss_series(runs), resumed, saved, offer_log=True)]
    charts.append(Chart("learning-rate", "Learning rate", "", _curve(runs, "learning_rate"), from_zero=True))
    norms = _curve(runs, "grad_norm")
    charts.append(Chart("grad-norm", "Gradient norm", "before clipping", norms, resumed, log_y=_has_spikes(norms)))
    tokens = all("tokens_per_second" in line for run in runs for line in run.metrics.train)
    speed = _curve(runs, "tokens_per_second" if tokens else "samples_per_second")
    charts.append(Chart("throughput", "Throughput", f"{'tokens' if tokens else 'samples'}/s", speed, from_zero=True))
    if any("loss_scale" in line for run in runs for line in run.metrics.train):
        charts.append(Chart("loss-scale", "Loss scale", "", _curve(runs, "loss_scale"), log_y=True))
    names = {name: None for run in runs for line in run.metrics.evaluation for name in figures(line)}
    for name in [name for name in names if name not in FUNCTIONS_OF_THE_LOSS]:
        curves = _curve(runs, name, kind="evaluation", look="dotted")
        charts.append(Chart(f"evaluation-{name}", _readable(name), "validation", curves))
    return f'<div class="charts">{"".join(draw(chart) for chart in charts)}</div>'


def _marks(metrics: Metrics) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the steps where the run was resumed, and those where it was saved."""
    resumed = {line["step"] for line in metrics.events if "session" in line and line["step"] > 0}
    saved = {line["step"] for line in metrics.events if line["event"] == "saved"}
    return tuple(sorted(resumed)), tuple(sorted(saved))


def _loss_series(runs: list[Run]) -> list[Series]:
    """Draw each run's loss faint as reported, and over it smoothed; validation as dots."""
    result = []
    several = len(runs) > 1
    for color, run in enumerate(runs):
        points = _points(run.metrics.train, "loss")
        smoothed = len(points) >= 20
        if smoothed and not several:
            result.append(Series("training", points, color, "faint"))
        name = run.name if several else "training, smoothed" if smoothed else "training"
        result.append(Series(name, smooth(points) if smoothed else points, color))
        name = f"{run.name}, validation" if several else "validation"
        validation = _points(run.metrics.evaluation, "loss")
        result.append(Series(name, validation, color if several else 1, "dotted"))
    return result


def _curve(runs: list[Run], name: str, kind: str = "train", look: str = "line") -> list[Series]:
    series = []
    for color, run in enumerate(runs):
        points = _points(getattr(run.metrics, kind), name)
        series.append(Series(run.name if len(runs) > 1 else "", points, color, look))
    return series


def _points(lines: list[dict[str, Any]], name: str) -> Points:
    return [(line["step"], line.get(name)) for line in lines]


def _has_spikes(curves: list[Series]) -> bool:
    values = [value for series in curves for _, value in series.points if value is not None]
    return bool(values) and max(values) > SPIKE_FACTOR * statistics.median(values) > 0


def time_bar(run: Run) -> str:
    spent = time_spent(run.metrics)
    total = sum(spent.values())
    if not total:
        return '<p class="panel">Nothing has been timed yet.</p>'
    parts = [(name, seconds, color) for color, (name, seconds) in enumerate(spent.items()) if seconds > 0]
    bar = "".join(f'<i class="c{color}" style="flex:{seconds / total:.5f}"></i>' for _, seconds, color in parts)
    items = "".join(
        f'<li><i class="c{color}"></i>{escape(name.capitalize())}<b>{duration(seconds)}</b>'
        f"<small>{seconds / total:.1%}</small></li>"
        for name, seconds, color in parts
    )
    return (
        f'<div class="panel"><div class="bar">{bar}</div><ul class="shares">{items}</ul>'
        f'<p class="note">Goodput is the share of training that counted: {spent["training"] / total:.1%} of '
        f"{duration(total)}. Repeated is what a session did after its last checkpoint and a later one did again. "
        "Time between sessions is left out.</p></div>"
    )


def text_samples(run: Run) -> str:
    lines = run.metrics.text[::-1]
    if not lines:
        return '<p class="panel">No samples of text have been generated yet.</p>'
    blocks = []
    for number, line in enumerate(lines[:MAX_SAMPLE_STEPS]):
        texts = "".join(_sample(sample["prompt"], sample["text"]) for sample in line["samples"])
        summary = f"<summary>Step {line['step']:,}</summary>"
        blocks.append(f"<details{' open' if number == 0 else ''}>{summary}<div>{texts}</div></details>")
    left_out = len(lines) - MAX_SAMPLE_STEPS
    note = f'<p class="note">{left_out} earlier steps are in metrics.jsonl.</p>' if left_out > 0 else ""
    return "".join(blocks) + note


def _sample(prompt: str, text: str) -> str:
    continuation = text.removeprefix(prompt)
    return f'<div class="text"><b>{escape(prompt)}</b>{escape(continuation)}</div>'


def setting_tree(document: dict[str, Any] | None, name: str) -> str:
    """Show a JSON document: what stands at its top in one table, then a table for each group, each to be folded."""
    if not document:
        return f'<p class="panel">There is no {name} in this run folder.</p>'
    groups = {key: value for key, value in document.items() if isinstance(value, dict) and value}
    top = {key: value for key, value in document.items() if key not in groups}
    tables = [("general", _flatten(top))] if top else []
    tables += [(key, _flatten(value)) for key, value in groups.items()]
    parts = (f"<details open><summary>{escape(key)}</summary>{_settings(rows)}</details>" for key, rows in tables)
    return f'<div class="panel tree">{"".join(parts)}</div>'


def _settings(rows: dict[str, Any]) -> str:
    body = "".join(f"<tr><th>{_breakable(key)}</th>{_setting(value)}</tr>" for key, value in rows.items())
    return f'<table class="settings"><tbody>{body}</tbody></table>'


def _setting(value: object) -> str:
    unset = ' class="unset"' if value is None else ""
    return f"<td{unset}>{escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}</td>"


def _breakable(key: str) -> str:
    """Escape, and let the browser break the line after a dot or an underscore."""
    return escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested objects into one of dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def event_table(events: list[dict[str, Any]]) -> str:
    if not events:
        return '<p class="panel">Nothing has happened yet.</p>'
    rows = "".join(
        f'<tr><td class="time">{clock(line["time"])}</td><td class="number">{line["step"]:,}</td>'
        f"<th>{escape(line['event'])}</th><td>{escape(line['message'])}</td>"
        f'<td class="number">{duration(line["seconds"]) if line.get("seconds") else ""}</td></tr>'
        for line in events
    )
    head = _row(["Time", "Step", "Event", "What", "Took"], number_columns=(1, 4))
    return f'<div class="panel scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _row(names: Iterable[str], number_columns: Container[int] = ()) -> str:
    """Make a table's head; numbers stand to the right."""
    cells = (
        f'<th class="number">{escape(name)}</th>' if column in number_columns else f"<th>{escape(name)}</th>"
        for column, name in enumerate(names)
    )
    return f"<tr>{''.join(cells)}</tr>"


def comparison_table(runs: list[Run]) -> str:
    summaries = [summarize(run) for run in runs]
    extra = list({name: None for summary in summaries for name in summary.evaluation})
    extra = [name for name in extra if name not in FUNCTIONS_OF_THE_LOSS]
    speed_unit = "tokens/s" if all(summary.tokens_per_second for summary in summaries) else "samples/s"
    names = ["Run", "State", "Validation loss", "Best", *map(_readable, extra), "Training loss", "Steps", "Tokens"]
    names += [speed_unit, "MFU", "Time", "Goodput"]
    head = _row(names, number_columns=range(2, len(names)))
    rows = []
    for color, (run, s) in enumerate(zip(runs, summaries, strict=True)):
        speed = s.tokens_per_second if speed_unit == "tokens/s" else s.samples_per_second
        cells = [_number(s.evaluation.get("loss"), ".4f"), _number(s.best_loss, ".4f")]
        cells += [_number(s.evaluation.get(name), ".4g") for name in extra]
        cells += [_number(s.train_loss, ".4f"), f"{s.last_step:,}", compact(s.num_tokens) if s.num_tokens else "-"]
        cells += [_number(speed, ",.0f"), _number(s.utilization, ".1%"), duration(s.wall_seconds)]
        cells.append(_number(s.goodput, ".1%"))
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        name = f'<th class="c{color % NUM_COLORS}"><i></i>{escape(run.name)}</th>'
        rows.append(f"<tr>{name}<td>{escape(s.state)}</td>{numbers}</tr>")
    table = f'<table class="compare"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="panel scroll">{table}</div>'


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def difference_table(runs: list[Run]) -> str:
    flats = [_flatten(run.document) for run in runs]
    keys = list({key: None for flat in flats for key in flat})
    differing = [key for key in keys if any(flat.get(key) != flats[0].get(key) for flat in flats)]
    if not differing:
        return '<p class="panel">The run documents are the same.</p>'
    rows = "".join(
        f"<tr><th>{_breakable(key)}</th>"
        + "".join(_setting(flat[key]) if key in flat else "<td>-</td>" for flat in flats)
        + "</tr>"
        for key in differing
    )
    head = _row(["Setting", *(run.name for run in runs)])
    return (
        f'<div class="panel scroll"><table class="settings compare"><thead>{head}</thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def escape(value: object) -> str:
    return html.escape(str(value))


def _readable(name: str) -> str:
    return name.replace("_", " ").capitalize()
