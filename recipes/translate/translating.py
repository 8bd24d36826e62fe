"""Translations of texts by beam search, and how good they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from bigbatch.recipes.core.beam_search import Search, beam_search
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, encode_documents, load_given_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.seq2seq import Seq2Seq
from bigbatch.recipes.translate.config import SearchSection


class Translation(NamedTuple):
    """A translation and its score, its log-probability over its number of tokens to the length penalty."""

    text: str
    score: float


class Translator(NamedTuple):
    """What it takes to translate."""

    model: Seq2Seq
    tokenizer: TextTokenizer
    begin_of_target: int
    search: SearchSection


def open_translator(facts: dict[str, Any], model: Seq2Seq, search: SearchSection) -> Translator:
    """Open a model's tokenizer."""
    return Translator(model, load_given_tokenizer(Path(facts["tokenizer"])), facts["begin_of_target"], search)


def translate(parts: Translator, texts: Sequence[str]) -> list[Translation]:
    """Translate texts, those of about the same length together; raise UserError for one that is empty or too long."""
    positions = parts.model.section.max_positions
    sources = encode_documents(parts.tokenizer, [text.strip() for text in texts])
    for text, source in zip(texts, sources, strict=True):
        if not text.strip():
            raise UserError("text", "is empty")
        if len(source) > positions:
            raise UserError("text", f"has {len(source)} tokens; the model has {positions} positions")
    settings = parts.search
    stops = (parts.tokenizer.end_of_text,)
    search = Search(settings.num_beams, settings.max_new_tokens, settings.length_penalty, stops)
    order = sorted(range(len(texts)), key=lambda number: len(sources[number]))
    found: dict[int, Translation] = {}
    for begin in range(0, len(order), settings.batch_size):
        chosen = order[begin : begin + settings.batch_size]
        starts = [[parts.begin_of_target]] * len(chosen)
        best = beam_search(parts.model, starts, search, [sources[number].tolist() for number in chosen])
        for number, (one,) in zip(chosen, best, strict=True):
            text = parts.tokenizer.tokenizer.decode(one.tokens, skip_special_tokens=True)
            found[number] = Translation(text.strip(), one.score)
    return [found[number] for number in range(len(texts))]


def judge(translations: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Return BLEU and chrF of sacreBLEU, with the signatures that tell what was computed."""
    found: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(translations, [references]).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found


def judge_each(translations: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the chrF of each translation."""
    metric = CHRF()
    return [metric.sentence_score(one, [right]).score for one, right in zip(translations, references, strict=True)]
