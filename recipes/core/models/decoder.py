"""The decoder-only transformer, GPT-2 and Llama family, written once as a list of layers.

Every parameter is used only inside the forward pass of the module that owns it, which is where ZeRO-3 gathers it; a
tied embedding belongs to two modules.

Shapes: B rows, T tokens, D hidden size, H heads, K heads of keys and values, E size of a head, V vocabulary, S keys.

Longer than other files: two families, and how transformers names their weights.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layers import (
    ColumnLinear,
    Embedding,
    LayerNorm,
    RMSNorm,
    RowLinear,
    attend,
    attention_mask,
    count_positions,
    gelu,
    rotary_table,
    rotate,
)
from bigbatch.recipes.core.loss import chunked_cross_entropy
from bigbatch.recipes.core.models.config import DecoderSection, padded_vocabulary
from bigbatch.recipes.core.models.hugging_face import Piece, WeightFolder, load_pieces, read_json, to_hugging_face
from bigbatch.recipes.core.models.mixture import MixtureFeedForward
from bigbatch.recipes.core.parallel import ALONE, Axis
from bigbatch.recipes.core.sequence_parallel import own_tokens, to_heads, to_tokens
from bigbatch.recipes.core.tensor_parallel import (
    copy_in,
    gather_in,
    gather_out,
    own_random_numbers,
    own_rows,
    sum_out,
)


class Context(NamedTuple):
    """What all blocks of one forward pass share."""

    rotary: torch.Tensor | None  # [2, B or 1, T, 1, E / 2]
    mask: torch.Tensor | None  # [B or 1, T, S], None: plain causal, or one token that may see all
    cache: "KeyValueCache | None"
    sequence: Axis  # of the ranks that the tokens are divided over
    spread: Axis = ALONE  # of the tensor ranks that what lies between the layers is divided over: [B * T / t, D]
    num_rows: int = 0  # 0: as many as the hidden states have


class Decoder(nn.Module):
    """A decoder with its language-model head over `vocabulary_size` tokens; the embedding's padding stays inside.

    Weights are drawn as GPT-2's: normal, those that write into the residual stream smaller by sqrt(2 * num_layers).
    `named_parameters` names a tied embedding once, `embed.tokens.weight`. Over tensor ranks each has its share of the
    heads, of the inner units and of the vocabulary, drawn as a part of the whole; hidden states and logits are
    replicated, and every tensor rank must call the model with the same tokens. So must every sequence rank: with labels
    each computes its own part of the rows, and the loss is that of whole rows; without, each computes all. Over expert
    ranks each has its part of the experts and its own tokens; only without labels all must call with the same. With
    `tensor_sequence` and labels the hidden states between the layers are not replicated but divided along tokens.
    """

    def __init__(
        self,
        section: DecoderSection,
        vocabulary_size: int,
        tensor: Axis = ALONE,
        sequence: Axis = ALONE,
        expert: Axis = ALONE,
        tensor_sequence: bool = False,
    ) -> None:
        """Build it; raise UserError where the vocabulary does not divide over the tensor ranks."""
        super().__init__()
        self.section = section
        self.vocabulary_size, self.tensor, self.sequence, self.expert = vocabulary_size, tensor, sequence, expert
        self.spread = tensor if tensor_sequence else ALONE
        self.embed = InputEmbedding(section, padded_vocabulary(vocabulary_size, section, tensor.size), tensor)
        self.blocks = nn.ModuleList(Block(section, index, tensor, expert) for index in range(section.num_layers))
        tied = self.embed.tokens if section.tie_embeddings else None
        self.head = LanguageModelHead(section, vocabulary_size, tied, tensor)

    def forward(
        self,
        tokens: torch.Tensor,  # [B, T]
        labels: torch.Tensor | None = None,  # [B, T], the token that follows; -100 counts not
        positions: torch.Tensor | None = None,  # [B, T]
        documents: torch.Tensor | None = None,  # [B, T]
        cache: "KeyValueCache | None" = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Return the logits [B, T, V], or with labels the loss summed over them (float32 scalar).

        While training a mixture of experts, the loss has its load-balancing loss in it, as much for each label.
        Labels are already shifted: labels[b, t] is the target at t. With `documents` a token sees only the tokens of
        its own number, which stand side by side, and positions start anew with each number; `positions` overrides.
        `last_only` keeps the last token's logits [B, 1, V].
        """
        if cache is None and tokens.shape[1] > self.section.max_positions:
            message = f"{self.section.max_positions}, but a sequence has {tokens.shape[1]} tokens"
            raise UserError("model.max_positions", message)
        if positions is None:
            positions = _positions(tokens, documents, cache)
        sequence, spread = (ALONE, ALONE) if labels is None else (self.sequence, self.spread)
        with own_random_numbers(spread, tokens.device, wanted=self.training and self.section.dropout > 0):
            own_positions = own_tokens(positions, sequence)
            hidden = self.embed(own_tokens(tokens, sequence), own_positions, spread)
            context = self._context(hidden, own_positions, documents, cache, sequence)
            context = context._replace(spread=spread, num_rows=len(tokens))
            for block in self.blocks:
                if self.section.recompute_activations and torch.is_grad_enabled():
                    hidden = checkpoint(block, hidden, context, use_reentrant=False)
                else:
                    hidden = block(hidden, context)
        if cache:
            cache.length += tokens.shape[1]
        if labels is None:
            result = self.head(hidden, None, last_only)
            return self.expert.first_in_place(result)  # ranks may round differently, and all are to write the same text
        result = sum_out(self.head(hidden, own_tokens(labels, sequence), False, spread), sequence)
        return result + self._auxiliary_loss(labels) if self.training and self.section.num_expert_layers else result

    def layers(self) -> list[nn.Module]:
        """List the modules in order of use, as a pipeline divides them."""
        return [self.embed, *self.blocks, self.head]

    def _auxiliary_loss(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the load-balancing losses of the last forward pass, for each label that counts."""
        mixtures = [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MixtureFeedForward)]
        total = torch.stack([mixture.auxiliary_loss for mixture in mixtures]).sum()
        return self.section.auxiliary_loss_coefficient * (labels != IGNORED_LABEL).sum() * total

    def _context(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        documents: torch.Tensor | None,
        cache: "KeyValueCache | None",
        sequence: Axis,
    ) -> Context:
        section = self.section
        rotary = None
        if section.family == "llama":
            rotary = rotary_table(positions, section.head_size, section.rope_theta, hidden.dtype)
        if cache is not None:
            return Context(rotary, cache.mask(hidden), cache, sequence)
        if documents is None:
            return Context(rotary, None, None, sequence)
        allowed = documents.unsqueeze(1) == documents.unsqueeze(2)  # [B, T, T]
        return Context(rotary, attention_mask(allowed.tril(), hidden.dtype), None, sequence)


class InputEmbedding(nn.Module):
    """Token vectors, with GPT-2's learned positions added."""

    def __init__(self, section: DecoderSection, num_rows: int, tensor: Axis) -> None:
        super().__init__()
        self.tokens = Embedding(num_rows, section.hidden_size, section.initializer_range, tensor)
        if section.family == "gpt2":
            self.positions = Embedding(section.max_positions, section.hidden_size, section.initializer_range)
        else:
            self.positions = None
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Return the first hidden states [B, T, D] of tokens [B, T] at positions [B or 1, T], or a rank's part."""
        hidden = self.tokens(tokens, spread)
        if self.positions is not None:
            hidden = hidden + self.positions(own_rows(positions.expand(len(tokens), -1), spread), spread)
        return self.dropout(hidden)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, section: DecoderSection, index: int, tensor: Axis, expert: Axis) -> None:
        super().__init__()
        self.attention_norm = _norm(section)
        self.attention = Attention(section, index, tensor)
        self.feed_forward_norm = _norm(section)
        layer = GeluFeedForward if section.family == "gpt2" else GatedFeedForward
        make = partial(layer, section, tensor)
        self.feed_forward = MixtureFeedForward(section, make, expert) if section.has_experts(index) else make()
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Map hidden states [B, T, D], or a rank's part of them, to the next ones."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden, context.spread), context))
        normed = self.feed_forward_norm(hidden, context.spread)
        return hidden + self.dropout(self.feed_forward(normed, context.spread))


