"""The bidirectional transformer of BERT's family, written once as a list of layers, and its heads of pretraining.

Every parameter is used only inside the forward pass of the module that owns it, which is where ZeRO-3 gathers it; the
tied embedding belongs to two modules. Post-norm with absolute positions is BERT (https://arxiv.org/abs/1810.04805), to
and from transformers' BertForMaskedLM; for the other forms transformers has no class.

Shapes: B rows, T tokens, K targets a row, D hidden size, H heads, E size of a head, V vocabulary.

Longer than other files: the layers, the heads of pretraining, and how transformers names their weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layers import (
    ColumnLinear,
    Embedding,
    LayerNorm,
    Linear,
    RowLinear,
    attend,
    attention_mask,
    count_positions,
    rotary_table,
    rotate,
)
from bigbatch.recipes.core.layout import mark, split
from bigbatch.recipes.core.loss import chunked_cross_entropy
from bigbatch.recipes.core.models.config import EncoderSection, padded_vocabulary
from bigbatch.recipes.core.models.hugging_face import (
    Piece,
    WeightFolder,
    label_tables,
    load_pieces,
    read_json,
    to_hugging_face,
)
from bigbatch.recipes.core.parallel import ALONE, Axis
from bigbatch.recipes.core.recipe import HuggingFaceExport
from bigbatch.recipes.core.sequence_parallel import counted_once, first_token, own_tokens, to_heads, to_tokens
from bigbatch.recipes.core.tensor_parallel import (
    copy_in,
    gather_out,
    own_random_numbers,
    own_rows,
    sum_out,
    whole_rows,
)


class Context(NamedTuple):
    """What all blocks of one forward pass share."""

    rotary: torch.Tensor | None  # [2, B or 1, T, 1, E / 2]
    mask: torch.Tensor | None  # [B, T, T], None: every token sees its whole row
    sequence: Axis = ALONE  # of the ranks that the tokens are divided over
    spread: Axis = ALONE  # of the tensor ranks that what lies between the layers is divided over: [B * T / t, D]
    num_rows: int = 0  # 0: as many as the hidden states have


class MaskedLanguageModel(nn.Module):
    """An encoder with the head that fills in masked tokens; the embedding's padding stays inside.

    With `has_pairs` also with the head that tells whether the two segments of a row belong together.
    `named_parameters` names the tied embedding once, `encoder.embed.tokens.weight`. Over tensor ranks each has its
    share of the heads, of the inner units and of the vocabulary, drawn as a part of the whole; all else is replicated.
    Over sequence ranks, with labels, each computes its own part of the rows, which are the same on all of them; what it
    returns is of whole rows. With `tensor_sequence` and labels the hidden states between the layers are not replicated
    on the tensor ranks but divided along tokens.
    """

    def __init__(
        self,
        section: EncoderSection,
        vocabulary_size: int,
        has_pairs: bool = False,
        tensor: Axis = ALONE,
        sequence: Axis = ALONE,
        tensor_sequence: bool = False,
    ) -> None:
        """Build it; raise UserError where the vocabulary does not divide over the tensor ranks."""
        super().__init__()
        self.sequence, self.spread = sequence, tensor if tensor_sequence else ALONE
        self.section, self.has_pairs = section, has_pairs
        self.vocabulary_size = vocabulary_size
        self.encoder = Encoder(section, vocabulary_size, tensor)
        self.head = FillHead(section, vocabulary_size, self.encoder.embed.tokens, tensor)
        if has_pairs:
            self.pooler = Pooler(section)
            self.pair_head = Linear(section.hidden_size, 2, True, section.initializer_range)

    def forward(
        self,
        tokens: torch.Tensor,  # [B, T]
        targets: torch.Tensor | None = None,  # [B, K], where the masked tokens stand in their rows
        labels: torch.Tensor | None = None,  # [B, K], what they were; -100 counts not
        positions: torch.Tensor | None = None,  # [B, T]
        documents: torch.Tensor | None = None,  # [B, T]
        segments: torch.Tensor | None = None,  # [B, T]
        with_pairs: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [B, T, V], or those at `targets` [B, K, V], or with labels the loss summed over them.

        With pairs, also the logits [B, 2] of each row's pair: it belongs together, it does not.
        """
        sequence, spread = (ALONE, ALONE) if labels is None else (self.sequence, self.spread)
        hidden = self.encoder(tokens, positions, documents, segments, sequence, spread)
        chosen = hidden
        if targets is None:
            labels = None if labels is None else own_tokens(labels, sequence)
        elif sequence.size == 1:
            chosen = hidden.gather(1, targets.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        else:
            assert labels is not None
            chosen, labels = _own_targets(hidden, targets, labels, sequence)
        filled = sum_out(self.head(chosen, labels), sequence)
        if not with_pairs:
            return filled
        return filled, counted_once(self.pair_head(self.pooler(first_token(hidden, sequence))), sequence)

    def layers(self) -> list[nn.Module]:
        """List the modules in order of use, as a pipeline divides them."""
        pairs = [self.pooler, self.pair_head] if self.has_pairs else []
        return [self.encoder.embed, *self.encoder.blocks, self.encoder.norm, self.head, *pairs]


class Encoder(nn.Module):
    """The layers without a head; weights are drawn as BERT's, normal with `initializer_range`."""

    def __init__(self, section: EncoderSection, vocabulary_size: int, tensor: Axis = ALONE) -> None:
        super().__init__()
        self.section = section
        self.embed = InputEmbedding(section, padded_vocabulary(vocabulary_size, section, tensor.size), tensor)
        self.blocks = nn.ModuleList(Block(section, tensor) for _ in range(section.num_layers))
        self.norm = _norm(section) if section.norm == "pre" else _NoNorm()

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        sequence: Axis = ALONE,
        spread: Axis = ALONE,
    ) -> torch.Tensor:
        """Return the hidden states [B, T, D] of tokens [B, T]; the others, each [B, T], may be left out.

        Of these a sequence rank returns its own part; it gets them whole. The tensor ranks `spread` divide what lies
        between the layers along tokens.

        With `documents` a token sees only the tokens of its own number, and positions start anew with each number,
        whose tokens stand side by side; `positions` overrides. Without `segments` all tokens are of the first kind.
        """
        if tokens.shape[1] > self.section.max_positions:
            message = f"{self.section.max_positions}, but a sequence has {tokens.shape[1]} tokens"
            raise UserError("model.max_positions", message)
        if positions is None:
            positions = count_positions(tokens, documents)
        segments = torch.zeros_like(tokens) if segments is None else segments
        tokens, positions, segments = (own_tokens(values, sequence) for values in (tokens, positions, segments))
        with own_random_numbers(spread, tokens.device, wanted=self.training and self.section.dropout > 0):
            hidden = self.embed(tokens, positions, segments, spread)
            context = self._context(hidden, positions, documents, sequence)
            context = context._replace(spread=spread, num_rows=len(tokens))
            for block in self.blocks:
                if self.section.recompute_activations and torch.is_grad_enabled():
                    hidden = checkpoint(block, hidden, context, use_reentrant=False)
                else:
                    hidden = block(hidden, context)
        return whole_rows(self.norm(hidden, spread), spread, len(tokens))

    def _context(
        self, hidden: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor | None, sequence: Axis
    ) -> Context:
        section, rotary, mask = self.section, None, None
        if section.positions == "rotary":
            rotary = rotary_table(positions, section.head_size, section.rope_theta, hidden.dtype)
        if documents is not None:
            mask = attention_mask(documents.unsqueeze(1) == documents.unsqueeze(2), hidden.dtype)
        return Context(rotary, mask, sequence)


