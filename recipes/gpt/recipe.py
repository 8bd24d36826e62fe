"""Train a GPT-2 or Llama decoder to predict the next token."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from bigbatch.recipes.core.data.prepare import prepare_tokens, prepared_folder
from bigbatch.recipes.core.data.shards import IGNORED_LABEL, TokenSamples
from bigbatch.recipes.core.data.tokenizing import encode_prompt, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.recipes.core.models.decoder import (
    Decoder,
    hugging_face_config,
    hugging_face_tensors,
    load_hugging_face,
)
from bigbatch.recipes.core.models.mixture import MixtureFeedForward
from bigbatch.recipes.core.parallel import ALONE, Axis, Mesh
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss
from bigbatch.recipes.core.train import Run
from bigbatch.recipes.gpt.config import GptConfig


def prepare(config: GptConfig) -> Path:
    """Tokenize the texts into shards."""
    return prepare_tokens(config.data)


def open_data(config: GptConfig) -> DataSplits:
    """Map the token shards into memory; there is no validation or test split where the document names none."""
    data = config.data
    folder = prepared_folder(data)
    train = TokenSamples(folder, "train", data.sequence_length, data.packing)

    def judged(split: str) -> TokenSamples:
        return TokenSamples(folder, split, data.sequence_length, data.packing)

    facts = {
        "vocabulary_size": train.vocabulary_size,
        "tokenizer": str(train.tokenizer_folder),
        "end_of_text": train.end_of_text,
        "tokens_per_sample": data.sequence_length,
        "train_samples": train.num_samples,
    }
    _prompts(config, load_tokenizer(folder).tokenizer)  # a prompt that cannot be used is told now, not hours later
    validation = judged("validation") if data.validation or data.validation_fraction else None
    return DataSplits(train, validation, facts, judged("test") if data.test else None)


def build_model(
    config: GptConfig,
    facts: dict[str, Any],
    initialize: bool = True,
    tensor: Axis = ALONE,
    sequence: Axis = ALONE,
    expert: Axis = ALONE,
) -> Decoder:
    """Build the decoder: first weights, or those of a Hugging Face folder."""
    model = Decoder(config.model, facts["vocabulary_size"], tensor, sequence, expert, config.parallel.tensor_sequence)
    if initialize and config.model.initialize_from:
        load_hugging_face(model, Path(config.model.initialize_from))
    return model


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the labels that are not ignored."""
    return int((batch["labels"] != IGNORED_LABEL).sum())


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy of the next tokens."""
    total = model(batch["tokens"], batch["labels"], batch.get("positions"), batch.get("documents"))
    return Loss(total, int((batch["labels"] != IGNORED_LABEL).sum()))


def metrics(loss: float) -> dict[str, float]:
    """Return perplexity and bits a token."""
    return {"perplexity": math.exp(min(loss, 700.0)), "bits_per_token": loss / math.log(2)}


def flops_per_sample(config: GptConfig, facts: dict[str, Any]) -> float:
    """Count 6 P + 12 L D T operations a token (PaLM, arXiv 2204.02311, appendix B; P without the input embedding).

    Of a mixture of experts, P has as many as a token meets, whatever fills their buffers up. Attention is counted in
    full, as the field does, though a causal kernel needs half of it.
    """
    section, length = config.model, config.data.sequence_length
    with torch.device("meta"):
        model = Decoder(section, facts["vocabulary_size"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not section.tie_embeddings:
        parameters -= model.embed.tokens.weight.numel()
    if model.embed.positions is not None:
        parameters -= model.embed.positions.weight.numel()
    for block in model.blocks:
        if isinstance(block.feed_forward, MixtureFeedForward):
            sizes = [parameter.numel() for parameter in block.feed_forward.experts.parameters()]
            parameters -= sum(sizes) // section.num_experts * (section.num_experts - section.experts_per_token)
    return length * (6.0 * parameters + 12.0 * section.num_layers * section.hidden_size * length)


def hugging_face(config: GptConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does."""
    section, size = config.model, facts["vocabulary_size"]
    sample = config.sample
    generation = {"do_sample": sample.temperature > 0, "max_new_tokens": sample.max_new_tokens}
    if sample.temperature > 0:
        generation |= {"temperature": sample.temperature, "top_k": sample.top_k, "top_p": sample.top_p}
    return HuggingFaceExport(hugging_face_config(section, size), hugging_face_tensors(section, size), generation)


def contestants(run: Run, mesh: Mesh) -> list[Any]:
    """Return who trains the same model, for `bigbatch bench train`."""
    from bigbatch.recipes.gpt import contestants as module  # noqa: PLC0415 - transformers' Trainer takes seconds

    return module.contestants(run, mesh)


def samples_of_text(config: GptConfig, model: Decoder, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Go on with each prompt of the document. Collective: every rank must call it."""
    tokenizer = load_tokenizer(Path(facts["tokenizer"])).tokenizer
    section = config.sample
    sampling = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        seed=config.seed,
        stop_tokens=(facts["end_of_text"],),
    )
    rows = generate(model, _prompts(config, tokenizer), sampling)
    texts = [tokenizer.decode(completions[0].tokens) for completions in rows]
    return [{"prompt": prompt, "text": text} for prompt, text in zip(section.prompts, texts, strict=True)]


def _prompts(config: GptConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Encode the prompts; raise UserError for one that cannot be gone on with."""
    encoded = []
    for index, prompt in enumerate(config.sample.prompts):
        where = f"sample.prompts[{index}]"
        encoded.append(encode_prompt(tokenizer, prompt, where))
        if not 0 < len(encoded[-1]) < config.model.max_positions:
            room = config.model.max_positions - 1
            raise UserError(where, f"{prompt!r} has {len(encoded[-1])} tokens; 1 to {room} would be right")
    return encoded
