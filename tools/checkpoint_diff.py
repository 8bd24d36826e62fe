"""`bigbatch checkpoint diff A B`: which tensors of two checkpoints differ, and by how much.

Both are read a window at a time, so memory does not grow with the model. Plans may differ: tensors are logical ones.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core.checkpoint import Reader, open_checkpoint
from bigbatch.recipes.core.errors import EXIT_DONE

EXIT_DIFFERS = 1
WINDOW_ELEMENTS = 2**22
MOST_ROWS = 20


class Difference(NamedTuple):
    """How far two tensors, or all those of a kind, lie apart."""

    kind: str
    name: str
    elements: int
    differing: int
    """Elements that are not equal; a NaN on both sides is."""
    max_abs: float
    relative_norm: float
    """|A - B| / |A|, 2-norms in float64."""


def diff(path_a: Path, path_b: Path, as_json: bool) -> int:
    """Compare two checkpoints, or those that two runs would be evaluated by; return 1 if any tensor differs."""
    readers = open_checkpoint(path_a), open_checkpoint(path_b)
    found = compare(*readers)
    print(json.dumps(_strict(found), indent=2)) if as_json else _print_tables(found)
    return EXIT_DONE if found["equal"] else EXIT_DIFFERS


def compare(a: Reader, b: Reader) -> dict[str, Any]:
    """Compare all tensors of two verified checkpoints."""
    listed = [{(kind, name): reader.tensors[name]["shape"] for kind, name in _tensors(reader)} for reader in (a, b)]
    both = [key for key in listed[0] if key in listed[1]]
    other_shapes = [key for key in both if listed[0][key] != listed[1][key]]
    sums = [_Sums(kind, name).add_tensors(a, b) for kind, name in both if (kind, name) not in other_shapes]
    kinds: dict[str, _Sums] = {}
    for one in sums:
        kinds.setdefault(one.kind, _Sums(one.kind, "")).add(one)
    differing = sorted((s.result() for s in sums if s.differing), key=lambda row: -row.relative_norm)
    only = [
        [f"{kind}/{name}" for kind, name in mine if (kind, name) not in other] for mine, other in (listed, listed[::-1])
    ]
    return {
        "a": {"checkpoint": str(a.folder), "step": a.manifest["step"]},
        "b": {"checkpoint": str(b.folder), "step": b.manifest["step"]},
        "equal": not (differing or other_shapes or any(only)),
        "kinds": [total.result()._asdict() for total in kinds.values()],
        "tensors": [row._asdict() for row in differing],
        "shapes": [{"name": f"{k}/{n}", "a": listed[0][k, n], "b": listed[1][k, n]} for k, n in other_shapes],
        "only_in_a": only[0],
        "only_in_b": only[1],
    }


def _tensors(reader: Reader) -> list[tuple[str, str]]:
    """List (kind, name), each once, in the order of the manifest."""
    pairs = [(piece[1], name) for name, tensor in reader.tensors.items() for piece in tensor["pieces"]]
    return list(dict.fromkeys(pairs))


class _Sums:
    """Running sums over one tensor, or over all of a kind."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        self.elements, self.differing = 0, 0
        self.max_abs, self.squares, self.squares_of_a = 0.0, 0.0, 0.0

    def add_tensors(self, a: Reader, b: Reader) -> "_Sums":
        """Take in this tensor of both, a window at a time."""
        numel = math.prod(a.tensors[self.name]["shape"])
        windows = torch.empty(2, min(numel, WINDOW_ELEMENTS))
        for start in range(0, numel, WINDOW_ELEMENTS):
            length = min(WINDOW_ELEMENTS, numel - start)
            for reader, window in zip((a, b), windows, strict=True):
                reader.read_into(self.name, self.kind, start, window[:length])
            self._add_window(*windows[:, :length])
        return self

    def _add_window(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.elements += a.numel()
        differs = (a != b) & ~(a.isnan() & b.isnan())
        self.squares_of_a += float(a.square().sum(dtype=torch.float64))
        if count := int(differs.sum()):
            apart = (a[differs].double() - b[differs].double()).abs()
            self.differing += count
            self.max_abs = float(torch.stack((apart.max(), apart.new_tensor(self.max_abs))).max())  # keeps a NaN
            self.squares += float(apart.square().sum())

    def add(self, other: "_Sums") -> None:
        """Take in the sums of another tensor."""
        self.elements += other.elements
        self.differing += other.differing
        self.max_abs = math.nan if math.isnan(other.max_abs + self.max_abs) else max(self.max_abs, other.max_abs)
        self.squares += other.squares
        self.squares_of_a += other.squares_of_a

    def result(self) -> Difference:
        """Return the figures."""
        norm_of_a = math.sqrt(self.squares_of_a)
        apart = math.sqrt(self.squares)
        relative = apart / norm_of_a if norm_of_a else (math.inf if apart else 0.0)
        return Difference(self.kind, self.name, self.elements, self.differing, self.max_abs, relative)


def _strict(value: Any) -> Any:
    """Make numbers that are not finite text, which JSON has no other way to tell."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print_tables(found: dict[str, Any]) -> None:
    for side in ("a", "b"):
        print(f"{side.upper()}: {found[side]['checkpoint']}, step {found[side]['step']:,}")
    console = Console()
    console.print(_table("kind", found["kinds"]))
    if found["tensors"]:
        console.print("", _table("tensor", found["tensors"][:MOST_ROWS]), sep="\n")
    if (more := len(found["tensors"]) - MOST_ROWS) > 0:
        print(f"and {more} more (--json lists all)")
    for row in found["shapes"]:
        print(f"{row['name']}: A has {row['a']}, B has {row['b']}")
    for side in ("a", "b"):
        for name in found[f"only_in_{side}"]:
            print(f"{name}: only in {side.upper()}")
    if found["equal"]:
        print("all tensors are equal")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in (title, "elements", "differ", "largest |A - B|", "|A - B| / |A|"):
        table.add_column(column, justify="left" if column == title else "right", overflow="fold")
    for row in rows:
        name = f"{row['kind']}/{row['name']}" if row["name"] else row["kind"]
        share = row["differing"] / max(row["elements"], 1)
        figures = (f"{row['elements']:,}", f"{share:.2%}", f"{row['max_abs']:.3g}", f"{row['relative_norm']:.3g}")
        table.add_row(name, *figures)
    return table
