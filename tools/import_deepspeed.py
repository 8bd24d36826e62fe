"""`bigbatch import-deepspeed CHECKPOINT OUT`: DeepSpeed's own checkpoint becomes safetensors, without running a pickle.

DeepSpeed pickles. Here torch's restricted unpickler reads the files, and what few classes DeepSpeed puts into them are
replaced by stand-ins that do nothing, so that nothing in a file is ever called; any other class is refused by name. The
tensors stay on disk, mapped, until they are written.
"""

import math
import os
import pickle
import re
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.models.decoder import Decoder, hugging_face_tensors, section_from_hugging_face
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.recipes.core.recipe import RECORD_FILE
from bigbatch.recipes.core.tensor_file import Entry, sync_folder, write_tensors
from bigbatch.tools.convert import TOKENIZER_FILES, write_text

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_\d+_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")
FOLDER_FILES = ("generation_config.json", *TOKENIZER_FILES, "vocab.json", "merges.txt", "tokenizer.model")


class FragmentAddress:
    """Stands in for DeepSpeed's `fragment_address`: where a parameter's piece lies in a flat tensor."""

    start: int
    numel: int


class Unread:
    """Stands in for an object that the import has no use for."""


STAND_INS = (
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Unread, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Unread, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)


class Tensor(NamedTuple):
    """A logical tensor: its flat pieces in order, mapped from the checkpoint's files."""

    shape: tuple[int, ...]
    pieces: list[torch.Tensor]


