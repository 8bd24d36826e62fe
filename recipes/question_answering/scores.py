"""Exact match and F1 as SQuAD's rules have them, and the F1 of exact spans.

Published in https://arxiv.org/abs/1606.05250, section 6.1, and https://arxiv.org/abs/1806.03822: texts are compared in
small letters, without punctuation, articles and further spaces, with the gold answer that agrees best; where there is
none, only no answer is right. N questions.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bigbatch.recipes.core.metrics import BOOTSTRAP_SAMPLES, bootstrap_intervals

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Judged(NamedTuple):
    """What is known of each question's best answer; `null` is what giving none would be worth."""

    exact: np.ndarray  # float64 [N]
    f1: np.ndarray  # [N]
    null: np.ndarray  # [N] 1 where there is no answer
    is_span: np.ndarray  # bool [N], stands exactly where a gold answer does
    margins: np.ndarray  # [N], of the score of none over the best answer's; minus infinity where none is no choice


def normalized(text: str) -> str:
    """Return what texts that count as equal share."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1 where an answer equals one of the right ones, else 0."""
    return float(any(normalized(answer) == normalized(gold) for gold in _worded(golds)))


def word_f1(answer: str, golds: Sequence[str]) -> float:
    """Return the F1 of the answer's words against those of the right answer that agrees best."""
    return max(_word_f1(normalized(answer).split(), normalized(gold).split()) for gold in _worded(golds))


def _worded(golds: Sequence[str]) -> Sequence[str]:
    """Return the answers of which something is left when normalized; that there is none is the answer ""."""
    return [gold for gold in golds if normalized(gold)] or [""]


def _word_f1(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


def fit_threshold(judged: Judged) -> float:
    """Return the threshold on the margins with the best mean F1; half-way between two margins, or 1 beyond the last."""
    order = np.argsort(judged.margins, kind="stable")
    margins = judged.margins[order]
    gains = (judged.f1 - judged.null)[order]  # of answering this one too
    sums = np.concatenate([[0.0], np.cumsum(gains)])  # where the first so many are answered
    sums[1:-1][margins[1:] == margins[:-1]] = -np.inf  # equal ones are answered together
    best = int(sums.argmax())
    if best == 0:
        return float(margins[0] - 1)
    return float(margins[-1] + 1 if best == len(margins) else (margins[best - 1] + margins[best]) / 2)


def score(judged: Judged, threshold: float, groups: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return the figures where no answer is given to questions whose margin exceeds the threshold.

    span_precision, span_recall and span_f1 count an answer as right where it stands exactly where a gold answer does;
    span_f1/<group> does so among a group's questions, and span_f1_macro is the mean of those (both where groups are
    named). f1_with_answer and f1_without_answer are of the questions that have one, and none, where some have none.
    """
    answers = judged.margins <= threshold
    has_answer = judged.null == 0
    f1 = np.where(answers, judged.f1, judged.null)
    figures = {"exact_match": float(np.where(answers, judged.exact, judged.null).mean()), "f1": float(f1.mean())}
    if not has_answer.all():
        figures["f1_without_answer"] = float(f1[~has_answer].mean())
        if has_answer.any():
            figures["f1_with_answer"] = float(f1[has_answer].mean())
    right = answers & judged.is_span
    hits, given, there = (int(which.sum()) for which in (right, answers, has_answer))
    figures |= {"span_precision": hits / max(1, given), "span_recall": hits / max(1, there)}
    figures["span_f1"] = 2 * hits / max(1, given + there)
    if names:
        for name in names:
            own = groups == name
            both = int((answers & own).sum() + (has_answer & own).sum())
            figures[f"span_f1/{name}"] = 2 * int((right & own).sum()) / max(1, both)
        figures["span_f1_macro"] = float(np.mean([figures[f"span_f1/{name}"] for name in names]))
    return figures


def intervals(judged: Judged, threshold: float, num_samples: int = BOOTSTRAP_SAMPLES) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of exact match and F1, over resampled questions."""
    answers = judged.margins <= threshold
    values = {"exact_match": judged.exact, "f1": judged.f1}
    values = {name: np.where(answers, found, judged.null) for name, found in values.items()}

    def means(rows: np.ndarray) -> dict[str, float]:
        return {name: float(found[rows].mean()) for name, found in values.items()}

    return bootstrap_intervals(len(answers), means, num_samples)
