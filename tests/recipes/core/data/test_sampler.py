import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.data.sampler import Order, chain_hash, random_words, rank_slice, sample_order


@settings(deadline=None)
@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6))
def test_each_epoch_holds_every_sample_once(num_samples, seed, epoch):
    order = sample_order(seed, num_samples, epoch * num_samples, num_samples)
    assert sorted(order.ids) == list(range(num_samples))
    assert set(order.epochs) == {epoch}


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 500), start=st.integers(0, 10**12), count=st.integers(0, 600), cut=st.integers(0, 600)
)
def test_a_stretch_is_the_same_whether_asked_for_at_once_or_in_two(num_samples, start, count, cut):
    cut = min(cut, count)
    whole = sample_order(3, num_samples, start, count)
    first, second = sample_order(3, num_samples, start, cut), sample_order(3, num_samples, start + cut, count - cut)
    assert np.array_equal(whole.ids, np.concatenate([first.ids, second.ids]))
    assert np.array_equal(whole.epochs, np.concatenate([first.epochs, second.epochs]))
    assert whole.ids.dtype == whole.epochs.dtype == np.int64


def test_the_order_of_a_seed_never_changes_between_versions():
    assert sample_order(0, 10, 0, 20).ids.tolist() == [
        0, 3, 5, 4, 8, 6, 7, 1, 2, 9,
        1, 2, 8, 5, 4, 3, 7, 0, 9, 6,
    ]  # fmt: skip


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_all_orders_of_a_few_samples_are_equally_likely(num_samples):
    epochs = 12_000
    ids = sample_order(1, num_samples, 0, epochs * num_samples).ids.reshape(epochs, num_samples)
    counts = np.unique(ids, axis=0, return_counts=True)[1]
    orders = {2: 2, 3: 6, 4: 24}[num_samples]
    expected = epochs / orders
    assert len(counts) == orders
    critical = {2: 10.8, 6: 20.5, 24: 49.7}[orders]  # chi-square at p = 0.001
    assert ((counts - expected) ** 2 / expected).sum() < critical


@pytest.mark.parametrize("num_samples", [1000, 1024])
def test_any_sample_is_equally_likely_at_any_place(num_samples):
    epochs = 2000
    ids = sample_order(7, num_samples, 0, epochs * num_samples).ids.reshape(epochs, num_samples)
    for place in (0, 1, num_samples // 2, num_samples - 1):
        counts = np.bincount(ids[:, place] * 20 // num_samples, minlength=20)
        assert ((counts - epochs / 20) ** 2 / (epochs / 20)).sum() < 43.8  # 19 degrees of freedom, p = 0.001


def test_random_words_are_uniform_and_those_of_a_sample_are_its_own():
    order = Order(np.arange(500), np.zeros(500, np.int64))
    words = random_words(1, order, 0, 40)
    assert words.shape == (500, 40)
    assert len(np.unique(words)) == 20_000
    for shift in (0, 32, 56):  # low, middle and high bits
        counts = np.bincount((words.ravel() >> np.uint64(shift) & np.uint64(255)).astype(int), minlength=256)
        assert ((counts - 20_000 / 256) ** 2 / (20_000 / 256)).sum() < 330  # 255 degrees of freedom, p = 0.001
    picked = np.array([77, 3])
    assert (random_words(1, Order(picked, np.zeros(2, np.int64)), 0, 25) == words[picked, :25]).all()
    for seed, epoch, stream in ((2, 0, 0), (1, 1, 0), (1, 0, 1)):
        other = random_words(seed, Order(order.ids, np.full(500, epoch)), stream, 40)
        assert not np.isin(other, words).any()


def test_neither_neighbours_nor_epochs_nor_seeds_are_correlated():
    size = 100_003
    first, second = sample_order(5, size, 0, 2 * size).ids.reshape(2, size)
    other = sample_order(6, size, 0, size).ids
    pairs = [
        (first, np.arange(size)),
        (first[:-1], first[1:]),
        (first, second),
        (first, other),
        (first[:-2], first[2:]),
    ]
    for left, right in pairs:
        assert abs(np.corrcoef(left, right)[0, 1]) < 3.5 / np.sqrt(size)
    assert (np.abs(np.diff(first)) == 1).sum() < 12  # 2 expected
    assert (first == second).sum() < 8  # 1 expected
    assert (first == other).sum() < 8


def test_far_positions_cost_no_more_than_near_ones_and_need_no_table():
    order = sample_order(2, 10**12 + 39, 10**17, 4)
    assert order.epochs.tolist() == [99_999] * 4
    assert len(set(order.ids.tolist())) == 4
    assert order.ids.max() > 10**10


@settings(deadline=None)
@given(
    ranks=st.integers(1, 6), micro_size=st.integers(1, 5), micro_steps=st.integers(1, 5), consumed=st.integers(0, 10**9)
)
def test_the_ranks_and_micro_batches_of_a_step_share_its_samples_without_gap(ranks, micro_size, micro_steps, consumed):
    slices = [
        position
        for micro_step in range(micro_steps)
        for rank in range(ranks)
        for position in rank_slice(consumed, micro_step, micro_size, rank, ranks)
    ]
    assert slices == list(range(consumed, consumed + ranks * micro_size * micro_steps))


def test_the_chained_hash_tells_order_epoch_and_history_apart():
    ids, epochs = np.array([3, 1, 2]), np.array([0, 0, 1])
    expected = hashlib.blake2b(b"before" + np.array([3, 1, 2, 0, 0, 1], "<i8").tobytes(), digest_size=16).digest()
    assert chain_hash(b"before", ids, epochs) == expected
    others = [chain_hash(b"", ids, epochs), chain_hash(b"before", ids[::-1], epochs), chain_hash(b"before", ids, ids)]
    assert len({expected, *others}) == 4
    assert chain_hash(b"before", ids.astype(np.int32), epochs.astype(np.int32)) == expected