class Attention(nn.Module):
    """Causal self-attention; the rows of `qkv` are all query heads, then the keys', then the values'.

    Of each kind a tensor rank has its share, and its dropout is its own.
    """

    def __init__(self, section: DecoderSection, index: int, tensor: Axis) -> None:
        super().__init__()
        self.index, self.tensor = index, tensor
        self.num_heads = section.num_heads // tensor.size
        self.num_key_value_heads = section.key_value_heads // tensor.size
        self.head_size = section.head_size
        self.dropout = section.dropout
        bias, size = section.family == "gpt2", section.hidden_size
        rows, key_rows = (count * section.head_size for count in (section.num_heads, section.key_value_heads))
        self.qkv = ColumnLinear(size, (rows, key_rows, key_rows), bias, section.initializer_range, tensor)
        self.out = RowLinear(rows, size, bias, _residual_deviation(section), tensor)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """Mix the hidden states [B, T, D] of a row's tokens."""
        num_key_values = self.num_key_value_heads
        num_heads = self.num_heads + 2 * num_key_values
        heads = self.qkv(hidden, context.spread).view(context.num_rows or len(hidden), -1, num_heads, self.head_size)
        if context.rotary is not None:
            turned, value = heads.split((self.num_heads + num_key_values, num_key_values), dim=2)
            query, key = rotate(turned, context.rotary).split((self.num_heads, num_key_values), dim=2)
        else:
            query, key, value = heads.split((self.num_heads, num_key_values, num_key_values), dim=2)
        if context.cache is not None:
            key, value = context.cache.append(self.index, key, value)
        query, key, value = to_heads((query, key, value), context.sequence)
        is_causal = context.mask is None and query.shape[1] == key.shape[1] > 1
        dropout = self.dropout if self.training else 0.0
        with own_random_numbers(self.tensor, query.device, wanted=dropout > 0):
            mixed = attend(query, key, value, context.mask, is_causal, dropout)
        return self.out(to_tokens(mixed, context.sequence), context.spread)


