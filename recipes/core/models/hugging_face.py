"""Names and layouts of weights in Hugging Face folders: a table of pieces, and both directions a tensor at a time."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layout import logical_shape, share_of
from bigbatch.recipes.core.recipe import OWN_TYPE, RECORD_FILE, HuggingFaceExport


class Piece(NamedTuple):
    """The Hugging Face tensor that rows start..stop of one of our tensors are, transposed or not.

    A vector transposed is a matrix of one row.
    """

    name: str
    start: int
    stop: int
    transpose: bool = False


def to_hugging_face(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Cut a piece out of our tensor, as it lies in a Hugging Face folder."""
    part = tensor[piece.start : piece.stop]
    return (part.reshape(len(part), -1).T if piece.transpose else part).contiguous()


def piece_shape(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a piece of our tensor of a shape has in a Hugging Face folder."""
    shape = (piece.stop - piece.start, *shape[1:])
    return (*shape, 1)[1::-1] if piece.transpose else shape


def from_hugging_face(
    pieces: Iterable[Piece], read: Callable[[str], torch.Tensor], shape: tuple[int, ...], where: str = ""
) -> torch.Tensor:
    """Put our tensor together from its pieces; rows that none of them has (a padded vocabulary) are zero."""
    tensor = None
    for piece in pieces:
        part = read(piece.name)
        expected = piece_shape(piece, shape)
        if tuple(part.shape) != expected:
            raise UserError(where, f"tensor {piece.name!r} is {tuple(part.shape)}, the model needs {expected}")
        if tensor is None:
            tensor = part.new_zeros(shape)
        rows = tensor[piece.start : piece.stop]
        rows.copy_(part.T.reshape(rows.shape) if piece.transpose else part)
    assert tensor is not None
    return tensor


class WeightFolder:
    """The safetensors of a Hugging Face folder, one file or many, opened for reading by name."""

    def __init__(self, folder: Path) -> None:
        """Find where each tensor lies; raise UserError if the folder has no readable safetensors."""
        self.folder = folder
        self.prefix = ""  # left out of the names in the files
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.exists():
            self.files: dict[str, Path] = {
                name: folder / file for name, file in read_json(index).get("weight_map", {}).items()
            }
        elif single.exists():
            self.files = dict.fromkeys(self._names(single), single)
        else:
            raise UserError(str(folder), "has no model.safetensors; weights in other formats are not read")

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        stored = name.removeprefix(self.prefix)
        path = self.files[stored]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise UserError(str(path), f"cannot be read ({error})") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return one tensor's shape without reading it."""
        stored = name.removeprefix(self.prefix)
        with safe_open(self.files[stored], framework="pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def _names(self, path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(str(path), f"is not a safetensors file ({error})") from None


def load_pieces(
    model: nn.Module, table: dict[str, list[Piece]], weights: WeightFolder, derived: tuple[str, ...] = ()
) -> None:
    """Fill a model's parameters, one at a time, those of a tensor rank with their shares.

    Stored tensors whose names end with one of `derived` follow from others and are not read. Raises UserError at a
    name that is missing or left over, and at a shape that differs.
    """
    where = str(weights.folder)
    needed = {piece.name.removeprefix(weights.prefix) for pieces in table.values() for piece in pieces}
    if missing := sorted(needed - weights.files.keys()):
        raise UserError(where, f"lacks {missing[0]!r}, one of {len(missing)} tensors that the model needs")
    extra = sorted(name for name in weights.files.keys() - needed if not f".{name}".endswith(derived))
    if extra:
        raise UserError(where, f"holds {extra[0]!r}, one of {len(extra)} tensors that the model does not have")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            share = share_of(parameter)
            whole = from_hugging_face(table[name], weights.read, logical_shape(parameter), where)
            check_finite(where, table[name][0].name, whole)
            parameter.copy_(share.cut(whole) if share else whole)


def check_finite(where: str, name: str, tensor: torch.Tensor) -> None:
    """Raise UserError for a tensor of weights that are no numbers, or none that were trained."""
    if not tensor.is_floating_point():
        raise UserError(where, f"tensor {name!r} is {tensor.dtype}; right are floating-point numbers")
    if not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise UserError(where, f"tensor {name!r} holds {count:,} values that are infinite or no number")


def own_export(recipe: str, build: Callable[[], nn.Module], **further: Any) -> HuggingFaceExport:
    """Describe a model that transformers has no class for: its tensors have our names, and `load_own` reads them.

    `build` builds it without weights. All facts of the run go with it, so that `describe_folder` needs no other.
    """
    with torch.device("meta"):
        model = build()
    config = {"model_type": f"{OWN_TYPE}{recipe}", "architectures": [type(model).__name__]}
    return HuggingFaceExport(config, _own_table(model), auto_class="", **further)


def load_own(model: nn.Module, folder: Path) -> None:
    """Fill a model with the weights of a folder that `own_export` describes."""
    load_pieces(model, _own_table(model), WeightFolder(folder))


def _own_table(model: nn.Module) -> dict[str, list[Piece]]:
    return {name: [Piece(name, 0, len(parameter))] for name, parameter in model.named_parameters()}


class OwnFolder:
    """A folder that `own_export` describes, to be read as a checkpoint is: by the model's names, in float32."""

    def __init__(self, folder: Path) -> None:
        """Find where each tensor lies; raise UserError if the folder has no readable weights."""
        record = conversion_record(folder)
        self.folder, self._weights = folder, WeightFolder(folder)
        self.tensors = self._weights.files
        facts = {**record.get("facts", {}), "tokenizer": str(folder.absolute())}
        self.manifest: dict[str, Any] = {"run": record["run"], "facts": facts}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, float32."""
        return self._weights.read(name).float()


def label_tables(labels: list[str]) -> tuple[dict[int, str], dict[str, int]]:
    """Return id2label and label2id as config.json has them."""
    return dict(enumerate(labels)), {label: index for index, label in enumerate(labels)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a Hugging Face folder."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(path), f"cannot be read as JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(str(path), f"holds a {type(document).__name__}, not an object")
    return document


def conversion_record(folder: Path) -> dict[str, Any]:
    """Return what `bigbatch convert` has written beside the weights; its `run` is empty where it was not there."""
    path = folder / RECORD_FILE
    record = {"run": {}, **(read_json(path) if path.exists() else {})}
    if not isinstance(record["run"], dict):
        raise UserError(str(path), f"run is a {type(record['run']).__name__}, not an object")
    return record


def untrained_document(**sections: Any) -> dict[str, Any]:
    """Return a run document for a model that is opened and not trained: with the least of what every one must say."""
    least = {"batch": {"global_size": 1}, "optimizer": {"learning_rate": 1.0}, "schedule": {"total_steps": 1}}
    return {"version": 1, **least, **sections}
