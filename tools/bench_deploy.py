"""`bigbatch bench deploy MODEL`: a model under each engine that is here, on one thread, against transformers' own.

All contestants are in one process and take turns, round after round, so that a machine whose speed drifts is equally
unfair to all. Quoted are medians of the processor time that this process took, and ratios of the rounds.
"""

import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core.beam_search import Search, beam_search
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.tools import ladder
from bigbatch.tools.convert import write_text
from bigbatch.tools.engines import onnx_engine, transformers_engine
from bigbatch.tools.export import open_exporter
from bigbatch.tools.exporters import onnx_export

BASE = "transformers, fp32"
TEXT_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 64, 16, 48
BATCHES = (1, 8)
GGUF = ("f16", "q8_0", "q4_k_m")
TERMINAL_WIDTH = 100

Call = Callable[[int], Any]
"""Runs a model on a batch of so many rows."""


class Result(NamedTuple):
    """One contestant's figures for one size of a batch."""

    name: str
    batch: int
    milliseconds: float
    """Median: of a call, or of a step that writes a token to each row."""
    ratio: float
    """Transformers' time over this one's: median over the rounds."""
    num_bytes: int
    """Of the files with weights."""


def bench_deploy(model: Path, rounds: int, as_json: bool) -> int:
    """Export a model to what there is here, measure in turns and print a table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bigbatch-bench-") as name:
        scratch = Path(name)
        source = ladder.open_source(model, scratch)
        contestants, sizes = _contestants(source, scratch)
        steps = NEW_TOKENS if _writes(source.path) else 1
        seconds = {batch: measure(contestants, batch, rounds) for batch in BATCHES}
    results = [one for batch in BATCHES for one in summarize(seconds[batch], batch, steps, sizes)]
    work = (
        f"{NEW_TOKENS} tokens behind {PROMPT_TOKENS}, greedy"
        if steps > 1
        else f"texts of {TEXT_TOKENS} tokens, or images"
    )
    if as_json:
        print(json.dumps({"rounds": rounds, "work": work, "results": [one._asdict() for one in results]}, indent=2))
    else:
        _print_table(results, f"{rounds} rounds; {work}; processor time, one thread")
    return EXIT_DONE


def measure(contestants: dict[str, Call], batch: int, rounds: int) -> dict[str, list[float]]:
    """Return the processor time in seconds of each turn of each contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call(batch)  # memory, and what is made at the first call
    for _ in range(rounds):
        for name, call in contestants.items():
            began = time.process_time()
            call(batch)
            seconds[name].append(time.process_time() - began)
    return seconds


def summarize(seconds: dict[str, list[float]], batch: int, steps: int, sizes: dict[str, int]) -> list[Result]:
    """Return medians, and those of the rounds' ratios to transformers."""
    base = seconds[BASE]
    return [
        Result(
            name,
            batch,
            1000 * statistics.median(own) / steps,
            statistics.median(theirs / ours for theirs, ours in zip(base, own, strict=True)),
            sizes[name],
        )
        for name, own in seconds.items()
    ]


def _contestants(source: ladder.Source, scratch: Path) -> tuple[dict[str, Call], dict[str, int]]:
    """Return who takes part, and the bytes of each one's weights; say who does not, and why."""
    kind = read_json(source.path / "config.json").get("model_type")
    if kind == onnx_export.SPEECH:
        raise UserError("MODEL", "is one of speech, for which transformers has no class to compare with")
    base = transformers_engine.open_session(source.path, 1)
    calls: dict[str, Call] = {BASE: _theirs(source, base)}
    sizes = {BASE: _size(source.path)}

    def enter(name: str, make: Callable[[Path], Any]) -> None:
        folder = scratch / name.replace(" ", "_")
        folder.mkdir()
        try:
            session = make(folder)
        except UserError as error:
            print(f"{name} does not take part: {error}", file=sys.stderr)
            return
        calls[name], sizes[name] = _ours(source, session), _size(folder)

    for precision in onnx_export.PRECISIONS:
        enter(f"onnxruntime, {precision}", partial(_onnx, source, precision))
    for precision in onnx_export.PRECISIONS if kind in onnx_export.WRITERS else ():
        folder = scratch / f"onnxruntime,_{precision}"
        calls[f"onnxruntime-genai, {precision}"] = _genai(source, folder)
        sizes[f"onnxruntime-genai, {precision}"] = _size(folder)
    for precision in GGUF if kind in onnx_export.WRITERS else ():
        enter(f"llama.cpp, {precision}", partial(_gguf, source, precision))
    return calls, sizes