class GeluFeedForward(nn.Module):
    """GPT-2's feed-forward layer."""

    def __init__(self, section: DecoderSection, tensor: Axis) -> None:
        super().__init__()
        size, inner = section.hidden_size, section.inner_size
        self.up = ColumnLinear(size, (inner,), True, section.initializer_range, tensor)
        self.down = RowLinear(inner, size, True, _residual_deviation(section), tensor)

    def forward(self, hidden: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Map hidden states [B, T, D], or a rank's part of them, one by one."""
        return self.down(gelu(self.up(hidden, spread)), spread)


class GatedFeedForward(nn.Module):
    """Llama's feed-forward layer, SwiGLU (https://arxiv.org/abs/2002.05202); `gate_up` has the gate's rows first."""

    def __init__(self, section: DecoderSection, tensor: Axis) -> None:
        super().__init__()
        size, inner = section.hidden_size, section.inner_size
        self.gate_up = ColumnLinear(size, (inner, inner), False, section.initializer_range, tensor)
        self.down = RowLinear(inner, size, False, _residual_deviation(section), tensor)

    def forward(self, hidden: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Map hidden states [B, T, D], or a rank's part of them, one by one."""
        gate, up = self.gate_up(hidden, spread).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, spread)


class LanguageModelHead(nn.Module):
    """The last norm and the logits; it makes the loss too, for this is where ZeRO-3 gathers the (tied) weight."""

    def __init__(self, section: DecoderSection, vocabulary_size: int, tied: Embedding | None, tensor: Axis) -> None:
        super().__init__()
        self.vocabulary_size, self.tensor = vocabulary_size, tensor
        self.norm = _norm(section)
        if tied is None:
            num_rows = padded_vocabulary(vocabulary_size, section, tensor.size)
            tied = Embedding(num_rows, section.hidden_size, section.initializer_range, tensor)
        self.weight = tied.weight

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        last_only: bool = False,
        spread: Axis = ALONE,
    ) -> torch.Tensor:
        """Return the logits [B, T, V] of hidden states [B, T, D], or the loss summed over labels [B, T]."""
        hidden = self.norm(hidden[:, -1:] if last_only else hidden, spread)
        hidden = gather_in(hidden, spread) if spread.size > 1 else copy_in(hidden, self.tensor)
        if labels is None:
            logits = F.linear(hidden, self.weight)
            return gather_out(logits, self.tensor)[..., : self.vocabulary_size]
        return chunked_cross_entropy(
            hidden.flatten(0, -2),
            self.weight,
            labels.flatten(),
            num_classes=self.vocabulary_size,
            tensor=self.tensor,
        )


