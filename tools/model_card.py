"""What the rungs of a model have cost and brought: on the terminal, in model_card.md and in report.html."""

import html
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core.metrics import higher_is_better
from bigbatch.tools.measure import Measurement, read_measurement
from bigbatch.tools.report_page import page

TERMINAL_WIDTH = 120  # of a table that goes into a file or a pipe
WIDTH, HEIGHT, MARGIN = 460, 300, 52  # of a picture, in its own units


class Rung(NamedTuple):
    """A verb that was run on a model, and what was measured; JSON can hold it."""

    verb: str
    format: str
    record: dict[str, Any]
    """What the verb says of what it did."""
    before: Measurement | None
    after: Measurement | None
    agreement: float | None
    """Share of the answers that are the same."""

    @property
    def drop(self) -> float:
        """What was lost: points of a hundred, or per cent of a figure that is better when lower; below 0 is a gain."""
        assert self.before is not None and self.after is not None
        before, after = self.before.figure.value, self.after.figure.value
        if not higher_is_better(self.after.figure.name):
            return 100 * (after - before) / before
        return (before - after) * (100 if max(abs(before), abs(after)) <= 1 else 1)

    @property
    def drop_unit(self) -> str:
        """The unit of `drop`."""
        assert self.after is not None
        return "points" if higher_is_better(self.after.figure.name) else "%"

    @property
    def name(self) -> str:
        """What was made, in a few words."""
        return f"{self.verb} {self.record.get('name') or self.record.get('method', '')}".rstrip()

    def document(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        measured = {"before": self.before and self.before._asdict(), "after": self.after and self.after._asdict()}
        return self._asdict() | measured

    @classmethod
    def read(cls, document: dict[str, Any]) -> "Rung":
        """Return a rung from its JSON."""
        pair: dict[str, Any] = {key: document[key] and read_measurement(document[key]) for key in ("before", "after")}
        return cls(**(document | pair))


def print_table(rungs: list[Rung]) -> None:
    """Print a row for the model that the ladder starts from and one for each rung."""
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(_columns(rungs)):
        table.add_column(name, justify="right" if index else "left")
    for row in _rows(rungs):
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else TERMINAL_WIDTH).print(table)
    for note in _notes(rungs):
        print(note)
    for rung in rungs:
        if curve := _curve(rung):
            table = Table(*_CURVE, box=None, pad_edge=False, title=f"{rung.verb} at other ratios", title_justify="left")
            for _, row in curve:
                table.add_row(*row)
            Console(width=None if console.is_terminal else TERMINAL_WIDTH).print(table)


def write_card(folder: Path, source: Any, rungs: list[Rung]) -> None:
    """Write model_card.md."""
    lines = [f"# {source.recipe_name}: {', '.join(rung.name for rung in rungs)}", ""]
    run = source.record.get("run") or {}
    if purpose := (run.get("about") or {}).get("purpose"):
        lines += [purpose, ""]
    if "parameters" in source.record:
        record = source.record
        lines += [f"{record['parameters']:,} parameters, step {record['step']:,} of {record['content_id']}.", ""]
    columns = _columns(rungs)
    lines += ["## Measured", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(rungs)]
    lines += ["", *_notes(rungs)]
    for rung in rungs:
        if curve := _curve(rung):
            lines += [
                "",
                f"## {rung.verb} at other ratios",
                "",
                f"| {' | '.join(_CURVE)} |",
                f"|{'---|' * len(_CURVE)}",
            ]
            lines += [f"| {' | '.join(row)} |" for _, row in curve]
    lines += ["", "## How it was made", ""]
    for rung in rungs:
        lines += [f"- `{rung.verb}`: {_told(rung.record)}"]
    (folder / "model_card.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_report(folder: Path, source: Any, rungs: list[Rung]) -> None:
    """Write report.html: the table, and pictures of quality against size and against latency."""
    head = "".join(f"<th>{name}</th>" for name in _columns(rungs))
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(rungs))
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(rungs))
    made = "".join(f"<li><b>{html.escape(rung.verb)}</b> {html.escape(_told(rung.record))}</li>" for rung in rungs)
    points = _points(rungs)
    pictures = "".join(
        (
            _picture("Quality and size", "MB", points, lambda one: one.num_bytes / 1e6),
            _picture("Quality and latency", "ms, batch 1", points, lambda one: one.latency["1"][0]),
        )
    )
    title = f"{source.recipe_name}: {', '.join(rung.name for rung in rungs)}"
    curves = "".join(_curve_section(rung) for rung in rungs)
    content = (
        f'<header><p class="eyebrow">bigbatch, from checkpoint to deployment</p><h1>{html.escape(title)}</h1></header>'
        f'<main><section><div class="charts">{pictures}</div></section>'
        f'<section><h2>Measured</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f"</table></div>{notes}</section>{curves}<section><h2>How it was made</h2><ul>{made}</ul></section></main>"
    )
    (folder / "report.html").write_text(page(title, content), encoding="utf-8")


def _points(rungs: list[Rung]) -> list[tuple[str, Measurement]]:
    """Return the names and measurements of the model that was begun with and of each rung."""
    measured = [rung for rung in rungs if rung.before and rung.after]
    if not measured:
        return []
    names = ["as it was", *(rung.name for rung in measured)]
    found = [*(rung.before for rung in measured), measured[-1].after]
    return [(name, one) for name, one in zip(names, found, strict=True) if one is not None]


_CURVE = ("ratio", "figure (95 %)", "parameters", "MB", "ms, batch 1 (p95)")


