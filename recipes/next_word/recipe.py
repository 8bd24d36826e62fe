"""Predict the next word: with Kneser-Ney n-grams, or with a recurrent network."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core.data.clean import clean
from bigbatch.recipes.core.data.ngrams import Tables, discounts_by_formula, distribution
from bigbatch.recipes.core.data.prepare import prepare_tokens, prepared_folder
from bigbatch.recipes.core.data.shards import IGNORED_LABEL, Stream
from bigbatch.recipes.core.data.tokenizing import encode_documents, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import own_export
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Samples
from bigbatch.recipes.next_word.config import NextWordConfig
from bigbatch.recipes.next_word.data import NgramSamples, TextSamples
from bigbatch.recipes.next_word.ngram import KneserNey
from bigbatch.recipes.next_word.recurrent import RecurrentLanguageModel
from bigbatch.recipes.next_word.tables import open_tables, prepare_tables, read_tables, tables_folder

MOST_WORDS = 1000  # of a text to predict behind: no state remembers more


def prepare(config: NextWordConfig) -> Path:
    """Tokenize the texts into shards; for n-grams count them, in all of the training text and in the part to fit on."""
    folder = prepare_tokens(config.data)
    if config.model.kind == "ngram":
        for num_tokens in _counted(config, folder):
            prepare_tables(folder, config.model.order, num_tokens)
    return folder


def open_data(config: NextWordConfig) -> DataSplits:
    """Map the token shards into memory; there is no validation or test split where the document names none."""
    data, folder = config.data, prepared_folder(config.data)
    stream = Stream(folder, "train")
    facts: dict[str, Any] = {
        "vocabulary_size": stream.vocabulary_size,
        "tokenizer": str(folder),
        "end_of_text": stream.end_of_text,
        "tokens_per_sample": data.sequence_length,
    }
    train, judged = (_ngram_splits if config.model.kind == "ngram" else _recurrent_splits)(config, folder, facts)
    facts["train_samples"] = train.num_samples
    validation = judged("validation") if data.validation or data.validation_fraction else None
    return DataSplits(train, validation, facts, judged("test") if data.test else None)


def build_model(config: NextWordConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the model: n-grams begin with the discounts by formula, a network with weights that are drawn."""
    if config.model.kind == "ngram":
        return KneserNey(facts["vocabulary_size"], facts["discounts"])
    return RecurrentLanguageModel(config.model, facts["vocabulary_size"])


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the labels that are not ignored."""
    return int((batch["labels"] != IGNORED_LABEL).sum())


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy of the words."""
    return Loss(model(**batch), int((batch["labels"] != IGNORED_LABEL).sum()))


def metrics(loss: float) -> dict[str, float]:
    """Return the perplexity."""
    return {"perplexity": math.exp(min(loss, 700.0))}


def flops_per_sample(config: NextWordConfig, facts: dict[str, Any]) -> float:
    """Count 6 operations a word for each weight; the tied table makes the logits (arXiv 2001.08361, section 2.1)."""
    with torch.device("meta"):
        model = build_model(config, facts, initialize=False)
    return 6.0 * sum(parameter.numel() for parameter in model.parameters()) * facts["tokens_per_sample"]


def samples_of_text(config: NextWordConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Tell the likeliest words behind each prompt of the document. Collective: every rank must call it."""
    prompts, was_training = config.sample.prompts, model.training
    answers = predictor(config, facts, model)(list(prompts)) if prompts else []
    model.train(was_training)
    shown = [answer["words"][: config.sample.num_words] for answer in answers]
    texts = [", ".join(f"{word!r} {probability:.1%}" for word, probability in words) for words in shown]
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def predictor(
    config: NextWordConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Return a function from texts to {"words": all words with their probabilities behind the text, likeliest first}.

    Behind an empty text stands what a text begins with.
    """
    folder = Path(facts["tokenizer"])
    tokenizer = load_tokenizer(folder)
    names = [tokenizer.tokenizer.id_to_token(number) for number in range(facts["vocabulary_size"])]
    model.eval()
    answer = _by_counts(config, facts, model) if isinstance(model, KneserNey) else _by_states(model)

    def predict(texts: list[str]) -> list[dict[str, Any]]:
        cleaned = [clean(text, config.data.clean) or "" for text in texts]
        begin = np.array([tokenizer.end_of_text], np.uint32)
        tokens = [np.concatenate([begin, found[:-1]]) for found in encode_documents(tokenizer, cleaned)]
        rows = answer([found[-MOST_WORDS:].astype(np.int64) for found in tokens])
        orders = [np.argsort(-row, kind="stable").tolist() for row in rows]
        return [
            {"words": [(names[number], float(row[number])) for number in order]}
            for row, order in zip(rows, orders, strict=True)
        ]

    return predict


def hugging_face(config: NextWordConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors, and the counts of n-grams; transformers has no such class."""
    counts = ()
    if config.model.kind == "ngram":
        counts = (tables_folder(Path(facts["tokenizer"]), config.model.order, facts["counted_tokens"]),)
    return own_export(config.recipe, lambda: build_model(config, facts, initialize=False), folders=counts)


Splits = tuple[Samples, Callable[[str], Samples]]
"""To train on; and how others are opened."""


def _recurrent_splits(config: NextWordConfig, folder: Path, facts: dict[str, Any]) -> Splits:
    length, context = config.data.sequence_length, config.data.context_length
    train = TextSamples(folder, "train", length, shift_seed=config.seed)
    return train, lambda split: TextSamples(folder, split, length, context)


def _ngram_splits(config: NextWordConfig, folder: Path, facts: dict[str, Any]) -> Splits:
    """Describe the n-grams in the facts, too."""
    assert config.model.kind == "ngram"
    whole, part = _counted(config, folder)
    tables, counted = (open_tables(folder, config.model.order, num_tokens) for num_tokens in (whole, part))
    facts |= {
        "counted_tokens": whole,
        "counts": tables.fingerprint,
        "discounts": [discounts_by_formula(table) for table in counted.by_length],
    }
    length = config.data.sequence_length
    train = NgramSamples(TextSamples(folder, "train", length, begin=part), counted)
    return train, lambda split: NgramSamples(TextSamples(folder, split, length), tables)


def _counted(config: NextWordConfig, folder: Path) -> tuple[int, int]:
    """Return how many words of the training text are counted to predict with, and to fit the discounts."""
    assert config.model.kind == "ngram"
    whole = Stream(folder, "train").num_tokens
    return whole, int(whole * (1 - config.model.held_out_fraction))


def _by_counts(
    config: NextWordConfig, facts: dict[str, Any], model: KneserNey
) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    folder = Path(facts["tokenizer"])
    target = tables_folder(folder, model.order, facts["counted_tokens"])
    tables: Tables = read_tables(target, model.order, facts["vocabulary_size"])
    if tables.fingerprint != facts["counts"]:
        raise UserError(str(folder), "holds other counts than those that the run was trained with; prepare them again")
    with torch.no_grad():
        discounts = model.discounts().double().cpu().numpy()
    return lambda texts: [distribution(tables, discounts, text) for text in texts]


def _by_states(model: nn.Module) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    def answer(texts: list[np.ndarray]) -> list[np.ndarray]:
        lasts = np.array([len(text) - 1 for text in texts])
        tokens = np.zeros((len(texts), int(lasts.max()) + 1), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        device = next(model.parameters()).device
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens).to(device), lasts=torch.from_numpy(lasts).to(device))
        return list(logits.float().softmax(-1).cpu().numpy())

    return answer
