"""Translate with an encoder-decoder, or tell how good a translation is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from bigbatch.recipes.core.data.examples import Examples, read_examples
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.data.splits import SPLITS, prepared_splits
from bigbatch.recipes.core.data.tokenizing import encode_documents, load_given_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import ForeignSeq2Seq, Session
from bigbatch.recipes.core.models.config import Seq2SeqSection
from bigbatch.recipes.core.models.hugging_face import conversion_record, own_export, untrained_document
from bigbatch.recipes.core.models.seq2seq import hugging_face_config, hugging_face_tensors
from bigbatch.recipes.core.operations import operations_of_sides
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.core.start_seq2seq import Seq2SeqStart, build_seq2seq, find_seq2seq_start, starting_facts
from bigbatch.recipes.translate import data
from bigbatch.recipes.translate.config import TranslateConfig
from bigbatch.recipes.translate.model import QualityModel
from bigbatch.recipes.translate.translating import judge, open_translator, translate

ARCHITECTURE = ("MarianMTModel", "BartForConditionalGeneration")
"""How the names of transformers' classes of this kind end."""
INPUTS = ("tokens", "written", "labels", "documents", "target_documents")  # of a batch, what the model takes
SHOWN_TRANSLATIONS = 3
MAIN_FIGURES = ("bleu", "spearman")


def prepare(config: TranslateConfig) -> Path:
    """Split and tokenize the pairs."""
    start = _start(config)
    return data.prepare(config.data, start.tokenizer if start else None)


def open_data(config: TranslateConfig) -> DataSplits:
    """Map the prepared pairs into memory."""
    start = _start(config)
    folder = prepared_splits(config.data, start.tokenizer if start else None)
    facts = starting_facts(config.model, folder, start)
    begin = facts["begin_of_target"]
    train = data.PairSamples(folder, "train", config.data, begin, config.seed)
    source, target = train.mean_tokens
    facts |= {
        "tokenizer": str(folder),
        "end_of_text": load_given_tokenizer(folder).end_of_text,
        "source_tokens_per_sample": source,
        "target_tokens_per_sample": target,
        "tokens_per_sample": round(source + target),
        "train_samples": train.num_samples,
    }
    facts |= {name: train.facts[name] for name in ("score_mean", "score_deviation")}
    validation, test = (data.open_split(folder, split, config.data, begin) for split in SPLITS[1:])
    return DataSplits(train, validation, facts, test)


