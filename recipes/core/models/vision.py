"""The Vision Transformer (https://arxiv.org/abs/2010.11929) over the encoder's own layers, and its Hugging Face form.

Shapes: B images, C channels, S pixels a side, P pixels a patch's side, T tokens, D hidden size, K labels.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layers import LayerNorm, Linear, draw
from bigbatch.recipes.core.models.config import VisionSection
from bigbatch.recipes.core.models.encoder import Block, Context
from bigbatch.recipes.core.models.hugging_face import Piece, WeightFolder, load_pieces, read_json


class VisionTransformer(nn.Module):
    """Patches as tokens, pre-norm layers, and a head for labels, which starts at zero."""

    def __init__(self, section: VisionSection, image_size: int, num_channels: int, num_labels: int) -> None:
        super().__init__()
        self.section, blocks = section, section.blocks
        self.embed = PatchEmbedding(section, image_size, num_channels)
        self.blocks = nn.ModuleList(Block(blocks) for _ in range(section.num_layers))
        self.norm = LayerNorm(section.hidden_size, section.norm_epsilon)
        self.head = Linear(section.hidden_size, num_labels, True, 0.0)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, K] of images [B, C, S, S], from -1 to 1."""
        hidden, context = self.embed(pixels), Context(None, None)
        for block in self.blocks:
            if self.section.recompute_activations and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, context, use_reentrant=False)
            else:
                hidden = block(hidden, context)
        hidden = self.norm(hidden)
        return self.head(hidden[:, 0] if self.section.pooling == "class" else hidden.mean(1))


