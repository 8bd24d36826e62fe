"""`bigbatch convert RUN_DIR OUT`: a checkpoint under any plan becomes a Hugging Face folder, in bounded memory.

Everything is written beside OUT, compared with transformers' own model on real text, and renamed to OUT when it agrees:
a folder called OUT is a folder that agreed.
"""

import contextlib
import errno
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.checkpoint import MANIFEST, MASTER, Reader, fill, open_checkpoint
from bigbatch.recipes.core.errors import EXIT_DONE, UserError, as_user_error
from bigbatch.recipes.core.lazy_weights import read_lazily
from bigbatch.recipes.core.models.hugging_face import Piece, WeightFolder, piece_shape
from bigbatch.recipes.core.precision import DTYPES
from bigbatch.recipes.core.recipe import RECORD_FILE, WEIGHTS
from bigbatch.recipes.core.run_home import enter_home
from bigbatch.recipes.core.tensor_file import Entry, sync_folder, write_json, write_tensors

TOLERANCE = 1e-4
"""Largest difference of two logits in float32, as a part of the largest logit. Two ways to sum the same products differ
by up to 1e-5 of it in deep models; a wrong weight, by more than 1e-3."""
WINDOW_BYTES = 16 * 2**20
"""Read, cast and written at a time, where --max-ram allows so much; larger ones are not faster."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TRANSFORMERS, OWN = "transformers' own", "this project's own"
# Of the inputs, ours and transformers'.
NAMES = {"tokens": "input_ids", "written": "decoder_input_ids", "segments": "token_type_ids", "pixels": "pixel_values"}
# In memory they name their layers otherwise than in files, or make tensors themselves.
WHOLE = ("AutoModelForImageClassification", "AutoModelForSeq2SeqLM")
MEASURES = ("samples", "tokens", "pieces", "labels")
"""Inputs of models by whose size it is told how much they were compared on, the first that there is."""
PARITY_SAMPLES = 2
PARITY_TOKENS = 128  # of each; the logits of a large vocabulary would take more memory than all else


class Sizes(NamedTuple):
    """Bounds in bytes."""

    max_ram: int = 4 * 2**30
    """For reading and writing."""
    max_shard_size: int = 4 * 2**30
    """Of a file of weights, unless one tensor is larger."""


DEFAULT_SIZES = Sizes()


class Parity(NamedTuple):
    """How the written folder compares with the checkpoint."""

    largest_difference: float
    largest_logit: float
    num_tokens: int
    unit: str = "tokens"
    model: str = TRANSFORMERS
    """Whose it was compared with: this project's own where transformers has no such class."""

    @property
    def bound(self) -> float:
        """The largest difference that passes."""
        return TOLERANCE * self.largest_logit


def main(argv: list[str]) -> int:
    """Run the verb `convert`."""
    parser = Parser(prog="bigbatch convert", description="Turn a checkpoint into a Hugging Face folder.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights written (default fp32)")
    parser.add_argument("--max-ram", default="4G", metavar="SIZE", help="for reading and writing (default 4G)")
    parser.add_argument("--max-shard-size", default="4G", metavar="SIZE", help="of a file of weights (default 4G)")
    arguments = parser.parse_args(argv)
    sizes = Sizes(*(parse_bytes(getattr(arguments, name), f"--{name.replace('_', '-')}") for name in Sizes._fields))
    out = arguments.out.absolute()  # before the current folder may change
    parity = convert(enter_home(arguments.run_dir), out, arguments.dtype, sizes)
    print(
        f"{arguments.out}: logits of {parity.num_tokens} {parity.unit} equal {parity.model} to "
        f"{parity.largest_difference:.1e} (largest logit {parity.largest_logit:.1f})",
        file=sys.stderr,
    )
    print(arguments.out)
    return EXIT_DONE


def convert(
    run_dir: Path,
    out: Path,
    dtype: str = "fp32",
    sizes: Sizes = DEFAULT_SIZES,
    text: dict[str, np.ndarray] | None = None,
) -> Parity:
    """Convert a run's best checkpoint, else its newest (or the one given), into the folder `out`.

    They are compared on `text`, as `compare` takes it; by default on some of the run's own.
    """
    if out.exists():
        raise UserError(str(out), "exists already; name a folder that does not")
    reader, recipe, config = open_run(run_dir)
    with scratch_beside(out) as scratch:
        partial = scratch / "made"
        partial.mkdir()
        auto_class = write_model(partial, reader, recipe, config, dtype, sizes)
        text = text or _real_text(recipe, config, is_whole=not auto_class)
        parity = compare(partial, reader, recipe, config, text, DTYPES[dtype], auto_class)
        if not parity.largest_difference <= parity.bound:
            raise UserError(
                str(out),
                f"not written: logits differ from {parity.model} by {parity.largest_difference:.3g}, "
                f"at most {parity.bound:.3g} would be right",
            )
        _write_card(partial, reader, config, parity, dtype)
        sync_folder(partial)
        partial.rename(out)
    return parity


