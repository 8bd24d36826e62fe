"""Ranges of shares of logical tensors, against NumPy's own indexing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.recipes.core import layout
from bigbatch.recipes.core.layout import Share, copy_overlap, rectangles, split


@st.composite
def shares(draw, shape):
    """Draw a share: all of it, or some ranges of a dim."""
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    if dim is None:
        return None
    cuts = sorted(draw(st.sets(st.integers(0, shape[dim]), min_size=2, max_size=6)))
    return Share(shape, dim, tuple(zip(cuts[::2], cuts[1::2], strict=False)))


@st.composite
def two_ranges(draw):
    """Draw a shape, and a flat range of each of two shares of it."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
    found = []
    for _ in range(2):
        share = draw(shares(shape))
        size = int(np.prod(share.local_shape if share else shape))
        start = draw(st.integers(0, size))
        found.append((share, start, draw(st.integers(start, size))))
    return shape, *found


def flat(whole: torch.Tensor, share: Share | None) -> torch.Tensor:
    """Return the flattened share, by NumPy."""
    if share is None:
        return whole.flatten()
    index = np.concatenate([np.arange(*each) for each in share.ranges])
    return torch.from_numpy(np.take(whole.numpy(), index, axis=share.dim)).flatten()


@given(two_ranges(), st.integers(1, 20))
def test_a_range_of_one_share_takes_from_a_range_of_another_all_that_both_have(drawn, block_elements):
    shape, (share, start, stop), (stored, begin, end) = drawn
    whole = torch.arange(float(np.prod(shape))).view(shape)
    wanted, there = flat(whole, share)[start:stop], flat(whole, stored)[begin:end]
    target, reads = torch.full((stop - start,), -1.0), []

    def read(low: int, high: int) -> torch.Tensor:
        reads.append(high - low)
        assert 0 <= low < high <= len(there)
        return there[low:high].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCK_ELEMENTS", block_elements)
        ours, theirs = rectangles(shape, share, start, stop), rectangles(shape, stored, begin, end)
        copied = copy_overlap(target, ours, read, theirs)
    shared = torch.isin(wanted, there)
    assert copied == int(shared.sum())
    assert torch.equal(target, torch.where(shared, wanted, -1.0))
    assert all(size <= max(block_elements, shape[-1]) for size in reads)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 1))
def test_the_shares_of_all_ranks_are_the_blocks_in_equal_pieces(sizes, count, dim):
    blocks = tuple(size * count for size in sizes)
    shape = (sum(blocks), 3) if dim == 0 else (3, sum(blocks))
    whole = torch.arange(float(np.prod(shape))).view(shape)
    pieces = [block.chunk(count, dim) for block in whole.split(blocks, dim)]
    for index in range(count):
        share = split(shape, dim, blocks, index, count)
        expected = torch.cat([block[index] for block in pieces], dim)
        assert torch.equal(share.cut(whole), expected)
        assert share.local_shape == tuple(expected.shape)
        assert Share.of(shape, [share.dim, [list(each) for each in share.ranges]]) == share
