"""Rankings of documents for queries: by BM25, by scores, by both; and how good they are.

Q queries, C candidates. A relevance judgement is a grade above 0; what is not judged has 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbatch.recipes.match.config import SearchSection, Stemming

CUT, DEEP_CUT = 10, 100  # ranks that figures look at
FUSION_RANKS = 60  # of https://doi.org/10.1145/1571941.1572114


class Ranked(NamedTuple):
    """What was found for a query, the best first."""

    documents: np.ndarray  # int64, numbers of candidates
    scores: np.ndarray  # float64


class Lexical:
    """BM25 (Robertson et al. 1994) over candidates, by the library bm25s with its defaults (k1 1.5, b 0.75)."""

    def __init__(self, texts: Sequence[str], stemming: Stemming = "none") -> None:
        """Index the texts by their words in small letters, without the commonest of English."""
        import bm25s  # noqa: PLC0415 - with what it brings half a second, and few commands rank words
        import Stemmer  # noqa: PLC0415

        self.stemmer = None if stemming == "none" else Stemmer.Stemmer(stemming)
        self.library, self.num_texts = bm25s, len(texts)
        self.index = bm25s.BM25()
        self.index.index(self._words(texts), show_progress=False)

    def rank(self, queries: Sequence[str], depth: int) -> list[Ranked]:
        """Return for each query the texts that share a word with it, `depth` at most; equal ones by their numbers."""
        found = []
        for words in self._words(queries, return_ids=False):
            known = [word for word in words if word in self.index.vocab_dict]
            scores = self.index.get_scores(known).astype(np.float64) if known else np.zeros(self.num_texts)
            found.append(top(scores, depth, lowest=0.0))
        return found

    def _words(self, texts: Sequence[str], **options: Any) -> Any:
        return self.library.tokenize(list(texts), stopwords="en", stemmer=self.stemmer, show_progress=False, **options)


def top(scores: np.ndarray, depth: int, lowest: float = -np.inf) -> Ranked:
    """Return the best of all candidates' scores [C] that are above `lowest`."""
    if depth < len(scores):  # those that tie with the last are sorted out below
        edge = np.partition(scores, -depth)[-depth]
        places = np.flatnonzero((scores >= edge) & (scores > lowest))
    else:
        places = np.flatnonzero(scores > lowest)
    order = places[np.lexsort((places, -scores[places]))][:depth]
    return Ranked(order, scores[order])


def fuse(lexical: Ranked, dense: Ranked, section: SearchSection) -> Ranked:
    """Put two rankings of a query together; what one of them has not found gets nothing of it."""
    totals: dict[int, float] = {}
    for ranked, weight in ((lexical, section.bm25_weight), (dense, 1 - section.bm25_weight)):
        if section.fusion == "reciprocal":
            worth = 1 / (FUSION_RANKS + 1 + np.arange(len(ranked.documents)))
        else:
            low, high = (ranked.scores.min(), ranked.scores.max()) if len(ranked.scores) else (0.0, 0.0)
            worth = weight * (ranked.scores - low) / (high - low or 1.0)
        for document, value in zip(ranked.documents.tolist(), worth.tolist(), strict=True):
            totals[document] = totals.get(document, 0.0) + value
    order = sorted(totals, key=lambda document: (-totals[document], document))
    return Ranked(np.array(order, np.int64), np.array([totals[document] for document in order]))


def without(ranked: Ranked, excluded: Iterable[int]) -> Ranked:
    """Leave some documents out."""
    stays = ~np.isin(ranked.documents, np.fromiter(excluded, np.int64))
    return Ranked(ranked.documents[stays], ranked.scores[stays])


def judge(rankings: Sequence[Ranked], grades: Sequence[Mapping[int, float]]) -> dict[str, float]:
    """Return the means over queries, each of which has a relevant document.

    ndcg@10 with the grades as gains (https://doi.org/10.1145/582415.582418, discount log2(rank + 1)); map, where what
    was not found counts as a precision of 0; recall@10 and @100; mrr@10.
    """
    rows = []
    for ranked, right in zip(rankings, grades, strict=True):
        gains = np.array([right.get(document, 0.0) for document in ranked.documents.tolist()])
        hits = gains > 0
        places = np.flatnonzero(hits)
        precision = np.cumsum(hits)[places] / (places + 1)
        ideal = _discounted(np.array(sorted(right.values(), reverse=True)))
        first = 1 / (places[0] + 1) if len(places) and places[0] < CUT else 0.0
        recalls = [hits[:cut].sum() / len(right) for cut in (CUT, DEEP_CUT)]
        rows.append([_discounted(gains) / ideal, precision.sum() / len(right), *recalls, first])
    names = (f"ndcg@{CUT}", "map", f"recall@{CUT}", f"recall@{DEEP_CUT}", f"mrr@{CUT}")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def _discounted(gains: np.ndarray) -> float:
    best = gains[:CUT]
    return float((best / np.log2(np.arange(len(best)) + 2)).sum())