@contextlib.contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """Give a folder beside OUT that goes whatever happens, on SIGTERM as on Ctrl-C.

    Parents of OUT that were made for it go too, where OUT is not made.
    """
    scratch = out.with_name(f".{out.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        scratch.mkdir(parents=True)
        yield scratch
    except UserError:
        raise
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        if full in str(error):  # whoever says it: not all libraries raise an OSError, and a copy names what it read
            raise UserError(str(out), f"cannot be made: {full}") from error
        if mistake := as_user_error(error, str(out)):
            is_ours = mistake.where.startswith(str(scratch))
            raise (UserError(str(out), f"cannot be made: {mistake.message}") if is_ours else mistake) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # not there, or not empty: OUT is in it
                parent.rmdir()
        signal.signal(signal.SIGTERM, before)


def open_run(run_dir: Path) -> tuple[Reader, Any, Any]:
    """Return a run's checkpoint, as `convert` chooses it, its recipe and its configuration."""
    if (run_dir / "config.json").is_file() and not (run_dir / MANIFEST).exists():
        raise UserError(str(run_dir), "is a Hugging Face folder already; right is a run folder or a checkpoint")
    reader = open_checkpoint(run_dir)
    document = reader.manifest["run"]
    config = recipes.read_config(document, str(run_dir))
    return reader, recipes.find(document["recipe"]), config


def write_model(folder: Path, reader: Reader, recipe: Any, config: Any, dtype: str, sizes: Sizes) -> str:
    """Write weights, configuration and tokenizer; return the class of transformers that builds the model."""
    export = recipe.hugging_face(config, reader.manifest["facts"])
    _write_weights(folder, reader, export.tensors, DTYPES[dtype], sizes)
    _write_rest(folder, export, reader.manifest["facts"], dtype)
    return export.auto_class


def compare(
    folder: Path,
    reader: Reader,
    recipe: Any,
    config: Any,
    text: dict[str, np.ndarray],
    dtype: torch.dtype,
    auto_class: str = "AutoModelForCausalLM",
) -> Parity:
    """Run transformers' own model from the folder and ours from the checkpoint, in float32, on a text's tokens [B, T].

    And with its segments [B, T] where it has such; or on images' pixels [B, C, S, S]. Both read their weights a module
    at a time; ours are rounded to `dtype`, which the folder has.
    """
    if not auto_class:
        return _compare_own(folder, reader, recipe, config, text, dtype)
    theirs = open_lazily(folder, auto_class)
    with torch.device("meta"):
        ours = recipe.build_model(config, reader.manifest["facts"], initialize=False).eval()
    read_lazily(ours, lambda name: reader.read(name).to(dtype).float())
    logits, differences = [], []
    cacheless = {"use_cache": False} if "use_cache" in inspect.signature(theirs.forward).parameters else {}
    with torch.inference_mode():
        first = next(iter(text.values()))
        for row in range(len(first)):
            inputs = {name: torch.from_numpy(array[row : row + 1]) for name, array in text.items()}
            named = {NAMES[name]: array for name, array in inputs.items()}
            expected = _logits(theirs(**named, **cacheless))
            found = ours(**inputs)
            logits.append(expected.abs().max())
            differences.append((expected - found).abs().max())
    # torch's maximum of numbers one of which is not a number is not a number; Python's may be any.
    unit = "numbers" if "pixels" in text else "tokens"
    return Parity(float(torch.stack(differences).max()), float(torch.stack(logits).max()), first.size, unit)


def _compare_own(
    folder: Path, reader: Reader, recipe: Any, config: Any, text: dict[str, np.ndarray], dtype: torch.dtype
) -> Parity:
    """Compare the folder's model and the checkpoint's where transformers has no such class; the model is small."""
    facts = reader.manifest["facts"]
    written = recipes.build_described(recipe, config, {**facts, WEIGHTS: str(folder)}).eval()
    ours = recipe.build_model(config, facts, initialize=False).eval()
    fill(reader, ours)
    batch = {name: torch.from_numpy(array) for name, array in text.items()}
    with torch.inference_mode():
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(dtype))
        found, expected = (_answers(recipe, model, batch) for model in (written, ours))
    differences = (found - expected).abs().masked_fill(found == expected, 0.0)  # infinite ones may be equal, too
    largest = expected[expected.isfinite()].abs().max()
    unit = "samples" if "samples" in batch else "tokens"
    count = next(array.size for name, array in text.items() if name in MEASURES)
    return Parity(float(differences.max()), float(largest), count, unit, OWN)


