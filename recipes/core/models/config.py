"""Sections that describe the native models. No torch import."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import NonNegativeFloat, PositiveFloat, PositiveInt, Section
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
    head_dim: PositiveInt | None = None
    """llama: numbers a head, by default hidden_size / num_heads; a model that has lost heads keeps their size."""
    feed_forward_size: PositiveInt | None = None
    """By default 4 times the hidden size (gpt2), 8/3 times rounded up to a multiple of 64 (llama)."""
    num_experts: PositiveInt = 1
    """Feed-forward layers that a router chooses among for each token (a mixture of experts,
    https://arxiv.org/abs/2401.04088); 1 is a dense model."""
    experts_per_token: PositiveInt = 2
    """The router's choice. 1: the expert's output counts by its probability (Switch, https://arxiv.org/abs/2101.03961);
    more: by their probabilities, normalized over the chosen (GShard, https://arxiv.org/abs/2006.16668; Mixtral)."""
    expert_interval: PositiveInt = 1
    """Every so many layers have experts, the others one feed-forward layer: 2 is GShard's every other one."""
    capacity_factor: PositiveFloat | None = None
    """While training, an expert takes so many times its even share of a micro-batch's choices; those beyond are
    dropped, and the token's other expert counts alone. By default none is dropped: every expert's buffer is as long as
    the fullest. Evaluation and generation never drop."""
    auxiliary_loss_coefficient: NonNegativeFloat = 0.01
    """Of each layer's load-balancing loss, 1 where experts get even shares (https://arxiv.org/abs/2101.03961, 2.2), in
    the training loss; the validation loss is without it."""
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
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.family == "gpt2" and self.hidden_size != self.num_heads * self.head_size:
            raise ValueError("head_dim is for the llama family: gpt2's heads have hidden_size numbers together")
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_key_value_heads {self.key_value_heads}"
            )
        if self.family == "gpt2" and self.key_value_heads != self.num_heads:
            raise ValueError("num_key_value_heads is for the llama family: gpt2 has as many as num_heads")
        if self.family == "llama" and self.head_size % 2:
            size = self.head_dim or f"{self.hidden_size} / {self.num_heads}"
            raise ValueError(f"rotary positions need heads of an even size, not {size}")
        return self

    @model_validator(mode="after")
    def _experts_are_there(self) -> Self:
        if 1 < self.num_experts < self.experts_per_token:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}")
        if self.num_experts > 1 and self.expert_interval > self.num_layers:
            raise ValueError(f"expert_interval {self.expert_interval} is more than num_layers {self.num_layers}")
        return self

    def has_experts(self, layer: int) -> bool:
        """Tell whether a layer, 0 the first, has experts."""
        return self.num_experts > 1 and (layer + 1) % self.expert_interval == 0

    @property
    def num_expert_layers(self) -> int:
        """Layers that have experts."""
        return self.num_layers // self.expert_interval if self.num_experts > 1 else 0

    @property
    def head_size(self) -> int:
        """Numbers a head."""
        return self.head_dim or self.hidden_size // self.num_heads

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


class VisionSection(Section):
    """A Vision Transformer (https://arxiv.org/abs/2010.11929)."""

    patch_size: PositiveInt = 16
    """Pixels along a side; every patch is a token."""
    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_heads: PositiveInt = 12
    feed_forward_size: PositiveInt | None = None
    """By default 4 times the hidden size."""
    pooling: Literal["class", "mean"] = "class"
    """class: a token of its own gathers what the head sees. mean: the mean over the patches; transformers has none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm_epsilon: PositiveFloat = 1e-12
    initializer_range: PositiveFloat = 0.02
    initialize_from: str | None = None
    """A Hugging Face ViT folder to start from; its shape must equal this section's. Its head is taken where it is for
    the same labels, else a new one starts at zero."""
    recompute_activations: bool = False
    """Keep one activation a layer and compute the others again in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        return self

    @property
    def blocks(self) -> EncoderSection:
        """The layers, which are the encoder's."""
        return EncoderSection(
            norm="pre",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            feed_forward_size=self.feed_forward_size,
            dropout=self.dropout,
            norm_epsilon=self.norm_epsilon,
            initializer_range=self.initializer_range,
        )


