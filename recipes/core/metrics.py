"""Figures of classification: scikit-learn's, the calibration error, and how sure the main ones are.

Shapes: N examples, C labels, S bootstrap samples, K different outcomes (what an example is and what it is taken for).
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbatch.recipes.core.errors import one_line

CONFIDENCE, BOOTSTRAP_SAMPLES = 0.95, 1000
RATES = ("precision", "recall", "f1")
CALIBRATION_BINS = 15
MAX_FLAT_LABELS = 20  # up to so many, each label's figures are scalars too, to stop a run by
SHOWN_LABELS = 20
SHOWN_CONFUSIONS = 10
NUMBERS_AT_ONCE = 2**22
LOWER_IS_BETTER = ("loss", "perplexity", "bits", "calibration_error", "word_err", "character_err", "sentence_err")


class ClassificationFigures(NamedTuple):
    """What is known about a classifier's answers; JSON can hold it."""

    names: list[str]
    """The labels, in the order of the model's outputs."""
    scalars: dict[str, float]
    """accuracy (multi_label: subset_accuracy), f1_macro, ...; of few labels also f1/<label>, precision/<label>, ..."""
    intervals: dict[str, tuple[float, float]]
    """Of some of the scalars."""
    confidence: float
    """With what probability an interval holds the figure of another sample of the same kind."""
    per_class: dict[str, dict[str, float]]
    """precision, recall and f1, each by label."""
    support: dict[str, int]
    """Examples that have the label."""
    confusion: list[list[int]]
    """[C][C] examples by what they are and what they are taken for; empty with multi_label."""
    notes: list[str]
    """What could not be computed, and why."""


