"""Which share of a logical tensor a rank holds, and how a range of one share is filled from ranges of others.

A logical tensor is seen as a matrix [R, C]: its first dim, and all the others together (a vector is [R, 1]). A share
is some ranges of its rows or of its columns, one behind the other in a local tensor. What a file or a rank holds is a
flat range of a local tensor: at most three bands of its rows, and each of them is a few rectangles of the matrix.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

BLOCK_ELEMENTS = 2**24
"""What is copied at once: 64 MiB of float32."""


class Share(NamedTuple):
    """Some ranges of the rows (dim 0) or columns (dim 1) of a logical tensor."""

    shape: tuple[int, ...]
    """Of the whole logical tensor."""
    dim: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], entry: list[Any] | None) -> "Share | None":
        """Read an entry [dim, ranges] of a manifest; None is the whole tensor."""
        return cls(shape, entry[0], tuple((begin, end) for begin, end in entry[1])) if entry else None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        size = sum(end - begin for begin, end in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the share of the whole tensor."""
        return torch.cat([whole.narrow(self.dim, begin, end - begin) for begin, end in self.ranges], self.dim)


def split(shape: tuple[int, ...], dim: int, blocks: tuple[int, ...], index: int, count: int) -> Share:
    """Return the `index`-th of `count` equal shares of each block; the blocks lie one behind the other along `dim`."""
    ranges, begin = [], 0
    for size in blocks:
        ranges.append((begin + size * index // count, begin + size * (index + 1) // count))
        begin += size
    return Share(shape, dim, tuple(ranges))


def mark(parameter: torch.Tensor, share: Share) -> None:
    """Say of a parameter that it is a share of a logical one; DeepSpeed's norms ask for the second attribute."""
    parameter.share = share  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def share_of(parameter: torch.Tensor) -> Share | None:
    """Return the share that a parameter is, None where it is the whole logical tensor."""
    return getattr(parameter, "share", None)


def logical_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole logical tensor, whatever tensor ranks and ZeRO-3 have left of it here."""
    share = share_of(parameter)
    return share.shape if share else tuple(getattr(parameter, "ds_shape", parameter.shape))


def name_logically(model: nn.Module) -> None:
    """Have the parameters keep their names and the model all shapes when layers are taken from it."""
    model.shapes_of_all = logical_shapes(model)  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        parameter.logical_name = name  # type: ignore[attr-defined]


def logical_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the parameters that are here under the names that they have in the whole model."""
    return {getattr(parameter, "logical_name", name): parameter for name, parameter in module.named_parameters()}


def logical_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all logical tensors of the model, of which a stage of a pipeline has a part."""
    if hasattr(module, "shapes_of_all"):
        return dict(module.shapes_of_all)  # type: ignore[arg-type]
    shapes = {name: logical_shape(parameter) for name, parameter in logical_parameters(module).items()}
    for path, part in module.named_modules():
        shapes |= {f"{path}.{name}": shape for name, shape in getattr(part, "shapes_of_all", {}).items()}
    return shapes


class Rectangle(NamedTuple):
    """Rows and columns of a logical matrix that lie evenly in a flat tensor."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int
    """Where the first of its elements lies in the flat tensor."""
    width: int
    """From one row to the next in the flat tensor."""

    def at(self, row: int, column: int) -> int:
        """Return where an element of the logical matrix lies in the flat tensor."""
        return self.offset + (row - self.top) * self.width + column - self.left


def rectangles(shape: tuple[int, ...], share: Share | None, start: int, stop: int) -> list[Rectangle]:
    """Return what elements start..stop of a flattened local tensor are of a logical one of this shape."""
    whole_rows, whole_columns = (shape or (1,))[0], math.prod(shape[1:])
    rows = _places(share.ranges if share and share.dim == 0 else ((0, whole_rows),))
    columns = _places(share.ranges if share and share.dim == 1 else ((0, whole_columns),))
    width = sum(end - begin for _, begin, end in columns)
    found: list[Rectangle] = []
    if start == stop:
        return found
    for band, row_place, column_place in product(_bands(start, stop, width), rows, columns):
        (low, high, left, right), (row, begin_row, end_row), (column, begin, end) = band, row_place, column_place
        low, high = max(low, row), min(high, row + end_row - begin_row)
        left, right = max(left, column), min(right, column + end - begin)
        if low < high and left < right:
            down, aside = begin_row - row, begin - column
            offset = low * width + left - start
            found.append(Rectangle(low + down, high + down, left + aside, right + aside, offset, width))
    return found


def copy_overlap(
    target: torch.Tensor,
    ours: list[Rectangle],
    read: Callable[[int, int], torch.Tensor],
    theirs: list[Rectangle],
) -> int:
    """Copy into `target` [n] what it shares with a source, a block at a time; return how many elements that were.

    `read(start, stop)` returns a range of the source's flat tensor.
    """
    copied = 0
    for mine, other in product(ours, theirs):
        top, bottom = max(mine.top, other.top), min(mine.bottom, other.bottom)
        left, right = max(mine.left, other.left), min(mine.right, other.right)
        if top >= bottom or left >= right:
            continue
        step = max(1, BLOCK_ELEMENTS // other.width)
        for row in range(top, bottom, step):
            size = (min(step, bottom - row), right - left)
            begin = other.at(row, left)
            source = read(begin, begin + (size[0] - 1) * other.width + size[1])
            view = target[mine.at(row, left) :].as_strided(size, (mine.width, 1))
            view.copy_(source.as_strided(size, (other.width, 1)))
        copied += (bottom - top) * (right - left)
    return copied


def _places(ranges: tuple[tuple[int, int], ...]) -> list[tuple[int, int, int]]:
    """Return (where it begins in the local tensor, begin, end) of each range."""
    places, local = [], 0
    for begin, end in ranges:
        places.append((local, begin, end))
        local += end - begin
    return places


def _bands(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, end row, first column, end column) of a flat range of a matrix: whole rows in one band."""
    first, last = start // width, (stop - 1) // width
    if first == last:
        yield first, first + 1, start - first * width, stop - first * width
        return
    whole, end = -(-start // width), stop // width
    if first < whole:
        yield first, whole, start - first * width, width
    if whole < end:
        yield whole, end, 0, width
    if end <= last:
        yield last, last + 1, 0, stop - last * width
