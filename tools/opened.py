"""Any model, opened: a run folder, a checkpoint, a Hugging Face folder, or one that is quantized, pruned or exported.

What cannot run natively runs in a session of the engine for its format, behind the recipe's own code.
"""

import importlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from bigbatch.recipes.core import language_model
from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.checkpoint import MANIFEST, fill, open_checkpoint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import Session
from bigbatch.recipes.core.models.hugging_face import WeightFolder, check_finite, read_json

CONFIG_FILE, DEPLOYMENT_FILE, INDEX_FILE = "config.json", "deployment.json", "model.safetensors.index.json"
ENGINES = {
    "transformers": "transformers",
    "onnx": "onnx",
    "litert": "litert",
    "executorch": "executorch",
    "gguf": "llama_cpp",
}
"""Of each format in deployment.json the module under tools/engines that runs it, without its ending."""
SIZES = ("_size", "_heads", "_dim", "n_embd", "n_head", "n_inner", "d_model", "num_channels")
PADDING_NUMBERS = 10**6  # by which a native model may be larger than what is stored
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = ("float32", "bfloat16", "float16")
COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "n_embd")
COUNTS += ("max_position_embeddings", "n_layer", "n_head", "n_positions", "d_model", "encoder_layers", "decoder_layers")
COUNTS += ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim")
COUNTS += ("image_size", "patch_size", "num_channels")
"""Settings of config.json that are whole numbers above 0 where they are there; some models have a list of them."""
OWN_TYPES = ("bert", "gpt2", "llama", "mixtral", "vit", "bart", "mbart", "marian")
"""Types that transformers need not be asked about, for it takes seconds to import."""
OPENING_ERRORS = (ValueError, OSError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)
"""What libraries raise at a folder whose settings and weights do not belong together."""


class Opened(NamedTuple):
    """A model in evaluation mode, and what its recipe's functions need beside it."""

    path: Path
    recipe_name: str
    recipe: Any
    config: Any
    facts: dict[str, Any]
    model: Any
    """Native, float32, on the CPU; or what stands in for that (core.foreign)."""


def open_model(
    path: Path, threads: int | None = None, must_predict: bool = False, recipe_name: str | None = None
) -> Opened:
    """Open any model; `threads` are those of an engine, by default its own choice.

    A folder is one of `recipe_name`, by default of the recipe that wrote it or is for its class. Raises UserError for
    what is no model, would run code of its own, or is damaged; with `must_predict` also for a model of a recipe without
    a predictor.
    """
    if not torch.cuda.is_available():  # else DeepSpeed, which transformers imports, prints that it had to guess
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (path / CONFIG_FILE).is_file():
        return _open_folder(path, threads, must_predict, recipe_name)
    if (path / "run.json").is_file() or (path / MANIFEST).is_file():
        return _open_run(path, must_predict)
    if not path.is_dir():
        what = "is no folder" if path.exists() else "there is no such folder"
        raise UserError(str(path), f"{what}; give a run folder, a checkpoint or a Hugging Face folder")
    raise UserError(str(path), "has no run.json, no manifest.json and no config.json: no model that can be opened")


def open_session(folder: Path, threads: int | None = None) -> Session:
    """Open a checked model folder in the engine of its format; a plain one in transformers."""
    engine = importlib.import_module(f"bigbatch.tools.engines.{ENGINES[format_of(folder)]}_engine")
    return engine.open_session(folder, threads)


def format_of(folder: Path) -> str:
    """Return the format that a model folder's deployment.json names; "transformers" without one."""
    path = folder / DEPLOYMENT_FILE
    found = read_json(path).get("format") if path.exists() else "transformers"
    if not isinstance(found, str) or found not in ENGINES:
        raise UserError(str(path), f"format is {found!r}; right is one of {', '.join(ENGINES)}")
    return found


def is_deployed(path: Path) -> bool:
    """Tell whether a path is a model folder that may need a session: quantized, pruned or exported."""
    if not (path / CONFIG_FILE).is_file():
        return False
    return (path / DEPLOYMENT_FILE).exists() or is_quantized(path)


def check_writes(opened: Opened) -> None:
    """Raise UserError unless a model is a decoder that writes text."""
    if not hasattr(opened.config.model, "family"):
        found = f"is a model of the recipe {opened.recipe_name!r}, which generates no text"
        raise UserError(str(opened.path), found)


def is_quantized(folder: Path) -> bool:
    """Tell whether a model folder's weights are those of a quantized model."""
    return bool(read_json(folder / CONFIG_FILE).get("quantization_config"))


def check_config(folder: Path) -> None:
    """Raise UserError for a model folder whose config.json cannot be read, or asks for code of its own."""
    settings = read_json(folder / CONFIG_FILE)
    if code := sorted({"auto_map", "custom_pipelines", "trust_remote_code"} & settings.keys()):
        raise UserError(str(folder / CONFIG_FILE), f"has {code[0]!r}, which asks for code of its own; that is not run")
    _check_settings(str(folder / CONFIG_FILE), settings)


