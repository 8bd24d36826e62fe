"""What `model.initialize_from` names: a run or checkpoint of an encoder, or a Hugging Face folder.

Three kinds: a checkpoint of this project, or a folder of its own, whose model has an `Encoder`; a folder of BERT's
family, read natively; any other folder with a config.json. And how a model that starts from one is tuned: layers drawn
anew, frozen, or slower.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bigbatch.recipes.core.checkpoint import MANIFEST, Reader, open_checkpoint
from bigbatch.recipes.core.data.tokenizing import load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Block, Encoder, Pooler, load_encoder, section_from_hugging_face
from bigbatch.recipes.core.models.hugging_face import OwnFolder, WeightFolder, read_json
from bigbatch.recipes.core.recipe import own_recipe
from bigbatch.recipes.core.run_home import recorded_path

WHERE = "model.initialize_from"
CONFIG_FILE = "config.json"
PREFIXES = ("encoder.", "backbone.encoder.")  # what an encoder's parameters are called in the models that have one


class Start(NamedTuple):
    """Where the first weights come from, and what is known of them without reading them."""

    path: Path
    tokenizer: Path
    """Folder of the tokenizer that belongs to them."""
    vocabulary_size: int
    encoder: dict[str, Any] | None
    """The shape of a native encoder (an EncoderSection as JSON)."""
    hugging_face: dict[str, Any] | None
    """config.json of a model of another family."""


def find_start(name: str) -> Start:
    """Look at a folder to start from; raise UserError for one that holds no encoder."""
    path = Path(name).expanduser()
    if is_ours(path):
        reader = open_ours(path)
        section = reader.manifest["facts"].get("encoder") or reader.manifest["run"].get("model", {})
        if _prefix(reader) is None:
            recipe = reader.manifest["run"].get("recipe")
            raise UserError(WHERE, f"{path} is a model of the recipe {recipe!r}, which has no encoder")
        return Start(path, tokenizer_of(reader), reader.manifest["facts"]["vocabulary_size"], _plain(section), None)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(WHERE, f"{path} has neither checkpoints nor a {CONFIG_FILE}: no model to start from")
    config = read_json(path / CONFIG_FILE)
    size = config.get("vocab_size")
    if not isinstance(size, int):
        raise UserError(WHERE, f"{path / CONFIG_FILE} says no vocab_size: it is of no model of text")
    if config.get("model_type") == "bert":
        return Start(path, path, size, _plain(section_from_hugging_face(config).model_dump(mode="json")), None)
    return Start(path, path, size, None, config)


def is_ours(path: Path) -> bool:
    """Tell whether a folder's tensors have our names: a run, a checkpoint, or what transformers has no class for."""
    return (path / MANIFEST).exists() or (path / "checkpoints").is_dir() or own_recipe(path) is not None


def open_ours(path: Path) -> Reader | OwnFolder:
    """Open a folder whose tensors have our names."""
    return OwnFolder(path) if own_recipe(path) else open_checkpoint(path)


def tokenizer_of(reader: Reader | OwnFolder) -> Path:
    """Return the folder of the tokenizer that belongs to a model of ours."""
    path = reader.manifest["facts"]["tokenizer"]
    return recorded_path(reader.folder, path) if isinstance(reader, Reader) else Path(path)


def find_native_start(section: Any) -> Start | None:
    """Look at the native encoder that a model's section is `initialize_from`; None for first weights."""
    name = getattr(section, "initialize_from", None)
    return native_start(find_start(name)) if name else None


def native_start(start: Start) -> Start:
    """Return it again; raise UserError for a model that transformers alone can build."""
    if start.hugging_face:
        raise UserError(WHERE, f"{start.path} is a {start.hugging_face.get('model_type')}; right is a BERT")
    return start


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    """Return a shape without where its own weights came from."""
    return EncoderSection.model_validate_json(json.dumps({**section, "initialize_from": None})).model_dump(mode="json")


def _prefix(reader: Reader | OwnFolder) -> str | None:
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in reader.tensors)), None)


def starting_vocabulary(folder: Path, start: Start | None) -> int:
    """Return how many tokens the model knows, by the tokenizer in `folder`; raise UserError if that has more."""
    size = load_tokenizer(folder).vocabulary_size
    if start and size > start.vocabulary_size:
        found = f"the tokenizer in {start.tokenizer} has {size} tokens, the model {start.vocabulary_size}"
        raise UserError(WHERE, found)
    return start.vocabulary_size if start else size


def starting_shape(section: Any, start: Start | None) -> dict[str, Any] | None:
    """Return the shape of the encoder of a model's section (`encoder`, `dropout`) with the document's dropout."""
    shape = start.encoder if start else section.encoder and section.encoder.model_dump(mode="json")
    return {**shape, "dropout": section.dropout} if shape and section.dropout is not None else shape