def build_model(config: TranslateConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the encoder-decoder, and the head that judges where it is to."""
    model = build_seq2seq(config.model, facts, config.objective.label_smoothing, initialize)
    if config.model.head == "translation":
        return model
    return QualityModel(model, facts["score_mean"], facts["score_deviation"])


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the tokens to say, or the pairs to judge."""
    return len(batch["scores"]) if "scores" in batch else int((batch["labels"] != IGNORED_LABEL).sum())


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy of the target's tokens, or the squared errors of the scores in their deviations."""
    return outputs(model, batch).loss


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the loss, and of pairs with scores both scores."""
    found = model(**{name: batch[name] for name in INPUTS})
    if "scores" not in batch:
        return Outputs(Loss(found, int((batch["labels"] != IGNORED_LABEL).sum())), {})
    scores = batch["scores"].float()
    errors = ((found - scores) / model.score_deviation).square().sum()
    return Outputs(Loss(errors, len(scores)), {"found": found, "scores": scores})


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: what the loss is depends on the head."""
    return {}


def figures(
    config: TranslateConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Tell how the scores found go with the right ones."""
    found, right = arrays["found"].astype(np.float64), arrays["scores"].astype(np.float64)
    agree = {"pearson": stats.pearsonr, "spearman": stats.spearmanr} if min(np.ptp(found), np.ptp(right)) > 0 else {}
    numbers = {name: float(agree[name](found, right).statistic) if agree else 0.0 for name in ("pearson", "spearman")}
    return numbers | {"mean_absolute_error": float(np.abs(found - right).mean()), "num_pairs": len(right)}


def figure_names(config: TranslateConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures of a head that judges."""
    return ["pearson", "spearman"] if config.model.head == "quality" else []


def generated_figures(
    config: TranslateConfig, facts: dict[str, Any], model: Any, samples: data.PairSamples
) -> dict[str, Any]:
    """Translate a split and compare with its targets."""
    if config.model.head == "quality":
        return {}
    numbers = np.arange(samples.num_samples)
    sources, references = (samples.examples.texts(side, numbers) for side in ("source", "target"))
    found = translate(open_translator(facts, model, config.search), sources)
    return judge([one.text for one in found], references) | {"num_pairs": len(found)}


def flops_per_sample(config: TranslateConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    sides = (facts[f"{side}_tokens_per_sample"] for side in ("source", "target"))
    return operations_of_sides(lambda: build_model(config, facts, initialize=False), *sides)


def samples_of_text(config: TranslateConfig, model: Any, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Translate the first few validation pairs."""
    folder = Path(facts["tokenizer"])
    if config.model.head == "quality" or "validation" not in read_examples(folder).splits:
        return []
    examples = Examples(folder, "validation")
    texts = examples.texts("source", np.arange(min(SHOWN_TRANSLATIONS, examples.num_rows)))
    greedy = config.search.model_copy(update={"num_beams": 1})
    found = translate(open_translator(facts, model, greedy), texts)
    return [{"prompt": text, "text": one.text} for text, one in zip(texts, found, strict=True)]


def fields(config: TranslateConfig) -> tuple[str, ...]:
    """Name what an input of the predictor consists of, where it is not one text."""
    return (config.data.source_column, config.data.target_column) if config.model.head == "quality" else ()


def predictor(
    config: TranslateConfig, facts: dict[str, Any], model: Any
) -> Callable[[list[Any]], list[dict[str, Any]]]:
    """Return a function from texts to translations, or from pairs to how good they are."""
    parts = open_translator(facts, model, config.search)

    def to_translations(texts: list[str]) -> list[dict[str, Any]]:
        return [{"translation": one.text, "score": one.score} for one in translate(parts, texts)]

    def to_scores(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sources, targets = (_encoded([item[name] for item in items], name) for name in fields(config))
        batch = data.collate(sources, targets, np.arange(len(items)), parts.begin_of_target, None)
        device = next(model.parameters()).device
        with torch.no_grad():
            found = model(**{name: torch.from_numpy(array).to(device) for name, array in batch.items()})
        return [{"quality": one} for one in found.tolist()]

    def _encoded(texts: list[Any], name: str) -> list[np.ndarray]:
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(name, "is empty, or no text")
        found = encode_documents(parts.tokenizer, [text.strip() for text in texts])
        positions = model.model.section.max_positions
        if (longest := max(map(len, found))) > positions:
            raise UserError(name, f"has {longest} tokens; the model has {positions} positions")
        return found

    return to_translations if config.model.head == "translation" else to_scores


def hugging_face(config: TranslateConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers' encoder-decoders do; a judge's by `own_export`."""
    if config.model.head == "quality":
        return own_export(config.recipe, lambda: build_model(config, facts, initialize=False))
    section = Seq2SeqSection.model_validate_json(json.dumps(facts["shape"]))
    size, begin, end = (facts[name] for name in ("vocabulary_size", "begin_of_target", "end_of_text"))
    search = config.search
    generation = {"num_beams": search.num_beams, "length_penalty": search.length_penalty}
    generation |= {"max_new_tokens": search.max_new_tokens, "decoder_start_token_id": begin, "pad_token_id": end}
    settings = hugging_face_config(section, size, begin, end)
    return HuggingFaceExport(settings, hugging_face_tensors(section, size), generation, "AutoModelForSeq2SeqLM")


def describe_folder(folder: Path) -> tuple[TranslateConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of an encoder-decoder, to predict with."""
    start = find_seq2seq_start(str(folder))
    document = untrained_document(
        model={"initialize_from": str(folder)},
        data={"train": [str(folder)]},
        search=conversion_record(folder)["run"].get("search", {}),
    )
    config = TranslateConfig.model_validate_json(json.dumps(document))
    return config, starting_facts(config.model, folder, start) | {"tokenizer": str(folder)}


def foreign(config: TranslateConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the model where a session runs an encoder-decoder."""
    return ForeignSeq2Seq(session, Seq2SeqSection.model_validate_json(json.dumps(facts["shape"])))


def _start(config: TranslateConfig) -> Seq2SeqStart | None:
    return find_seq2seq_start(config.model.initialize_from) if config.model.initialize_from else None
