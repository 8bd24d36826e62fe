"""How good entities and relations are: F1 of whole entities by seqeval, and SemEval-2010 task 8's official rule."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigbatch.recipes.core.metrics import bootstrap_intervals

_DIRECTED = re.compile(r"(?P<name>.+)\((?:e1,e2|e2,e1)\)")


def entity_figures(gold: list[list[str]], given: list[list[str]]) -> dict[str, float]:
    """Return precision, recall and F1 over all entities, each right only as a whole with its type, and F1 by type.

    As conlleval counts: I- without B- before it begins an entity. A quotient of nothing by nothing is 0.
    """
    from seqeval.metrics import sequence_labeling  # noqa: PLC0415 - brings scikit-learn

    score: Any = sequence_labeling.precision_recall_fscore_support
    kinds = sorted({tag[2:] for row in gold for tag in row if tag != "O"})
    if not kinds and all(tag == "O" for row in given for tag in row):
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    precision, recall, f1, _ = score(gold, given, average="micro", zero_division=0)
    found = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    every = sorted({tag[2:] for rows in (gold, given) for row in rows for tag in row if tag != "O"})
    by_kind = dict(zip(every, score(gold, given, average=None, zero_division=0)[2], strict=True))
    return found | {f"f1/{kind}": float(by_kind[kind]) for kind in kinds}


def entity_counts(gold: list[list[str]], given: list[list[str]]) -> np.ndarray:
    """Return of each sentence how many entities are right, given and there [N, 1, 3]."""
    from seqeval.metrics.sequence_labeling import get_entities  # noqa: PLC0415

    pairs = [(set(get_entities(right)), set(get_entities(found))) for right, found in zip(gold, given, strict=True)]
    return np.array([[[len(right & found), len(found), len(right)]] for right, found in pairs])


def relation_figures(gold: Sequence[str], given: Sequence[str], none: str) -> dict[str, float]:
    """Return the official macro F1 of SemEval-2010 task 8, and what it is made of.

    The mean over the relations but `none` of the F1 of each, both directions together, where one with the wrong
    direction is given and there, and is not right: "(9+1)-way evaluation taking directionality into account",
    https://aclanthology.org/S10-1006, section 4.2. Also accuracy over all labels.
    """
    names, counts = relation_counts(gold, given, none)
    precision, recall, f1 = _rates(counts.sum(0))
    found = {"relation_f1": float(f1.mean()), "precision": float(precision.mean()), "recall": float(recall.mean())}
    found["accuracy"] = float(np.mean(np.array(gold) == np.array(given)))
    return found | {f"f1/{name}": float(value) for name, value in zip(names, f1, strict=True)}


def relation_counts(gold: Sequence[str], given: Sequence[str], none: str) -> tuple[list[str], np.ndarray]:
    """Return the relations that are there, whatever their direction, and which is right, given and there [N, K, 3]."""
    names = sorted({undirected(label) for label in gold} - {none})
    there, found = (np.array([undirected(label) for label in labels]) for labels in (gold, given))
    is_there, is_given = there[:, None] == names, found[:, None] == names
    is_right = is_there & (np.array(gold) == np.array(given))[:, None]
    return names, np.stack([is_right, is_given, is_there], -1)


def undirected(label: str) -> str:
    """Return a relation's name without its direction."""
    found = _DIRECTED.fullmatch(label)
    return found["name"] if found else label


def interval(counts: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of the mean F1 of counts [N, K, 3] whose rows are drawn with replacement.

    The same for the same rows.
    """
    return bootstrap_intervals(len(counts), lambda rows: {"f1": float(_rates(counts[rows].sum(0))[2].mean())})["f1"]


def _rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 [K] of counts [K, 3] of right, given and there."""
    right, given, there = counts.astype(np.float64).T
    sums = given + there
    zero = np.zeros(len(counts))
    precision, recall = (np.divide(right, of, out=zero.copy(), where=of > 0) for of in (given, there))
    return precision, recall, np.divide(2 * right, sums, out=zero.copy(), where=sums > 0)
