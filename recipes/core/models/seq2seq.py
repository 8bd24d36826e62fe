"""The encoder-decoder transformer (https://arxiv.org/abs/1706.03762), written once for Marian, BART and mBART.

To and from transformers' MarianMTModel, BartForConditionalGeneration and MBartForConditionalGeneration. Every parameter
is used only inside the forward pass of the module that owns it, which is where ZeRO-3 gathers it; the table of token
vectors belongs to two modules.

Shapes: B rows, S tokens of the source, T of the target, D hidden size, H heads, E size of a head, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layers import Embedding, LayerNorm, Linear, attend, attention_mask, count_positions
from bigbatch.recipes.core.loss import chunked_cross_entropy
from bigbatch.recipes.core.models.config import Seq2SeqSection, padded_vocabulary
from bigbatch.recipes.core.models.decoder import KeyValueCache
from bigbatch.recipes.core.models.hugging_face import Piece, WeightFolder, load_pieces, read_json, to_hugging_face
from bigbatch.recipes.core.parallel import ALONE

NORM_EPSILON = 1e-5
POSITION_OFFSET = 2  # BART's table of positions has two rows that stand for none
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu}


class Context(NamedTuple):
    """What all blocks of one side share in one forward pass."""

    mask: torch.Tensor | None  # [B, T, T], None: all of the source, or plain causal, or one token that may see all
    is_causal: bool = False
    source: torch.Tensor | None = None  # [B, S, D], what the encoder made; None in the encoder
    source_mask: torch.Tensor | None = None  # [B, T or 1, S]
    cache: "Seq2SeqCache | None" = None


class Seq2Seq(nn.Module):
    """An encoder and a decoder over one vocabulary; the embedding's padding stays inside.

    `named_parameters` names the tied embedding once, `embed.weight`. `label_smoothing` is of the loss while training.
    """

    tensor = ALONE

    def __init__(self, section: Seq2SeqSection, vocabulary_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.section, self.vocabulary_size, self.label_smoothing = section, vocabulary_size, label_smoothing
        num_rows = padded_vocabulary(vocabulary_size, section)
        self.embed = Embedding(num_rows, section.hidden_size, section.initializer_range)
        self.encoder = Stack(section, section.num_encoder_layers, writes=False)
        self.decoder = Stack(section, section.num_decoder_layers, writes=True)
        self.head = LanguageModelHead(section, vocabulary_size, self.embed)

    def forward(
        self,
        tokens: torch.Tensor,  # [B, S]
        written: torch.Tensor,  # [B, T], the target that the decoder reads, behind the token that begins it
        labels: torch.Tensor | None = None,  # [B, T], the token that follows each of them; -100 counts not
        documents: torch.Tensor | None = None,  # [B, S]
        target_documents: torch.Tensor | None = None,  # [B, T]
    ) -> torch.Tensor:
        """Return the logits [B, T, V], or with labels the loss summed over them (float32 scalar).

        With `documents` and `target_documents` tokens see only those of their own number, on both sides, and positions
        start anew with each number; a negative one is padding.
        """
        return self.head(self.states(tokens, written, documents, target_documents), labels, self._smoothing())

    def states(
        self,
        tokens: torch.Tensor,
        written: torch.Tensor,
        documents: torch.Tensor | None = None,
        target_documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the decoder's last hidden states [B, T, D]; arguments as in `forward`."""
        source = self.encode(tokens, documents)
        _check_length(written, self.section, "target")
        mask, source_mask = None, None
        if documents is not None:
            assert target_documents is not None
            own = target_documents.unsqueeze(2)
            is_padding = own < 0  # which sees all, so that no softmax is empty
            mask = attention_mask(((own == own.mT) | is_padding).tril(), source.dtype)
            source_mask = attention_mask((own == documents.unsqueeze(1)) | is_padding, source.dtype)
        positions = count_positions(written, target_documents)
        context = Context(mask, mask is None, source, source_mask)
        return self.decoder(self.embed(written), positions, context)

    def encode(self, tokens: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        """Return the encoder's hidden states [B, S, D]."""
        _check_length(tokens, self.section, "source")
        vectors, mask = self.embed(tokens), None
        if documents is not None:
            mask = attention_mask(documents.unsqueeze(1) == documents.unsqueeze(2), vectors.dtype)
        return self.encoder(vectors, count_positions(tokens, documents), Context(mask))

    def decode(self, tokens: torch.Tensor, cache: "Seq2SeqCache") -> torch.Tensor:
        """Return the logits [B, 1, V] behind the last of the next tokens [B, T] of targets, and remember them."""
        positions = cache.own.positions(tokens.shape[1])
        vectors = self.embed(tokens)
        mask = cache.own.mask(vectors)
        is_causal = mask is None and tokens.shape[1] > 1
        hidden = self.decoder(vectors, positions, Context(mask, is_causal, cache.source, cache.source_mask, cache))
        cache.own.length += tokens.shape[1]
        return self.head(hidden[:, -1:])

    def open_cache(
        self, sources: Sequence[Sequence[int]], max_length: int, padding: torch.Tensor | None = None
    ) -> "Seq2SeqCache":
        """Encode sources of any lengths and return the cache that `decode` begins with."""
        device = next(self.parameters()).device
        lengths = torch.tensor([len(source) for source in sources])
        tokens = torch.zeros(len(sources), int(lengths.max()), dtype=torch.long)
        for row, source in zip(tokens, sources, strict=True):
            row[: len(source)] = torch.tensor(source)
        is_token = (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).to(device)
        source = self.encode(tokens.to(device), None if bool(is_token.all()) else is_token.long() - 1)
        return Seq2SeqCache(self, source, attention_mask(is_token.unsqueeze(1), source.dtype), max_length, padding)

    def _smoothing(self) -> float:
        return self.label_smoothing if self.training else 0.0


class Stack(nn.Module):
    """The layers of one side; those that write see the source too."""

    def __init__(self, section: Seq2SeqSection, num_layers: int, writes: bool) -> None:
        super().__init__()
        self.section = section
        size, is_marian = section.hidden_size, section.family == "marian"
        self.scale = math.sqrt(size) if section.scale_embeddings else 1.0
        num_rows = section.max_positions + POSITION_OFFSET
        self.positions = None if is_marian else Embedding(num_rows, size, section.initializer_range)
        self.embed_norm = nn.Identity() if is_marian else LayerNorm(size, NORM_EPSILON)
        self.dropout = nn.Dropout(section.dropout)
        self.blocks = nn.ModuleList(Block(section, index, writes) for index in range(num_layers))
        self.norm = LayerNorm(size, NORM_EPSILON) if section.family == "mbart" else nn.Identity()

    def forward(self, vectors: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        """Map token vectors [B, T, D] at positions [B or 1, T] to the last hidden states."""
        if self.positions is None:
            places = sines(positions, vectors.shape[-1], vectors.dtype)
        else:
            places = self.positions(positions + POSITION_OFFSET)
        hidden = self.dropout(self.embed_norm(vectors * self.scale + places))
        for block in self.blocks:
            if self.section.recompute_activations and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, context, use_reentrant=False)
            else:
                hidden = block(hidden, context)
        return self.norm(hidden)


class Block(nn.Module):
    """One layer: attention to its own side, to the source where it writes, and feed-forward."""

    def __init__(self, section: Seq2SeqSection, index: int, writes: bool) -> None:
        super().__init__()
        self.is_post_norm = section.family != "mbart"
        size, deviation = section.hidden_size, section.initializer_range
        self.attention = SelfAttention(section, index)
        self.attention_norm = LayerNorm(size, NORM_EPSILON)
        self.source_attention = SourceAttention(section, index) if writes else None
        self.source_norm = LayerNorm(size, NORM_EPSILON) if writes else None
        self.up = Linear(size, section.inner_size, True, deviation)
        self.activation = ACTIVATIONS[section.activation]
        self.down = Linear(section.inner_size, size, True, deviation)
        self.feed_forward_norm = LayerNorm(size, NORM_EPSILON)
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Map hidden states [B, T, D] to the next ones."""
        hidden = self._add(hidden, self.attention_norm, lambda states: self.attention(states, context))
        if self.source_attention is not None:
            attention, norm = self.source_attention, self.source_norm
            hidden = self._add(hidden, norm, lambda states: attention(states, context))
        return self._add(hidden, self.feed_forward_norm, lambda states: self.down(self.activation(self.up(states))))

    def _add(self, hidden: torch.Tensor, norm: Any, layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.is_post_norm:
            return norm(hidden + self.dropout(layer(hidden)))
        return hidden + self.dropout(layer(norm(hidden)))


class SelfAttention(nn.Module):
    """Attention to the tokens of the same side; the rows of `qkv` are the queries', the keys', the values'."""

    def __init__(self, section: Seq2SeqSection, index: int) -> None:
        super().__init__()
        size, deviation = section.hidden_size, section.initializer_range
        self.index, self.num_heads, self.dropout = index, section.num_heads, section.attention_dropout
        self.qkv = Linear(size, 3 * size, True, deviation)
        self.out = Linear(size, size, True, deviation)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Mix the hidden states [B, T, D] of a row's tokens."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if context.cache is not None:
            key, value = context.cache.own.append(self.index, key, value)
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(query, key, value, context.mask, context.is_causal, dropout))