class InputEmbedding(nn.Module):
    """The sum of token, segment and absolute position vectors, normed in the post-norm form."""

    def __init__(self, section: EncoderSection, num_rows: int, tensor: Axis) -> None:
        super().__init__()
        size, deviation = section.hidden_size, section.initializer_range
        self.tokens = Embedding(num_rows, size, deviation, tensor)
        self.segments = Embedding(section.num_segments, size, deviation)
        is_absolute = section.positions == "absolute"
        self.positions = Embedding(section.max_positions, size, deviation) if is_absolute else None
        self.norm = _norm(section) if section.norm == "post" else _NoNorm()
        self.dropout = nn.Dropout(section.dropout)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, spread: Axis = ALONE
    ) -> torch.Tensor:
        """Return the first hidden states [B, T, D] of tokens [B, T] at positions [B or 1, T], or a rank's part."""
        hidden = self.tokens(tokens, spread) + self.segments(own_rows(segments, spread), spread)
        if self.positions is not None:
            hidden = hidden + self.positions(own_rows(positions.expand(len(tokens), -1), spread), spread)
        return self.dropout(self.norm(hidden, spread))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to what entered it, and a norm behind or before each."""

    def __init__(self, section: EncoderSection, tensor: Axis = ALONE) -> None:
        super().__init__()
        self.is_post_norm = section.norm == "post"
        self.attention = Attention(section, tensor)
        self.attention_norm = _norm(section)
        self.feed_forward = FeedForward(section, tensor)
        self.feed_forward_norm = _norm(section)
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Map hidden states [B, T, D], or a rank's part of them, to the next ones."""
        spread = context.spread
        if self.is_post_norm:
            hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, context)), spread)
            return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden, spread)), spread)
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden, spread), context))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden, spread), spread))


