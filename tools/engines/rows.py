"""Rows for models that take one at a time, of lengths that they were exported for.

Runs in the engines' own environments: needs numpy and the standard library alone.
Shapes: B rows, T tokens of the longest, L tokens that the model takes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigbatch.recipes.core.errors import UserError

Call = Callable[[int, list[np.ndarray]], list[np.ndarray]]
"""Runs the model on one row: from the length and its inputs [1, L] to its outputs."""


def run_rows(call: Call, layout: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs of rows; of those that stand by token, [B, T, ...], zeros where `attention_mask` has none.

    `layout` says what the model takes and gives: inputs; outputs, each {name, by_token}; lengths, or none where any up
    to max_length will do. Raises UserError for a row that is longer.
    """
    if "pixel_values" in layout["inputs"]:
        rows = [call(0, [row[None]])[0] for row in arrays["pixel_values"].astype(np.float32)]
        return {layout["outputs"][0]["name"]: np.concatenate(rows)}
    tokens = arrays["input_ids"]
    mask = arrays.get("attention_mask", np.ones_like(tokens))
    given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": arrays.get("token_type_ids", tokens * 0)}
    results: dict[str, np.ndarray] = {}
    for row, used in enumerate(mask.sum(1).tolist()):
        length = fitting(used, layout)
        inputs = [_padded(given[name][row, :used], length) for name in layout["inputs"]]
        for output, found in zip(layout["outputs"], call(length, inputs), strict=True):
            shape = (*tokens.shape, *found.shape[2:]) if output["by_token"] else (len(tokens), *found.shape[1:])
            result = results.setdefault(output["name"], np.zeros(shape, np.float32))
            if output["by_token"]:
                result[row, :used] = found[0, :used]
            else:
                result[row] = found[0]
    return results


def fitting(num_tokens: int, layout: Mapping[str, Any]) -> int:
    """Return the length that a row of so many tokens is padded to."""
    if num_tokens > layout["max_length"]:
        raise UserError(
            "input_ids", f"found {num_tokens} tokens; the exported model takes {layout['max_length']} at most"
        )
    lengths = layout["lengths"] or [max(num_tokens, layout["min_length"])]
    return min(length for length in lengths if length >= num_tokens)


def _padded(row: np.ndarray, length: int) -> np.ndarray:
    return np.pad(row, (0, length - len(row)))[None]