class SourceAttention(nn.Module):
    """Attention of what is written to the source; the rows of `kv` are the keys', the values'."""

    def __init__(self, section: Seq2SeqSection, index: int) -> None:
        super().__init__()
        size, deviation = section.hidden_size, section.initializer_range
        self.index, self.num_heads, self.dropout = index, section.num_heads, section.attention_dropout
        self.query = Linear(size, size, True, deviation)
        self.kv = Linear(size, 2 * size, True, deviation)
        self.out = Linear(size, size, True, deviation)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Add what the source says to hidden states [B, T, D]; a cache keeps the source's keys and values."""
        query = self.query(hidden).unflatten(-1, (self.num_heads, -1))
        kept = {} if context.cache is None else context.cache.of_source
        if self.index not in kept:
            kept[self.index] = self.kv(context.source).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        key, value = kept[self.index]
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(query, key, value, context.source_mask, False, dropout))


class LanguageModelHead(nn.Module):
    """The logits; it makes the loss too, for this is where ZeRO-3 gathers the tied weight."""

    def __init__(self, section: Seq2SeqSection, vocabulary_size: int, tied: Embedding) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.weight = tied.weight
        self.bias = nn.Parameter(torch.zeros(padded_vocabulary(vocabulary_size, section)))

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Return the logits [B, T, V] of hidden states [B, T, D], or the loss summed over labels [B, T]."""
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)[..., : self.vocabulary_size]
        return chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            num_classes=self.vocabulary_size,
            bias=self.bias,
            label_smoothing=label_smoothing,
        )


class Seq2SeqCache:
    """What `decode` need not compute again: keys and values of the targets so far, and those of the sources."""

    def __init__(
        self,
        model: Seq2Seq,
        source: torch.Tensor,  # [B, S, D]
        source_mask: torch.Tensor,  # [B, 1, S]
        max_length: int,
        padding: torch.Tensor | None = None,
    ) -> None:
        self.own = KeyValueCache(model, len(source), max_length, padding)
        self.source, self.source_mask = source, source_mask
        self.of_source: dict[int, tuple[torch.Tensor, ...]] = {}  # of each layer [B, S, H, E]

    def repeat(self, num_samples: int) -> None:
        """Continue each row in several ways."""
        self.own.repeat(num_samples)
        self._change(lambda kept: kept.repeat_interleave(num_samples, dim=0))

    def select(self, rows: torch.Tensor) -> None:
        """Let each row go on as another one [B] has begun, where they are as many one of the same source."""
        self.own.select(rows)
        if len(rows) < len(self.source):
            self._change(lambda kept: kept[rows])

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.source, self.source_mask = change(self.source), change(self.source_mask)
        self.of_source = {layer: tuple(map(change, pair)) for layer, pair in self.of_source.items()}


def sines(positions: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return sines, then cosines [..., size] of positions [...] (https://arxiv.org/abs/1706.03762, section 3.5)."""
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size
    angles = positions.double().unsqueeze(-1) / 10000.0**exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype)


