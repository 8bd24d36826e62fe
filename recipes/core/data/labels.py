"""Which labels rows have, in the order of a model's outputs."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

from bigbatch.recipes.core.data.splits import Row, shown_counts
from bigbatch.recipes.core.errors import UserError

SHOWN_LABELS = 5


def label_names(
    rows: Sequence[Row], given: Sequence[str], counts: dict[str, int], multi_label: bool = False
) -> list[str]:
    """Return the given labels, else those of the training rows, sorted; raise UserError where the two do not agree.

    And where there is nothing to learn: no rows, or one label for all.
    """
    found = {label for row in rows for label in row.labels}
    labels = list(given) or sorted(found)
    if not rows:
        raise UserError("data.train", f"no row is left to train on ({shown_counts(counts)})")
    for label in labels:
        if labels.count(label) > 1:
            raise UserError("data.labels", f"holds {label!r} twice")
        if label not in found:
            raise UserError("data.labels", f"holds {label!r}, which no training row has; there are: {_some(found)}")
    for row in rows:
        if unknown := set(row.labels) - set(labels):
            raise UserError(row.origin, f"has the label {min(unknown)!r}, which is not in data.labels")
    if len(labels) < (1 if multi_label else 2):
        which = f"the same label, {labels[0]!r}" if labels else "no label"
        raise UserError("data.train", f"all {len(rows)} rows have {which}: there is nothing to learn")
    return labels


def is_known(row: Row, labels: list[str], on_error: Literal["fail", "skip"], counts: Counter[str]) -> bool:
    """Tell whether training rows have all labels of another row, and count or refuse it where not."""
    unseen = set(row.labels) - set(labels)
    if unseen and on_error == "fail":
        found = f"has the label {min(unseen)!r}, which no training row has"
        hint = "data.on_error 'skip' leaves such rows out"
        raise UserError(row.origin, f"{found}; there are: {_some(labels)}; {hint}")
    counts["unseen_label"] += bool(unseen)
    return not unseen


def _some(labels: Collection[str]) -> str:
    names = sorted(labels)
    return ", ".join(map(repr, names[:SHOWN_LABELS])) + (", ..." if len(names) > SHOWN_LABELS else "")
