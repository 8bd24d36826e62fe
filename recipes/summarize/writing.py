"""Summaries that an encoder-decoder writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bigbatch.recipes.core.beam_search import Search, beam_search
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.data.splits import TRAIN
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, load_given_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import ForeignSeq2Seq, Session
from bigbatch.recipes.core.models.config import Seq2SeqSection
from bigbatch.recipes.core.models.seq2seq import hugging_face_config, hugging_face_tensors
from bigbatch.recipes.core.operations import operations_of_sides
from bigbatch.recipes.core.recipe import Batch, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.core.start_seq2seq import Seq2SeqStart, build_seq2seq, find_seq2seq_start
from bigbatch.recipes.core.start_seq2seq import starting_facts as seq2seq_facts
from bigbatch.recipes.summarize import data
from bigbatch.recipes.summarize.choosing import lead
from bigbatch.recipes.summarize.config import SearchSection, SummarizeConfig
from bigbatch.recipes.summarize.pairs import PairSamples, whole
from bigbatch.recipes.summarize.rouge import Rouge, told

INPUTS = ("tokens", "written", "labels", "documents", "target_documents")  # of a batch, what the model takes
DOCUMENTS_AT_ONCE, SHOWN = 32, 3


def find(config: SummarizeConfig) -> Seq2SeqStart | None:
    """Look at what the model starts from."""
    return find_seq2seq_start(config.model.initialize_from) if config.model.initialize_from else None


def starting_facts(config: SummarizeConfig, folder: Path, start: Seq2SeqStart | None) -> dict[str, Any]:
    """Return what the model's shape is, by the tokenizer in a folder and what it starts from."""
    facts = seq2seq_facts(config.model, folder, start)
    most, longest = facts["shape"]["max_positions"], max(config.data.sequence_length, config.data.summary_tokens)
    if longest > most:
        raise UserError("data.sequence_length", f"or summary_tokens is {longest}; the model has {most} positions")
    return facts


def open_split(config: SummarizeConfig, facts: dict[str, Any], split: str) -> PairSamples:
    """Open a split of the prepared folder, of which only the training one drops tokens."""
    dropout = config.objective.token_dropout if split == TRAIN else 0.0
    folder = Path(facts["tokenizer"])
    return PairSamples(folder, split, config.data, facts["begin_of_target"], dropout, config.seed)


def build(config: SummarizeConfig, facts: dict[str, Any], initialize: bool) -> nn.Module:
    """Build the encoder-decoder."""
    return build_seq2seq(config.model, facts, config.objective.label_smoothing, initialize)


def foreign(config: SummarizeConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the encoder-decoder that a session runs."""
    return ForeignSeq2Seq(session, Seq2SeqSection.model_validate_json(json.dumps(facts["shape"])))


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the cross-entropy of the summaries' tokens."""
    total = model(**{name: batch[name] for name in INPUTS})
    return Outputs(Loss(total, int((batch["labels"] != IGNORED_LABEL).sum())), {})


def figures(config: SummarizeConfig, facts: dict[str, Any], model: nn.Module, samples: PairSamples) -> dict[str, Any]:
    """Write a summary of every document of a split and compare; beside it the first sentence."""
    tokenizer, numbers, rouge = load_given_tokenizer(Path(facts["tokenizer"])), np.arange(samples.num_samples), Rouge()
    written = write(model, tokenizer, facts["begin_of_target"], config.search, samples.sources(numbers))
    named: dict[str, list[np.ndarray]] = {"": [], "lead_": []}
    columns = (samples.documents.texts(name, numbers) for name in ("text", "references"))
    for summary, text, right in zip(written, *columns, strict=True):
        references, sentences = right.split(data.BETWEEN_REFERENCES), text.split(data.BETWEEN_SENTENCES)
        named[""].append(rouge.score(data.BETWEEN_SENTENCES.join(data.sentences_of(summary)), references))
        named["lead_"].append(rouge.score(sentences[lead(len(sentences), 1)[0]], references))
    return told(named, thorough=True)


def flops_per_sample(config: SummarizeConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    return operations_of_sides(lambda: build(config, facts, initialize=False), *facts["tokens_of_sides"])


def samples_of_text(config: SummarizeConfig, model: Any, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Summarize the first few validation documents, greedily. Collective: every rank must call it."""
    samples = open_split(config, facts, "validation")
    numbers = np.arange(min(SHOWN, samples.num_samples))
    greedy = config.search.model_copy(update={"num_beams": 1})
    written = write(model, samples.tokenizer, facts["begin_of_target"], greedy, samples.sources(numbers))
    texts = samples.documents.texts("text", numbers)
    return [{"prompt": text, "text": summary} for text, summary in zip(texts, written, strict=True)]


def predictor(
    config: SummarizeConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[list[str]]], list[dict[str, Any]]]:
    """Return a function from documents, lists of sentences, to {"summary"}."""
    tokenizer = load_given_tokenizer(Path(facts["tokenizer"]))

    def predict(documents: list[list[str]]) -> list[dict[str, Any]]:
        encoded = data.encode_sentences(tokenizer, documents)
        sources = [whole(np.concatenate(tokens), tokenizer, config.data) for tokens in encoded]
        written = write(model, tokenizer, facts["begin_of_target"], config.search, sources)
        return [{"summary": summary} for summary in written]

    return predict


def export(config: SummarizeConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers' encoder-decoders do."""
    section = Seq2SeqSection.model_validate_json(json.dumps(facts["shape"]))
    size, begin, end = (facts[name] for name in ("vocabulary_size", "begin_of_target", "end_of_text"))
    search = config.search
    generation = {"num_beams": search.num_beams, "length_penalty": search.length_penalty}
    generation |= {"min_new_tokens": search.min_new_tokens, "max_new_tokens": search.max_new_tokens}
    generation |= {"no_repeat_ngram_size": search.no_repeat_tokens, "early_stopping": False}
    generation |= {"decoder_start_token_id": begin, "pad_token_id": end}
    settings = hugging_face_config(section, size, begin, end)
    return HuggingFaceExport(settings, hugging_face_tensors(section, size), generation, "AutoModelForSeq2SeqLM")


def write(
    model: Any, tokenizer: TextTokenizer, begin_of_target: int, section: SearchSection, sources: list[np.ndarray]
) -> list[str]:
    """Return a summary for each document's tokens, those of about the same length together."""
    search = Search(
        num_beams=section.num_beams,
        max_new_tokens=section.max_new_tokens,
        length_penalty=section.length_penalty,
        stop_tokens=(tokenizer.end_of_text,),
        min_new_tokens=section.min_new_tokens,
        no_repeat_tokens=section.no_repeat_tokens,
    )
    order = np.argsort([len(source) for source in sources], kind="stable").tolist()
    written = [""] * len(sources)
    for begin in range(0, len(order), DOCUMENTS_AT_ONCE):
        chosen = order[begin : begin + DOCUMENTS_AT_ONCE]
        prompts = [[begin_of_target]] * len(chosen)
        found = beam_search(model, prompts, search, [sources[number].tolist() for number in chosen])
        for number, (best, *_) in zip(chosen, found, strict=True):
            written[number] = tokenizer.tokenizer.decode(best.tokens, skip_special_tokens=True).strip()
    return written
