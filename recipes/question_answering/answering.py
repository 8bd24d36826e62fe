"""Answers to questions that are not prepared: the best ones of all windows, and whether to give any."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core.data.tokenizing import Placed, TextTokenizer, encode_with_places
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.question_answering.config import AnswerSection, QuestionDataSection
from bigbatch.recipes.question_answering.data import collate, cut_contexts
from bigbatch.recipes.question_answering.model import INPUTS, LAYOUT, best_spans

WINDOWS_AT_ONCE = 64
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Answering(NamedTuple):
    """What answers are made with."""

    model: nn.Module
    tokenizer: TextTokenizer
    data: QuestionDataSection
    section: AnswerSection
    threshold: float | None
    """No answer is given where its score exceeds the best one's by more; None: there always is one."""


class Ranked(NamedTuple):
    """The spans of a context, tokens, by score, and the score of none, the lowest of all windows."""

    spans: dict[tuple[int, int], float]
    null: float


def answer(parts: Answering, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each object with question and context its answer.

    An answer is {"answer", "start", "end", "probability", "null_score", "candidates"}; start and end are characters of
    the context, and where there is no answer it is "" with null for them. null_score is by how much none is better than
    the best answer, which the threshold is about. Candidates have answer, start, end and probability, the best first.
    Raises UserError for an input without text.
    """
    for item in items:
        for name in ("question", "context"):
            if not isinstance(item.get(name), str) or not item[name].strip():
                raise UserError(name, "is empty, or no text: there is nothing to answer")
            if _SURROGATE.search(item[name]):
                raise UserError(name, "is not Unicode: it holds half a character")
    questions = encode_with_places(parts.tokenizer, [item["question"] for item in items])
    contexts = encode_with_places(parts.tokenizer, [item["context"] for item in items])
    if not all(len(context.tokens) for context in contexts):
        raise UserError("context", "holds nothing that the tokenizer sees")
    ranked = _rank(parts, questions, contexts)
    found = zip(items, contexts, ranked, strict=True)
    return [_chosen(parts, item["context"], context, spans) for item, context, spans in found]


def _rank(parts: Answering, questions: list[Placed], contexts: list[Placed]) -> list[Ranked]:
    """Look at all windows of all questions; of a span that several windows hold the best score counts."""
    asked, given = (np.array([len(placed.tokens) for placed in found]) for found in (questions, contexts))
    rows, begins = cut_contexts(asked, given, parts.data)
    found: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    nulls = [np.inf] * len(questions)
    for some in (slice(begin, begin + WINDOWS_AT_ONCE) for begin in range(0, len(rows), WINDOWS_AT_ONCE)):
        asked, given = ([placed[row].tokens for row in rows[some]] for placed in (questions, contexts))
        for row, spans, null in zip(rows[some], *_look(parts, asked, given, begins[some]), strict=True):
            nulls[row] = min(nulls[row], null)
            for span, value in spans:
                found[row][span] = max(value, found[row].get(span, -np.inf))
    return [Ranked(spans, null) for spans, null in zip(found, nulls, strict=True)]


def _look(
    parts: Answering, questions: list[np.ndarray], contexts: list[np.ndarray], begins: np.ndarray
) -> tuple[Iterator[list[tuple[tuple[int, int], float]]], list[float]]:
    """Return each window's best spans, in tokens of the whole context, with their scores, and the score of none."""
    batch = collate(questions, contexts, begins, parts.data, parts.tokenizer)
    device = next(parts.model.parameters()).device
    tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
    with torch.inference_mode():
        logits = parts.model(**{name: tensors[name] for name in INPUTS})
        layout = {name: tensors[name] for name in LAYOUT}
        best = best_spans(logits, **layout, most_tokens=parts.section.most_tokens, count=parts.section.candidates)
    offsets = (begins - batch["contexts"])[:, None]
    scores, starts, ends = (found.cpu().numpy() for found in (best.scores, best.starts, best.ends))
    listed = zip(scores.tolist(), (starts + offsets).tolist(), (ends + offsets).tolist(), strict=True)
    spans = ([((f, last), s) for s, f, last in zip(*row, strict=True) if s > -np.inf] for row in listed)
    return spans, best.nulls.tolist()


def _chosen(parts: Answering, text: str, context: Placed, ranked: Ranked) -> dict[str, Any]:
    """Choose among the spans and none; their chances are a softmax of their scores."""
    spans = sorted(ranked.spans, key=lambda span: -ranked.spans[span])[: parts.section.candidates]
    null = -np.inf if parts.threshold is None else ranked.null
    scores = np.array([ranked.spans[span] for span in spans] + [null])
    chances = np.exp(scores - scores.max())
    chances = (chances / chances.sum()).tolist()
    candidates = []
    for (first, last), chance in zip(spans, chances, strict=False):
        start, end = int(context.starts[first]), int(context.ends[last])
        candidates.append({"answer": text[start:end], "start": start, "end": end, "probability": chance})
    best, margin = candidates[0], ranked.null - scores[0]
    if parts.threshold is not None and margin > parts.threshold:
        best = {"answer": "", "start": None, "end": None, "probability": chances[-1]}
    return {**best, "null_score": float(margin), "candidates": candidates}
