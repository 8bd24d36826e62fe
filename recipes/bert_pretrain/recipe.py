"""Pretrain a BERT: fill in masked tokens."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig
from bigbatch.recipes.bert_pretrain.data import MaskedSamples, read_vocabulary
from bigbatch.recipes.core.data.prepare import prepare_tokens, prepared_folder
from bigbatch.recipes.core.data.shards import IGNORED_LABEL, TokenSamples
from bigbatch.recipes.core.data.tokenizing import MASK, encode_prompt, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.encoder import (
    MaskedLanguageModel,
    hugging_face_config,
    hugging_face_tensors,
    load_hugging_face,
)
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss
from bigbatch.recipes.core.train import Run


def prepare(config: BertPretrainConfig) -> Path:
    """Tokenize the texts into shards."""
    return prepare_tokens(config.data)


def open_data(config: BertPretrainConfig) -> DataSplits:
    """Map the token shards into memory; there is no validation split where the document names none.

    The validation samples are masked as in epoch 0, whenever they are looked at.
    """
    data = config.data
    folder = prepared_folder(data)
    vocabulary = read_vocabulary(folder, config.masking.whole_words)

    def masked(split: str) -> MaskedSamples:
        samples = TokenSamples(folder, split, data.sequence_length, data.packing)
        return MaskedSamples(samples, vocabulary, config.masking, config.seed)

    train = masked("train")
    facts = {
        "vocabulary_size": train.samples.vocabulary_size,
        "tokenizer": str(folder),
        "end_of_text": train.samples.end_of_text,
        "mask": vocabulary.mask,
        "tokens_per_sample": data.sequence_length,
        "train_samples": train.num_samples,
    }
    _prompts(config, load_tokenizer(folder).tokenizer, vocabulary.mask)  # a useless prompt is told now, not hours later
    return DataSplits(train, masked("validation") if data.validation or data.validation_fraction else None, facts)


def build_model(config: BertPretrainConfig, facts: dict[str, Any], initialize: bool = True) -> MaskedLanguageModel:
    """Build the encoder and its head: first weights, or those of a Hugging Face folder."""
    model = MaskedLanguageModel(config.model, facts["vocabulary_size"])
    if initialize and config.model.initialize_from:
        load_hugging_face(model, Path(config.model.initialize_from))
    return model


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the tokens to fill in."""
    return int((batch["labels"] != IGNORED_LABEL).sum())


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy of the tokens to fill in."""
    total = model(batch["tokens"], batch["targets"], batch["labels"], batch.get("positions"), batch.get("documents"))
    return Loss(total, int((batch["labels"] != IGNORED_LABEL).sum()))


def metrics(loss: float) -> dict[str, float]:
    """Return the perplexity of a masked token."""
    return {"perplexity": math.exp(min(loss, 700.0))}


def flops_per_sample(config: BertPretrainConfig, facts: dict[str, Any]) -> float:
    """Count 6 P + 12 L D T operations a token, P the weights of the layers, and 6 for each weight of the head a target.

    The formula is PaLM's (arXiv 2204.02311, appendix B); attention is counted in full, whatever the packing hides.
    """
    section, length = config.model, config.data.sequence_length
    with torch.device("meta"):
        model = MaskedLanguageModel(section, facts["vocabulary_size"])
    layers = sum(parameter.numel() for parameter in model.encoder.blocks.parameters())
    head = sum(parameter.numel() for parameter in model.head.parameters())
    attention = 12.0 * section.num_layers * section.hidden_size * length
    return length * (6.0 * layers + attention + 6.0 * config.masking.fraction * head)


def hugging_face(config: BertPretrainConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does."""
    section, size = config.model, facts["vocabulary_size"]
    tensors = hugging_face_tensors(section, size)
    return HuggingFaceExport(hugging_face_config(section, size), tensors, auto_class="AutoModelForMaskedLM")


def contestants(run: Run, mesh: Mesh) -> list[Any]:
    """Return who trains the same model, for `bigbatch bench train`."""
    from bigbatch.recipes.bert_pretrain import contestants as module  # noqa: PLC0415 - transformers takes seconds

    return module.contestants(run, mesh)


def samples_of_text(
    config: BertPretrainConfig, model: MaskedLanguageModel, facts: dict[str, Any]
) -> list[dict[str, str]]:
    """Fill in each prompt of the document: the likeliest tokens. Collective: every rank must call it."""
    tokenizer = load_tokenizer(Path(facts["tokenizer"])).tokenizer
    device = next(model.parameters()).device
    was_training, texts = model.training, []
    model.eval()
    with torch.no_grad():
        for tokens in _prompts(config, tokenizer, facts["mask"]):
            row = torch.tensor([tokens], device=device)
            places = [[place for place, token in enumerate(tokens) if token == facts["mask"]]]
            logits = model(row, torch.tensor(places, device=device))  # [1, K, V]
            best = logits[0].float().softmax(-1).topk(config.sample.candidates)
            each = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            texts.append("; ".join(_candidates(tokenizer, *found) for found in each))
    model.train(was_training)
    return [{"prompt": prompt, "text": text} for prompt, text in zip(config.sample.prompts, texts, strict=True)]


def _candidates(tokenizer: Tokenizer, probabilities: list[float], tokens: list[int]) -> str:
    return ", ".join(f"{tokenizer.id_to_token(t)} {p:.0%}" for p, t in zip(probabilities, tokens, strict=True))


def _prompts(config: BertPretrainConfig, tokenizer: Tokenizer, mask: int) -> list[list[int]]:
    """Encode the prompts; raise UserError for one with nothing to fill in or without room."""
    encoded = []
    for index, prompt in enumerate(config.sample.prompts):
        where = f"sample.prompts[{index}]"
        encoded.append(encode_prompt(tokenizer, prompt, where))
        if mask not in encoded[-1]:
            raise UserError(where, f"{prompt!r} has nothing to fill in; write {MASK} where a token is wanted")
        if len(encoded[-1]) > config.model.max_positions:
            room = config.model.max_positions
            raise UserError(where, f"{prompt!r} has {len(encoded[-1])} tokens; at most {room} would be right")
    return encoded
