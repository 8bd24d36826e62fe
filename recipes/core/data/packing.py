"""Token lists laid out in rows. W windows of N texts lie in R rows of T tokens.

A text begins with a special token where the tokenizer has one for that, and always ends with one.
"""

import numpy as np


def lay_out(windows: list[np.ndarray], row_tokens: int | None) -> dict[str, np.ndarray]:
    """Put windows into rows: several in one of `row_tokens`, or each into its own, as long as the longest, for None.

    tokens [R, T] int64, 0 where nothing lies; documents [R, T] int32, the number of the window, W where nothing lies;
    firsts [W] int64, where each window begins in the flattened tokens; lengths [W] int64.
    """
    lengths = np.array([len(window) for window in windows], np.int64)
    rows, offsets = np.arange(len(windows)), np.zeros(len(windows), np.int64)
    if row_tokens:
        rows, offsets = first_fit(lengths, row_tokens)
    shape = (int(rows.max()) + 1, row_tokens or int(lengths.max()))
    tokens, documents = np.zeros(shape, np.int64), np.full(shape, len(windows), np.int32)
    for number, (window, row, offset) in enumerate(zip(windows, rows.tolist(), offsets.tolist(), strict=True)):
        tokens[row, offset : offset + len(window)] = window
        documents[row, offset : offset + len(window)] = number
    return {"tokens": tokens, "documents": documents, "firsts": rows * shape[1] + offsets, "lengths": lengths}


def first_fit(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the offset [W] of each window: the longest first, each into the first row with room.

    No more than 11/9 of the fewest possible rows, and one (Johnson, 1973).
    """
    rows, offsets = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    room = np.full(len(lengths), row_tokens, np.int64)
    for number in np.argsort(-lengths, kind="stable").tolist():
        row = int(np.argmax(room >= lengths[number]))
        rows[number], offsets[number] = row, row_tokens - room[row]
        room[row] -= lengths[number]
    return rows, offsets


def first_fit_pairs(lengths: np.ndarray, row_tokens: int, block_pairs: int = 4096) -> np.ndarray:
    """Return the row [W] of each pair of texts, lengths [W, 2], where a row has `row_tokens` on either side.

    As `first_fit`, of so many pairs at a time: all rows together would take a time that grows with their square.
    """
    rows, num_rows = np.zeros(len(lengths), np.int64), 0
    for begin in range(0, len(lengths), block_pairs):
        block = lengths[begin : begin + block_pairs]
        room = np.full((len(block), 2), row_tokens, np.int64)
        for number in np.argsort(-block.max(1), kind="stable").tolist():
            row = int(np.argmax((room >= block[number]).all(1)))
            rows[begin + number] = num_rows + row
            room[row] -= block[number]
        num_rows += int((room < row_tokens).any(1).sum())
    return rows


def truncated(tokens: np.ndarray, length: int) -> np.ndarray:
    """Cut a text to `length` tokens, the last special one kept."""
    return tokens if len(tokens) <= length else np.concatenate([tokens[: length - 1], tokens[-1:]])


def cut_windows(texts: list[np.ndarray], length: int, begins_special: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut long texts into windows of at most `length` tokens that overlap by half, each with the special tokens.

    Return them and the number of the text [W] that each belongs to.
    """
    windows, examples = [], []
    for number, text in enumerate(texts):
        first, inner, last = text[: int(begins_special)], text[int(begins_special) : -1], text[-1:]
        room = length - len(first) - len(last)
        stride = max(1, room // 2)
        for start in range(0, max(1, len(inner) - room + stride), stride):
            windows.append(np.concatenate([first, inner[start : start + room], last]))
            examples.append(number)
    return windows, np.array(examples, np.int64)