def _onnx(source: ladder.Source, precision: str, folder: Path) -> Any:
    onnx_export.write_onnx(source.path, folder, precision)
    return onnx_engine.open_session(folder, 1)


def _genai(source: ladder.Source, folder: Path) -> Call:
    """Return the loop of onnxruntime-genai over what onnxruntime runs."""
    genai: Any = importlib.import_module("onnxruntime_genai")
    config = onnx_export.genai_config(source.path)
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    write_text(folder / onnx_export.GENAI_FILE, config)
    model, length = genai.Model(str(folder)), PROMPT_TOKENS + NEW_TOKENS

    def call(batch: int) -> Any:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=batch)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(_tokens(source.path, batch, PROMPT_TOKENS).numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)

    return call


def _gguf(source: ladder.Source, precision: str, folder: Path) -> Any:
    exporter = open_exporter("gguf")
    exporter.write_gguf(source.path, folder / exporter.FILE, precision)
    return exporter.LlamaSession(folder / exporter.FILE, 1)


def _theirs(source: ladder.Source, session: Any) -> Call:
    """Return transformers' own call, or its `generate`."""
    if not _writes(source.path):
        return partial(_call, source.path, session)
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}

    def call(batch: int) -> Any:
        tokens = _tokens(source.path, batch, PROMPT_TOKENS)
        return session.model.generate(tokens, attention_mask=torch.ones_like(tokens), **fixed)

    return call


def _ours(source: ladder.Source, session: Any) -> Call:
    """Return the call of a session, or this project's `generate` over it."""
    if not _writes(source.path):
        return partial(_call, source.path, session)
    model = source.recipe.foreign(source.config, source.facts, session).eval()
    is_pair = read_json(source.path / "config.json")["model_type"] in onnx_export.PAIRS

    def call(batch: int) -> Any:
        prompts = _tokens(source.path, batch, PROMPT_TOKENS).tolist()
        if is_pair:
            search = Search(num_beams=1, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
            begin = source.facts["begin_of_target"]
            return beam_search(model, batch * [[begin]], search, prompts)
        return generate(model, prompts, Sampling(NEW_TOKENS, temperature=0))

    return call


def _call(folder: Path, session: Any, batch: int) -> Any:
    config = read_json(folder / "config.json")
    if config["model_type"] == "vit":
        shape = (batch, config["num_channels"], config["image_size"], config["image_size"])
        return session(pixel_values=torch.zeros(shape))
    tokens = _tokens(folder, batch, min(TEXT_TOKENS, config["max_position_embeddings"]))
    return session(input_ids=tokens, attention_mask=torch.ones_like(tokens), token_type_ids=torch.zeros_like(tokens))


def _tokens(folder: Path, batch: int, length: int) -> torch.Tensor:
    size = read_json(folder / "config.json")["vocab_size"]
    return torch.randint(size, (batch, length), generator=torch.Generator().manual_seed(0))


def _writes(folder: Path) -> bool:
    return read_json(folder / "config.json").get("model_type") in onnx_export.WRITERS + onnx_export.PAIRS


def _size(folder: Path) -> int:
    kinds = (".safetensors", ".data", ".onnx", ".gguf")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds)


def _print_table(results: list[Result], caption: str) -> None:
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for index, name in enumerate(("engine, weights", "MB", "batch", "ms", "times as fast")):
        table.add_column(name, justify="right" if index else "left")
    for one in results:
        cells = (f"{one.num_bytes / 1e6:.1f}", str(one.batch), f"{one.milliseconds:.2f}", f"{one.ratio:.2f}")
        table.add_row(one.name, *cells)
    console = Console()
    Console(width=None if console.is_terminal else TERMINAL_WIDTH).print(table)
