"""Draw line charts as SVG that keeps sharp at any width and needs no script; a script may add the read-out.

The curves live in a square of 1000 x 1000 that is stretched to the plot, with strokes that do not stretch; every label
is HTML beside it, placed in percent, so that text keeps its size on a narrow screen.
"""

import html
import itertools
import json
import math
from typing import Any, NamedTuple

SQUARE = 1000
MAX_POINTS = 1200
NUM_COLORS = 6

Points = list[tuple[int, float | None]]  # (step, value); None is a gap


class Series(NamedTuple):
    """One curve."""

    name: str
    points: Points
    color: int
    look: str = "line"
    """line, faint, or dotted (a line with a dot at each point)."""


class Chart(NamedTuple):
    """What is to be seen in one figure."""

    key: str
    """Becomes the figure's id."""
    title: str
    unit: str
    series: list[Series]
    resumed: tuple[int, ...] = ()
    """Steps after which a run went on."""
    saved: tuple[int, ...] = ()
    """Steps of checkpoints."""
    from_zero: bool = False
    log_y: bool = False
    offer_log: bool = False
    """Let the reader switch to logarithmic axes."""


class Axis(NamedTuple):
    """A range and how it maps to 0..1."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where the value lies between low (0) and high (1)."""
        if self.log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def draw(chart: Chart) -> str:
    """Return a <figure>; a plain sentence stands in it when there is nothing to draw."""
    series = [s._replace(points=thin_out(s.points)) for s in chart.series if any(v is not None for _, v in s.points)]
    name = html.escape(chart.key)
    head = f'<h3>{html.escape(chart.title)} <span class="unit">{html.escape(chart.unit)}</span></h3>'
    if not series:
        return f'<figure class="chart" id="{name}"><figcaption>{head}</figcaption><p>Nothing to show yet.</p></figure>'
    chart = chart._replace(series=series)
    steps = [step for s in series for step, _ in s.points]
    toggle = box = log_plot = ""
    if chart.offer_log and max(steps) > max(min(steps), 1):
        box = f'<input type="checkbox" class="use-log" id="{name}-log">'
        toggle = f'<label class="toggle" for="{name}-log">log axes</label>'
        log_plot = _plot(chart, log_axis(max(min(steps), 1), max(steps)), _value_axis(chart, log=True), "log")
    plot = _plot(chart, step_axis(min(steps), max(steps)), _value_axis(chart, log=chart.log_y), "linear")
    # The curves' numbers for the read-out; `<` is written so that no text can end the script element.
    data = json.dumps([[s.name, s.color, s.look, s.points] for s in series]).replace("<", "\\u003c")
    return (
        f'<figure class="chart" id="{name}">{box}<figcaption>{head}{_legend(chart)}{toggle}</figcaption>'
        f'{plot}{log_plot}<script type="application/json">{data}</script></figure>'
    )


def _plot(chart: Chart, x_axis: Axis, y_axis: Axis, kind: str) -> str:
    low, high = x_axis.low, x_axis.high
    lines = "".join(f"M0 {_down(y_axis, tick)}H{SQUARE}" for tick in y_axis.ticks)
    resumed = "".join(f"M{_across(x_axis, step)} 0V{SQUARE}" for step in chart.resumed if low <= step <= high)
    saved = "".join(f"M{_across(x_axis, step)} {SQUARE}h0" for step in chart.saved if low <= step <= high)
    paths = "".join(_paths(series, x_axis, y_axis) for series in chart.series)
    label = html.escape(f"{chart.title} by step, {chart.unit}")
    y_labels = "".join(
        f'<span style="top:{100 - 100 * y_axis.place(tick):.2f}%">{compact(tick)}</span>' for tick in y_axis.ticks
    )
    x_labels = "".join(
        f'<span style="left:{100 * x_axis.place(tick):.2f}%">{compact(tick)}</span>' for tick in x_axis.ticks
    )
    axes = json.dumps([low, high, x_axis.log, y_axis.low, y_axis.high, y_axis.log])
    return (
        f'<div class="plot {kind}"><div class="y">{y_labels}</div><div class="area" data-axes="{axes}">'
        f'<svg viewBox="0 0 {SQUARE} {SQUARE}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<path class="grid" d="{lines}"/><path class="resumed" d="{resumed}"/>{paths}<path class="saved" d="{saved}"/>'
        f'</svg></div><div class="x">{x_labels}<em>step</em></div></div>'
    )


