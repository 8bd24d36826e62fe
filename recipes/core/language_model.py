"""What recipes that train a decoder to write share: functions of the Recipe protocol, and how they sample.

Their documents have a DecoderSection `model`, `data.sequence_length` and a SamplingSection `sample`.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core.config import SamplingSection
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.foreign import ForeignDecoder, Session
from bigbatch.recipes.core.generate import Sampling
from bigbatch.recipes.core.models.decoder import Decoder, hugging_face_config, hugging_face_tensors
from bigbatch.recipes.core.models.mixture import MixtureFeedForward
from bigbatch.recipes.core.recipe import Batch, HuggingFaceExport, Loss


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


def flops_per_sample(config: Any, facts: dict[str, Any]) -> float:
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


def hugging_face(config: Any, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does."""
    section, size = config.model, facts["vocabulary_size"]
    sample = config.sample
    generation = {"do_sample": sample.temperature > 0, "max_new_tokens": sample.max_new_tokens}
    if sample.temperature > 0:
        generation |= {"temperature": sample.temperature, "top_k": sample.top_k, "top_p": sample.top_p}
    return HuggingFaceExport(hugging_face_config(section, size), hugging_face_tensors(section, size), generation)


def foreign(config: Any, facts: dict[str, Any], session: Session) -> ForeignDecoder:
    """Return what stands in for the decoder that a session runs."""
    return ForeignDecoder(session, config.model)


def sampling_of(section: SamplingSection, seed: int, stop_tokens: tuple[int, ...]) -> Sampling:
    """Return how a document's section says that text is to be sampled."""
    names = type(section).model_fields.keys() & SamplingSection.model_fields.keys()
    return Sampling(**{name: getattr(section, name) for name in names}, seed=seed, stop_tokens=stop_tokens)