def _check_length(tokens: torch.Tensor, section: Seq2SeqSection, side: str) -> None:
    if tokens.shape[1] > section.max_positions:
        message = f"{section.max_positions}, but a {side} has {tokens.shape[1]} tokens"
        raise UserError("model.max_positions", message)


# ----------------------------------------------------------------------------------- to and from Hugging Face


def hugging_face_config(
    section: Seq2SeqSection, vocabulary_size: int, begin_of_target: int, end_of_text: int
) -> dict[str, Any]:
    """Return the config.json under which transformers builds the same model."""
    return {
        "architectures": [_CLASSES[section.family]],
        "model_type": section.family,
        "vocab_size": vocabulary_size,
        "encoder_layers": section.num_encoder_layers,
        "decoder_layers": section.num_decoder_layers,
        "encoder_ffn_dim": section.inner_size,
        "decoder_ffn_dim": section.inner_size,
        "encoder_attention_heads": section.num_heads,
        "decoder_attention_heads": section.num_heads,
        "d_model": section.hidden_size,
        "max_position_embeddings": section.max_positions,
        "activation_function": section.activation,
        "dropout": section.dropout,
        "attention_dropout": section.attention_dropout,
        "init_std": section.initializer_range,
        "scale_embedding": section.scale_embeddings,
        "decoder_start_token_id": begin_of_target,
        "eos_token_id": end_of_text,
        "bos_token_id": None,
        "pad_token_id": end_of_text,
        "forced_eos_token_id": None,
        "tie_word_embeddings": True,
    }