class Attention(nn.Module):
    """Self-attention in both directions; the rows of `qkv` are all query heads, then the keys', then the values'.

    Of each kind a tensor rank has its share, and its dropout is its own.
    """

    def __init__(self, section: EncoderSection, tensor: Axis) -> None:
        super().__init__()
        self.tensor, self.num_heads = tensor, section.num_heads // tensor.size
        self.head_size, self.dropout = section.head_size, section.dropout
        size = section.hidden_size
        self.qkv = ColumnLinear(size, (size, size, size), True, section.initializer_range, tensor)
        self.out = RowLinear(size, size, True, section.initializer_range, tensor)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Mix the hidden states [B, T, D] of a row's tokens."""
        heads = self.qkv(hidden, context.spread).view(
            context.num_rows or len(hidden), -1, 3, self.num_heads, self.head_size
        )
        query, key, value = heads.unbind(2)
        if context.rotary is not None:
            query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        query, key, value = to_heads((query, key, value), context.sequence)
        dropout = self.dropout if self.training else 0.0
        with own_random_numbers(self.tensor, query.device, wanted=dropout > 0):
            mixed = attend(query, key, value, context.mask, False, dropout)
        return self.out(to_tokens(mixed, context.sequence), context.spread)


class FeedForward(nn.Module):
    """BERT's feed-forward layer, with the exact GELU."""

    def __init__(self, section: EncoderSection, tensor: Axis) -> None:
        super().__init__()
        size, inner = section.hidden_size, section.inner_size
        self.up = ColumnLinear(size, (inner,), True, section.initializer_range, tensor)
        self.down = RowLinear(inner, size, True, section.initializer_range, tensor)

    def forward(self, hidden: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Map hidden states [B, T, D], or a rank's part of them, one by one."""
        return self.down(F.gelu(self.up(hidden, spread)), spread)


class FillHead(nn.Module):
    """A layer of its own, then the logits; it makes the loss too, for this is where ZeRO-3 gathers the tied weight."""

    def __init__(self, section: EncoderSection, vocabulary_size: int, tied: Embedding, tensor: Axis) -> None:
        super().__init__()
        self.vocabulary_size, self.tensor = vocabulary_size, tensor
        self.transform = Linear(section.hidden_size, section.hidden_size, True, section.initializer_range)
        self.norm = _norm(section)
        self.weight = tied.weight
        rows = padded_vocabulary(vocabulary_size, section)
        self.bias = nn.Parameter(torch.zeros(rows // tensor.size))
        if tensor.size > 1:
            mark(self.bias, split((rows,), 0, (rows,), tensor.rank, tensor.size))

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits [B, T, V] of hidden states [B, T, D], or the loss summed over labels [B, T]."""
        hidden = copy_in(self.norm(F.gelu(self.transform(hidden))), self.tensor)
        if labels is None:
            logits = F.linear(hidden, self.weight, self.bias)
            return gather_out(logits, self.tensor)[..., : self.vocabulary_size]
        return chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            num_classes=self.vocabulary_size,
            bias=self.bias,
            tensor=self.tensor,
        )


class Pooler(nn.Module):
    """BERT's summary of a text: one layer with tanh on the state of its first token."""

    def __init__(self, section: EncoderSection) -> None:
        super().__init__()
        self.dense = Linear(section.hidden_size, section.hidden_size, True, section.initializer_range)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map the first states [..., D] of texts to [..., D]."""
        return torch.tanh(self.dense(states))


def _own_targets(
    hidden: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor, sequence: Axis
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states [1, N, D] and labels [1, N] of those targets [B, K] that lie in a rank's tokens [B, t, D]."""
    num_rows, num_tokens, _ = hidden.shape
    places = targets - sequence.rank * num_tokens
    is_own = (places >= 0) & (places < num_tokens)
    places = places + num_tokens * torch.arange(num_rows, device=hidden.device).unsqueeze(1)
    return hidden.flatten(0, 1)[places[is_own]].unsqueeze(0), labels[is_own].unsqueeze(0)


class _NoNorm(nn.Module):
    def forward(self, hidden: torch.Tensor, _: Axis) -> torch.Tensor:
        return hidden


def _norm(section: EncoderSection) -> LayerNorm:
    return LayerNorm(section.hidden_size, section.norm_epsilon)


# ----------------------------------------------------------------------------------- to and from Hugging Face


def hugging_face_config(
    section: EncoderSection, vocabulary_size: int, architecture: str = "BertForMaskedLM"
) -> dict[str, Any]:
    """Return the config.json under which transformers builds the same model; raise UserError where it has none."""
    for key, only in (("norm", "post"), ("positions", "absolute")):
        if getattr(section, key) != only:
            found = getattr(section, key)
            raise UserError(f"model.{key}", f"is {found!r}; transformers' BERT has only {only!r}")
    return {
        "architectures": [architecture],
        "model_type": "bert",
        "vocab_size": vocabulary_size,
        "num_hidden_layers": section.num_layers,
        "hidden_size": section.hidden_size,
        "num_attention_heads": section.num_heads,
        "intermediate_size": section.inner_size,
        "max_position_embeddings": section.max_positions,
        "type_vocab_size": section.num_segments,
        "hidden_act": "gelu",
        "layer_norm_eps": section.norm_epsilon,
        "hidden_dropout_prob": section.dropout,
        "attention_probs_dropout_prob": section.dropout,
        "initializer_range": section.initializer_range,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }


def hugging_face_tensors(
    section: EncoderSection, vocabulary_size: int, has_pairs: bool = False
) -> dict[str, list[Piece]]:
    """Return, for each name of `MaskedLanguageModel.named_parameters`, the Hugging Face tensors it is made of."""
    size = section.hidden_size
    table = encoder_tensors(section, vocabulary_size, "encoder.")
    table["head.transform.weight"] = [Piece("cls.predictions.transform.dense.weight", 0, size)]
    table["head.transform.bias"] = [Piece("cls.predictions.transform.dense.bias", 0, size)]
    table |= _norm_pieces(section, "head.norm", "cls.predictions.transform.LayerNorm")
    table["head.bias"] = [Piece("cls.predictions.bias", 0, vocabulary_size)]
    if has_pairs:
        table |= pooler_tensors(section, "pooler.")
        table |= {f"pair_head.{kind}": [Piece(f"cls.seq_relationship.{kind}", 0, 2)] for kind in ("weight", "bias")}
    return table


def encoder_tensors(section: EncoderSection, vocabulary_size: int, prefix: str = "") -> dict[str, list[Piece]]:
    """Return the same for an `Encoder` whose parameters' names begin with `prefix`."""
    ours, theirs = f"{prefix}embed", "bert.embeddings"
    table = {
        f"{ours}.tokens.weight": [Piece(f"{theirs}.word_embeddings.weight", 0, vocabulary_size)],
        f"{ours}.segments.weight": [Piece(f"{theirs}.token_type_embeddings.weight", 0, section.num_segments)],
        f"{ours}.positions.weight": [Piece(f"{theirs}.position_embeddings.weight", 0, section.max_positions)],
    }
    table |= _norm_pieces(section, f"{ours}.norm", f"{theirs}.LayerNorm")
    for index in range(section.num_layers):
        table |= _layer(section, f"{prefix}blocks.{index}", f"bert.encoder.layer.{index}")
    return table


def pooler_tensors(section: EncoderSection, prefix: str = "") -> dict[str, list[Piece]]:
    """Return the same for a `Pooler` whose parameters' names begin with `prefix`."""
    theirs, size = "bert.pooler.dense", section.hidden_size
    return {f"{prefix}dense.{kind}": [Piece(f"{theirs}.{kind}", 0, size)] for kind in ("weight", "bias")}


def encoder_export(
    facts: dict[str, Any],
    kind: str,
    head: str,
    num_outputs: int,
    labels: Sequence[str] = (),
    has_pooler: bool = False,
    prefix: str = "",
) -> HuggingFaceExport:
    """Describe an encoder with a head as transformers' Bert<kind>, where the head is called `head`.

    `facts` are those of the model; `prefix` begins the names of our encoder and pooler.
    """
    section, size = EncoderSection.model_validate(facts["encoder"]), facts["vocabulary_size"]
    tensors = encoder_tensors(section, size, f"{prefix}encoder.")
    tensors |= pooler_tensors(section, f"{prefix}pooler.") if has_pooler else {}
    tensors |= {f"head.{part}": [Piece(f"{head}.{part}", 0, num_outputs)] for part in ("weight", "bias")}
    settings = hugging_face_config(section, size, f"Bert{kind}")
    settings |= dict(zip(("id2label", "label2id"), label_tables(list(labels)), strict=True)) if labels else {}
    return HuggingFaceExport(settings, tensors, auto_class=f"AutoModel{kind}")


def hugging_face_state(model: MaskedLanguageModel) -> dict[str, torch.Tensor]:
    """Return all weights as a Hugging Face folder holds them."""
    table = hugging_face_tensors(model.section, model.vocabulary_size, model.has_pairs)
    parameters = dict(model.named_parameters())
    return {piece.name: to_hugging_face(parameters[name].detach(), piece) for name in table for piece in table[name]}


def section_from_hugging_face(config: dict[str, Any]) -> EncoderSection:
    """Describe a folder's model by its config.json; raise UserError for what the native encoder does not have."""
    for key, only in _FIXED.items():
        if config.get(key, only) != only:
            raise UserError("config.json", f"{key} is {config[key]!r}; the native BERT has {only!r}")
    if not isinstance(config.get("vocab_size"), int):
        raise UserError("config.json", f"vocab_size is {config.get('vocab_size')!r}; right is a number of tokens")
    values = {ours: config[theirs] for ours, theirs in _FIELDS.items() if config.get(theirs) is not None}
    try:
        return EncoderSection(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = _FIELDS.get(str(problem["loc"][0]), "") if problem["loc"] else ""
        raise UserError("config.json", f"{key}: {problem['msg']}".lstrip(": ")) from None


def load_hugging_face(model: MaskedLanguageModel, folder: Path) -> None:
    """Fill a model with the weights of a BERT folder, safetensors only; raise UserError if it is of another model.

    A model without pairs leaves the pooler and the next-sentence head of a folder unread.
    """
    weights = _open_folder(folder, model.section, model.vocabulary_size)
    table = hugging_face_tensors(model.section, model.vocabulary_size, model.has_pairs)
    load_pieces(model, _as_named_in(weights, table), weights, _UNREAD)


def load_encoder(encoder: Encoder, folder: Path, vocabulary_size: int, pooler: Pooler | None = None) -> bool:
    """Fill an encoder, and a pooler where the folder has one, from a folder of any BERT; return whether it has.

    Safetensors only; heads stay unread. Raises UserError if the folder is of another model.
    """
    weights = _open_folder(folder, encoder.section, vocabulary_size)
    if not any(name.startswith("bert.") for name in weights.files):  # BertModel by itself
        weights.prefix = "bert."
    inside = ("embeddings.", "encoder.", "pooler.") if weights.prefix else ("bert.",)
    weights.files = {name: file for name, file in weights.files.items() if name.startswith(inside)}
    has_pooler = "bert.pooler.dense.weight".removeprefix(weights.prefix) in weights.files
    parts, table = nn.ModuleDict({"encoder": encoder}), encoder_tensors(encoder.section, vocabulary_size, "encoder.")
    if pooler is not None and has_pooler:
        parts["pooler"] = pooler
        table |= pooler_tensors(encoder.section, "pooler.")
    load_pieces(parts, _as_named_in(weights, table), weights, _UNREAD)
    return has_pooler


def _open_folder(folder: Path, section: EncoderSection, vocabulary_size: int) -> WeightFolder:
    """Open the weights of a folder; raise UserError if its config.json tells of another shape or vocabulary."""
    config = read_json(folder / "config.json")
    found = section_from_hugging_face(config)
    for key in _SHAPE:
        ours, theirs = getattr(section, key), getattr(found, key)
        if ours != theirs:
            shown = "feed_forward_size" if key == "inner_size" else key
            raise UserError(f"model.{shown}", f"{ours}, but the model in {folder} has {theirs}")
    if config["vocab_size"] != vocabulary_size:
        message = f"the tokenizer has {vocabulary_size} tokens, the model in {folder} {config['vocab_size']}"
        raise UserError("model.initialize_from", message)
    return WeightFolder(folder)


def _as_named_in(weights: WeightFolder, table: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
    """Return the table with the names of BERT's first release where the folder has those."""
    if "bert.embeddings.LayerNorm.gamma".removeprefix(weights.prefix) not in weights.files:
        return table
    return {name: [_with_first_name(piece) for piece in pieces] for name, pieces in table.items()}


_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "feed_forward_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "num_segments": "type_vocab_size",
    "norm_epsilon": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "dropout": "hidden_dropout_prob",
}
_SHAPE = ("norm", "positions", "num_layers", "hidden_size", "num_heads", "inner_size", "max_positions")
_SHAPE += ("num_segments", "norm_epsilon")
# What config.json may say where our encoder has no choice, if it says anything.
_FIXED: dict[str, Any] = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}
_UNREAD = (
    ".embeddings.position_ids",
    ".pooler.dense.weight",
    ".pooler.dense.bias",
    ".cls.seq_relationship.weight",
    ".cls.seq_relationship.bias",
    ".cls.predictions.decoder.weight",  # the tied embedding and the bias once more
    ".cls.predictions.decoder.bias",
)


def _with_first_name(piece: Piece) -> Piece:
    name = piece.name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return piece._replace(name=name)


def _norm_pieces(section: EncoderSection, ours: str, theirs: str) -> dict[str, list[Piece]]:
    return {f"{ours}.{kind}": [Piece(f"{theirs}.{kind}", 0, section.hidden_size)] for kind in ("weight", "bias")}


def _layer(section: EncoderSection, ours: str, theirs: str) -> dict[str, list[Piece]]:
    size = section.hidden_size
    table = _norm_pieces(section, f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
    table |= _norm_pieces(section, f"{ours}.feed_forward_norm", f"{theirs}.output.LayerNorm")
    query, key, value = (f"attention.self.{name}" for name in ("query", "key", "value"))
    for name, parts in (
        ("attention.qkv", ((query, size), (key, size), (value, size))),
        ("attention.out", (("attention.output.dense", size),)),
        ("feed_forward.up", (("intermediate.dense", section.inner_size),)),
        ("feed_forward.down", (("output.dense", size),)),
    ):
        for kind in ("weight", "bias"):
            pieces, start = [], 0
            for their_name, rows in parts:
                pieces.append(Piece(f"{theirs}.{their_name}.{kind}", start, start + rows))
                start += rows
            table[f"{ours}.{name}.{kind}"] = pieces
    return table
