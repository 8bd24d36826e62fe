"""Tell of which kind a text is: one label of several, or any number of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.classify import data
from bigbatch.recipes.classify.config import ClassifyConfig, ObjectiveSection
from bigbatch.recipes.classify.heads import problem_type
from bigbatch.recipes.classify.models import build_classifier, foreign_classifier
from bigbatch.recipes.core import start as starting
from bigbatch.recipes.core.data.clean import clean
from bigbatch.recipes.core.data.splits import prepared_splits
from bigbatch.recipes.core.data.tokenizing import encode_documents, load_given_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import Session
from bigbatch.recipes.core.metrics import classification_figures
from bigbatch.recipes.core.models.encoder import encoder_export
from bigbatch.recipes.core.models.hugging_face import (
    Piece,
    conversion_record,
    label_tables,
    own_export,
    read_json,
    untrained_document,
)
from bigbatch.recipes.core.operations import operations_of_tokens
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.core.start import Start, find_start

ARCHITECTURE = "ForSequenceClassification"
"""How the names of transformers' classes of this kind end."""
learning_rate_scales = starting.learning_rate_scales


def prepare(config: ClassifyConfig) -> Path:
    """Clean, split and tokenize the rows."""
    start = _start(config)
    return data.prepare(config.data, start.tokenizer if start else None)


def open_data(config: ClassifyConfig) -> DataSplits:
    """Map the prepared rows into memory."""
    start = _start(config)
    folder = prepared_splits(config.data, start.tokenizer if start else None)
    is_packed = config.data.packing and _can_pack(config, start)

    def samples(split: str) -> data.ClassifiedSamples | None:
        dropout = config.objective.token_dropout if split == "train" else 0.0
        return data.open_split(folder, split, config.data, is_packed, dropout, config.seed)

    train = samples("train")
    assert train is not None  # prepare refuses data without training rows
    facts = {
        "vocabulary_size": starting.starting_vocabulary(folder, start),
        "tokenizer": str(folder),
        "end_of_text": train.end_of_text,
        "labels": train.labels,
        "class_weights": _class_weights(config.objective, train),
        "tokens_per_sample": round(train.mean_tokens),
        "train_samples": train.num_samples,
        "encoder": starting.starting_shape(config.model, start) if config.model.backbone == "encoder" else None,
        "hugging_face": start.hugging_face if start else None,
    }
    return DataSplits(train, samples("validation"), facts, samples("test"))


