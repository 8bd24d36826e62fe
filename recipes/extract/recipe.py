"""Find entities in a text, or tell how two that are marked are related."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core import start as starting
from bigbatch.recipes.core.data.examples import Examples
from bigbatch.recipes.core.data.splits import SPLITS, TRAIN, prepared_splits
from bigbatch.recipes.core.data.tokenizing import load_given_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import ForeignEncoder, Session
from bigbatch.recipes.core.metrics import CONFIDENCE
from bigbatch.recipes.core.models.encoder import encoder_export
from bigbatch.recipes.core.models.hugging_face import conversion_record, own_export, untrained_document
from bigbatch.recipes.core.operations import operations_of_tokens
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.extract import data
from bigbatch.recipes.extract.answering import entities_in, relations_in
from bigbatch.recipes.extract.config import ExtractConfig
from bigbatch.recipes.extract.model import THEIR_HEAD
from bigbatch.recipes.extract.model import build_model as build
from bigbatch.recipes.extract.scores import (
    entity_counts,
    entity_figures,
    interval,
    relation_counts,
    relation_figures,
)
from bigbatch.recipes.extract.sentences import BadSentenceError, entities_of_tags

ARCHITECTURE = "ForTokenClassification"
"""How the names of transformers' classes of this kind end."""
MODEL_FACTS = ("labels",)
"""What is of the model though no weight."""
NOT_INPUTS = ("rows", "begins", "splits")  # of a batch, what the model does not take
WHOLE_SPLIT = True
MAIN_FIGURES = ("f1", "relation_f1")
learning_rate_scales = starting.learning_rate_scales


def prepare(config: ExtractConfig) -> Path:
    """Read, split and tokenize the sentences."""
    start = starting.find_native_start(config.model)
    return data.prepare(config.data, start.tokenizer if start else None)


def open_data(config: ExtractConfig) -> DataSplits:
    """Map the prepared sentences into memory."""
    start = starting.find_native_start(config.model)
    folder = prepared_splits(config.data, start.tokenizer if start else None)
    train = data.ExtractSamples(folder, TRAIN, config)
    facts = {
        "vocabulary_size": starting.starting_vocabulary(folder, start),
        "tokenizer": str(folder),
        "end_of_text": train.tokenizer.end_of_text,
        "labels": train.facts["labels"],
        "encoder": starting.starting_shape(config.model, start) if config.model.backbone == "encoder" else None,
        "tokens_per_sample": round(train.mean_tokens),
        "train_samples": train.num_samples,
    }
    validation, test = (data.open_split(folder, split, config) for split in SPLITS[1:])
    return DataSplits(train, validation, facts, test)