class Native(NamedTuple):
    """What a DeepSpeed checkpoint holds of a model."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    shared: dict[str, str]
    """Names that are the same parameter as another one, which is among `parameters`."""
    facts: dict[str, Any]


def main(argv: list[str]) -> int:
    """Run the verb `import-deepspeed`."""
    parser = Parser(
        prog="bigbatch import-deepspeed", description="Turn a checkpoint of DeepSpeed's own into a safetensors folder."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the folder that has the file `latest`")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--tag", help="which of the checkpoints (default: the one that `latest` names)")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="a Hugging Face folder of the same model: names and shapes are checked, config and tokenizer copied",
    )
    arguments = parser.parse_args(argv)
    facts = import_deepspeed(arguments.checkpoint, arguments.out, arguments.tag, arguments.like)
    print(
        f"{arguments.out}: {facts['parameters']:,} parameters, float32, from ZeRO-{facts['zero_stage']} "
        f"on {facts['ranks']} ranks",
        file=sys.stderr,
    )
    print(arguments.out)
    return EXIT_DONE


def import_deepspeed(folder: Path, out: Path, tag: str | None = None, like: Path | None = None) -> dict[str, Any]:
    """Write the float32 masters of a DeepSpeed checkpoint to `out`; return what conversion.json says of them.

    Parameters keep their names, shared ones are written once; buffers follow, integers as they are. With `like`, a
    Hugging Face folder of a native family, the result is a folder of that model.
    """
    if out.exists():
        raise UserError(str(out), "exists already; name a folder that does not")
    native = read_native(_tag_folder(folder, tag))
    tensors = native.parameters | native.buffers
    if like:
        check_like(native, like)
        tensors = native.parameters  # a native family's buffers follow from its config.json
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        entries = [Entry(name, _written_dtype(tensor), tensor.shape) for name, tensor in tensors.items()]
        pieces = (piece.to(entry.dtype) for entry in entries for piece in tensors[entry.name].pieces)
        native.facts["file"] = write_tensors(partial / "model.safetensors", entries, pieces)
        if like:
            _copy_like(like, partial)
        write_text(partial / RECORD_FILE, native.facts)
        sync_folder(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return native.facts


def _written_dtype(tensor: Tensor) -> torch.dtype:
    dtype = tensor.pieces[0].dtype
    return torch.float32 if dtype.is_floating_point else dtype


# ---------------------------------------------------------------------------------------------------------------- read


def read_native(folder: Path) -> Native:
    """Read the folder of one tag; raise UserError if a file is missing, damaged, or holds what is not expected."""
    others = [
        path.name for path in sorted(folder.glob("*.pt")) if path.name.startswith("layer_") or "expert" in path.name
    ]
    if others:
        raise UserError(
            str(folder / others[0]), "is of a pipeline or of experts; only data-parallel checkpoints are read"
        )
    models = [_load(path) for path in _ranked(folder, MODEL_FILE)]
    optimizers = [_load(path) for path in _ranked(folder, OPTIMIZER_FILE)]
    if not models:
        raise UserError(str(folder), "has no *_model_states.pt: it is no checkpoint of DeepSpeed's")
    model = models[0]
    try:
        stage = _check_plan(folder, model, models, optimizers)
        masters, shared = _read_masters(stage, models, optimizers)
        module, buffer_names = model["module"], model["buffer_names"]
        ordered = {name: masters[name] for name in module if name in masters}
        buffers = {name: _whole(module[name]) for name in buffer_names if name not in shared}
        facts = {
            "source": "DeepSpeed checkpoint",
            "tag": folder.name,
            "deepspeed": model["ds_version"],
            "zero_stage": stage,
            "ranks": model["dp_world_size"],
            "step": model["global_steps"],
            "parameters": sum(math.prod(tensor.shape) for tensor in masters.values()),
            "shared": shared,
            "buffers": sorted(buffers),
        }
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(str(folder), f"is not laid out as DeepSpeed 0.19 does it ({reason})") from error
    for name, tensor in masters.items():
        found = sum(piece.numel() for piece in tensor.pieces)
        if found != math.prod(tensor.shape):
            raise UserError(str(folder), f"holds {found} of the {math.prod(tensor.shape)} elements of {name!r}")
    return Native(ordered, buffers, shared, facts)


def _tag_folder(folder: Path, tag: str | None) -> Path:
    if tag is None and any(MODEL_FILE.fullmatch(path.name) for path in folder.glob("*.pt")):
        return folder  # the folder of a tag itself
    try:
        tag = tag or (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        tags = sorted(path.parent.name for path in folder.glob("*/*mp_rank_00_model_states.pt"))
        there_are = f"name one with --tag: {', '.join(dict.fromkeys(tags))}" if tags else "and no checkpoint in it"
        raise UserError(str(folder), f"has no readable file `latest`; {there_are}") from None
    if not (folder / tag).is_dir():
        raise UserError(str(folder), f"has no checkpoint {tag!r}")
    return folder / tag


def _ranked(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """List the files of a kind in the order of their ranks."""
    found = [(match, path) for path in folder.glob("*.pt") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1] or 0), path) for match, path in found)]


def _load(path: Path) -> dict[str, Any]:
    """Read a file of torch.save's without unpickling more than plain data; its tensors are mapped, not read."""
    try:
        with safe_globals(list(STAND_INS)):
            if unknown := sorted(get_unsafe_globals_in_checkpoint(str(path))):
                raise UserError(str(path), f"is refused: it would make objects of {', '.join(unknown)}")
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(str(path), f"cannot be read without running what it holds, or is damaged ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(str(path), f"holds a {type(content).__name__}; DeepSpeed's files hold a dictionary")
    return content


def _check_plan(
    folder: Path, model: dict[str, Any], models: list[dict[str, Any]], optimizers: list[dict[str, Any]]
) -> int:
    """Return the ZeRO stage; raise UserError if files are missing or the model was divided."""
    stage = model["ds_config"].get("zero_optimization", {}).get("stage", 0)
    ranks = model["dp_world_size"]
    if model["mp_world_size"] != 1:
        raise UserError(str(folder), f"is of {model['mp_world_size']} model-parallel ranks; 1 would be right")
    for kind, found, needed in (
        ("model_states", len(models), ranks if stage == 3 else 1),
        ("optim_states", len(optimizers), ranks if stage else 0),
    ):
        if found != needed:
            raise UserError(str(folder), f"has {found} files *_{kind}.pt; ZeRO-{stage} on {ranks} ranks wrote {needed}")
    return stage


# ------------------------------------------------------------------------------------------------------------- masters


def _read_masters(
    stage: int, models: list[dict[str, Any]], optimizers: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all parameters, and which names are shared with which."""
    model = models[0]
    shared = model["shared_params"] if stage else _shared_storage(model["module"])
    states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
    whole = {
        name: _whole(tensor)
        for name, tensor in model["module"].items()
        if name not in shared and name not in model["buffer_names"]
    }
    if stage == 0:
        return whole | _replicated(model, whole), shared
    if stage == 3:
        return _frozen_shards(models) | _sharded(model, states), shared
    return whole | _partitioned(model, states), shared


def _replicated(model: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the masters of stage 0, which lie in the optimizer's order, by the weights that they round to.

    Two weights that are equal to the last bit may change places: their masters differ by less than that bit.
    """
    optimizer = model["optimizer"]
    fused = "fp32_groups_flat" in optimizer  # all masters of a group in one tensor
    runs = optimizer["fp32_groups_flat"] if fused else chain(*optimizer.get("fp32_groups", []))
    masters: dict[str, Tensor] = {}
    for run in runs:
        flat, offset = run.detach().view(-1), 0
        for name, weight in weights.items():
            if name in masters or not (fused or run.shape == weight.shape):
                continue
            piece, low = flat[offset : offset + math.prod(weight.shape)], weight.pieces[0]
            if torch.equal(piece.to(low.dtype), low):
                masters[name] = Tensor(weight.shape, [piece])
                offset += piece.numel()
        if offset != flat.numel():
            raise ValueError(f"{flat.numel() - offset} elements of the float32 masters belong to none of the weights")
    return masters


def _partitioned(model: dict[str, Any], states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the parameters of stages 1 and 2 together: each rank says which piece of which it has."""
    masters = {name: Tensor(tuple(shape), []) for group in model["param_shapes"] for name, shape in group.items()}
    for state in states:
        for flat, addresses in zip(
            state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True
        ):
            for name, address in addresses.items():
                masters[name].pieces.append(flat.detach()[address.start : address.start + address.numel])
    return masters


def _sharded(model: dict[str, Any], states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the parameters of stage 3 together: every rank has an equal part of each, the last one padded."""
    masters = {}
    for index, shapes in enumerate(model["param_shapes"]):
        flats = [state["fp32_flat_groups"][index].detach() for state in states]
        offset = 0
        for name, shape in shapes.items():
            part = -(-math.prod(shape) // len(states))
            masters[name] = _unpadded(tuple(shape), [flat[offset : offset + part] for flat in flats])
            offset += part
        if offset != flats[0].numel():
            raise ValueError(f"group {index} has {flats[0].numel()} elements a rank; its parameters need {offset}")
    return masters


def _frozen_shards(models: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the parameters of stage 3 together that are not trained."""
    shapes = models[0]["frozen_param_shapes"] or {}
    return {
        name: _unpadded(tuple(shape), [model["frozen_param_fragments"][name].view(-1) for model in models])
        for name, shape in shapes.items()
    }


def _whole(tensor: torch.Tensor) -> Tensor:
    return Tensor(tuple(tensor.shape), [tensor.detach().reshape(-1)])


def _unpadded(shape: tuple[int, ...], parts: list[torch.Tensor]) -> Tensor:
    pieces, missing = [], math.prod(shape)
    for part in parts:
        pieces.append(part[:missing])
        missing -= pieces[-1].numel()
    return Tensor(shape, pieces)


def _shared_storage(module: dict[str, torch.Tensor]) -> dict[str, str]:
    """Find the names that share their memory with an earlier one: stage 0 does not write them down."""
    first: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, tensor in module.items():
        owner = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if owner != name:
            shared[name] = owner
    return shared


# ---------------------------------------------------------------------------------------------------------------- like


def check_like(native: Native, like: Path) -> None:
    """Raise UserError unless names and shapes are those of the Hugging Face folder's model."""
    config = read_json(like / "config.json")
    section = section_from_hugging_face(config)
    with torch.device("meta"):
        model = Decoder(section, config["vocab_size"])
    table = hugging_face_tensors(section, config["vocab_size"])
    expected = {}
    for name, parameter in model.named_parameters():
        for piece in table[name]:
            shape = (piece.stop - piece.start, *parameter.shape[1:])
            expected[piece.name] = shape[::-1] if piece.transpose else shape
    for name, shape in expected.items():
        if name not in native.parameters:
            tied = f"; it shares {native.shared[name]!r}" if name in native.shared else ""
            some = next(iter(native.parameters), None)
            raise UserError(str(like), f"has {name!r}, the checkpoint has not (its first is {some!r}){tied}")
        found = native.parameters[name].shape
        if found != shape:
            raise UserError(str(like), f"has {name!r} of shape {shape}, the checkpoint of {found}")
    if extra := sorted(native.parameters.keys() - expected.keys()):
        raise UserError(str(like), f"has no {extra[0]!r}, one of {len(extra)} tensors that only the checkpoint has")


def _copy_like(like: Path, out: Path) -> None:
    config = {key: value for key, value in read_json(like / "config.json").items() if key != "torch_dtype"}
    write_text(out / "config.json", config | {"dtype": "float32"})
    for name in FOLDER_FILES:
        if (like / name).exists():
            shutil.copyfile(like / name, out / name)
