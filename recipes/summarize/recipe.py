"""Summarize a document: choose sentences of it (extracting.py), or write (writing.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from bigbatch.recipes.core import start as starting
from bigbatch.recipes.core.data.examples import read_examples
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.data.splits import SPLITS, TRAIN, prepared_splits, tell_prepared
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import Session
from bigbatch.recipes.core.models.hugging_face import conversion_record, untrained_document
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.summarize import data, extracting, writing
from bigbatch.recipes.summarize.config import SummarizeConfig
from bigbatch.recipes.summarize.rouge import KINDS

FIELDS = ("document",)
"""What an input of the predictor consists of."""
WHOLE_SPLIT = True
learning_rate_scales = starting.learning_rate_scales


def prepare(config: SummarizeConfig) -> Path:
    """Split and tokenize the documents, and label their best sentences; say on standard error what there is."""
    start = _way(config).find(config)
    folder = data.prepare(config.data, start.tokenizer if start else None)
    splits, _ = _open(config, folder, start)
    held = (f"{name}: {split.described()}" for name, split in splits.items())
    tell_prepared(folder, config.data, held, "documents that stand")
    return folder


def open_data(config: SummarizeConfig) -> DataSplits:
    """Map the prepared documents into memory."""
    start = _way(config).find(config)
    splits, facts = _open(config, prepared_splits(config.data, start.tokenizer if start else None), start)
    train, sides = splits[TRAIN], splits[TRAIN].mean_tokens
    facts |= {"end_of_text": train.tokenizer.end_of_text, "train_samples": train.num_samples}
    facts |= {"tokens_of_sides": sides, "tokens_per_sample": round(sum(sides))}
    return DataSplits(train, splits.get(SPLITS[1]), facts, splits.get(SPLITS[2]))


def build_model(config: SummarizeConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the encoder and its head, or the encoder-decoder."""
    return _way(config).build(config, facts, initialize)


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the windows, or the tokens to write."""
    return int((batch["labels"] != IGNORED_LABEL).sum()) if "written" in batch else len(batch["places"])


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the loss over the windows, or over the tokens to write."""
    return outputs(model, batch).loss


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    """Return the loss, and of windows the score of each sentence."""
    return (writing if "written" in batch else extracting).outputs(model, batch)


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: what the loss is depends on the backbone."""
    return {}


def figures(
    config: SummarizeConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Compare each document's best sentences with its summaries; when thorough also other ways to choose."""
    return extracting.figures(config, facts, arrays, thorough)


def figure_names(config: SummarizeConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures of a validation split while training; a seq2seq writes its summaries later."""
    return list(KINDS) if config.model.backbone == "encoder" else []


def generated_figures(config: SummarizeConfig, facts: dict[str, Any], model: nn.Module, samples: Any) -> dict[str, Any]:
    """Write the summaries of a split and compare them with its own."""
    return writing.figures(config, facts, model, samples) if config.model.backbone == "seq2seq" else {}


def flops_per_sample(config: SummarizeConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    return _way(config).flops_per_sample(config, facts)


def samples_of_text(config: SummarizeConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return a few written summaries. Collective: every rank must call it."""
    return writing.samples_of_text(config, model, facts) if config.model.backbone == "seq2seq" else []


def predictor(
    config: SummarizeConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return a function from objects with a document, a text or a list of sentences, to their summaries.

    An encoder's have the sentences too.
    """
    summarize = _way(config).predictor(config, facts, model.eval())

    def predict(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            documents = [data.sentences_of(item.get("document")) for item in items]
        except ValueError as error:
            raise UserError("document", str(error)) from None
        if not all(documents):
            raise UserError("document", "has no sentence: there is nothing to summarize")
        return summarize(documents)

    return predict


def hugging_face(config: SummarizeConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does."""
    return _way(config).export(config, facts)


def describe_folder(folder: Path) -> tuple[SummarizeConfig, dict[str, Any]]:
    """Describe a Hugging Face folder that `bigbatch convert` has written, to predict with."""
    run = conversion_record(folder)["run"]
    backbone = run["model"]["backbone"]
    head = {"keep_head": True} if backbone == "encoder" else {}
    document = untrained_document(model={"backbone": backbone, "initialize_from": str(folder), **head})
    document |= {key: run[key] for key in ("data", "objective", "summary", "search")}
    config = SummarizeConfig.model_validate_json(json.dumps(document))
    way = _way(config)
    return config, {"tokenizer": str(folder), **way.starting_facts(config, folder, way.find(config))}


def foreign(config: SummarizeConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the model where a session gives the logits of tokens, or writes."""
    return _way(config).foreign(config, facts, session)


def _way(config: SummarizeConfig) -> ModuleType:
    """Return the module that follows the backbone."""
    return extracting if config.model.backbone == "encoder" else writing


def _open(config: SummarizeConfig, folder: Path, start: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the splits of a prepared folder, and what is known of the model so far."""
    way, there = _way(config), read_examples(folder).splits
    facts = {"tokenizer": str(folder), **way.starting_facts(config, folder, start)}
    return {split: way.open_split(config, facts, split) for split in SPLITS if split in there}, facts