def build_model(config: ExtractConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the backbone and its head."""
    return build(config, facts, initialize)


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the words, or the pairs."""
    return int(batch["word_counts"].sum()) if batch["labels"].ndim > 1 else len(batch["labels"])


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy over words or pairs; with a CRF minus the log likelihood over sentences."""
    return _run(model, batch)[0]


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the loss, and the tags of the words [N, longest window], or the chances of the relations [N, C]."""
    total, found = _run(model, batch)
    arrays = {name: batch[name] for name in NOT_INPUTS}
    if batch["labels"].dim() == 1:
        return Outputs(total, arrays | {"found": found, "labels": batch["labels"]})
    longest = model.longest - found.shape[1]
    return Outputs(total, arrays | {"found": nn.functional.pad(found, (0, longest), value=-1)})


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: the loss alone says little here."""
    return {}


def figures(
    config: ExtractConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Judge whole sentences, by seqeval or by SemEval's official rule; when thorough with an interval."""
    if config.data.task == "relations":
        labels, name = np.array(facts["labels"]), "relation_f1"
        both = labels[arrays["labels"]].tolist(), labels[arrays["found"].argmax(1)].tolist()
        found: dict[str, Any] = relation_figures(*both, config.data.no_relation)
        counts = relation_counts(*both, config.data.no_relation)[1] if thorough else None
    else:
        examples, name = Examples(Path(facts["tokenizer"]), SPLITS[arrays["splits"][0]]), "f1"
        sentences = _whole_sentences(examples, arrays, facts["labels"])
        found = entity_figures(*sentences)
        counts = entity_counts(*sentences) if thorough else None
    if counts is not None:
        found["details"] = {"intervals": {name: interval(counts)}, "confidence": CONFIDENCE}
    return found


def figure_names(config: ExtractConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures of a validation split that has all labels."""
    labels = facts["labels"]
    if config.data.task == "relations":
        return list(relation_figures(labels, labels, config.data.no_relation))
    return list(entity_figures([labels], [labels]))


def flops_per_sample(config: ExtractConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    return operations_of_tokens(lambda: build(config, facts, initialize=False), facts["tokens_per_sample"])


def samples_of_text(config: ExtractConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return nothing: the model writes no text."""
    return []


def predictor(
    config: ExtractConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Return a function from texts to {"entities"}, or from texts with markers to {"label", "probability", ...}."""
    tokenizer = load_given_tokenizer(Path(facts["tokenizer"]))
    answer = relations_in if config.data.task == "relations" else entities_in
    return partial(answer, model.eval(), tokenizer, config, facts["labels"])


def hugging_face(config: ExtractConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does, or where it has no such class as `own_export`."""
    if config.model.backbone != "encoder" or config.model.crf:
        return own_export(config.recipe, lambda: build(config, facts, initialize=False))
    labels, is_pair = facts["labels"], config.data.task == "relations"
    kind = "ForSequenceClassification" if is_pair else ARCHITECTURE
    return encoder_export(facts, kind, THEIR_HEAD, len(labels), labels, has_pooler=is_pair)


def describe_folder(folder: Path) -> tuple[ExtractConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of a BERT that tags words, or one that this recipe has written."""
    start = starting.native_start(starting.find_start(str(folder)))
    labels = starting.read_labels(folder)
    length = min(256, (start.encoder or {})["max_positions"])
    data = {"task": "entities", "train": [str(folder)], "sequence_length": length}
    document = untrained_document(
        data=conversion_record(folder)["run"].get("data", data),
        model={"backbone": "encoder", "initialize_from": str(folder), "keep_head": True},
    )
    config = ExtractConfig.model_validate_json(json.dumps(document))
    facts = {"vocabulary_size": start.vocabulary_size, "tokenizer": str(folder), "encoder": start.encoder}
    facts["labels"] = labels
    if config.data.task == "entities":
        try:
            entities_of_tags(labels)
        except BadSentenceError as error:
            raise UserError(str(folder / starting.CONFIG_FILE), f"id2label {error}") from None
    return config, facts


def foreign(config: ExtractConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the model where a session gives the logits of tokens, or of marked pairs."""
    with torch.device("meta"):
        model: Any = build(config, facts, initialize=False)
    model.encoder, model.head = ForeignEncoder(session, "logits"), nn.Identity()
    model.pooler = model.pooler and nn.Identity()
    return model


def _run(model: Any, batch: Batch) -> tuple[Loss, torch.Tensor]:
    total, found = model(**{name: array for name, array in batch.items() if name not in NOT_INPUTS})
    has_words = batch["labels"].dim() > 1
    return Loss(total, int(batch["word_counts"].sum()) if has_words else len(batch["labels"])), found


def _whole_sentences(
    examples: Examples, arrays: dict[str, np.ndarray], labels: list[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Return of each sentence that windows were evaluated of the right tags and those that the model gives."""
    order = np.lexsort((arrays["begins"], arrays["rows"]))
    rows, firsts = np.unique(arrays["rows"][order], return_index=True)
    found = np.split(arrays["found"][order], firsts[1:])
    gold = [[labels[tag] for tag in tags] for tags in examples.lists("tags", rows)]
    given = [[labels[tag] for tag in parts[parts >= 0]] for parts in found]
    return [right[: len(answer)] for right, answer in zip(gold, given, strict=True)], given
