"""What `model.initialize_from` names for a decoder: a run or checkpoint of one, or a Hugging Face folder.

A vocabulary that has grown since, by the tokens of a chat template, is made room for.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from bigbatch.recipes.core.checkpoint import MANIFEST, Reader, open_checkpoint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layout import logical_shape, share_of
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import (
    Decoder,
    check_shape,
    hugging_face_tensors,
    load_hugging_face,
    section_from_hugging_face,
)
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.recipes.core.run_home import recorded_path
from bigbatch.recipes.core.start import CONFIG_FILE, WHERE, read_tensor

TABLES = ("embed.tokens.weight", "head.weight")  # with a row a token


class DecoderStart(NamedTuple):
    """Where the first weights come from, and what is known of them without reading them."""

    path: Path
    tokenizer: Path
    """Folder of the tokenizer that belongs to them."""
    vocabulary_size: int
    section: DecoderSection


def find_decoder(name: str) -> DecoderStart:
    """Look at a folder to start from; raise UserError for one that holds no decoder of a native family."""
    path = Path(name).expanduser()
    if (path / MANIFEST).exists() or (path / "checkpoints").is_dir():
        reader = open_checkpoint(path)
        run, facts = reader.manifest["run"], reader.manifest["facts"]
        if "family" not in run.get("model", {}):
            raise UserError(WHERE, f"{path} is a model of the recipe {run.get('recipe')!r}, which is no decoder")
        tokenizer = recorded_path(reader.folder, facts["tokenizer"])
        return DecoderStart(path, tokenizer, facts["vocabulary_size"], DecoderSection.model_validate(run["model"]))
    if not (path / CONFIG_FILE).is_file():
        raise UserError(WHERE, f"{path} has neither checkpoints nor a {CONFIG_FILE}: no model to start from")
    config = read_json(path / CONFIG_FILE)
    section = section_from_hugging_face(config)
    return DecoderStart(path, path, config["vocab_size"], section)


def load_decoder(model: Decoder, start: DecoderStart) -> None:
    """Fill a model, or a tensor rank's share of it, with the weights that it starts from.

    A token that these do not know begins with the mean of those that they do
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    check_shape(model.section, start.section, start.path)
    if (start.path / CONFIG_FILE).is_file():
        weights = load_hugging_face(model, start.path, start.vocabulary_size)
        pieces = hugging_face_tensors(model.section, start.vocabulary_size)
        tables = {name: weights.read(pieces[name][0].name) for name in TABLES if name in pieces}
    else:
        tables = _fill(model, open_checkpoint(start.path), start.vocabulary_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in TABLES and model.vocabulary_size > start.vocabulary_size:
                fresh = torch.zeros(logical_shape(parameter))
                fresh[start.vocabulary_size : model.vocabulary_size] = tables[name].float().mean(0)
                share = share_of(parameter)
                parameter.add_(share.cut(fresh) if share else fresh)


def _fill(model: Decoder, reader: Reader, vocabulary_size: int) -> dict[str, torch.Tensor]:
    """Copy a checkpoint's weights, tables without the rows that pad them; return the tables."""
    tables = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape, share = logical_shape(parameter), share_of(parameter)
            if name in TABLES:
                tables[name] = reader.read(name)[:vocabulary_size]
                whole = torch.zeros(shape)
                whole[:vocabulary_size] = tables[name]
            else:
                whole = read_tensor(reader, name, shape)
            parameter.copy_(share.cut(whole) if share else whole)
    return tables
