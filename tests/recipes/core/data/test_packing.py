"""Rows of windows: every token placed once, none beyond its row, and read back from where the batch says."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.recipes.core.data.packing import cut_windows, first_fit, first_fit_pairs, lay_out, truncated

FIRST, LAST = 1, 2
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def texts_of(lengths, begins_special=True):
    """Return texts whose inner tokens are all different, numbered from 10."""
    texts, number = [], 10
    for length in lengths:
        inner = np.arange(number, number + length, dtype=np.uint32)
        texts.append(np.concatenate([[FIRST] * begins_special, inner, [LAST]]).astype(np.uint32))
        number += length
    return texts


def read_back(batch, number):
    first, length = batch["firsts"][number], batch["lengths"][number]
    return batch["tokens"].reshape(-1)[first : first + length]


@given(lengths=LENGTHS, packing=st.booleans())
def test_every_window_lies_whole_in_one_row_and_nothing_else_does(lengths, packing):
    windows = texts_of(lengths)
    row_tokens = max(map(len, windows)) + 3 if packing else None
    batch = lay_out(windows, row_tokens)
    rows, width = batch["tokens"].shape
    assert (width, rows) == ((row_tokens, rows) if packing else (max(map(len, windows)), len(windows)))
    for number, window in enumerate(windows):
        assert read_back(batch, number).tolist() == window.tolist()
        assert batch["firsts"][number] % width + len(window) <= width
        assert (batch["documents"] == number).sum() == len(window)
        assert (batch["documents"].reshape(-1)[batch["firsts"][number] :][: len(window)] == number).all()
    assert (batch["documents"] == len(windows)).sum() == batch["tokens"].size - sum(map(len, windows))
    assert (batch["tokens"][batch["documents"] == len(windows)] == 0).all()
    assert {batch[name].dtype.name for name in ("tokens", "firsts", "lengths")} == {"int64"}
    assert batch["documents"].dtype == np.int32


@given(lengths=LENGTHS, room=st.integers(40, 60))
def test_a_row_is_opened_only_when_none_has_room(lengths, room):
    rows, offsets = first_fit(np.array(lengths), room)
    used: dict[int, int] = {}
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fitting = [row for row, full in used.items() if full + lengths[number] <= room]
        assert rows[number] == (fitting[0] if fitting else len(used))
        assert offsets[number] == used.get(rows[number], 0)
        used[rows[number]] = used.get(rows[number], 0) + lengths[number]
    assert max(used.values()) <= room
    assert sum(2 * full <= room for full in used.values()) <= 1


@given(lengths=LENGTHS, length=st.integers(4, 20), begins_special=st.booleans())
def test_windows_overlap_by_half_and_hold_every_token_between_special_ones(lengths, length, begins_special):
    texts = texts_of(lengths, begins_special)
    windows, examples = cut_windows(texts, length, begins_special)
    assert examples.tolist() == sorted(examples.tolist())
    stride = (length - 1 - begins_special) // 2
    for number, text in enumerate(texts):
        mine = [windows[w] for w in np.flatnonzero(examples == number)]
        assert all(len(window) <= length for window in mine)
        assert all(window[-1] == LAST for window in mine)
        assert all(not begins_special or window[0] == FIRST for window in mine)
        inner = [window[int(begins_special) : -1].tolist() for window in mine]
        assert sorted({token for window in inner for token in window}) == text[int(begins_special) : -1].tolist()
        if len(text) <= length:
            assert [window.tolist() for window in mine] == [text.tolist()]
        for before, after in pairwise(inner):
            assert after[0] - before[0] == stride
            assert set(after) - set(before)  # each adds something
            assert len(set(before) & set(after)) == len(before) - stride


@given(length=st.integers(1, 40), limit=st.integers(2, 50))
def test_a_cut_text_keeps_its_beginning_and_its_last_token(length, limit):
    (text,) = texts_of([length])
    cut = truncated(text, limit)
    assert len(cut) == min(len(text), limit)
    assert cut[-1] == LAST
    assert (cut[:-1] == text[: len(cut) - 1]).all()


def test_rows_of_pairs_overflow_on_neither_side_and_are_few():
    lengths = np.random.default_rng(1).integers(1, 30, (1000, 2))
    rows = first_fit_pairs(lengths, 32, block_pairs=300)
    totals = np.zeros((rows.max() + 1, 2), np.int64)
    np.add.at(totals, rows, lengths)
    assert totals.min() > 0
    assert totals.max() <= 32
    assert len(totals) < 1.25 * lengths.sum(0).max() / 32
