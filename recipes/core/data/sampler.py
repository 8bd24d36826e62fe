"""The order of training samples: a pure function of seed, epoch and index, so any step is found at the same cost."""

import hashlib
from typing import NamedTuple

import numpy as np

ROUNDS = 8  # four make a Feistel network pseudo-random; the rest is margin for domains of a few bits
GOLDEN = 0x9E3779B97F4A7C15


class Order(NamedTuple):
    """Which samples, each in which epoch."""

    ids: np.ndarray  # int64 [count]
    epochs: np.ndarray  # int64 [count]


def sample_order(seed: int, num_samples: int, start: int, count: int) -> Order:
    """Return the samples that stand at positions start, start + 1, ... counted from the beginning of the run.

    Every epoch is another permutation of all ids. It takes no memory beyond the answer, and the same time for any
    `start`: position p is id P(p mod num_samples), where P is a Feistel network over the smallest domain of 4^k values
    that holds num_samples, walked along its cycle until the value is an id (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002).
    """
    positions = np.arange(start, start + count, dtype=np.int64)
    epochs, indices = np.divmod(positions, num_samples)
    keys = _mix(epochs.astype(np.uint64) * np.uint64(GOLDEN) + _mix(np.full(count, seed % 2**64, np.uint64)))
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    ids = _permute(indices.astype(np.uint64), keys, half_bits)
    outside = np.flatnonzero(ids >= num_samples)
    while outside.size:
        ids[outside] = _permute(ids[outside], keys[outside], half_bits)
        outside = outside[ids[outside] >= num_samples]
    return Order(ids.astype(np.int64), epochs)


def random_words(seed: int, order: Order, stream: int, length: int) -> np.ndarray:
    """Return [count, length] uint64 of random bits, each a pure function of (seed, id, epoch, stream, place).

    SplitMix64 counted from a mixed key; `stream` numbers the uses within one sample.
    """
    key = _mix(np.full(len(order.ids), (seed + stream * GOLDEN) % 2**64, np.uint64))
    for numbers in (order.ids, order.epochs):
        key = _mix(key + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    places = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return _mix(key[:, None] + places)


def rank_slice(consumed: int, micro_step: int, micro_size: int, data_rank: int, data_ranks: int) -> range:
    """Return the positions in the run's order that a data rank computes in one micro-batch.

    `consumed` counts the samples of all earlier steps. The micro-batches of a step and their ranks follow each other,
    so that a global batch is the same set of samples for any number of ranks.
    """
    first = consumed + (micro_step * data_ranks + data_rank) * micro_size
    return range(first, first + micro_size)


def chain_hash(previous: bytes, ids: np.ndarray, epochs: np.ndarray) -> bytes:
    """Return 16 bytes that stand for everything consumed so far; start with b""."""
    digest = hashlib.blake2b(previous, digest_size=16)
    digest.update(np.stack([ids, epochs]).astype("<i8").tobytes())
    return digest.digest()


def _permute(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Map each value below 4^half_bits to another, one-to-one for every key."""
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for round_number in range(ROUNDS):
        round_keys = keys + np.full(keys.shape, round_number * GOLDEN % 2**64, np.uint64)
        left, right = right, left ^ (_mix(_mix(round_keys) + right) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
