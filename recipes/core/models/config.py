"""Sections that describe the native models. No torch import."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import PositiveFloat, PositiveInt, Section
from bigbatch.recipes.core.errors import UserError


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
    """llama: the base of the rotary frequencies."""
    norm_epsilon: PositiveFloat = 1e-5
    initializer_range: PositiveFloat = 0.02
    vocabulary_multiple: PositiveInt = 64
    """The embedding's rows are rounded up to a multiple of this: full tiles for the matrix unit."""
    initialize_from: str | None = None
    """A Hugging Face folder of the same family to start from; its shape must equal this section's."""
    recompute_activations: bool = False
    """Keep one activation a layer and compute the others again in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_key_value_heads {self.key_value_heads}"
            )
        if self.family == "gpt2" and self.key_value_heads != self.num_heads:
            raise ValueError("num_key_value_heads is for the llama family: gpt2 has as many as num_heads")
        if self.family == "llama" and self.head_size % 2:
            raise ValueError(f"rotary positions need heads of an even size, not {self.hidden_size} / {self.num_heads}")
        return self

    @property
    def head_size(self) -> int:
        """Numbers a head."""
        return self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, the default filled in."""
        return self.num_key_value_heads or self.num_heads

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer, the default filled in."""
        if self.feed_forward_size:
            return self.feed_forward_size
        return 4 * self.hidden_size if self.family == "gpt2" else -(-8 * self.hidden_size // (3 * 64)) * 64


class EncoderSection(Section):
    """A bidirectional transformer of BERT's family."""

    norm: Literal["post", "pre"] = "post"
    """post: each layer's sum is normed, as in BERT. pre: what enters a layer is, and the last hidden states."""
    positions: Literal["absolute", "rotary"] = "absolute"
    """absolute: learned vectors, as in BERT. rotary: queries and keys are turned by their position's angle."""
    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_heads: PositiveInt = 12
    feed_forward_size: PositiveInt | None = None
    """By default 4 times the hidden size."""
    max_positions: PositiveInt = 512
    num_segments: PositiveInt = 2
    """Kinds of text in a row that a learned vector tells apart (BERT's token types)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    rope_theta: PositiveFloat = 10000.0
    """rotary: the base of the frequencies."""
    norm_epsilon: PositiveFloat = 1e-12
    initializer_range: PositiveFloat = 0.02
    vocabulary_multiple: PositiveInt = 64
    """The embedding's rows are rounded up to a multiple of this: full tiles for the matrix unit."""
    initialize_from: str | None = None
    """A Hugging Face BERT folder to start from; its shape must equal this section's."""
    recompute_activations: bool = False
    """Keep one activation a layer and compute the others again in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need heads of an even size, not {self.hidden_size} / {self.num_heads}")
        return self

    @property
    def head_size(self) -> int:
        """Numbers a head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer, the default filled in."""
        return self.feed_forward_size or 4 * self.hidden_size


def padded_vocabulary(vocabulary_size: int, section: DecoderSection | EncoderSection, tensor_ranks: int = 1) -> int:
    """Return the embedding's number of rows for a tokenizer's vocabulary; raise UserError if they do not divide."""
    rows = -(-vocabulary_size // section.vocabulary_multiple) * section.vocabulary_multiple
    if rows % tensor_ranks:
        raise UserError(
            "model.vocabulary_multiple",
            f"{section.vocabulary_multiple} makes {rows} rows of {vocabulary_size} tokens, which do not divide over "
            f"parallel.tensor {tensor_ranks}; right would be a multiple of {tensor_ranks}",
        )
    return rows
