"""What `model.initialize_from` names: a run or checkpoint of an encoder, or a Hugging Face folder.

Three kinds: a checkpoint of this project whose model has an `Encoder`; a folder of BERT's family, read natively; any
other folder that transformers' AutoModelForSequenceClassification opens.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from bigbatch.recipes.core.checkpoint import MANIFEST, Reader, open_checkpoint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Encoder, Pooler, load_encoder, section_from_hugging_face
from bigbatch.recipes.core.models.hugging_face import WeightFolder, read_json
from bigbatch.recipes.core.run_home import recorded_path

WHERE = "model.initialize_from"
CONFIG_FILE = "config.json"


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
    if (path / MANIFEST).exists() or (path / "checkpoints").is_dir():
        reader = open_checkpoint(path)
        section = reader.manifest["facts"].get("encoder") or reader.manifest["run"].get("model", {})
        if not any(tensor.startswith(_prefix(reader)) for tensor in reader.tensors):
            recipe = reader.manifest["run"].get("recipe")
            raise UserError(WHERE, f"{path} is a model of the recipe {recipe!r}, which has no encoder")
        tokenizer = recorded_path(reader.folder, reader.manifest["facts"]["tokenizer"])
        return Start(path, tokenizer, reader.manifest["facts"]["vocabulary_size"], _plain(section), None)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(WHERE, f"{path} has neither checkpoints nor a {CONFIG_FILE}: no model to start from")
    config = read_json(path / CONFIG_FILE)
    size = config.get("vocab_size")
    if not isinstance(size, int):
        raise UserError(WHERE, f"{path / CONFIG_FILE} says no vocab_size: it is of no model of text")
    if config.get("model_type") == "bert":
        return Start(path, path, size, _plain(section_from_hugging_face(config).model_dump(mode="json")), None)
    return Start(path, path, size, None, config)


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    """Return a shape without where its own weights came from."""
    return EncoderSection.model_validate_json(json.dumps({**section, "initialize_from": None})).model_dump(mode="json")


def _prefix(reader: Reader) -> str:
    return "backbone.encoder." if reader.manifest["run"].get("recipe") == "classify" else "encoder."


def load_start(path: Path, encoder: Encoder, pooler: Pooler | None, vocabulary_size: int) -> None:
    """Fill an encoder, and a pooler where there is one to read, with the weights of a checkpoint or a BERT folder."""
    if (path / CONFIG_FILE).is_file():
        load_encoder(encoder, path, vocabulary_size, pooler)
        return
    reader = open_checkpoint(path)
    prefix = _prefix(reader)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(_read(reader, prefix + name, parameter.shape))
        theirs = prefix.removesuffix("encoder.") + "pooler."
        if pooler and any(tensor.startswith(theirs) for tensor in reader.tensors):
            for name, parameter in pooler.named_parameters():
                parameter.copy_(_read(reader, theirs + name, parameter.shape))


def _read(reader: Reader, name: str, shape: torch.Size) -> torch.Tensor:
    if name not in reader.tensors:
        raise UserError(WHERE, f"{reader.folder} has no tensor {name!r} that the model needs")
    tensor = reader.read(name)
    if tensor.shape != shape:
        found = f"tensor {name!r} of {reader.folder} is {tuple(tensor.shape)}"
        raise UserError(WHERE, f"{found}, the model's is {tuple(shape)}: another tokenizer or shape")
    return tensor


def read_head(path: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return the labels of the head in a folder or checkpoint, and its weight and bias; empty where it has none."""
    if (path / CONFIG_FILE).is_file():
        table, weights = read_json(path / CONFIG_FILE).get("id2label") or {}, WeightFolder(path)
        names = [name for name in ("weight", "bias") if f"classifier.{name}" in weights.files]
        return [table[key] for key in sorted(table, key=int)], {n: weights.read(f"classifier.{n}") for n in names}
    reader = open_checkpoint(path)
    names = [name for name in ("weight", "bias") if f"head.{name}" in reader.tensors]
    return reader.manifest["facts"].get("labels", []), {name: reader.read(f"head.{name}") for name in names}


def build_other(
    config: dict[str, Any], folder: Path | None, labels: list[str], multi_label: bool, keep_head: bool
) -> nn.Module:
    """Build transformers' classifier of another family: first weights, or those of the folder, safetensors alone."""
    import transformers  # noqa: PLC0415 - takes seconds, and native models do without

    named = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    settings = transformers.AutoConfig.for_model(**named)
    settings.id2label, settings.label2id = label_tables(labels)
    settings.problem_type = problem_type(multi_label)
    if settings.pad_token_id is None:  # a decoder classifies by its last token that is not padding
        settings.pad_token_id = settings.eos_token_id
    auto_class = transformers.AutoModelForSequenceClassification
    try:
        if folder is None:
            return auto_class.from_config(settings, dtype=torch.float32)
        model = auto_class.from_pretrained(
            folder,
            config=settings,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other labels is drawn anew
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise UserError(WHERE, f"{folder or config.get('model_type')} is no text classifier: {error}") from None
    if keep_head:
        check_labels(list((config.get("id2label") or {}).values()), labels, folder)
        return model
    for name, module in model.named_modules():
        if not name.startswith(model.base_model_prefix) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def check_labels(theirs: list[str], labels: list[str], folder: Path) -> None:
    """Raise UserError unless a head that is to be kept is for the labels at hand."""
    if theirs != labels:
        shown = ", ".join(theirs[:5]) or "none"
        raise UserError("model.keep_head", f"the head in {folder} is for other labels ({shown}, ...); right is false")


def label_tables(labels: list[str]) -> tuple[dict[int, str], dict[str, int]]:
    """Return id2label and label2id as config.json has them."""
    return dict(enumerate(labels)), {label: index for index, label in enumerate(labels)}


def problem_type(multi_label: bool) -> Literal["multi_label_classification", "single_label_classification"]:
    """Return how transformers calls the loss."""
    return "multi_label_classification" if multi_label else "single_label_classification"