def _check_settings(where: str, settings: dict[str, Any]) -> None:
    """Raise UserError where a setting that every reader trusts is of a kind that none can take."""
    for key in COUNTS:
        value = settings.get(key, 1)
        if not isinstance(value, list) and not (type(value) is int and value > 0):
            raise UserError(where, f"{key} is {value!r}; right is a whole number above 0")
    for key in ("dtype", "torch_dtype"):
        if settings.get(key) not in (None, *DTYPES):
            raise UserError(where, f"{key} is {settings[key]!r}; right is one of {', '.join(DTYPES)}")
    classes = settings.get("architectures")
    if not (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))):
        raise UserError(where, f'architectures is {classes!r}; right is a list of names, such as ["BertForMaskedLM"]')
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise UserError(where, f"model_type is {kind!r}; right is a name, such as 'bert'")
    if kind not in OWN_TYPES and not kind.startswith(recipes.OWN_TYPE):
        import transformers

        if kind not in transformers.CONFIG_MAPPING:
            known = f"transformers {transformers.__version__}"
            raise UserError(where, f"model_type is {kind!r}, which {known} does not know")


def check_weights(folder: Path) -> None:
    """Raise UserError for a folder that has pickles for weights, or damaged files."""
    if format_of(folder) != "transformers":
        return
    index = folder / INDEX_FILE
    table = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(table, dict) or not table:
        raise UserError(str(index), "has no weight_map, which says where each tensor lies")
    if strange := [name for name in table.values() if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(str(index), f"names the file {strange[0]!r}, which does not lie in the folder")
    names = sorted(set(table.values()))
    if not index.exists() and not (folder / names[0]).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f"has its weights in {pickles[0]}, a pickle, which may run code" if pickles else "has no weights"
        raise UserError(str(folder), f"{found}; right is model.safetensors")
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(str(folder / name), f"is damaged, or no safetensors file ({error})") from None


def check_numbers(folder: Path) -> None:
    """Raise UserError for weights that hold what is no number; all of them are read, one at a time."""
    weights = WeightFolder(folder)
    for name in weights.files:
        check_finite(str(weights.files[name]), name, weights.read(name))


def build_native(recipe: Any, config: Any, facts: dict[str, Any], folder: Path, initialize: bool = True) -> Any:
    """Build a folder's native model; raise UserError where its settings and its weights do not belong together."""
    try:
        if initialize:
            return recipes.build_described(recipe, config, facts).eval()
        return recipe.build_model(config, facts, initialize=False)
    except OPENING_ERRORS as error:
        found = f"settings and weights do not belong together ({type(error).__name__}: {error})"
        raise UserError(str(folder), found) from error


def _open_folder(folder: Path, threads: int | None, must_predict: bool, recipe_name: str | None) -> Opened:
    check_config(folder)
    name = recipe_name or recipes.of_folder(folder)
    recipe = _find(name, folder, must_predict)
    check_weights(folder)
    _check_own(folder, recipe)
    config, facts = recipes.describe_folder(recipe, folder)
    if format_of(folder) == "transformers" and not is_quantized(folder):
        try:
            _check_sizes(folder, recipe, config, facts)
            return Opened(folder, name, recipe, config, facts, build_native(recipe, config, facts, folder))
        except UserError:
            if not (folder / DEPLOYMENT_FILE).exists():
                raise
            # Pruned: of a shape that the native model does not have, but transformers' may.
    model = recipe.foreign(config, facts, open_session(folder, threads))
    return Opened(folder, name, recipe, config, facts, model.eval())


def _check_own(folder: Path, recipe: Any) -> None:
    """Raise UserError for a model that transformers has no class for in a form that none of its recipe's has."""
    forms = ("transformers", *(recipes.further(recipe, "EXPORTS_OWN") or ()))
    if recipes.own_recipe(folder) is None or (format_of(folder) in forms and not is_quantized(folder)):
        return
    found = "is quantized" if is_quantized(folder) else f"is in the form of {format_of(folder)}"
    raise UserError(str(folder), f"{found}, though transformers has no class for it; right is what convert has written")


def _check_sizes(folder: Path, recipe: Any, config: Any, facts: dict[str, Any]) -> None:
    """Raise UserError where config.json tells of a far larger model than there are weights for, before it is built."""
    weights = WeightFolder(folder)
    stored = sum(math.prod(weights.shape(name)) for name in weights.files)
    for key, value in read_json(folder / CONFIG_FILE).items():
        most = len(weights.files) if "layer" in key else stored if key.endswith(SIZES) else None
        if most is not None and isinstance(value, int) and value > most:
            found = f"{key} is {value:,}, but the weights are {len(weights.files):,} tensors of {stored:,} numbers"
            raise UserError(str(folder / CONFIG_FILE), found)
    with torch.device("meta"):
        model = build_native(recipe, config, facts, folder, initialize=False)
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > 2 * stored + PADDING_NUMBERS:
        found = f"describes a model of {needed:,} numbers, but the weights are {stored:,}"
        raise UserError(str(folder / CONFIG_FILE), found)


def _open_run(path: Path, must_predict: bool) -> Opened:
    reader = open_checkpoint(path)
    document, facts = reader.manifest["run"], reader.manifest["facts"]
    name = document["recipe"]
    recipe = _find(name, path, must_predict)
    config = recipes.read_config(document, str(path))
    model = recipe.build_model(config, facts, initialize=False)
    fill(reader, model)
    return Opened(path, name, recipe, config, facts, model.eval())


def _find(name: str, path: Path, must_predict: bool) -> Any:
    recipe = recipes.find(name)
    if must_predict and recipes.further(recipe, "predictor") is None:
        writes = recipes.further(recipe, "foreign") is language_model.foreign
        instead = "; right is bigbatch generate" if writes else ""
        raise UserError(str(path), f"is a model of the recipe {name!r}, which predicts none{instead}")
    return recipe
