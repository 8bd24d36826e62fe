"""Cross-entropy over a large vocabulary: the logits exist a chunk of rows at a time, loss and gradients in one go.

Shapes: N rows (tokens), D hidden size, V vocabulary, C rows of a chunk, R rows of a block.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from bigbatch.recipes.core.parallel import ALONE, Axis

CHUNK_BYTES = 2**28
"""A chunk's logits take at most this much: fewer chunks mean less adding up of weight gradients."""
CPU_CHUNK_ROWS = 1024
"""On a CPU a chunk has at most this many rows: the weight gradient's product is slower over more."""
BLOCK_ELEMENTS = 2**18
"""On a CPU the softmax walks over a chunk in blocks of this many float32 numbers, which stay in a core's cache."""


def chunked_cross_entropy(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    labels: torch.Tensor,  # [N]
    ignore: int = -100,
    chunk_rows: int | None = None,
    num_classes: int | None = None,
    bias: torch.Tensor | None = None,  # [V]
    tensor: Axis = ALONE,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum the cross-entropy of `hidden @ weight.T + bias` against `labels` over the rows whose label is not `ignore`.

    Rows of `weight` from `num_classes` on are padding: they have no probability and get no gradient. With
    `label_smoothing` that share of the target is spread over all classes; not over tensor ranks.
    The result is a float32 scalar (float64 for float64 input), and so are the statistics of the softmax. The gradients
    are made in the forward pass, those of the plain sum, and multiplied by the incoming one in the backward pass: they
    are of the order of 1 when they are first rounded, whatever the loss scale and the number of targets, so that
    float16 does not underflow; the weight's are added up in float32.

    Over tensor ranks V is divided: `weight` and `bias` are a rank's rows, `labels` and `num_classes` count all of them,
    and the result is replicated. The gradient of `hidden` is what this rank's rows of the weight make of it: that of
    copy_in's or gather_in's result. Collective: every tensor rank must call it with the same rows.
    """
    if chunk_rows is None:
        chunk_rows = _default_chunk_rows(len(hidden), weight)
    if num_classes is not None:
        num_classes = max(0, num_classes - tensor.rank * len(weight))  # of this rank's rows
    return _ChunkedCrossEntropy.apply(
        hidden, weight, bias, labels, ignore, chunk_rows, num_classes, tensor, label_smoothing
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore, chunk_rows, num_classes, tensor, label_smoothing):
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        loss = hidden.new_zeros((), dtype=_statistics_dtype(hidden))
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        grad_bias = torch.zeros_like(bias, dtype=loss.dtype) if wants_bias else None
        buffer = hidden.new_empty(min(chunk_rows, len(hidden)), weight.shape[0])
        for start in range(0, len(hidden), chunk_rows):
            chunk = hidden[start : start + chunk_rows]  # [C, D]
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])  # [C, V]
            if bias is not None:
                logits += bias
            if num_classes is not None:
                logits[:, num_classes:] = -math.inf
            chunk_labels = labels[start : start + chunk_rows]
            if tensor.size == 1:
                loss += _loss_and_gradient(logits, chunk_labels, ignore, label_smoothing, num_classes)
            else:
                loss += _divided_loss_and_gradient(logits, chunk_labels, ignore, tensor)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + chunk_rows])
            if wants_weight:
                product = _weight_gradient(logits, chunk)
                grad_weight = product.to(loss.dtype) if grad_weight is None else grad_weight.add_(product)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=loss.dtype)
        if wants_weight and grad_weight is None:  # a sequence rank may have no target; ZeRO waits for every gradient
            grad_weight = torch.zeros_like(weight, dtype=loss.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        scaled = (
            # In float32, then rounded once: as a bfloat16 or float16 number grad_output would lose digits or overflow.
            kept
            if kept is None
            else torch.mul(kept.to(grad_output.dtype), grad_output, out=kept.new_empty(kept.shape, dtype=ctx.dtype))
            for kept in ctx.saved_tensors
        )
        return (*scaled, None, None, None, None, None, None)


def _default_chunk_rows(num_rows: int, weight: torch.Tensor) -> int:
    """Return the rows of a chunk, all chunks about equally large."""
    most = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    if not weight.is_cuda:
        most = min(most, CPU_CHUNK_ROWS)
    num_chunks = max(1, math.ceil(num_rows / most))
    return max(1, math.ceil(num_rows / num_chunks))


def _loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, ignore: int, smoothing: float, num_classes: int | None
) -> torch.Tensor:
    """Return the summed loss of a chunk, and overwrite its logits [C, V] with their gradient."""
    block_rows = len(logits) if logits.is_cuda else max(1, BLOCK_ELEMENTS // logits.shape[1])
    buffer = logits.new_empty(min(block_rows, len(logits)), logits.shape[1], dtype=_statistics_dtype(logits))
    loss = buffer.new_zeros(())
    for block, block_labels in zip(logits.split(block_rows), labels.split(block_rows), strict=True):
        counted = (block_labels != ignore).unsqueeze(1)  # [R, 1]
        targets = block_labels.unsqueeze(1).masked_fill(~counted, 0)  # [R, 1]
        values = buffer[: len(block)].copy_(block)  # [R, V]
        values -= values.amax(1, keepdim=True)
        target_values = values.gather(1, targets)
        if smoothing:
            classes = values[:, :num_classes]
            target_values = (1 - smoothing) * target_values + smoothing * classes.mean(1, keepdim=True)
        total = values.exp_().sum(1, keepdim=True)
        loss += ((total.log() - target_values) * counted).sum()
        values *= counted / total
        values.scatter_add_(1, targets, (smoothing - 1) * counted.to(values.dtype))
        if smoothing:
            classes -= smoothing / classes.shape[1] * counted
        block.copy_(values)
    return loss


def _divided_loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, ignore: int, tensor: Axis) -> torch.Tensor:
    """Do the same with this rank's columns of a chunk's logits; the statistics of a row are those of all columns."""
    num_rows, num_columns = logits.shape
    counted, own = labels != ignore, labels - tensor.rank * num_columns
    is_own = counted & (own >= 0) & (own < num_columns)
    targets = own.masked_fill(~is_own, 0).unsqueeze(1)  # [C, 1]
    largest = logits.amax(1, keepdim=True).to(_statistics_dtype(logits))
    tensor.max_in_place(largest)
    block_rows = num_rows if logits.is_cuda else max(1, BLOCK_ELEMENTS // num_columns)
    blocks = [slice(begin, min(begin + block_rows, num_rows)) for begin in range(0, num_rows, block_rows)]
    buffer = largest.new_empty(min(block_rows, num_rows), num_columns)
    statistics = largest.new_empty(2, num_rows)  # of each row: the sum of exponentials, the target's value
    for block in blocks:
        values = torch.sub(logits[block], largest[block], out=buffer[: block.stop - block.start])  # [R, V]
        statistics[1, block] = values.gather(1, targets[block]).squeeze(1).masked_fill_(~is_own[block], 0)
        statistics[0, block] = values.exp_().sum(1)
    tensor.sum_in_place(statistics)
    total, target_values = statistics
    for block in blocks:
        values = torch.sub(logits[block], largest[block], out=buffer[: block.stop - block.start]).exp_()
        values *= (counted[block] / total[block]).unsqueeze(1)
        values.scatter_add_(1, targets[block], -is_own[block].unsqueeze(1).to(values.dtype))
        logits[block] = values
    return ((total.log() - target_values) * counted).sum()


def _weight_gradient(grad_logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return grad_logits.T @ hidden [V, D]; float16 cannot hold the sum over many rows."""
    if hidden.dtype == torch.float16:
        return grad_logits.T.float() @ hidden.float()
    return grad_logits.T @ hidden


def _statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