class KeyValueCache:
    """Keys and values of the tokens seen so far, in memory taken once for `max_length` tokens.

    Rows of different lengths are aligned at their ends: `padding` [B] says how many of a row's first tokens are none.
    A row may go on past the model's last position, to keep others company: what it says there means nothing.
    """

    def __init__(self, model: Any, num_rows: int, max_length: int, padding: torch.Tensor | None = None) -> None:
        """Take memory for a Decoder, or the decoder of a Seq2Seq."""
        section, weight = model.section, next(model.parameters())
        heads = section.key_value_heads // model.tensor.size
        shape = (section.num_layers, 2, num_rows, heads, max_length, section.head_size)
        self.states = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # [layers, 2, B, K, S, E]
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.last_position = section.max_positions - 1
        self.length = 0

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [B, T, K, E] behind those of a layer and return all of them [B, S, K, E]."""
        stop = self.length + key.shape[1]
        self.states[layer, 0, :, :, self.length : stop] = key.transpose(1, 2)
        self.states[layer, 1, :, :, self.length : stop] = value.transpose(1, 2)
        keys, values = self.states[layer, :, :, :, :stop].transpose(2, 3)
        return keys, values

    def positions(self, num_tokens: int) -> torch.Tensor:
        """Return the positions [B or 1, T] of the next tokens."""
        index = torch.arange(self.length, self.length + num_tokens, device=self.states.device).unsqueeze(0)
        if self.padding is not None:
            index = (index - self.padding.unsqueeze(1)).clamp_(min=0)
        return index.clamp_(max=self.last_position)

    def mask(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return what the next tokens [B, T, D] may see, or None where the rule needs no mask."""
        num_tokens = hidden.shape[1]
        if self.padding is None and (self.length == 0 or num_tokens == 1):
            return None
        keys = torch.arange(self.length + num_tokens, device=hidden.device)  # [S]
        allowed = keys <= keys[self.length :].unsqueeze(1)  # [T, S]
        if self.padding is None:
            return attention_mask(allowed.unsqueeze(0), hidden.dtype)
        # Padding sees padding, so that no softmax is empty; its keys and values are seen by no token.
        is_text = keys >= self.padding.unsqueeze(1)  # [B, S]
        same = is_text[:, self.length :].unsqueeze(2) == is_text.unsqueeze(1)
        return attention_mask(allowed & same, hidden.dtype)

    def repeat(self, num_samples: int) -> None:
        """Continue each row in several ways."""
        self.states = self.states.repeat_interleave(num_samples, dim=2)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(num_samples)

    def select(self, rows: torch.Tensor) -> None:
        """Let each row go on as another one [B] has begun; there may be fewer."""
        kept = self.states[..., : self.length, :].index_select(2, rows)
        self.states = self.states[:, :, : len(rows)]
        self.states[..., : self.length, :] = kept
        if self.padding is not None:
            self.padding = self.padding[rows]


