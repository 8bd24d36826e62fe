"""What is served: a model, opened so that requests can be answered with it."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bigbatch.recipes.core.checkpoint import MANIFEST
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import session_of
from bigbatch.recipes.core.generate import Sampling
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.recipes.core.recipe import further
from bigbatch.recipes.core.run_home import enter_home
from bigbatch.tools import generate
from bigbatch.tools.export import main as export
from bigbatch.tools.opened import CONFIG_FILE, Opened, check_config, format_of, open_model
from bigbatch.tools.predict import Fields, Predict

FORMATS = {"torch": "transformers", "onnx": "onnx", "llama.cpp": "gguf"}
"""What each engine runs."""


class Generating(NamedTuple):
    """A model that writes text."""

    model: Any  # Decoder, or one that generates by itself
    tokenizer: Any  # tokenizers.Tokenizer
    chat: Any  # core.data.chat.Chat, or None where it has not learned to chat
    sampling: Sampling
    """What a request gets that does not say otherwise."""


class Embedding(NamedTuple):
    """A model that makes vectors of texts."""

    embed: Callable[[list[str]], np.ndarray]
    count_tokens: Callable[[str], int]


class Served(NamedTuple):
    """A model, by what it can do."""

    name: str
    recipe_name: str
    engine: str
    predict: Predict | None = None
    fields: Fields = ()
    reads_files: bool = False
    generating: Generating | None = None
    embedding: Embedding | None = None


def open_served(path: Path, name: str | None = None, dtype: str | None = None, threads: int | None = None) -> Served:
    """Open a run folder, a checkpoint or a model folder; raise UserError for what cannot be served."""
    name = name or path.resolve().name
    if threads:
        torch.set_num_threads(threads)
    if (path / CONFIG_FILE).is_file():
        check_config(path)
    if writes(path):
        generating = _open_generating(path, dtype, threads)
        recipe_name = "dialogue" if generating.chat else "gpt"
        return Served(name, recipe_name, _engine(path, generating.model), generating=generating)
    if dtype:
        raise UserError("--dtype", "is of models that write text; the others run in float32, or as they were exported")
    opened = open_model(enter_home(path), threads, must_predict=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = opened._replace(model=opened.model.to(device))
    predict = opened.recipe.predictor(opened.config, opened.facts, opened.model)
    reads_files = bool(further(opened.recipe, "READS_FILES"))
    embedding = _embedding(opened) if opened.recipe_name == "match" else None
    engine, fields = _engine(opened.path, opened.model), fields_of(opened)
    return Served(name, opened.recipe_name, engine, predict, fields, reads_files, embedding=embedding)


@contextlib.contextmanager
def in_engine(path: Path, engine: str | None) -> Iterator[Path]:
    """Give a model in the form that an engine runs: itself, or for the time of a `with` an export of it."""
    wanted = FORMATS[engine] if engine else None
    has = format_of(path) if (path / CONFIG_FILE).is_file() else "transformers"
    if wanted in (None, has):
        yield path
        return
    if has != "transformers":
        raise UserError("--engine", f"{engine} cannot run it: {path} is a model in the form of {has}")
    with tempfile.TemporaryDirectory(prefix="bigbatch-serve-") as folder:
        out = Path(folder) / path.resolve().name
        with contextlib.redirect_stdout(sys.stderr):
            export([str(path), str(out), "--format", str(wanted), "--no-measure"])
        yield out


def writes(path: Path) -> bool:
    """Tell whether a model is a decoder."""
    if (path / CONFIG_FILE).is_file():
        architectures = read_json(path / CONFIG_FILE).get("architectures") or [""]
        return str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
    file = path / ("run.json" if (path / "run.json").is_file() else MANIFEST)
    document = read_json(file) if file.is_file() else {}
    return document.get("run", document).get("recipe") in ("gpt", "dialogue")


def fields_of(opened: Opened) -> Fields:
    """Return of what an input of its predictor consists, () where it is one text or file."""
    fields = further(opened.recipe, "fields")
    return fields(opened.config) if fields else further(opened.recipe, "FIELDS") or ()


def _engine(path: Path, model: Any) -> str:
    return "torch" if session_of(model) is None else format_of(path)


def _open_generating(path: Path, dtype: str | None, threads: int | None) -> Generating:
    from bigbatch.recipes.core.data.chat import open_chat

    loaded, text_model = generate.open_model(path, dtype, threads)
    wanted = ("max_new_tokens", "temperature", "top_k", "top_p")
    flags = argparse.Namespace(seed=0, **dict.fromkeys(wanted))
    sampling = generate.sampling_of(flags, loaded.document, text_model)
    try:
        chat = open_chat(loaded.tokenizer)
    except UserError:
        chat = None
    ends = {*sampling.stop_tokens, *([chat.tokenizer.end_of_text] if chat else [])}
    sampling = sampling._replace(stop_tokens=tuple(sorted(ends)))
    return Generating(loaded.model, text_model.tokenizer, chat, sampling)


def _embedding(opened: Opened) -> Embedding | None:
    from bigbatch.recipes.core.data.tokenizing import load_given_tokenizer
    from bigbatch.recipes.match.recipe import encoder_of

    if opened.config.model.kind != "bi":
        return None
    tokenizer = load_given_tokenizer(Path(opened.facts["tokenizer"])).tokenizer
    embed = encoder_of(opened.config, opened.facts, opened.model)
    return Embedding(embed, lambda text: len(tokenizer.encode(text).ids))