def classification_figures(
    probabilities: np.ndarray,  # [N, C]
    labels: np.ndarray,  # [N], or with multi_label [N, C]
    names: Sequence[str],
    multi_label: bool = False,
    threshold: float = 0.5,
    bootstrap_samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> ClassificationFigures:
    """Judge a classifier by its probabilities.

    A quotient of nothing by nothing is 0; macro averages are over the labels that an example has or is given. Intervals
    are percentiles over resampled examples, the same for the same examples in any order.
    """
    library, names, every_label = _scikit_learn(), list(names), np.arange(len(names))
    if multi_label:
        truth, predicted = labels.astype(bool), probabilities >= threshold
        is_there, is_given = truth, predicted  # [N, C]
        calibration = calibration_error(probabilities, truth)
    else:
        truth, predicted = labels, probabilities.argmax(1)
        is_there, is_given = truth[:, None] == every_label, predicted[:, None] == every_label  # [N, C]
        calibration = calibration_error(probabilities.max(1), truth == predicted)
    accuracy_name = "subset_accuracy" if multi_label else "accuracy"
    per_class, averages = _rates(truth, predicted, (is_there | is_given).sum(0) > 0, names)
    ranking, notes = _ranking(probabilities, is_there, names, multi_label)
    scalars = {accuracy_name: float(library.accuracy_score(truth, predicted))} | averages | ranking
    scalars["calibration_error"] = calibration
    if len(names) <= MAX_FLAT_LABELS:
        scalars |= {f"{rate}/{name}": value for rate, values in per_class.items() for name, value in values.items()}
    return ClassificationFigures(
        names=names,
        scalars=scalars,
        intervals=_intervals(is_there, is_given, names, accuracy_name, bootstrap_samples, seed, confidence),
        confidence=confidence,
        per_class=per_class,
        support=dict(zip(names, is_there.sum(0).tolist(), strict=True)),
        confusion=[] if multi_label else library.confusion_matrix(truth, predicted, labels=every_label).tolist(),
        notes=notes,
    )


def _scikit_learn() -> Any:
    """Import what takes a second, and only an evaluation needs."""
    from sklearn import metrics  # noqa: PLC0415

    return metrics


def higher_is_better(metric: str) -> bool:
    """Tell the direction of a figure by its name."""
    return not metric.startswith(LOWER_IS_BETTER)


def bootstrap_intervals(
    count: int, figures: Callable[[np.ndarray], dict[str, float]], num_samples: int = BOOTSTRAP_SAMPLES
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of the figures of so many rows, whose numbers are drawn with replacement.

    The same for the same rows.
    """
    generator = np.random.default_rng(0)
    drawn = [figures(generator.integers(count, size=count)) for _ in range(num_samples)]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    found = {name: np.quantile([one[name] for one in drawn], tails).tolist() for name in drawn[0]}
    return {name: (low, high) for name, (low, high) in found.items()}


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Return the expected calibration error of predictions, with what came of each: https://arxiv.org/abs/1706.04599,
    equation 3.
    """
    probabilities, outcomes = probabilities.ravel().astype(np.float64), outcomes.ravel()
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    bins = np.searchsorted(edges, probabilities)  # a bin has its upper edge
    gaps = np.bincount(bins, outcomes) - np.bincount(bins, probabilities)
    return float(np.abs(gaps).sum() / len(probabilities))


def _rates(
    truth: np.ndarray, predicted: np.ndarray, occurs: np.ndarray, names: list[str]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return precision, recall and F1 of each label, and their averages over the labels that occur and over all."""
    score = _scikit_learn().precision_recall_fscore_support
    known = None if truth.ndim == 2 else np.arange(len(names))
    if truth.ndim == 2:  # with an empty column beside it, a lone one is not read as two classes
        truth, predicted = (np.pad(array, ((0, 0), (0, 1))) for array in (truth, predicted))
    each = score(truth, predicted, labels=known, average=None, zero_division=0.0)
    micro = score(truth, predicted, average="micro", zero_division=0.0)
    per_class, averages = {}, {}
    for rate, values, average in zip(RATES, each, micro, strict=False):  # each ends with the support
        own = values[: len(names)]
        per_class[rate] = dict(zip(names, own.tolist(), strict=True))
        averages[f"{rate}_macro"] = float(own[occurs].mean()) if occurs.any() else 0.0
        averages[f"{rate}_micro"] = float(average)
    return per_class, averages


def _ranking(
    probabilities: np.ndarray, is_there: np.ndarray, names: list[str], multi_label: bool
) -> tuple[dict[str, float], list[str]]:
    """Return AUROC, of two labels the second's, else the mean of each against the rest; and average precision."""
    columns = range(len(names)) if multi_label or len(names) > 2 else (1,)
    support = is_there.sum(0)
    is_mixed = (support > 0) & (support < len(is_there))
    defined = [column for column in columns if is_mixed[column]]
    scores, scalars = _scikit_learn(), {}
    figures = ["auroc", "average_precision"] if multi_label else ["auroc"]
    for name, score in zip(figures, (scores.roc_auc_score, scores.average_precision_score), strict=False):
        values = [score(is_there[:, column], probabilities[:, column]) for column in defined]
        scalars |= {name: float(np.mean(values))} if values else {}
    left_out = [names[column] for column in columns if not is_mixed[column]]
    if not left_out:
        return scalars, []
    shown = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
    return scalars, [f"{' and '.join(figures)} without {shown}: no example has the label, or every one"]


def _intervals(
    is_there: np.ndarray,
    is_given: np.ndarray,
    names: list[str],
    accuracy_name: str,
    num_samples: int,
    seed: int,
    confidence: float,
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of the accuracy, the macro F1 and, of few labels, each one's F1."""
    if num_samples == 0:
        return {}
    blocks = list(_resampled(is_there, is_given, num_samples, seed))
    accuracy, f1 = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    figures = {accuracy_name: accuracy, "f1_macro": np.ma.mean(np.ma.masked_invalid(f1), 1).filled(0.0)}
    if len(names) <= MAX_FLAT_LABELS:
        figures |= {f"f1/{name}": f1[:, column][~np.isnan(f1[:, column])] for column, name in enumerate(names)}
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    found = {name: np.quantile(values, tails).tolist() for name, values in figures.items() if len(values)}
    return {name: (low, high) for name, (low, high) in found.items()}


def _resampled(
    is_there: np.ndarray, is_given: np.ndarray, num_samples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield accuracy [S] and each label's F1 [S, C] (NaN where nothing has it) of resampled examples, in blocks.

    To draw N examples with replacement is to draw how often each different outcome occurs: a multinomial, small where
    the labels are few.
    """
    num_labels = is_there.shape[1]
    packed = np.packbits(np.concatenate([is_there, is_given], axis=1), axis=1)
    kinds, counts = np.unique(packed, axis=0, return_counts=True)
    outcomes = np.unpackbits(kinds, axis=1, count=2 * num_labels).astype(bool)  # [K, 2 C]
    there, given = outcomes[:, :num_labels], outcomes[:, num_labels:]
    hits = (there & given).astype(np.float64)
    sizes = there.astype(np.float64) + given  # [K, C]
    is_right = (there == given).all(1)
    generator, num_examples = np.random.default_rng(seed), len(is_there)
    block = max(1, NUMBERS_AT_ONCE // len(counts))
    for begin in range(0, num_samples, block):
        size = min(block, num_samples - begin)
        draws = generator.multinomial(num_examples, counts / num_examples, size).astype(np.float64)  # [S, K]
        totals = draws @ sizes
        f1 = np.divide(2 * (draws @ hits), totals, out=np.full(totals.shape, np.nan), where=totals > 0)
        yield draws @ is_right / num_examples, f1


def render(figures: ClassificationFigures) -> str:
    """Return the figures as tables for a terminal: of many labels those with the lowest F1."""
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    written = io.StringIO()
    console = Console(file=written, width=100, color_system=None)
    overall = [name for name in figures.scalars if "/" not in name]
    rows = [[name, f"{figures.scalars[name]:.4f}", _interval(figures, name)] for name in overall]
    console.print(_table(["figure", "value", f"{figures.confidence:.0%} interval"], rows))
    by_f1 = sorted(figures.names, key=lambda name: figures.per_class["f1"][name])
    labels = figures.names if len(by_f1) <= SHOWN_LABELS else by_f1[:SHOWN_LABELS]
    rates = [[f"{figures.per_class[rate][name]:.4f}" for rate in RATES] for name in labels]
    rows = [
        [name, *rate, _interval(figures, f"f1/{name}"), f"{figures.support[name]:,}"]
        for name, rate in zip(labels, rates, strict=True)
    ]
    console.print()
    console.print(_table(["label", *RATES, "f1 interval", "examples"], rows))
    if len(labels) < len(by_f1):
        console.print(Text(f"the {len(labels)} labels of {len(by_f1)} with the lowest f1"))
    if confusions := _worst_confusions(figures):
        console.print()
        console.print(_table(["is", "taken for", "times"], confusions))
    for note in figures.notes:
        console.print(Text(one_line(note)))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def _table(titles: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False)
    for title in titles:
        is_name = title in ("figure", "label", "is", "taken for")
        table.add_column(title, justify="left" if is_name else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))  # a label is not to be read as markup
    return table


def _interval(figures: ClassificationFigures, name: str) -> str:
    return "{:.4f} - {:.4f}".format(*figures.intervals[name]) if name in figures.intervals else ""


def _worst_confusions(figures: ClassificationFigures) -> list[list[str]]:
    cells = [
        (count, figures.names[true], figures.names[given])
        for true, row in enumerate(figures.confusion)
        for given, count in enumerate(row)
        if true != given and count
    ]
    worst = sorted(cells, key=lambda cell: -cell[0])[:SHOWN_CONFUSIONS]
    return [[true, given, f"{count:,}"] for count, true, given in worst]
