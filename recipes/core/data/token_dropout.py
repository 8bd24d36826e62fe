"""Token dropout: training tokens that the unknown one stands for, others in every epoch."""

import numpy as np

from bigbatch.recipes.core.data.sampler import Order, random_words
from bigbatch.recipes.core.data.tokenizing import TextTokenizer


def drop_tokens(
    texts: list[np.ndarray],
    chance: float,
    seed: int,
    order: Order,
    tokenizer: TextTokenizer,
    stream: int = 0,
    has_special: bool = False,
) -> list[np.ndarray]:
    """Replace each token by the unknown one with a chance, drawn anew in every epoch.

    With `has_special` texts are as `encode_documents` gives them, and their special tokens stay.
    """
    words = random_words(seed, order, stream, max(1, *map(len, texts)))
    unknown, found = np.uint32(tokenizer.unknown or 0), []
    for text, is_dropped in zip(texts, words < np.uint64(chance * 2.0**64), strict=True):
        if has_special:
            is_dropped[: tokenizer.begin_of_text is not None] = False
            is_dropped[len(text) - 1] = False
        found.append(np.where(is_dropped[: len(text)], unknown, text))
    return found