def load_start(path: Path, encoder: Encoder, pooler: Pooler | None, vocabulary_size: int) -> None:
    """Fill an encoder, and a pooler where there is one to read, with the weights of a checkpoint or a BERT folder."""
    if not is_ours(path):
        load_encoder(encoder, path, vocabulary_size, pooler)
        return
    reader = open_ours(path)
    prefix = _prefix(reader) or ""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(read_tensor(reader, prefix + name, parameter.shape))
        theirs = prefix.removesuffix("encoder.") + "pooler."
        if pooler and any(tensor.startswith(theirs) for tensor in reader.tensors):
            for name, parameter in pooler.named_parameters():
                parameter.copy_(read_tensor(reader, theirs + name, parameter.shape))


def start_encoder(
    encoder: Encoder, pooler: Pooler | None, section: Any, vocabulary_size: int, initialize: bool
) -> None:
    """Fill an encoder as a model's section says: `initialize_from`, `redraw_layers` and what is to be frozen.

    Where layers are drawn anew, the pooler is too. Without `initialize` no file is read.
    """
    if section.initialize_from and initialize:
        fresh = [Block(encoder.section) for _ in range(section.redraw_layers)]
        path = Path(section.initialize_from).expanduser()
        load_start(path, encoder, None if section.redraw_layers else pooler, vocabulary_size)
        for index, block in enumerate(reversed(fresh), 1):
            encoder.blocks[-index] = block
    frozen = [encoder.embed] if section.freeze_embeddings or section.freeze_layers else []
    for module in [*frozen, *list(encoder.blocks)[: section.freeze_layers]]:
        module.requires_grad_(False)


def start_head(
    head: nn.Linear, section: Any, theirs: str, initialize: bool, labels: list[str] | None = None, lack: str = ""
) -> None:
    """Fill a head with that of what a model starts from, where its section says `keep_head`.

    `theirs` is its name in a Hugging Face folder. Raises UserError unless it is for the same labels, or without any has
    the same size: `lack` tells what the model cannot do.
    """
    if not (section.keep_head and section.initialize_from and initialize):
        return
    path = Path(section.initialize_from).expanduser()
    tensors = _read_head(path, theirs)
    if labels is not None:
        check_labels(read_labels(path) if len(tensors) == 2 else [], labels, path)
    elif tensors.keys() != {"weight", "bias"} or tensors["bias"].shape != head.bias.shape:
        raise UserError("model.keep_head", f"{section.initialize_from} {lack}; right is false")
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(tensors[name])


def learning_rate_scales(config: Any, model: nn.Module) -> dict[str, float]:
    """Let lower layers of an encoder learn more slowly: `model.layer_decay` times the rate of the layer above."""
    layer_decay, names = getattr(config.model, "layer_decay", 1.0), [name for name, _ in model.named_parameters()]
    if layer_decay == 1:
        return {}
    prefix = next(prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names))
    place = prefix.count(".") + 1
    blocks = {name: int(name.split(".")[place]) for name in names if name.startswith(f"{prefix}blocks.")}
    num_layers = 1 + max(blocks.values())
    scales = {name: layer_decay ** (num_layers + 1) for name in names if name.startswith(f"{prefix}embed.")}
    return scales | {name: layer_decay ** (num_layers - number) for name, number in blocks.items()}


def _read_head(path: Path, theirs: str) -> dict[str, torch.Tensor]:
    """Return weight and bias of the head in a folder, where it is called `theirs`, or in a checkpoint; {} for none."""
    if not is_ours(path):
        weights, prefix = WeightFolder(path), theirs
        there, read = weights.files, weights.read
    else:
        reader, prefix = open_ours(path), "head"
        there, read = reader.tensors, reader.read
    return {name: read(f"{prefix}.{name}") for name in ("weight", "bias") if f"{prefix}.{name}" in there}


def read_labels(path: Path) -> list[str]:
    """Return the labels of the head in a folder or checkpoint; none where it has no head."""
    if not is_ours(path):
        table = read_json(path / CONFIG_FILE).get("id2label") or {}
        return [table[key] for key in sorted(table, key=int)]
    return open_ours(path).manifest["facts"].get("labels", [])


def check_labels(theirs: list[str], labels: list[str], folder: Path) -> None:
    """Raise UserError unless a head that is to be kept is for the labels at hand."""
    if theirs != labels:
        shown = ", ".join(theirs[:5]) or "none"
        raise UserError("model.keep_head", f"the head in {folder} is for other labels ({shown}, ...); right is false")


def read_tensor(reader: Reader | OwnFolder, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read a tensor of a checkpoint; raise UserError where it is missing or has another shape."""
    if name not in reader.tensors:
        raise UserError(WHERE, f"{reader.folder} has no tensor {name!r} that the model needs")
    tensor = reader.read(name)
    if tensor.shape != shape:
        found = f"tensor {name!r} of {reader.folder} is {tuple(tensor.shape)}"
        raise UserError(WHERE, f"{found}, the model's is {tuple(shape)}: another tokenizer or shape")
    return tensor