def _positions(tokens: torch.Tensor, documents: torch.Tensor | None, cache: KeyValueCache | None) -> torch.Tensor:
    """Count the tokens of each row, or of each document, from 0: [B or 1, T]."""
    if cache is not None:
        return cache.positions(tokens.shape[1])
    return count_positions(tokens, documents)


def _norm(section: DecoderSection) -> nn.Module:
    if section.family == "gpt2":
        return LayerNorm(section.hidden_size, section.norm_epsilon)
    return RMSNorm(section.hidden_size, section.norm_epsilon)


def _residual_deviation(section: DecoderSection) -> float:
    return section.initializer_range / (2 * section.num_layers) ** 0.5


# ----------------------------------------------------------------------------------- to and from Hugging Face


def hugging_face_config(section: DecoderSection, vocabulary_size: int) -> dict[str, Any]:
    """Return the config.json under which transformers builds the same model; raise UserError where it has none."""
    if section.num_expert_layers:
        _check_is_mixtral(section)
    common = {
        "vocab_size": vocabulary_size,
        "tie_word_embeddings": section.tie_embeddings,
        "initializer_range": section.initializer_range,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if section.family == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_layer": section.num_layers,
            "n_embd": section.hidden_size,
            "n_head": section.num_heads,
            "n_inner": section.inner_size,
            "n_positions": section.max_positions,
            "layer_norm_epsilon": section.norm_epsilon,
            "embd_pdrop": section.dropout,
            "attn_pdrop": section.dropout,
            "resid_pdrop": section.dropout,
        }
    if section.num_expert_layers:
        kind = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": section.num_experts,
            "num_experts_per_tok": section.experts_per_token,
            "sliding_window": None,
        }
    else:
        kind = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
        }
    return common | {
        **kind,
        "hidden_act": "silu",
        "num_hidden_layers": section.num_layers,
        "hidden_size": section.hidden_size,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.key_value_heads,
        "head_dim": section.head_size,
        "intermediate_size": section.inner_size,
        "max_position_embeddings": section.max_positions,
        "rms_norm_eps": section.norm_epsilon,
        "rope_theta": section.rope_theta,  # read by transformers 4, and by most other programs
        "rope_parameters": {"rope_type": "default", "rope_theta": section.rope_theta},  # read by transformers 5
    }