class Seq2SeqSection(Section):
    """An encoder-decoder transformer (https://arxiv.org/abs/1706.03762) with one table of token vectors."""

    family: Literal["marian", "bart", "mbart"] = "marian"
    """marian: positions are sines, each layer's sum is normed. bart: positions are learned, and the embeddings normed
    too. mbart: as bart, but what enters a layer is normed, and the last hidden states."""
    num_encoder_layers: PositiveInt = 6
    num_decoder_layers: PositiveInt = 6
    hidden_size: PositiveInt = 512
    num_heads: PositiveInt = 8
    feed_forward_size: PositiveInt | None = None
    """By default 4 times the hidden size."""
    activation: Literal["relu", "gelu", "swish"] = "relu"
    max_positions: PositiveInt = 512
    """Of a source, and of a target."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the attention's weights."""
    scale_embeddings: bool = True
    """Multiply token vectors by the root of the hidden size where they enter."""
    initializer_range: PositiveFloat = 0.02
    vocabulary_multiple: PositiveInt = 64
    """The embedding's rows are rounded up to a multiple of this: full tiles for the matrix unit."""
    recompute_activations: bool = False
    """Keep one activation a layer and compute the others again in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.family == "marian" and self.hidden_size % 2:
            raise ValueError(f"positions that are sines and cosines need an even hidden_size, not {self.hidden_size}")
        return self

    @property
    def num_layers(self) -> int:
        """Layers that write, of which a cache keeps keys and values."""
        return self.num_decoder_layers

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads

    @property
    def head_size(self) -> int:
        """Numbers a head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer, the default filled in."""
        return self.feed_forward_size or 4 * self.hidden_size


class ConvolutionSection(Section):
    """A convolution over frames and mel bands, odd many of each."""

    channels: PositiveInt
    frames: PositiveInt = 5
    bands: PositiveInt = 5
    frame_stride: PositiveInt = 1
    band_stride: PositiveInt = 1

    @model_validator(mode="after")
    def _has_a_middle(self) -> Self:
        if not (self.frames % 2 and self.bands % 2):
            raise ValueError(f"frames {self.frames} and bands {self.bands} have to be odd")
        return self


class SpeechSection(Section):
    """Log-mel features, convolutions and recurrent layers, as in Deep Speech 2 (https://arxiv.org/abs/1512.02595)."""

    window_seconds: PositiveFloat = 0.025
    hop_seconds: PositiveFloat = 0.01
    """From one frame to the next."""
    num_mels: PositiveInt = 40
    """Mel bands between `lowest_hertz` and half of the sample rate."""
    lowest_hertz: NonNegativeFloat = 20.0
    convolutions: tuple[ConvolutionSection, ...] = (
        ConvolutionSection(channels=16, frame_stride=2, band_stride=2),
        ConvolutionSection(channels=16, band_stride=2),
    )
    """Their frame strides together say how many frames become one."""
    cell: Literal["lstm", "gru"] = "lstm"
    num_layers: PositiveInt = 2
    hidden_size: PositiveInt = 128
    """Of each direction."""
    bidirectional: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Between the recurrent layers, and behind the last."""

    @property
    def frame_stride(self) -> int:
        """Frames of features that become one of the output."""
        return math.prod(convolution.frame_stride for convolution in self.convolutions)

    @property
    def recurrent_inputs(self) -> int:
        """Numbers that the convolutions leave of a frame."""
        bands = self.num_mels
        for convolution in self.convolutions:
            bands = -(-bands // convolution.band_stride)
        return bands * (self.convolutions[-1].channels if self.convolutions else 1)


def padded_vocabulary(
    vocabulary_size: int, section: DecoderSection | EncoderSection | Seq2SeqSection, tensor_ranks: int = 1
) -> int:
    """Return the embedding's number of rows for a tokenizer's vocabulary; raise UserError if they do not divide."""
    rows = -(-vocabulary_size // section.vocabulary_multiple) * section.vocabulary_multiple
    if rows % tensor_ranks:
        raise UserError(
            "model.vocabulary_multiple",
            f"{section.vocabulary_multiple} makes {rows} rows of {vocabulary_size} tokens, which do not divide over "
            f"parallel.tensor {tensor_ranks}; right would be a multiple of {tensor_ranks}",
        )
    return rows
