"""Summaries of a document's own sentences, which an encoder scores."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.data.examples import Examples
from bigbatch.recipes.core.data.splits import SPLITS, TRAIN
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, load_given_tokenizer
from bigbatch.recipes.core.foreign import ForeignEncoder, Session
from bigbatch.recipes.core.models.encoder import encoder_export
from bigbatch.recipes.core.models.hugging_face import own_export
from bigbatch.recipes.core.operations import operations_of_tokens
from bigbatch.recipes.core.recipe import Batch, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.core.start import Start, find_native_start, starting_shape, starting_vocabulary
from bigbatch.recipes.summarize import data
from bigbatch.recipes.summarize.choosing import choose, lead, text_rank
from bigbatch.recipes.summarize.config import SummarizeConfig
from bigbatch.recipes.summarize.model import INPUTS, THEIR_HEAD, build_model, sentence_loss
from bigbatch.recipes.summarize.rouge import Rouge, Words, told
from bigbatch.recipes.summarize.windows import DocumentSamples, collate, cut_document

WINDOWS_AT_ONCE = 64


def find(config: SummarizeConfig) -> Start | None:
    """Look at what the model starts from."""
    return find_native_start(config.model)


def starting_facts(config: SummarizeConfig, folder: Path, start: Start | None) -> dict[str, Any]:
    """Return what the model's shape is, by the tokenizer in a folder and what it starts from."""
    return {"vocabulary_size": starting_vocabulary(folder, start), "encoder": starting_shape(config.model, start)}


def open_split(config: SummarizeConfig, facts: dict[str, Any], split: str) -> DocumentSamples:
    """Open a split of the prepared folder, of which only the training one drops tokens."""
    dropout = config.objective.token_dropout if split == TRAIN else 0.0
    return DocumentSamples(Path(facts["tokenizer"]), split, config.data, dropout, config.seed)


def build(config: SummarizeConfig, facts: dict[str, Any], initialize: bool) -> nn.Module:
    """Build the encoder and its head."""
    return build_model(config, facts, initialize)


def foreign(config: SummarizeConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return the model whose logits of tokens a session gives."""
    with torch.device("meta"):
        model: Any = build_model(config, facts, initialize=False)
    model.encoder, model.head = ForeignEncoder(session, "logits"), nn.Identity()
    return model


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the loss and the score of each sentence, minus infinity beyond the last."""
    logits = model(**{name: batch[name] for name in INPUTS})
    scores = logits.float().masked_fill(batch["places"] < 0, -torch.inf)
    scores = F.pad(scores, (0, model.window_sentences - scores.shape[1]), value=-torch.inf)
    right = (batch[name] for name in ("places", "labels", "worths"))
    total = sentence_loss(logits, *right, objective=model.objective)
    return Outputs(Loss(total, len(scores)), {"scores": scores, "splits": batch["splits"], "rows": batch["rows"]})


def figures(
    config: SummarizeConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Compare each document's best sentences with its summaries.

    When thorough also those of two baselines, the first sentences and TextRank's, and of the oracle; with intervals.
    """
    documents = Examples(Path(facts["tokenizer"]), SPLITS[arrays["splits"][0]])
    rows, firsts = np.unique(arrays["rows"], return_index=True)
    scores = [window[window > -np.inf] for window in arrays["scores"]]
    scores = [np.concatenate(scores[first:last]) for first, last in pairwise([*firsts.tolist(), len(scores)])]
    oracles = documents.lists("oracle", rows)
    rouge, section = Rouge(), config.summary
    named: dict[str, list[np.ndarray]] = {}
    texts = zip(documents.texts("text", rows), documents.texts("references", rows), strict=True)
    for number, (text, references) in enumerate(texts):
        sentences = text.split(data.BETWEEN_SENTENCES)
        choices = {"": _choose(sentences, scores[number], config, rouge.words)}
        if thorough:
            choices["lead_"] = lead(len(sentences), section.sentences)
            choices["textrank_"] = text_rank(sentences, rouge.words, section.sentences)
            choices["oracle_"] = oracles[number].tolist()
        for name, chosen in choices.items():
            summary = data.BETWEEN_SENTENCES.join(sentences[place] for place in chosen)
            named.setdefault(name, []).append(rouge.score(summary, references.split(data.BETWEEN_REFERENCES)))
    return told(named, thorough)


def flops_per_sample(config: SummarizeConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    return operations_of_tokens(
        lambda: build_model(config, facts, initialize=False).encoder, facts["tokens_of_sides"][0]
    )


def predictor(
    config: SummarizeConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[list[str]]], list[dict[str, Any]]]:
    """Return a function from documents, lists of sentences, to {"summary", "sentences"}.

    The sentences are those chosen, in their order, each with its place in the document, counted from 0, and its score:
    its probability with a binary loss, its share with a listwise one.
    """
    tokenizer, words = load_given_tokenizer(Path(facts["tokenizer"])), Words()

    def predict(documents: list[list[str]]) -> list[dict[str, Any]]:
        found = zip(documents, _score(model, config, tokenizer, documents), strict=True)
        return [_summary(sentences, scores, config, words) for sentences, scores in found]

    return predict


def export(config: SummarizeConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers' BertForTokenClassification does.

    Its one label is the score of a sentence, at the [CLS] before it. With layers over sentences it has no such class.
    """
    if getattr(config.model, "sentence_layers", 0):
        return own_export(config.recipe, lambda: build_model(config, facts, initialize=False))
    return encoder_export(facts, "ForTokenClassification", THEIR_HEAD, 1, ["summary"])


def _choose(sentences: list[str], scores: np.ndarray, config: SummarizeConfig, words: Words) -> list[int]:
    section = config.summary
    found = [words.tokenize(sentence) if section.block_trigrams else [] for sentence in sentences]
    return choose(scores.tolist(), found, section.sentences, section.block_trigrams)


def _score(
    model: nn.Module, config: SummarizeConfig, tokenizer: TextTokenizer, documents: list[list[str]]
) -> list[np.ndarray]:
    """Return the logits of each document's sentences."""
    device = next(model.parameters()).device
    windows, scores, owners = [], [], []
    for number, tokens in enumerate(data.encode_sentences(tokenizer, documents)):
        cuts = cut_document(np.array(list(map(len, tokens))), config.data)
        windows += [tokens[begin:end] for begin, end in cuts]
        owners += [number] * len(tokens)
    for begin in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = collate(windows[begin : begin + WINDOWS_AT_ONCE], config.data, tokenizer)
        with torch.inference_mode():
            logits = model(**{name: torch.from_numpy(batch[name]).to(device) for name in INPUTS})
        scores.append(logits.float().cpu().numpy()[batch["places"] >= 0])
    return np.split(np.concatenate(scores), np.cumsum(np.bincount(owners))[:-1])


def _summary(sentences: list[str], scores: np.ndarray, config: SummarizeConfig, words: Words) -> dict[str, Any]:
    logits = torch.from_numpy(scores)
    shares = (logits.sigmoid() if config.objective.loss == "binary" else logits.softmax(0)).tolist()
    chosen = _choose(sentences, scores, config, words)
    listed = [{"place": place, "sentence": sentences[place], "score": round(shares[place], 6)} for place in chosen]
    return {"summary": " ".join(sentences[place] for place in chosen), "sentences": listed}
