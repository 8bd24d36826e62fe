"""What `model.initialize_from` names where the model is an encoder-decoder: a run, or a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigbatch.recipes.core.checkpoint import Reader
from bigbatch.recipes.core.data.tokenizing import load_given_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import Seq2SeqSection
from bigbatch.recipes.core.models.hugging_face import OwnFolder, read_json
from bigbatch.recipes.core.models.seq2seq import Seq2Seq, load_hugging_face, section_from_hugging_face
from bigbatch.recipes.core.start import CONFIG_FILE, WHERE, is_ours, open_ours, read_tensor, tokenizer_of

PREFIXES = ("", "model.")  # what an encoder-decoder's parameters are called in the models that have one
MARK = "decoder.blocks.0.source_attention.query.weight"


class Seq2SeqStart(NamedTuple):
    """Where the first weights come from, and what is known of them without reading them."""

    path: Path
    tokenizer: Path
    """Folder of the tokenizer that belongs to them."""
    vocabulary_size: int
    shape: dict[str, Any]
    """A Seq2SeqSection as JSON."""
    begin_of_target: int
    """The token that the decoder begins with."""


def find_seq2seq_start(name: str) -> Seq2SeqStart:
    """Look at a folder to start from; raise UserError for one that holds no encoder-decoder."""
    path = Path(name).expanduser()
    if is_ours(path):
        reader = open_ours(path)
        _prefix(reader)
        facts = reader.manifest["facts"]
        return Seq2SeqStart(
            path, tokenizer_of(reader), facts["vocabulary_size"], facts["shape"], facts["begin_of_target"]
        )
    if not (path / CONFIG_FILE).is_file():
        raise UserError(WHERE, f"{path} has neither checkpoints nor a {CONFIG_FILE}: no model to start from")
    config = read_json(path / CONFIG_FILE)
    shape = section_from_hugging_face(config).model_dump(mode="json")
    begin = config.get("decoder_start_token_id")
    begin = config.get("eos_token_id") if begin is None else begin
    if not isinstance(begin, int) or not isinstance(config.get("vocab_size"), int):
        raise UserError(WHERE, f"{path / CONFIG_FILE} lacks decoder_start_token_id or vocab_size")
    return Seq2SeqStart(path, path, config["vocab_size"], shape, begin)


def starting_facts(section: Any, folder: Path, start: Seq2SeqStart | None) -> dict[str, Any]:
    """Return vocabulary_size, shape and begin_of_target of a model's section (`shape`, `dropout`).

    `folder` holds the tokenizer. Raises UserError if that has more tokens than the model that is started from.
    """
    tokenizer = load_given_tokenizer(folder)
    size = tokenizer.vocabulary_size
    if start and size > start.vocabulary_size:
        found = f"the tokenizer in {start.tokenizer} has {size} tokens, the model {start.vocabulary_size}"
        raise UserError(WHERE, found)
    shape = start.shape if start else section.shape.model_dump(mode="json")
    return {
        "vocabulary_size": start.vocabulary_size if start else size,
        "shape": shape if section.dropout is None else {**shape, "dropout": section.dropout},
        "begin_of_target": start.begin_of_target if start else tokenizer.end_of_text,
    }


def build_seq2seq(section: Any, facts: dict[str, Any], label_smoothing: float, initialize: bool) -> Seq2Seq:
    """Build the model that the facts describe, with the weights that `section.initialize_from` names.

    Without `initialize` no file is read.
    """
    shape = Seq2SeqSection.model_validate_json(json.dumps(facts["shape"]))
    model = Seq2Seq(shape, facts["vocabulary_size"], label_smoothing)
    if section.initialize_from and initialize:
        _load(Path(section.initialize_from).expanduser(), model)
    return model


def _load(path: Path, model: Seq2Seq) -> None:
    if not is_ours(path):
        load_hugging_face(model, path)
        return
    reader = open_ours(path)
    prefix = _prefix(reader)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_tensor(reader, prefix + name, parameter.shape))


def _prefix(reader: Reader | OwnFolder) -> str:
    found = next((prefix for prefix in PREFIXES if prefix + MARK in reader.tensors), None)
    if found is None:
        recipe = reader.manifest["run"].get("recipe")
        raise UserError(WHERE, f"{reader.folder} is a model of the recipe {recipe!r}, which has no encoder-decoder")
    return found
