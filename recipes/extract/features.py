"""What a linear model looks at, by name and hashed: words around the one that is judged, or around two marked ones."""

import re
import zlib
from collections.abc import Sequence

import numpy as np

from bigbatch.recipes.extract.sentences import Span

STEM_LETTERS = 5
MOST_BETWEEN = 30  # words between two entities that are looked at one by one
NUM_CHARACTERS, PLAIN_CHARACTERS = 512, 384  # Latin letters each have their own number, all others share the rest
MOST_LETTERS = 20
_RUNS = re.compile(r"(.)\1+")


def word_features(words: Sequence[str]) -> list[list[str]]:
    """Return the features of each word: itself, its beginnings, ends and shape, and its neighbours."""
    lower = ["<<", "<", *(word.lower() for word in words), ">", ">>"]
    shapes = ["", "", *map(shape, words), "", ""]
    found = []
    for place, word in enumerate(words, 2):
        own = lower[place]
        ends = [f"p{n} {own[:n]}" for n in (1, 2, 3, 4)] + [f"s{n} {own[-n:]}" for n in (1, 2, 3, 4)]
        around = [f"{step} {lower[place + step]}" for step in (-2, -1, 0, 1, 2)]
        around += [f"b {lower[place - 1]} {own}", f"a {own} {lower[place + 1]}"]
        around += [f"z{step} {lower[place + step][-3:]}" for step in (-1, 1)]
        forms = [f"h{step} {shapes[place + step]}" for step in (-2, -1, 0, 1, 2)]
        forms += [f"hb {shapes[place - 1]} {shapes[place]}", f"ha {shapes[place]} {shapes[place + 1]}"]
        forms += [f"ht {shapes[place - 1]} {shapes[place]} {shapes[place + 1]}", f"w {word}"]
        forms += [f"hw {shapes[place]} {lower[place - 1]}", f"wh {shapes[place]} {lower[place + 1]}"]
        found.append(["", *ends, *around, *forms])
    return found


def pair_features(words: Sequence[str], first: Span, second: Span) -> list[str]:
    """Return the features of two marked spans: their last words, what stands between, before and behind them."""
    lower = [word.lower() for word in words]
    (left, right), turned = ((first, second), "") if first < second else ((second, first), "t")
    one, other = lower[left[1] - 1], lower[right[1] - 1]
    before, between, behind = lower[: left[0]], lower[left[1] : right[0]], lower[right[1] :]
    found = [f"1 {one}", f"2 {other}", f"s1 {one[-3:]}", f"s2 {other[-3:]}", f"p1 {_stem(one)}", f"p2 {_stem(other)}"]
    found += [f"12 {_stem(one)} {_stem(other)}", f"n {min(len(between), 12)}"]
    inner = ["<", *between[:MOST_BETWEEN], ">"]
    stems = [_stem(word) for word in inner]
    for size in (1, 2, 3):
        for place in range(len(inner) - size + 1):
            found.append(f"b{size} {' '.join(inner[place : place + size])}")
            found.append(f"c{size} {' '.join(stems[place : place + size])}")
    if len(between) <= STEM_LETTERS:
        found.append(f"all {' '.join(between)}")
    for size in (1, 2):
        found += [f"l{size} {' '.join(before[-size:])}", f"r{size} {' '.join(behind[:size])}"]
    found += [f"x {_stem(word)}" for word in before[-5:] + behind[:5]]
    if between:
        found += [f"1b {_stem(one)} {between[0]}", f"2b {between[-1]} {_stem(other)}"]
    return [turned + feature for feature in dict.fromkeys(found)]


def letters_of(word: str) -> list[int]:
    """Return the numbers of a word's letters from 1 on, of a long word the first ones and the last."""
    half = MOST_LETTERS // 2
    word = word if len(word) <= MOST_LETTERS else word[:half] + word[-half:]
    others = NUM_CHARACTERS - PLAIN_CHARACTERS
    codes = (ord(letter) for letter in word)
    return [max(1, code) if code < PLAIN_CHARACTERS else PLAIN_CHARACTERS + code % others for code in codes]


def hashed(features: Sequence[str], num_buckets: int) -> np.ndarray:
    """Return the numbers of features, which share `num_buckets`."""
    return np.array([zlib.crc32(feature.encode()) % num_buckets for feature in features], np.int64)


def shape(word: str) -> str:
    """Return the form of a word: capitals X, small letters x, digits 9, others as they are; each run once."""
    letters = "".join("X" if c.isupper() else "x" if c.isalpha() else "9" if c.isdigit() else c for c in word)
    return _RUNS.sub(r"\1", letters)


def _stem(word: str) -> str:
    return word[:STEM_LETTERS]