def _paths(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    """Return the curve's path, broken where a value is missing, and one with its dots."""
    places = [None if v is None else f"{_across(x_axis, x)} {_down(y_axis, v)}" for x, v in series.points]
    line, pen = [], "M"
    for place in places:
        if place:
            line.append(pen + place)
        pen = "L" if place else "M"
    look = html.escape(series.look)
    path = f'<path class="c{series.color % NUM_COLORS} {look}" d="{"".join(line)}"/>'
    known = [place for place in places if place]
    if series.look != "dotted" and len(known) > 1:
        return path
    return path + f'<path class="c{series.color % NUM_COLORS} dots" d="{"".join(f"M{place}h0" for place in known)}"/>'


def _across(axis: Axis, step: float) -> str:
    return f"{SQUARE * axis.place(step):.5g}"


def _down(axis: Axis, value: float) -> str:
    return f"{SQUARE * (1 - axis.place(value)):.5g}"


def _legend(chart: Chart) -> str:
    items = [(f"c{s.color % NUM_COLORS} {s.look}", s.name) for s in chart.series if s.name]
    items += [("resumed", "resumed")] if chart.resumed else []
    items += [("saved", "checkpoint")] if chart.saved else []
    if len(items) < 2:
        return ""
    return "<ul>" + "".join(f'<li><i class="{look}"></i>{html.escape(name)}</li>' for look, name in items) + "</ul>"


def _value_axis(chart: Chart, *, log: bool) -> Axis:
    values = [value for s in chart.series for _, value in s.points if value is not None]
    low, high = min(values), max(values)
    if log and low > 0 and high > low:
        return log_axis(low, high)
    return linear_axis(min(low, 0.0) if chart.from_zero else low, high, whole_steps=True)


def step_axis(low: int, high: int) -> Axis:
    """Return an axis that begins and ends with the data."""
    return linear_axis(low, high, whole_steps=False)


def linear_axis(low: float, high: float, *, whole_steps: bool, num_ticks: int = 5) -> Axis:
    """Return an axis with ticks at 1, 2 or 5 times a power of ten; `whole_steps` widens the range to the next ticks."""
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    # Rounded first: 0.3 / 0.1 is a little less than 3.
    first, last = round(low / step, 6), round(high / step, 6)
    if whole_steps:
        first, last = math.floor(first), math.ceil(last)
        low, high = first * step, last * step
    return Axis(low, high, False, tuple(n * step for n in range(math.ceil(first), math.floor(last) + 1)))


def log_axis(low: float, high: float) -> Axis:
    """Return an axis over powers of ten, with numbers between them when there are few. Needs 0 < low < high."""
    if high < 10 * low:
        return linear_axis(low, high, whole_steps=False)._replace(log=True)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = (factor * 10.0**decade for decade in decades for factor in factors)
    return Axis(low, high, True, tuple(tick for tick in ticks if low <= tick <= high))


def thin_out(points: Points, max_points: int = MAX_POINTS) -> Points:
    """Keep the lowest and the highest point of each stretch, so that no peak is lost."""
    if len(points) <= max_points:
        return points
    stretch = math.ceil(2 * len(points) / max_points)
    kept: Points = []
    for begin in range(0, len(points), stretch):
        known = [p for p in points[begin : begin + stretch] if p[1] is not None]
        if known:
            kept += sorted({min(known, key=_value), max(known, key=_value)})
        else:
            kept.append(points[begin])
    return kept


def _value(point: tuple[int, float | None]) -> Any:
    return point[1]


def smooth(points: Points) -> Points:
    """Average over about a fortieth of the curve around each point, and over less near its ends: no lag, no pull."""
    known = [(step, value) for step, value in points if value is not None]
    sums = list(itertools.accumulate((value for _, value in known), initial=0.0))
    reach = max(len(known) // 80, 2)
    result: Points = []
    for index, (step, _) in enumerate(known):
        half = min(reach, index, len(known) - 1 - index)
        result.append((step, (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)))
    return result


def compact(value: float) -> str:
    """Write a number in few characters: 12k, 1.5M, 3e-4.

    >>> [compact(v) for v in (0, 0.25, 1000, 1_500_000, 3e-4)]
    ['0', '0.25', '1k', '1.5M', '3e-4']
    """
    size = abs(value)
    if 0 < size < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for bound, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= bound:
            return f"{value / bound:.4g}{letter}"
    return f"{value:.4g}"