def build_model(config: ClassifyConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the backbone and its head."""
    return build_classifier(config, facts, initialize)


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the texts."""
    return len(batch["labels"])


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy over the texts; with multi_label the mean binary one over the labels."""
    total, _ = model(**batch)
    return Loss(total, len(batch["labels"]))


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    """Return the loss, and the probability of each label beside what is right."""
    total, logits = model(**batch)
    probabilities = logits.float().sigmoid() if batch["labels"].dim() > 1 else logits.float().softmax(-1)
    found = {"probabilities": probabilities, "labels": batch["labels"]}
    return Outputs(Loss(total, len(batch["labels"])), found)


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: the loss alone says little here."""
    return {}


def figures(
    config: ClassifyConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Judge the probabilities; when thorough with intervals, all labels and the confusion matrix."""
    found = classification_figures(
        arrays["probabilities"],
        arrays["labels"],
        facts["labels"],
        config.data.multi_label,
        config.objective.threshold,
        bootstrap_samples=1000 if thorough else 0,
    )
    return {**found.scalars, **({"details": found._asdict()} if thorough else {})}


def figure_names(config: ClassifyConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures that a validation split with all labels has."""
    num_labels = len(facts["labels"])
    right = np.eye(num_labels) if config.data.multi_label else np.arange(num_labels)
    found = figures(config, facts, {"probabilities": np.eye(num_labels), "labels": right}, thorough=False)
    return list(found)


def flops_per_sample(config: ClassifyConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    return operations_of_tokens(lambda: build_classifier(config, facts, initialize=False), facts["tokens_per_sample"])


def samples_of_text(config: ClassifyConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return nothing: a classifier writes no text."""
    return []


def predictor(
    config: ClassifyConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Return a function from texts to {"label", "probability", "probabilities"}; with multi_label "labels" instead."""
    tokenizer, labels, section = load_given_tokenizer(Path(facts["tokenizer"])), facts["labels"], config.data
    device = next(model.parameters()).device
    is_packed = section.packing and config.model.backbone != "rnn" and not facts.get("hugging_face")
    model.eval()

    def predict(texts: list[str]) -> list[dict[str, Any]]:
        cleaned = [clean(text, section.clean) for text in texts]
        if None in cleaned:
            raise UserError("text", "is empty: there is nothing to classify")
        tokens = encode_documents(tokenizer, [text for text in cleaned if text is not None])
        batch = data.collate(tokens, section, is_packed, tokenizer)
        with torch.inference_mode():
            logits = model(**{name: torch.from_numpy(array).to(device) for name, array in batch.items()}).float()
        chances = (logits.sigmoid() if section.multi_label else logits.softmax(-1)).tolist()
        return [_answer(dict(zip(labels, row, strict=True)), config) for row in chances]

    return predict


def hugging_face(config: ClassifyConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does, or where it has no such class as `own_export`."""
    labels = facts["labels"]
    names, numbers = label_tables(labels)
    table = {"id2label": names, "label2id": numbers, "problem_type": problem_type(config.data.multi_label)}
    auto_class = f"AutoModel{ARCHITECTURE}"
    if facts.get("hugging_face"):
        with torch.device("meta"):
            model = build_classifier(config, facts, initialize=False)
        tensors = {name: [Piece(name.removeprefix("model."), 0, len(p))] for name, p in model.named_parameters()}
        return HuggingFaceExport({**facts["hugging_face"], **table}, tensors, auto_class=auto_class)
    if config.model.backbone != "encoder" or config.model.pooling != "first":
        return own_export(config.recipe, lambda: build_classifier(config, facts, initialize=False))
    export = encoder_export(facts, ARCHITECTURE, "classifier", len(labels), labels, has_pooler=True, prefix="backbone.")
    return export._replace(config={**export.config, **table, "classifier_dropout": config.model.head_dropout})


def describe_folder(folder: Path) -> tuple[ClassifyConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of a text classifier, to predict with; texts are cut at its longest length."""
    settings, start = read_json(folder / "config.json"), find_start(str(folder))
    table = settings.get("id2label") or {}
    length = min(512, settings.get("max_position_embeddings") or 512)
    is_multi_label = settings.get("problem_type") == problem_type(multi_label=True)
    document = untrained_document(
        model={"backbone": "encoder", "initialize_from": str(folder), "keep_head": True},
        data={"train": [str(folder)], "sequence_length": length, "multi_label": is_multi_label},
    )
    run = conversion_record(folder)["run"]
    document |= {key: run[key] for key in ("data", "objective") if key in run}
    config = ClassifyConfig.model_validate_json(json.dumps(document))
    facts = {
        "vocabulary_size": start.vocabulary_size,
        "tokenizer": str(folder),
        "labels": [table[key] for key in sorted(table, key=int)],
        "encoder": start.encoder,
        "hugging_face": start.hugging_face,
    }
    return config, facts


def foreign(config: ClassifyConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the model where a session gives the logits of windows."""
    return foreign_classifier(config, facts, session)


def _start(config: ClassifyConfig) -> Start | None:
    section = config.model
    return find_start(section.initialize_from) if section.backbone == "encoder" and section.initialize_from else None


def _can_pack(config: ClassifyConfig, start: Start | None) -> bool:
    return config.model.backbone != "rnn" and not (start and start.hugging_face)


def _class_weights(section: ObjectiveSection, train: data.ClassifiedSamples) -> list[float] | None:
    """Return the factor on each label's loss; with one label a text their mean over the training rows is 1."""
    if section.class_weights == "none":
        return None
    counts = train.class_counts.astype(float)
    if isinstance(section.class_weights, dict):
        if unknown := set(section.class_weights) - set(train.labels):
            raise UserError("objective.class_weights", f"names {min(unknown)!r}; labels: {', '.join(train.labels)}")
        weights = np.array([section.class_weights.get(label, 1.0) for label in train.labels])
    elif train.multi_label:
        return ((train.num_samples - counts) / np.maximum(counts, 1)).tolist()
    else:
        weights = 1 / np.maximum(counts, 1)
    return (weights * counts.sum() / (weights * counts).sum()).tolist()


def _answer(chances: dict[str, float], config: ClassifyConfig) -> dict[str, Any]:
    best = max(chances, key=lambda label: chances[label])
    if not config.data.multi_label:
        return {"label": best, "probability": chances[best], "probabilities": chances}
    given = {label: chance for label, chance in chances.items() if chance >= config.objective.threshold}
    return {"labels": list(given), "probabilities": chances}