def hugging_face_tensors(section: Seq2SeqSection, vocabulary_size: int) -> dict[str, list[Piece]]:
    """Return, for each name of `named_parameters`, the Hugging Face tensors that it is made of."""
    size = section.hidden_size
    table = {
        "embed.weight": [Piece("model.shared.weight", 0, vocabulary_size)],
        "head.bias": [Piece("final_logits_bias", 0, vocabulary_size, transpose=True)],
    }
    for side, num_layers in (("encoder", section.num_encoder_layers), ("decoder", section.num_decoder_layers)):
        theirs = f"model.{side}"
        if section.family != "marian":
            rows = section.max_positions + POSITION_OFFSET
            table[f"{side}.positions.weight"] = [Piece(f"{theirs}.embed_positions.weight", 0, rows)]
            table |= _pieces(f"{side}.embed_norm", ((f"{theirs}.layernorm_embedding", size),))
        if section.family == "mbart":
            table |= _pieces(f"{side}.norm", ((f"{theirs}.layer_norm", size),))
        for index in range(num_layers):
            table |= _layer(section, f"{side}.blocks.{index}", f"{theirs}.layers.{index}", side == "decoder")
    return table


def hugging_face_state(model: Seq2Seq) -> dict[str, torch.Tensor]:
    """Return all weights as a Hugging Face folder holds them."""
    table = hugging_face_tensors(model.section, model.vocabulary_size)
    parameters = dict(model.named_parameters())
    return {piece.name: to_hugging_face(parameters[name].detach(), piece) for name in table for piece in table[name]}