class PatchEmbedding(nn.Module):
    """One linear layer on all pixels of a patch, learned positions, and the class token."""

    def __init__(self, section: VisionSection, image_size: int, num_channels: int) -> None:
        super().__init__()
        size, self.patch_size = section.hidden_size, section.patch_size
        has_class, deviation = section.pooling == "class", section.initializer_range
        num_tokens = (image_size // self.patch_size) ** 2 + has_class
        # A convolution's shape, as it is stored everywhere.
        self.weight = nn.Parameter(torch.empty(size, num_channels, self.patch_size, self.patch_size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.positions = nn.Parameter(torch.empty(1, num_tokens, size))
        self.class_token = nn.Parameter(torch.empty(1, 1, size)) if has_class else None
        for parameter in (self.weight, self.positions, self.class_token):
            if parameter is not None:
                draw(parameter, deviation)
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the first hidden states [B, T, D] of images [B, C, S, S]; the class token's is the first."""
        patches = pixels.to(self.weight.dtype).unfold(2, self.patch_size, self.patch_size)
        patches = patches.unfold(3, self.patch_size, self.patch_size)  # [B, C, S / P, S / P, P, P]
        hidden = F.linear(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)
        if self.class_token is not None:
            hidden = torch.cat((self.class_token.expand(len(pixels), -1, -1), hidden), 1)
        return self.dropout(hidden + self.positions)


# ----------------------------------------------------------------------------------- to and from Hugging Face


def vision_config(section: VisionSection, image_size: int, num_channels: int) -> dict[str, Any]:
    """Return the config.json under which transformers builds the same model; raise UserError where it has none."""
    if section.pooling != "class":
        raise UserError("model.pooling", f"is {section.pooling!r}; transformers' ViT has only 'class'")
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": image_size,
        "num_channels": num_channels,
        "intermediate_size": section.blocks.inner_size,
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": section.dropout,
        "qkv_bias": True,
        **{theirs: getattr(section, ours) for ours, theirs in _FIELDS.items() if ours != "feed_forward_size"},
    }


def vision_tensors(section: VisionSection, num_labels: int) -> dict[str, list[Piece]]:
    """Return, for each name of `VisionTransformer.named_parameters`, the Hugging Face tensors it is made of."""
    size, theirs = section.hidden_size, "vit.embeddings"
    table = {
        "embed.weight": [Piece(f"{theirs}.patch_embeddings.projection.weight", 0, size)],
        "embed.bias": [Piece(f"{theirs}.patch_embeddings.projection.bias", 0, size)],
        "embed.positions": [Piece(f"{theirs}.position_embeddings", 0, 1)],
        "embed.class_token": [Piece(f"{theirs}.cls_token", 0, 1)],
    }
    layers = {"norm": ("vit.layernorm",), "head": ("classifier",)}
    for index in range(section.num_layers):
        ours, theirs = f"blocks.{index}", f"vit.encoder.layer.{index}"
        own = (f"{theirs}.attention.attention.{name}" for name in ("query", "key", "value"))
        layers |= {
            f"{ours}.attention.qkv": tuple(own),
            f"{ours}.attention.out": (f"{theirs}.attention.output.dense",),
            f"{ours}.attention_norm": (f"{theirs}.layernorm_before",),
            f"{ours}.feed_forward.up": (f"{theirs}.intermediate.dense",),
            f"{ours}.feed_forward.down": (f"{theirs}.output.dense",),
            f"{ours}.feed_forward_norm": (f"{theirs}.layernorm_after",),
        }
    for ours, names in layers.items():
        rows = {"head": num_labels}.get(ours, section.blocks.inner_size if ours.endswith(".up") else size)
        for kind in ("weight", "bias"):
            pieces = [Piece(f"{name}.{kind}", place * rows, (place + 1) * rows) for place, name in enumerate(names)]
            table[f"{ours}.{kind}"] = pieces
    return table


def section_from_hugging_face(config: dict[str, Any]) -> VisionSection:
    """Describe a folder's model by its config.json; raise UserError for what the native model does not have."""
    for key, only in (("model_type", "vit"), ("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(key, only) != only:
            raise UserError("config.json", f"{key} is {config[key]!r}; the native ViT has {only!r}")
    if not all(isinstance(config.get(key), int) for key in ("image_size", "num_channels", "patch_size")):
        raise UserError("config.json", "lacks image_size, num_channels or patch_size as whole numbers")
    values = {ours: config[theirs] for ours, theirs in _FIELDS.items() if config.get(theirs) is not None}
    try:
        return VisionSection(**values)
    except ValidationError as error:
        raise UserError("config.json", error.errors()[0]["msg"]) from None


def load_vision(model: VisionTransformer, folder: Path, labels: list[str]) -> bool:
    """Fill a model from a ViT folder, safetensors only; return whether the head too, which is for the same labels.

    Raises UserError if the folder is of another model.
    """
    config = read_json(folder / "config.json")
    found = section_from_hugging_face(config)
    for key in ("patch_size", "num_layers", "hidden_size", "num_heads", "norm_epsilon"):
        if getattr(model.section, key) != getattr(found, key):
            told = f"{getattr(model.section, key)}, but the model in {folder} has {getattr(found, key)}"
            raise UserError(f"model.{key}", told)
    weights = WeightFolder(folder)
    if not any(name.startswith("vit.") for name in weights.files):  # ViTModel by itself
        weights.prefix = "vit."
    has_head = "classifier.weight" in weights.files and labels == stored_labels(config)
    table = vision_tensors(model.section, len(labels))
    outer = {"embed": model.embed, "blocks": model.blocks, "norm": model.norm}
    parts: nn.Module = model if has_head else nn.ModuleDict(outer)
    kept = {name: table[name] for name, _ in parts.named_parameters()}
    load_pieces(parts, kept, weights, _UNREAD if has_head else (*_UNREAD, ".classifier.weight", ".classifier.bias"))
    return has_head


def stored_labels(config: dict[str, Any]) -> list[str]:
    """Return the labels of a folder's head by its config.json."""
    table = config.get("id2label") or {}
    return [table[key] for key in sorted(table, key=int)]


_FIELDS = {
    "patch_size": "patch_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "feed_forward_size": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "dropout": "hidden_dropout_prob",
}
_UNREAD = (".pooler.dense.weight", ".pooler.dense.bias")