def _answers(recipe: Any, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all numbers that a model says of a batch in the recipe's hands, one after another."""
    said: list[Any] = []
    hook = model.register_forward_hook(lambda _, __, output: said.append(output))
    (recipes.further(recipe, "outputs") or recipe.loss)(model, batch)
    hook.remove()
    parts = [part for output in said for part in (output if isinstance(output, tuple) else (output,))]
    return torch.cat([part.float().flatten() for part in parts if part.is_floating_point()])


def _logits(output: Any) -> torch.Tensor:
    """Return transformers' logits; those of a first and a last token [B, T] each as [B, T, 2]; else the states."""
    if "last_hidden_state" in output:
        return output.last_hidden_state
    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


def open_lazily(folder: Path, auto_class: str) -> torch.nn.Module:
    """Build transformers' class, with weights that come as they are needed and go again."""
    import accelerate
    import transformers

    if auto_class in WHOLE:
        return getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    with accelerate.init_empty_weights(include_buffers=False):
        further = {"add_pooling_layer": False} if auto_class == "AutoModel" else {}
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32, **further).eval()
    weights = WeightFolder(folder)
    # A tied head has no tensor of its own in the file, and the empty model has forgotten that it is tied.
    tied: dict[str, str] = model.all_tied_weights_keys

    prefix = "transformer." if "wte.weight" in weights.files else ""  # which the first GPT-2 folders leave out

    def read(name: str) -> torch.Tensor:
        is_stored = name.removeprefix(prefix) in weights.files
        name = (name if is_stored else tied.get(name, name)).removeprefix(prefix)
        return (weights.read(name) if name in weights.files else _read_mixture(weights, name)).float()

    read_lazily(model, read)
    return model


def _read_mixture(weights: WeightFolder, name: str) -> torch.Tensor:
    """Put together what transformers 5 has in one tensor and a Mixtral folder, as all programs read it, in many."""
    layer, _, rest = name.partition(".mlp.")
    prefix = f"{layer}.block_sparse_moe"
    if rest == "gate.weight":
        return weights.read(f"{prefix}.{rest}")
    parts = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}[rest]
    experts = takewhile(lambda index: f"{prefix}.experts.{index}.w1.weight" in weights.files, count())
    return torch.stack(
        [torch.cat([weights.read(f"{prefix}.experts.{index}.{part}.weight") for part in parts]) for index in experts]
    )


class _State(NamedTuple):
    """Tensors in memory, read as those of a checkpoint are."""

    state: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, Any]:
        return {name: {"shape": tuple(tensor.shape)} for name, tensor in self.state.items()}

    def read_into(self, name: str, kind: str, start: int, target: torch.Tensor) -> None:
        target.copy_(self.state[name].flatten()[start : start + target.numel()])


def write_state(
    folder: Path, state: dict[str, torch.Tensor], table: dict[str, list[Piece]], dtype: torch.dtype
) -> None:
    """Write the weights of a model in memory, by the names of its parameters, as a Hugging Face folder holds them."""
    _write_weights(folder, _State(state), table, dtype, DEFAULT_SIZES)


