"""Floating-point operations of training, forward and backward: 6 for each weight that a token meets.

The formula is that of arXiv 2001.08361, section 2.1. Models are built without memory.
"""

from collections.abc import Callable

import torch
from torch import nn


def operations_of_tokens(build: Callable[[], nn.Module], num_tokens: float) -> float:
    """Count those of so many tokens, which meet all weights but the embeddings'."""
    with torch.device("meta"):
        model = build()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return 6.0 * weights * num_tokens


def operations_of_sides(build: Callable[[], nn.Module], source_tokens: float, target_tokens: float) -> float:
    """Count those of an encoder-decoder.

    Tokens of the source meet the encoder's weights, and the attention's that reads them; of the target the others.
    """
    with torch.device("meta"):
        weights = {name: parameter.numel() for name, parameter in build().named_parameters()}
    of_source = sum(count for name, count in weights.items() if "encoder." in name or ".kv." in name)
    of_target = sum(weights.values()) - of_source  # the tied table once, where it makes logits
    return 6.0 * (of_source * source_tokens + of_target * target_tokens)
