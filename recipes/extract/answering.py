"""Entities and relations of texts that are not prepared."""

from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core.data.tokenizing import TextTokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.extract.config import ExtractConfig
from bigbatch.recipes.extract.data import Window, around, collate, cut_words, encode_words, hash_window, part
from bigbatch.recipes.extract.scores import undirected
from bigbatch.recipes.extract.sentences import BadSentenceError, Span, entities_of_tags, touched, unmarked, words_of

WINDOWS_AT_ONCE = 64


def entities_in(
    model: nn.Module, tokenizer: TextTokenizer, config: ExtractConfig, labels: list[str], texts: list[str]
) -> list[dict[str, Any]]:
    """Return for each text {"entities": [{"text", "type", "start", "end"}]}, places in characters."""
    spans = [_words(text) for text in texts]
    windows, whose = [], []
    for number, (text, found) in enumerate(zip(texts, spans, strict=True)):
        whole = _window(text, found, tokenizer)
        for begin, stop in cut_words(whole.counts, config):
            windows.append(part(whole, begin, stop))
            whose.append(number)
    tags: list[list[str]] = [[] for _ in texts]
    for number, found in zip(whose, _look(model, tokenizer, config, windows), strict=True):
        tags[number] += [labels[tag] for tag in found[found >= 0].tolist()]
    return [{"entities": _told(*row)} for row in zip(texts, spans, tags, strict=True)]


def relations_in(
    model: nn.Module, tokenizer: TextTokenizer, config: ExtractConfig, labels: list[str], texts: list[str]
) -> list[dict[str, Any]]:
    """Return {"label", "probability", "probabilities", "relation"} for each text with <e1>...</e1> and <e2>...</e2>.

    The relation is {"name", "subject"}, without direction and with "e1" or "e2"; None where there is none.
    """
    windows = []
    for marked in texts:
        try:
            text, spans = unmarked(marked)
            words = _words(text)
            marks = [touched(words, text, span) for span in spans]
        except BadSentenceError as error:
            raise UserError("text", str(error)) from None
        whole = _window(text, words, tokenizer)._replace(marks=tuple(marks))
        places = [place for mark in marks for place in mark]
        windows.append(part(whole, *around(whole.counts, min(places), max(places), config, "text")))
    answers = []
    for chances in _look(model, tokenizer, config, windows):
        by_label = dict(zip(labels, chances.tolist(), strict=True))
        best = max(by_label, key=lambda label: by_label[label])
        relation = {"name": undirected(best), "subject": "e2" if best.endswith("(e2,e1)") else "e1"}
        found = {"label": best, "probability": by_label[best], "probabilities": by_label}
        answers.append({**found, "relation": None if best == config.data.no_relation else relation})
    return answers


def _words(text: str) -> tuple[Span, ...]:
    if not isinstance(text, str) or not (words := words_of(text)):
        raise UserError("text", "is empty, or no text: there is no word in it")
    return words


def _window(text: str, words: tuple[Span, ...], tokenizer: TextTokenizer) -> Window:
    texts = [text[slice(*span)] for span in words]
    pieces = encode_words(tokenizer, texts)
    own = [pieces[word] for word in texts]
    return Window(texts, np.concatenate(own), np.array(list(map(len, own))), ())


def _look(
    model: nn.Module, tokenizer: TextTokenizer, config: ExtractConfig, windows: list[Window]
) -> list[torch.Tensor]:
    """Return what the model says of each window."""
    buckets, device = getattr(config.model, "feature_buckets", 0), next(model.parameters()).device
    found: list[torch.Tensor] = []
    for begin in range(0, len(windows), WINDOWS_AT_ONCE):
        some = windows[begin : begin + WINDOWS_AT_ONCE]
        features = [hash_window(window, buckets) for window in some] if buckets else []
        batch = collate(some, features, config, tokenizer)
        with torch.inference_mode():
            found += model(**{name: torch.from_numpy(array).to(device) for name, array in batch.items()})[1].cpu()
    return found


def _told(text: str, words: tuple[Span, ...], tags: list[str]) -> list[dict[str, Any]]:
    spans = [(words[item.first][0], words[item.stop - 1][1], item.kind) for item in entities_of_tags(tags)]
    return [{"text": text[start:end], "type": kind, "start": start, "end": end} for start, end, kind in spans]