def _curve(rung: Rung) -> list[tuple[tuple[str, Measurement], list[str]]]:
    """Return points and rows of a rung that was done at several ratios, by ratio; 0 is the model before it."""
    record, before, after = rung.record, rung.before, rung.after
    if not record.get("curve") or before is None or after is None:
        return []
    found = [(one["ratio"], one["parameters"], read_measurement(one["measured"])) for one in record["curve"]]
    found += [(0.0, record["parameters_before"], before), (record["ratio"], record["parameters"], after)]
    points = []
    for ratio, parameters, one in sorted(found, key=lambda point: point[0]):
        _, figure, _, size, _, latency, _ = _row("", one, None)
        points.append(((f"{ratio:.0%}", one), [f"{ratio:g}", figure, f"{parameters:,}", size, latency]))
    return points


def _curve_section(rung: Rung) -> str:
    """Return a table and pictures of the curve for a page."""
    curve = _curve(rung)
    if not curve:
        return ""
    head = "".join(f"<th>{name}</th>" for name in _CURVE)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for _, row in curve)
    ratios = {id(one): 100 * float(row[0]) for (_, one), row in curve}
    points = [point for point, _ in curve]
    pictures = _picture("Quality and ratio", "% taken out", points, lambda one: ratios[id(one)])
    pictures += _picture("Quality and size", "MB", points, lambda one: one.num_bytes / 1e6)
    return (
        f'<section><h2>{html.escape(rung.verb)} at other ratios</h2><div class="charts">{pictures}</div>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _columns(rungs: list[Rung]) -> list[str]:
    points = _points(rungs)
    name = points[0][1].figure.name if points else "figure"
    return ["", f"{name} (95 %)", "same answers", "MB", "peak MB", "ms, batch 1 (p95)", "ms, batch 8 (p95)"]


def _rows(rungs: list[Rung]) -> list[list[str]]:
    if not _points(rungs):
        return []
    agreements = [None, *(rung.agreement for rung in rungs if rung.before and rung.after)]
    rows = enumerate(zip(_points(rungs), agreements, strict=True))
    return [_row(f"{index} {name}", one, share) for index, ((name, one), share) in rows]


def _row(name: str, one: Measurement, share: float | None) -> list[str]:
    figure = one.figure
    interval = f" ({figure.low:.4g} - {figure.high:.4g})" if figure.low is not None else ""
    times = ["{:.2f} ({:.2f})".format(*one.latency[size]) for size in ("1", "8")]
    same = "" if share is None else f"{share:.1%}"
    return [
        name,
        f"{figure.value:.4g}{interval}",
        same,
        f"{one.num_bytes / 1e6:.2f}",
        f"{one.peak_bytes / 1e6:.0f}",
        *times,
    ]


def _notes(rungs: list[Rung]) -> list[str]:
    measured = [rung for rung in rungs if rung.before and rung.after]
    if not measured:
        return ["Nothing was measured."]
    last = measured[-1]
    after = last.after
    assert after is not None
    lost = f"{last.drop:+.2f} {last.drop_unit}" if last.drop_unit == "%" else f"{0.0 - last.drop:+.2f} points"
    return [
        f"{after.figure.name} {lost}, {after.num_samples:,} samples of the {after.split} split; milliseconds of "
        f"{after.latency_of}, median and 95th percentile, {after.threads} thread{'s' * (after.threads > 1)}; "
        "the last two models were timed in turns."
    ]


def _told(record: dict[str, Any]) -> str:
    """Return the plain values of a record."""
    plain = {key: value for key, value in record.items() if isinstance(value, (str, int, float, bool))}
    texts = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in plain.items()}
    return ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in texts.items())


def _picture(title: str, unit: str, points: list[tuple[str, Measurement]], across: Any) -> str:
    """Draw the points with their intervals and names."""
    if not points:
        return ""
    xs = [across(one) for _, one in points]
    ends = [end for _, one in points for end in (one.figure.low, one.figure.high, one.figure.value) if end is not None]
    low, high = min(ends), max(ends)
    space = (high - low or abs(high) or 1) * 0.15
    low, high, most = low - space, high + space, max(xs) * 1.15 or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + x / most * (WIDTH - MARGIN - 16),
            HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - MARGIN - 16),
        )

    marks = []
    for index, ((_, one), x) in enumerate(zip(points, xs, strict=True)):
        left, top = place(x, one.figure.value)
        color = f"var(--series-{index % 6})"
        if one.figure.low is not None and one.figure.high is not None:
            (_, upper), (_, lower) = place(x, one.figure.high), place(x, one.figure.low)
            marks.append(f'<path d="M{left:.1f} {upper:.1f}V{lower:.1f}" stroke="{color}" stroke-width="1.5"/>')
        marks.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="9" fill="{color}"/>')
        label = f'x="{left:.1f}" y="{top + 4:.1f}" text-anchor="middle" font-weight="600"'
        marks.append(f'<text {label} fill="var(--card)">{index}</text>')
    ticks = []
    for part in (0.25, 0.5, 0.75, 1.0):
        x, _ = place(most * part / 1.15, low)
        _, y = place(0, low + (high - low) * part)
        ticks.append(
            f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{most * part / 1.15:.3g}</text>'
        )
        ticks.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{low + (high - low) * part:.3g}</text>')
        ticks.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - 16}" stroke="var(--grid)"/>')
    figure = html.escape(points[0][1].figure.name)
    head = f'<h3>{html.escape(title)} <span class="unit">{figure}; {unit}</span></h3>'
    return (
        f'<figure class="chart" style="grid-column: auto"><figcaption>{head}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT - 16}" role="img" aria-label="{html.escape(title)}" font-size="12" '
        f'fill="var(--soft)">{"".join(ticks)}{"".join(marks)}</svg></figure>'
    )
