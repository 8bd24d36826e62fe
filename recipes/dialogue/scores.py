"""Figures of generated replies, and the baseline that writes none: the reply of the most similar dialogue."""

from collections.abc import Iterable
from typing import Any

from bigbatch.recipes.core.data.chat import Messages
from bigbatch.recipes.dialogue.data import Reply

CONTEXT_MESSAGES = 2  # that the baseline compares: what the assistant last said, and the answer to it


def reply_figures(replies: list[str], references: list[str]) -> dict[str, Any]:
    """Compare replies with what was said: BLEU with its signature, and how varied they are."""
    import sacrebleu  # noqa: PLC0415 - for evaluation alone

    metric = sacrebleu.BLEU()
    bleu = metric.corpus_score(replies, [references]).score
    varied = {f"distinct_{length}": distinct(replies, length) for length in (1, 2)}
    return {"bleu": bleu, **varied, "bleu_signature": str(metric.get_signature())}


def distinct(texts: Iterable[str], length: int) -> float:
    """Return the share of different n-grams of words among all: https://arxiv.org/abs/1510.03055, section 6."""
    found = [gram for text in texts for gram in _grams(text.split(), length)]
    return len(set(found)) / len(found) if found else 0.0


def most_similar_replies(known: list[Reply], asked: list[Messages]) -> list[str]:
    """Return for each dialogue the reply that followed the most similar one, by the cosine of TF-IDF of its end."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415 - takes a second

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    table = vectorizer.fit_transform(_end(reply.before) for reply in known)
    similar = vectorizer.transform(map(_end, asked)) @ table.T
    return [known[row.indices[row.data.argmax()] if row.nnz else 0].content for row in similar]


def _end(messages: Messages) -> str:
    return " ".join(message["content"] for message in messages[-CONTEXT_MESSAGES:])


def _grams(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[begin:] for begin in range(length)), strict=False)