def _check_is_mixtral(section: DecoderSection) -> None:
    """Raise UserError for a mixture of experts that is none of transformers' Mixtral, the one that it becomes."""
    wrong = {
        "family": section.family != "llama",
        "expert_interval": section.expert_interval != 1,
        "experts_per_token": section.experts_per_token == 1,  # which counts by its probability; Mixtral's counts whole
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            needs = "family llama, expert_interval 1 and experts_per_token of 2 or more"
            message = f"{getattr(section, name)!r} has no like in transformers; a Mixtral has {needs}"
            raise UserError(f"model.{name}", message)


def hugging_face_tensors(section: DecoderSection, vocabulary_size: int) -> dict[str, list[Piece]]:
    """Return, for each name of `named_parameters`, the Hugging Face tensors that it is made of."""
    table = {}
    if section.family == "gpt2":
        table["embed.tokens.weight"] = [Piece("transformer.wte.weight", 0, vocabulary_size)]
        table["embed.positions.weight"] = [Piece("transformer.wpe.weight", 0, section.max_positions)]
        table |= _norm_pieces(section, "head.norm", "transformer.ln_f")
        layer_pieces = _gpt2_layer
    else:
        table["embed.tokens.weight"] = [Piece("model.embed_tokens.weight", 0, vocabulary_size)]
        table |= _norm_pieces(section, "head.norm", "model.norm")
        layer_pieces = _llama_layer
    for index in range(section.num_layers):
        table |= layer_pieces(section, index)
    if not section.tie_embeddings:
        table["head.weight"] = [Piece("lm_head.weight", 0, vocabulary_size)]
    return table


def hugging_face_state(model: Decoder) -> dict[str, torch.Tensor]:
    """Return all weights as a Hugging Face folder holds them."""
    table = hugging_face_tensors(model.section, model.vocabulary_size)
    parameters = dict(model.named_parameters())
    return {piece.name: to_hugging_face(parameters[name].detach(), piece) for name in table for piece in table[name]}


def section_from_hugging_face(config: dict[str, Any]) -> DecoderSection:
    """Describe a folder's model by its config.json; raise UserError for what the native families do not have."""
    kind = config.get("model_type")
    if kind not in _FIELDS or (kind == "opt" and "quantization_config" not in config):
        native = [name for name in _FIELDS if name != "opt"]
        raise UserError("config.json", f"model_type is {kind!r}; the native ones are {', '.join(native)}")
    family: Any = "gpt2" if kind in ("gpt2", "opt") else "llama"
    for key, allowed in _FIXED[kind].items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError("config.json", f"{key} is {config[key]!r}; the native {kind} has {allowed[0]!r}")
    if not isinstance(config.get("vocab_size"), int):
        raise UserError("config.json", f"vocab_size is {config.get('vocab_size')!r}; right is a number of tokens")
    names = _FIELDS[kind]
    values = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    values.setdefault("tie_embeddings", family == "gpt2")
    if family == "llama":
        size, count = config.get("head_dim"), config.get("num_attention_heads")
        if isinstance(size, int) and isinstance(count, int) and size * count != config["hidden_size"]:
            values["head_dim"] = size  # it has lost heads
        values["rope_theta"] = _rope_theta(config, 1e6 if kind == "mixtral" else 1e4)
    if kind == "mixtral":
        values.setdefault("num_experts", 8)
    try:
        section = DecoderSection(family=family, **values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = names.get(str(problem["loc"][0]), "") if problem["loc"] else ""
        raise UserError("config.json", f"{key}: {problem['msg']}".lstrip(": ")) from None
    return section


def load_hugging_face(model: Decoder, folder: Path, vocabulary_size: int | None = None) -> WeightFolder:
    """Fill a model with the weights of a folder, safetensors only, and return them.

    Raises UserError if it is of another model. Where `vocabulary_size`, the folder's own, is given, the model may have
    more tokens, whose weights are then 0.
    """
    config = read_json(folder / "config.json")
    section = model.section
    check_shape(section, section_from_hugging_face(config), folder)
    if vocabulary_size is None and (
        padded_vocabulary(config["vocab_size"], section) != padded_vocabulary(model.vocabulary_size, section)
    ):
        message = f"the model has {model.vocabulary_size} tokens, the one in {folder} {config['vocab_size']}"
        raise UserError("model.initialize_from", message)
    weights = WeightFolder(folder)
    if "wte.weight" in weights.files:  # the first GPT-2 folders leave the prefix out
        weights.prefix = "transformer."
    derived = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq") + (
        ".lm_head.weight",
    ) * section.tie_embeddings
    load_pieces(model, hugging_face_tensors(section, config["vocab_size"]), weights, derived)
    return weights


def check_shape(section: DecoderSection, found: DecoderSection, folder: Path) -> None:
    """Raise UserError where the model found in a folder is of another shape than a section says."""
    keys = ["family", "num_layers", "hidden_size", "num_heads", "key_value_heads", "head_size", "inner_size"]
    keys += ["max_positions", "tie_embeddings", "norm_epsilon"] + ["rope_theta"] * (section.family == "llama")
    keys += ["num_experts", *["experts_per_token", "expert_interval"] * (section.num_experts > 1)]
    for key in keys:
        ours, theirs = getattr(section, key), getattr(found, key)
        if ours != theirs:
            raise UserError(f"model.{_KEYS.get(key, key)}", f"{ours}, but the model in {folder} has {theirs}")


_FIELDS = {
    "gpt2": {
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
        "feed_forward_size": "n_inner",
        "max_positions": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "dropout": "resid_pdrop",
        "tie_embeddings": "tie_word_embeddings",
    },
    "llama": {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "feed_forward_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "initializer_range": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    },
}
_FIELDS["mixtral"] = _FIELDS["llama"] | {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
# `bigbatch quantize` writes a GPT-2 so: the same function, by linear layers. It is described here, not loaded.
_FIELDS["opt"] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "feed_forward_size": "ffn_dim",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_KEYS = {
    "key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "inner_size": "feed_forward_size",
}  # of the run document
# What config.json may say where our families have no choice; the first is what a missing key means.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    "opt": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "do_layer_norm_before": (True,)},
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "mixtral": {"hidden_act": ("silu",), "sliding_window": (None,), "router_jitter_noise": (0, 0.0)},
}


def _rope_theta(config: dict[str, Any], default: float) -> float:
    """Return the base of plain rotary positions, from either generation of config.json."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError("config.json", f"rotary positions of type {kind!r}; the native llama has only plain ones")
    return float(rope.get("rope_theta") or config.get("rope_theta") or default)


def _norm_pieces(section: DecoderSection, ours: str, theirs: str) -> dict[str, list[Piece]]:
    kinds = ("weight", "bias") if section.family == "gpt2" else ("weight",)
    return {f"{ours}.{kind}": [Piece(f"{theirs}.{kind}", 0, section.hidden_size)] for kind in kinds}


def _gpt2_layer(section: DecoderSection, index: int) -> dict[str, list[Piece]]:
    ours, theirs, size = f"blocks.{index}", f"transformer.h.{index}", section.hidden_size
    table = _norm_pieces(section, f"{ours}.attention_norm", f"{theirs}.ln_1")
    table |= _norm_pieces(section, f"{ours}.feed_forward_norm", f"{theirs}.ln_2")
    for name, their_name, rows in (
        ("attention.qkv", "attn.c_attn", 3 * size),
        ("attention.out", "attn.c_proj", size),
        ("feed_forward.up", "mlp.c_fc", section.inner_size),
        ("feed_forward.down", "mlp.c_proj", size),
    ):
        table[f"{ours}.{name}.weight"] = [Piece(f"{theirs}.{their_name}.weight", 0, rows, transpose=True)]
        table[f"{ours}.{name}.bias"] = [Piece(f"{theirs}.{their_name}.bias", 0, rows)]
    return table


def _llama_layer(section: DecoderSection, index: int) -> dict[str, list[Piece]]:
    ours, theirs, size = f"blocks.{index}", f"model.layers.{index}", section.hidden_size
    table = _norm_pieces(section, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
    table |= _norm_pieces(section, f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm")
    rows, key_rows = (count * section.head_size for count in (section.num_heads, section.key_value_heads))
    inner = section.inner_size
    layers: list[tuple[str, tuple[tuple[str, int], ...]]] = [
        ("attention.qkv", (("self_attn.q_proj", rows), ("self_attn.k_proj", key_rows), ("self_attn.v_proj", key_rows))),
        ("attention.out", (("self_attn.o_proj", size),)),
    ]
    if section.has_experts(index):
        mixture = "block_sparse_moe"
        table[f"{ours}.feed_forward.router"] = [Piece(f"{theirs}.{mixture}.gate.weight", 0, section.num_experts)]
        for expert in range(section.num_experts):
            our_expert, their_expert = f"feed_forward.experts.{expert}", f"{mixture}.experts.{expert}"
            layers.append((f"{our_expert}.gate_up", ((f"{their_expert}.w1", inner), (f"{their_expert}.w3", inner))))
            layers.append((f"{our_expert}.down", ((f"{their_expert}.w2", size),)))
    else:
        layers.append(("feed_forward.gate_up", (("mlp.gate_proj", inner), ("mlp.up_proj", inner))))
        layers.append(("feed_forward.down", (("mlp.down_proj", size),)))
    for name, parts in layers:
        pieces, start = [], 0
        for their_name, rows in parts:
            pieces.append(Piece(f"{theirs}.{their_name}.weight", start, start + rows))
            start += rows
        table[f"{ours}.{name}.weight"] = pieces
    return table