def section_from_hugging_face(config: dict[str, Any]) -> Seq2SeqSection:
    """Describe a folder's model by its config.json; raise UserError for what the native families do not have."""
    kind = config.get("model_type")
    if kind not in _CLASSES:
        raise UserError("config.json", f"model_type is {kind!r}; the native ones are {', '.join(_CLASSES)}")
    for key, only in _fixed(config).items():
        if config.get(key, only) != only:
            raise UserError("config.json", f"{key} is {config[key]!r}; the native {kind} has {only!r}")
    values = {ours: config[theirs] for ours, theirs in _FIELDS.items() if config.get(theirs) is not None}
    values.setdefault("scale_embeddings", False)
    values["activation"] = {"silu": "swish"}.get(values.get("activation", "gelu"), values.get("activation", "gelu"))
    try:
        return Seq2SeqSection(family=kind, **values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = _FIELDS.get(str(problem["loc"][0]), "") if problem["loc"] else ""
        raise UserError("config.json", f"{key}: {problem['msg']}".lstrip(": ")) from None


def load_hugging_face(model: Seq2Seq, folder: Path) -> None:
    """Fill a model with the weights of a folder, safetensors only; raise UserError if it is of another model."""
    config = read_json(folder / "config.json")
    found, section = section_from_hugging_face(config), model.section
    for key in _SHAPE:
        ours, theirs = getattr(section, key), getattr(found, key)
        if ours != theirs:
            raise UserError(f"model.shape.{key}".replace("inner", "feed_forward"), f"{ours}, but {folder} has {theirs}")
    if config["vocab_size"] != model.vocabulary_size:
        message = f"the model has {model.vocabulary_size} tokens, the one in {folder} {config['vocab_size']}"
        raise UserError("model.initialize_from", message)
    load_pieces(model, hugging_face_tensors(section, config["vocab_size"]), WeightFolder(folder), _DERIVED)


_CLASSES = {
    "marian": "MarianMTModel",
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
}
_FIELDS = {
    "num_encoder_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "hidden_size": "d_model",
    "num_heads": "encoder_attention_heads",
    "feed_forward_size": "encoder_ffn_dim",
    "activation": "activation_function",
    "max_positions": "max_position_embeddings",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "scale_embeddings": "scale_embedding",
    "initializer_range": "init_std",
}
_SHAPE = ("family", "num_encoder_layers", "num_decoder_layers", "hidden_size", "num_heads", "inner_size")
_SHAPE += ("activation", "max_positions", "scale_embeddings")
# What follows from other tensors: the tied embedding once more, and Marian's table of sines.
_DERIVED = (
    ".encoder.embed_tokens.weight",
    ".decoder.embed_tokens.weight",
    ".lm_head.weight",
    ".embed_positions.weight",
)


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json must say where the native families have no choice, if it says anything."""
    return {
        "decoder_attention_heads": config.get("encoder_attention_heads"),
        "decoder_ffn_dim": config.get("encoder_ffn_dim"),
        "decoder_vocab_size": config.get("vocab_size"),
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
    }


def _layer(section: Seq2SeqSection, ours: str, theirs: str, writes: bool) -> dict[str, list[Piece]]:
    size, inner = section.hidden_size, section.inner_size
    own, source = f"{theirs}.self_attn", f"{theirs}.encoder_attn"
    table = _pieces(f"{ours}.attention.qkv", tuple((f"{own}.{name}_proj", size) for name in "qkv"))
    table |= _pieces(f"{ours}.attention.out", ((f"{own}.out_proj", size),))
    table |= _pieces(f"{ours}.attention_norm", ((f"{theirs}.self_attn_layer_norm", size),))
    if writes:
        table |= _pieces(f"{ours}.source_attention.query", ((f"{source}.q_proj", size),))
        table |= _pieces(f"{ours}.source_attention.kv", tuple((f"{source}.{name}_proj", size) for name in "kv"))
        table |= _pieces(f"{ours}.source_attention.out", ((f"{source}.out_proj", size),))
        table |= _pieces(f"{ours}.source_norm", ((f"{theirs}.encoder_attn_layer_norm", size),))
    table |= _pieces(f"{ours}.up", ((f"{theirs}.fc1", inner),)) | _pieces(f"{ours}.down", ((f"{theirs}.fc2", size),))
    return table | _pieces(f"{ours}.feed_forward_norm", ((f"{theirs}.final_layer_norm", size),))


def _pieces(ours: str, parts: tuple[tuple[str, int], ...]) -> dict[str, list[Piece]]:
    """Return the pieces of weight and bias of a layer that is made of several, so many rows of each."""
    stops = accumulate(rows for _, rows in parts)
    pieces = [(name, stop - rows, stop) for (name, rows), stop in zip(parts, stops, strict=True)]
    return {
        f"{ours}.{kind}": [Piece(f"{name}.{kind}", start, stop) for name, start, stop in pieces]
        for kind in ("weight", "bias")
    }