def _write_weights(
    folder: Path, reader: Reader | _State, table: dict[str, list[Piece]], dtype: torch.dtype, sizes: Sizes
) -> None:
    """Write model.safetensors, or shards with their index."""
    shapes = {name: tuple(reader.tensors[name]["shape"]) for name in table}
    items = [(_entry(piece, shapes[name], dtype), name, piece) for name, pieces in table.items() for piece in pieces]
    shards: list[list[tuple[Entry, str, Piece]]] = [[]]
    for item in items:
        if shards[-1] and sum(entry.num_bytes for entry, *_ in shards[-1]) + item[0].num_bytes > sizes.max_shard_size:
            shards.append([])
        shards[-1].append(item)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"model{suffix}.safetensors"
        parts = (part for _, name, piece in shard for part in _parts(reader, name, piece, dtype, sizes.max_ram))
        write_tensors(file, [entry for entry, *_ in shard], parts)
        weight_map.update({entry.name: file.name for entry, *_ in shard})
    if len(shards) > 1:
        total = sum(entry.num_bytes for entry, *_ in items)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _entry(piece: Piece, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    return Entry(piece.name, dtype, piece_shape(piece, shape))


def _parts(
    reader: Reader | _State, name: str, piece: Piece, dtype: torch.dtype, max_ram: int
) -> Iterator[torch.Tensor]:
    """Yield a piece's elements in order, a window of rows at a time; a transposed one has to be read whole."""
    shape = reader.tensors[name]["shape"]
    row_elements = math.prod(shape[1:])
    num_rows = piece.stop - piece.start
    needed = 16 * num_rows * row_elements  # read as float32, transposed, cast: four copies at the worst
    if piece.transpose and needed > max_ram:
        raise UserError("--max-ram", f"tensor {piece.name} has to be transposed whole; it needs {needed:,} bytes")
    window_bytes = needed // 4 if piece.transpose else min(max_ram // 4, WINDOW_BYTES)
    window_rows = max(1, window_bytes // (4 * row_elements))
    for start in range(piece.start, piece.stop, window_rows):
        rows = min(window_rows, piece.stop - start)
        part = torch.empty(rows * row_elements)
        reader.read_into(name, MASTER, start * row_elements, part)
        part = part.view(rows, *shape[1:]).to(dtype)
        yield part.reshape(rows, -1).T if piece.transpose else part


def _write_rest(folder: Path, export: Any, facts: dict[str, Any], dtype: str) -> None:
    """Write configuration and generation settings, and copy the tokenizer."""
    end, generates = facts.get("end_of_text"), export.generation is not None
    ids = {"bos_token_id": end, "eos_token_id": end} if generates else {}
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    write_text(folder / "config.json", {**export.config, **ids, "dtype": names[dtype]})
    if generates:
        write_text(folder / "generation_config.json", {**ids, **export.generation})
    for name, content in (export.files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, content)
    for path in export.folders:
        if not path.is_dir():
            raise UserError(str(path.absolute()), "is not there: the prepared data have gone; run bigbatch prepare")
        shutil.copytree(path, folder / path.name)
    if export.processor:
        write_text(folder / "preprocessor_config.json", export.processor)
        return
    tokenizer = Path(facts["tokenizer"])
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            str(tokenizer.absolute()), "holds no tokenizer.json: the prepared data have gone; run bigbatch prepare"
        )


def write_text(path: Path, content: Any) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _real_text(recipe: Any, config: Any, is_whole: bool = False) -> dict[str, np.ndarray]:
    """Return what models take of a few validation samples, else training ones: tokens or pixels; or the whole batch."""
    data = recipe.open_data(config)
    samples = data.validation or data.train
    ids = np.arange(min(PARITY_SAMPLES, samples.num_samples))
    batch = samples.batch(ids, np.zeros_like(ids))
    if is_whole:
        return batch
    return {
        name: batch[name][:, :PARITY_TOKENS] if name != "pixels" else batch[name] for name in NAMES if name in batch
    }


def _write_card(folder: Path, reader: Reader, config: Any, parity: Parity, dtype: str) -> None:
    """Write what this model is, where it comes from and what was compared: for people, and as JSON."""
    manifest = reader.manifest
    parameters = sum(math.prod(tensor["shape"]) for tensor in reader.tensors.values())
    record = {
        "recipe": config.recipe,
        "content_id": manifest["content_id"],
        "step": manifest["step"],
        "consumed_samples": manifest["consumed_samples"],
        "data_fingerprint": manifest["data_fingerprint"],
        "parameters": parameters,
        "dtype": dtype,
        "parity": parity._asdict(),
        "run": manifest["run"],
        "working_directory": str(Path.cwd()),
        "facts": _model_facts(config.recipe, manifest["facts"], is_own=parity.model == OWN),
    }
    write_text(folder / RECORD_FILE, record)
    purpose = f"{config.about.purpose}\n\n" if config.about else ""
    (folder / "README.md").write_text(f"""# {config.recipe}, step {manifest["step"]:,}

{purpose}| | |
|---|---|
| parameters | {parameters:,} |
| weights | {dtype} |
| trained for | {manifest["step"]:,} steps, {manifest["consumed_samples"]:,} samples |
| recipe, content id | {config.recipe}, {manifest["content_id"]} |
| data fingerprint | {manifest["data_fingerprint"]} |

## What was verified

On {parity.num_tokens:,} {parity.unit} of real data, in float32, the logits of {parity.model} model loaded from this
folder differ from those of the model that was trained by at most {parity.largest_difference:.2e} (the largest logit is
{parity.largest_logit:.2f}; the bound is {parity.bound:.2e}).
""")


def _model_facts(recipe: str, facts: dict[str, Any], is_own: bool) -> dict[str, Any]:
    """Return what is of the model though no weight; without a class of transformers all but where the tokenizer lay."""
    if is_own:
        return {name: fact for name, fact in facts.items() if name != "tokenizer"}
    names = recipes.further(recipes.find(recipe), "MODEL_FACTS") or ()
    return {name: facts[name] for name in names if name in facts}


def parse_bytes(text: str, flag: str) -> int:
    """Read a size such as 4G, 512M or 1000000; with a B behind it, as in 20MB, in thousands."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)(B?)", text.upper())
    power = {"": 0, "K": 1, "M": 2, "G": 3}[found[2]] if found else 0
    num_bytes = int(float(found[1]) * (1000 if found[3] else 1024) ** power) if found else 0
    if not num_bytes:
        raise UserError(flag, f"found {text!r}; right is a size such as 4G, 512M or 20MB")
    return num_bytes
