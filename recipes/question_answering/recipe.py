"""Find the answer to a question in a text, or tell that it is not there."""

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
from bigbatch.recipes.core.data.splits import SPLITS, prepared_splits
from bigbatch.recipes.core.data.tokenizing import load_given_tokenizer
from bigbatch.recipes.core.foreign import ForeignEncoder, Session
from bigbatch.recipes.core.metrics import CONFIDENCE
from bigbatch.recipes.core.models.encoder import encoder_export
from bigbatch.recipes.core.models.hugging_face import conversion_record, untrained_document
from bigbatch.recipes.core.operations import operations_of_tokens
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.question_answering import data
from bigbatch.recipes.question_answering.answering import Answering, answer
from bigbatch.recipes.question_answering.config import QuestionAnsweringConfig
from bigbatch.recipes.question_answering.model import INPUTS, LAYOUT, THEIR_HEAD, best_spans, span_loss
from bigbatch.recipes.question_answering.model import build_model as build
from bigbatch.recipes.question_answering.scores import (
    Judged,
    exact_match,
    fit_threshold,
    intervals,
    score,
    word_f1,
)

ARCHITECTURE = "ForQuestionAnswering"
"""How the names of transformers' classes of this kind end."""
FIELDS = ("question", "context")
"""What an input of the predictor consists of."""
THRESHOLD = "null_threshold"
MODEL_FACTS = (THRESHOLD, "has_null")
"""What is of the model though no weight."""
WHOLE_SPLIT = True
MAIN_FIGURES = ("f1",)
learning_rate_scales = starting.learning_rate_scales


def prepare(config: QuestionAnsweringConfig) -> Path:
    """Split and tokenize the questions, and place their answers."""
    start = starting.find_native_start(config.model)
    return data.prepare(config.data, start.tokenizer if start else None)


def open_data(config: QuestionAnsweringConfig) -> DataSplits:
    """Map the prepared questions into memory."""
    start = starting.find_native_start(config.model)
    folder = prepared_splits(config.data, start.tokenizer if start else None)
    train = data.QuestionSamples(folder, "train", config.data, config.objective.token_dropout, config.seed)
    facts = {
        "vocabulary_size": starting.starting_vocabulary(folder, start),
        "tokenizer": str(folder),
        "end_of_text": train.tokenizer.end_of_text,
        "encoder": starting.starting_shape(config.model, start),
        "has_null": train.facts["has_null"],
        "groups": train.facts["groups"],
        "tokens_per_sample": round(train.mean_tokens),
        "train_samples": train.num_samples,
    }
    validation, test = (data.open_split(folder, split, config.data) for split in SPLITS[1:])
    return DataSplits(train, validation, facts, test)


