"""Sections that describe the native models. No torch import."""

from typing import Annotated, Literal

from pydantic import Field

from bigbatch.recipes.core.config import PositiveFloat, PositiveInt, Section


class DecoderSection(Section):
    """A decoder-only transformer of the GPT-2 or the Llama family."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """gpt2: LayerNorm, learned positions, GELU, biases. llama: RMSNorm, rotary positions, SwiGLU, no biases."""
    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_heads: PositiveInt = 12
    num_key_value_heads: PositiveInt | None = None
    """llama: heads of keys and values (grouped-query attention); by default as many as `num_heads`."""
    feed_forward_size: PositiveInt | None = None
    """By default 4 times the hidden size (gpt2), 8/3 times rounded up to a multiple of 64 (llama)."""
    max_positions: PositiveInt = 1024
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tie_embeddings: bool = True
    rope_theta: PositiveFloat = 10000.0
    norm_epsilon: PositiveFloat = 1e-5
    initializer_range: PositiveFloat = 0.02
    vocabulary_multiple: PositiveInt = 64
    """The embedding's rows are rounded up to a multiple of this: full tiles for the matrix unit."""
    initialize_from: str | None = None
    """A Hugging Face folder of the same family to start from; its shape must equal this section's."""
    recompute_activations: bool = False
    """Keep one activation a layer and compute the others again in the backward pass: less memory, a third more time."""
