"""The parts that native models are made of, and the three computations where a CPU deserves a way of its own.

An argument `spread` is the tensor ranks that have each a part of the tokens of what lies between the layers, if so.

Shapes: B rows, T tokens, D hidden size, H heads, K heads of keys and values, G = H / K, E size of a head,
S keys (T, or the tokens in a cache); W windows in R rows, L tokens of the longest.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from bigbatch.recipes.core.layout import Share, mark, split
from bigbatch.recipes.core.parallel import ALONE, Axis
from bigbatch.recipes.core.tensor_parallel import copy_in, scatter_out, spread_linear, sum_out


class Linear(nn.Linear):
    """A linear layer with normal weights and zero bias, drawn while it is built, as deepspeed.zero.Init needs."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, standard_deviation: float, share: Share | None = None
    ) -> None:
        """Build the layer, or a rank's share of a larger one."""
        self.standard_deviation, self.share = standard_deviation, share
        super().__init__(in_features, out_features, bias)
        if share:
            mark(self.weight, share)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        draw(self.weight, self.standard_deviation, self.share)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ColumnLinear(Linear):
    """A linear layer whose outputs are divided over the tensor ranks, each of the blocks that they consist of.

    It takes a replicated or spread tensor and makes this rank's share of each block, one behind the other.
    """

    def __init__(
        self, in_features: int, blocks: tuple[int, ...], bias: bool, standard_deviation: float, tensor: Axis = ALONE
    ) -> None:
        self.tensor, rows = tensor, sum(blocks)
        share = _share((rows, in_features), 0, blocks, tensor)
        super().__init__(in_features, rows // tensor.size, bias, standard_deviation, share)
        if bias and share:
            mark(self.bias, share._replace(shape=(rows,)))

    def forward(self, input: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Map replicated states [..., D], or spread ones [B * T / t, D], to this rank's outputs for all tokens."""
        if spread.size > 1:
            return spread_linear(input, self.weight, self.bias, spread)
        return super().forward(copy_in(input, self.tensor))


class RowLinear(Linear):
    """A linear layer whose inputs are divided over the tensor ranks; what it makes is replicated or spread.

    Its bias is replicated.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, standard_deviation: float, tensor: Axis = ALONE
    ) -> None:
        self.tensor = tensor
        share = _share((out_features, in_features), 1, (in_features,), tensor)
        super().__init__(in_features // tensor.size, out_features, bias, standard_deviation, share)

    def forward(self, input: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Map this rank's inputs to states [..., D], or spread ones [B * T / t, D]; the bias is added to the sum."""
        if self.tensor.size == 1:
            return super().forward(input)
        total = _sum_over(F.linear(input, self.weight), self.tensor, spread)
        return total if self.bias is None else total + copy_in(self.bias, spread)


class Embedding(nn.Embedding):
    """A table of vectors with normal weights; its rows may be divided over the tensor ranks."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, standard_deviation: float, tensor: Axis = ALONE
    ) -> None:
        self.standard_deviation, self.tensor = standard_deviation, tensor
        self.share = _share((num_embeddings, embedding_dim), 0, (num_embeddings,), tensor)
        super().__init__(num_embeddings // tensor.size, embedding_dim)
        if self.share:
            mark(self.weight, self.share)

    def reset_parameters(self) -> None:
        """Draw the vectors."""
        draw(self.weight, self.standard_deviation, self.share)

    def forward(self, input: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Return the vectors [..., D] of numbers [...].

        Spread are those of a divided table, for the numbers of all tokens; a whole one takes a rank's own numbers.
        """
        if self.tensor.size == 1:
            return F.embedding(input, copy_in(self.weight, spread))
        own = input - self.tensor.rank * self.num_embeddings
        elsewhere = (own < 0) | (own >= self.num_embeddings)
        vectors = super().forward(own.masked_fill(elsewhere, 0))
        return _sum_over(vectors.masked_fill(elsewhere.unsqueeze(-1), 0), self.tensor, spread)


def draw(weight: torch.Tensor, standard_deviation: float, share: Share | None = None) -> None:
    """Draw normal numbers in float32: the same ones whatever dtype and device the weight has under ZeRO-3.

    A share is cut out of the whole logical tensor, so that a model starts the same under every plan. What is on the
    meta device, as it is where a model is only counted, has no numbers.
    """
    if weight.is_meta:
        return
    with torch.no_grad():
        whole = torch.normal(0.0, standard_deviation, share.shape if share else weight.shape)
        weight.copy_(share.cut(whole) if share else whole)


def _share(shape: tuple[int, ...], dim: int, blocks: tuple[int, ...], tensor: Axis) -> Share | None:
    return None if tensor.size == 1 else split(shape, dim, blocks, tensor.rank, tensor.size)


def _sum_over(partial: torch.Tensor, tensor: Axis, spread: Axis) -> torch.Tensor:
    return scatter_out(partial, spread) if spread.size > 1 else sum_out(partial, tensor)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, of states that may be spread."""

    def forward(self, input: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Map states [..., D]."""
        if spread.size == 1:
            return super().forward(input)
        weight, bias = copy_in(torch.stack((self.weight, self.bias)), spread)  # one message for both gradients
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, and scale (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:  # [..., D]
        """Round to the input's dtype before the scaling, as transformers' Llama does."""
        values = hidden.float()
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.epsilon)
        return copy_in(self.weight, spread) * values.to(hidden.dtype)


def count_positions(tokens: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Count the tokens of each row, or of each document of a row, from 0: [B or 1, T]."""
    index = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    if documents is None:
        return index
    is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(is_first, index, 0).cummax(dim=1).values


def rotary_table(positions: torch.Tensor, size: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """Return cosines and sines [2, ..., 1, E / 2] for positions [...] (https://arxiv.org/abs/2104.09864)."""
    frequencies = theta ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = positions.float().unsqueeze(-1) * frequencies
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(-2).to(dtype)


def rotate(heads: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + E / 2) of heads [B, T, H, E] by its position's angle; the order of pairs is Llama's."""
    cosine, sine = table
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def gather_windows(
    hidden: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each window of hidden states [R, T, D] a row [W, L, D] of its own, and tell what is a token there [W, L]."""
    offsets = torch.arange(int(lengths.max()), device=hidden.device)
    is_token = offsets < lengths.unsqueeze(1)
    return hidden.flatten(0, 1)[torch.where(is_token, firsts.unsqueeze(1) + offsets, 0)], is_token


def attention_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn what may be attended to into what is added to the scores: 0 or minus infinity."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)


def attend(
    query: torch.Tensor,  # [B, T, H, E]
    key: torch.Tensor,  # [B, S, K, E]
    value: torch.Tensor,  # [B, S, K, E]
    mask: torch.Tensor | None,  # [B or 1, T, S], added to the scores
    is_causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return softmax(query key' / sqrt(E) + mask) value as [B, T, H * E]; `is_causal` needs no mask, T = S."""
    batch, length, num_heads, _ = query.shape
    if _is_short_training_on_cpu(query, key, dropout):
        if is_causal:
            mask = attention_mask(torch.ones(1, length, length, dtype=torch.bool).tril_(), query.dtype)
        return _ShortAttention.apply(query, key, value, mask)
    result = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        dropout_p=dropout,
        is_causal=is_causal,
        enable_gqa=key.shape[2] != num_heads,
    )
    return result.transpose(1, 2).reshape(batch, length, -1)


def _is_short_training_on_cpu(query: torch.Tensor, key: torch.Tensor, dropout: float) -> bool:
    """Tell where batched products beat PyTorch's flash attention, whose bfloat16 backward pass is slow on a CPU.

    Forward and backward together, 4,096 tokens, 6 heads of 64, processor seconds of one core with AMX: 1.8 times as
    fast at length 256, 1.2 times at 512, slower at 1,024.
    """
    is_training = torch.is_grad_enabled() and query.requires_grad
    is_short = query.shape[1] == key.shape[1] <= 512
    return is_training and is_short and dropout == 0 and query.dtype == torch.bfloat16 and not query.is_cuda


class _ShortAttention(torch.autograd.Function):
    """Attention as batched matrix products that keeps the probabilities and works in place where it may."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        batch, length, num_heads, size = query.shape
        num_groups = key.shape[2]
        queries = _by_group(query, num_groups)  # [B * K, G * T, E]
        keys, values = _by_group(key, num_groups), _by_group(value, num_groups)  # [B * K, T, E]
        scores = queries.new_empty(batch * num_groups, queries.shape[1], length)
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=size**-0.5, out=scores)
        if mask is not None:
            scores.view(batch, num_heads, length, length).add_(mask.unsqueeze(1))
        probabilities = torch.softmax(scores, -1, out=scores)
        ctx.save_for_backward(queries, keys, values, probabilities)
        ctx.shape = query.shape
        return _by_token(torch.bmm(probabilities, values), query.shape).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        queries, keys, values, probabilities = ctx.saved_tensors
        batch, length, _, size = shape = ctx.shape
        grad = _by_group(grad_output.view(shape), len(keys) // batch)
        grad_values = torch.bmm(probabilities.mT, grad)
        grad_scores = torch.bmm(grad, values.mT)
        torch.ops.aten._softmax_backward_data.out(grad_scores, probabilities, -1, grad.dtype, grad_input=grad_scores)
        empty = grad.new_empty(())
        grad_queries = torch.baddbmm(empty, grad_scores, keys, beta=0, alpha=size**-0.5)
        grad_keys = torch.baddbmm(empty, grad_scores.mT, queries, beta=0, alpha=size**-0.5)
        key_shape = (batch, length, len(keys) // batch, size)
        return (
            _by_token(grad_queries, shape),
            _by_token(grad_keys, key_shape),
            _by_token(grad_values, key_shape),
            None,
        )


def _by_group(heads: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Lay out [B, T, H, E] as [B * K, G * T, E]: the queries of a group share one matrix of keys."""
    batch, length, num_heads, size = heads.shape
    return heads.transpose(1, 2).reshape(batch * num_groups, num_heads // num_groups * length, size)


def _by_token(grouped: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Undo `_by_group`."""
    batch, length, num_heads, size = shape
    return grouped.view(batch, num_heads, length, size).transpose(1, 2)


def gelu(hidden: torch.Tensor) -> torch.Tensor:
    """Apply GPT-2's GELU, the tanh form (https://arxiv.org/abs/1606.08415)."""
    if hidden.requires_grad and torch.is_grad_enabled() and hidden.dtype == torch.bfloat16 and not hidden.is_cuda:
        return _CpuGelu.apply(hidden)
    return F.gelu(hidden, approximate="tanh")


class _CpuGelu(torch.autograd.Function):
    """GELU that makes its derivative along the way, a quarter faster than PyTorch's in bfloat16 on a CPU.

    With u = 2 sqrt(2 / pi) (x + 0.044715 x^3) and s = sigmoid(u): y = x s, and dy/dx = s + (1 - s) (x s u').
    Computed in float32, a block at a time so that it stays in a core's cache.
    """

    BLOCK_ELEMENTS = 2**17

    @staticmethod
    def forward(ctx, hidden):
        linear = torch.tensor(2 * math.sqrt(2 / math.pi))
        cubic = 0.044715 * linear.item()
        one = torch.ones(())
        hidden = hidden.contiguous()
        result, derivative = torch.empty_like(hidden), torch.empty_like(hidden)
        size = _CpuGelu.BLOCK_ELEMENTS
        buffers = torch.empty(3, min(size, hidden.numel()))
        for source, result_part, derivative_part in zip(
            hidden.view(-1).split(size), result.view(-1).split(size), derivative.view(-1).split(size), strict=True
        ):
            x, square, s = buffers[:, : len(source)]
            x.copy_(source)
            torch.mul(x, x, out=square)
            torch.add(linear, square, alpha=cubic, out=s)
            s.mul_(x).sigmoid_()
            result_part.copy_(x.mul_(s))
            slope = torch.add(linear, square, alpha=3 * cubic, out=square).mul_(x)  # x s u'
            derivative_part.copy_(slope.lerp_(one, s))
        ctx.save_for_backward(derivative)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (derivative,) = ctx.saved_tensors
        return grad_output * derivative