def build_model(config: QuestionAnsweringConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the encoder and its head."""
    return build(config.model, config.answers, facts, initialize)


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the windows."""
    return len(batch["starts"])


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the loss over the windows: of each the mean of the cross-entropies of the first and the last token."""
    return _loss(model(**{name: batch[name] for name in INPUTS}), batch)


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the loss, and each window's best answer, in tokens of the context, with its score and that of none."""
    logits = model(**{name: batch[name] for name in INPUTS})
    layout: dict[str, Any] = {name: batch[name] for name in LAYOUT}
    found = best_spans(logits, **layout, most_tokens=model.most_tokens, count=1)
    columns = torch.stack([found.starts[:, 0], found.ends[:, 0]], 1) - batch["contexts"].unsqueeze(1)
    arrays = {
        "splits": batch["splits"],
        "rows": batch["rows"],
        "tokens": columns + batch["begins"].unsqueeze(1),
        "scores": torch.stack([found.scores[:, 0], found.nulls], 1),
    }
    return Outputs(_loss(logits, batch), arrays)


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: the loss alone says little here."""
    return {}


def figures(
    config: QuestionAnsweringConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Judge each question once, by the best answer of all its windows.

    While training, the threshold for giving no answer is fitted to these questions; when thorough it is the one that
    belongs to the model.
    """
    examples = Examples(Path(facts["tokenizer"]), SPLITS[arrays["splits"][0]])
    rows, judged = _judge(facts, arrays, examples)
    found = {}
    threshold = config.answers.null_threshold
    if threshold is None:
        is_to_be_fitted = facts["has_null"] and not thorough
        threshold = fit_threshold(judged) if is_to_be_fitted else facts.get(THRESHOLD, 0.0)
    if facts["has_null"]:
        found[THRESHOLD] = threshold
    groups = np.array(examples.texts("group", rows))
    found |= score(judged, threshold, groups, facts["groups"])
    found["num_questions"] = len(rows)
    if thorough:
        around = intervals(judged, threshold)
        found["details"] = {"intervals": around, "confidence": CONFIDENCE}
    return found


def figure_names(config: QuestionAnsweringConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures of a validation split that has questions of all kinds that the training split has."""
    groups, null = np.array(facts["groups"]), np.array([0.0, float(facts["has_null"])])
    judged = Judged(null, null, null, null > 0, null)
    return [*([THRESHOLD] if facts["has_null"] else []), *score(judged, 0.0, groups[:1], groups.tolist())]


def flops_per_sample(config: QuestionAnsweringConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    return operations_of_tokens(
        lambda: build(config.model, config.answers, facts, initialize=False), facts["tokens_per_sample"]
    )


def samples_of_text(config: QuestionAnsweringConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return nothing: the model writes no text."""
    return []


def predictor(
    config: QuestionAnsweringConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return a function from objects with FIELDS to answers, as `answering.answer` gives them."""
    threshold = config.answers.null_threshold
    threshold = facts.get(THRESHOLD, 0.0) if threshold is None else threshold
    tokenizer = load_given_tokenizer(Path(facts["tokenizer"]))
    parts = Answering(model.eval(), tokenizer, config.data, config.answers, threshold if facts["has_null"] else None)
    return partial(answer, parts)


def hugging_face(config: QuestionAnsweringConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers' BertForQuestionAnswering does."""
    return encoder_export(facts, ARCHITECTURE, THEIR_HEAD, num_outputs=2)


def describe_folder(folder: Path) -> tuple[QuestionAnsweringConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of a BERT that answers questions, to predict with.

    One that this project has not written is taken to know that there may be no answer, at a threshold of 0.
    """
    start = starting.native_start(starting.find_start(str(folder)))
    record = conversion_record(folder)
    length = min(384, (start.encoder or {})["max_positions"])
    document = untrained_document(
        model={"initialize_from": str(folder), "keep_head": True},
        data={"train": [str(folder)], "sequence_length": length, "question_tokens": min(64, length // 2)},
    )
    document |= {key: record["run"][key] for key in ("data", "answers") if key in record["run"]}
    config = QuestionAnsweringConfig.model_validate_json(json.dumps(document))
    facts = {"vocabulary_size": start.vocabulary_size, "tokenizer": str(folder), "encoder": start.encoder}
    facts |= {"has_null": True, **record.get("facts", {})}
    return config, facts


def foreign(config: QuestionAnsweringConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the model where a session gives the logits of first and last tokens."""
    with torch.device("meta"):
        model = build(config.model, config.answers, facts, initialize=False)
    model.encoder = ForeignEncoder(session, "start_logits", "end_logits")  # type: ignore[assignment]
    model.head = nn.Identity()  # type: ignore[assignment]
    return model


def _loss(logits: torch.Tensor, batch: Batch) -> Loss:
    found = span_loss(logits, *(batch[name] for name in ("firsts", "lengths", "starts", "ends")))
    return Loss(found, len(batch["starts"]))


def _judge(facts: dict[str, Any], arrays: dict[str, np.ndarray], examples: Examples) -> tuple[np.ndarray, Judged]:
    """Return the questions that windows were evaluated of, and what is known of their best answers."""
    split = SPLITS[arrays["splits"][0]]
    scores, nulls = arrays["scores"].astype(np.float64).T
    order = np.lexsort((-scores, arrays["rows"]))  # of each question the best window first
    rows, places = np.unique(arrays["rows"][order], return_index=True)
    best = order[places]
    lowest = np.minimum.reduceat(nulls[order], places)
    contexts = Examples(Path(facts["tokenizer"]), split + data.CONTEXTS)
    numbers = examples.numbers("context")[rows]
    found = zip(
        contexts.texts("text", numbers),
        contexts.lists("starts", numbers),
        contexts.lists("ends", numbers),
        arrays["tokens"][best].tolist(),
        examples.lists("answer_starts", rows),
        examples.lists("answer_ends", rows),
        strict=True,
    )
    judged = []
    for text, starts, ends, (first, last), *right in found:
        span = (int(starts[first]), int(ends[last]))
        spans = list(zip(*(side.tolist() for side in right), strict=True))
        golds = [text[slice(*gold)] for gold in spans]
        answer = text[slice(*span)]
        judged.append((exact_match(answer, golds), word_f1(answer, golds), float(not spans), span in spans))
    exact, f1, null, is_span = np.array(judged).T
    margins = lowest - scores[best] if facts["has_null"] else np.full(len(rows), -np.inf)
    return rows, Judged(exact, f1, null, is_span > 0, margins)
