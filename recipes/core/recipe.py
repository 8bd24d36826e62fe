"""What a recipe gives to the shared loop, and how one is found: by its folder."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import ValidationError

from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.errors import UserError

if TYPE_CHECKING:  # the launcher finds a recipe's configuration on a machine without torch
    import numpy as np
    import torch

    from bigbatch.recipes.core.foreign import Session

RECORD_FILE = "conversion.json"  # what `bigbatch convert` writes beside the weights
OWN_TYPE = "bigbatch_"  # and a recipe's name: model_type in config.json where transformers has no class for a model
WEIGHTS = "weights_folder"
"""The fact that names the folder of such a model's weights."""
Batch = dict[str, Any]  # name -> tensor [B, ...] on the rank's device


class Loss(NamedTuple):
    """A summed loss and what it was summed over; only the shared loop divides."""

    sum: "torch.Tensor"  # float32 scalar
    num_targets: int


class Outputs(NamedTuple):
    """What a model says about one micro-batch."""

    loss: Loss
    arrays: dict[str, "torch.Tensor"]
    """What figures are made of (probabilities, labels): [B, ...], of the same further shape in every batch."""


class Samples(Protocol):
    """A prepared split: random access by sample id, the same for every rank."""

    num_samples: int
    fingerprint: str
    """Changes when the content of any sample would."""
    # It may have an `evaluation_size`, samples of an evaluation's batch, where those are other than training samples.

    def batch(self, sample_ids: "np.ndarray", epochs: "np.ndarray") -> dict[str, "np.ndarray"]:
        """Return the collated batch [B, ...] of these samples, a pure function of both arguments and the run's seed."""
        ...


class DataSplits(NamedTuple):
    """What a recipe opens: a training split, and one to validate on."""

    train: Samples
    validation: Samples | None
    facts: dict[str, Any]
    """What the model and the checkpoint need to know: vocabulary_size, tokenizer (path), fingerprint, ..."""
    test: Samples | None = None
    """Looked at by `bigbatch evaluate --split test` alone."""


class HuggingFaceExport(NamedTuple):
    """How transformers describes the same model."""

    config: dict[str, Any]
    """config.json."""
    tensors: dict[str, list[Any]]
    """For each of our parameters, its pieces in Hugging Face's names (models/hugging_face.py)."""
    generation: dict[str, Any] | None = None
    """generation_config.json, for a model that writes text."""
    auto_class: str = "AutoModelForCausalLM"
    """The class of transformers that builds it; "" where there is none, and the folder is for this project alone."""
    processor: dict[str, Any] | None = None
    """preprocessor_config.json, for a model of images or sound, which has no tokenizer."""
    files: dict[str, Any] | None = None
    """Further JSON files, by their paths in the folder."""
    folders: tuple[Path, ...] = ()
    """Folders that go with the model, each under its own name."""


class Recipe(Protocol):
    """The parts that a recipe module (`recipes/<name>/recipe.py`) defines as functions: never control flow.

    Those of `Further` it may have besides.
    """

    def prepare(self, config: Any) -> Path:
        """Turn raw data into the folder that `open_data` reads; what is whole already is not made again."""
        ...

    def open_data(self, config: Any) -> DataSplits:
        """Map the prepared folder into memory."""
        ...

    def build_model(self, config: Any, facts: dict[str, Any], initialize: bool = True) -> "torch.nn.Module":
        """Build the module with its first weights, drawn from the default generator.

        Without `initialize` no file is read: the weights are about to be overwritten. Where the configuration's `axes`
        hold "tensor" or "expert", the function takes a further argument of that name (parallel.Axis), and builds that
        rank's share; where they hold "sequence", an argument `sequence`, whose ranks divide the work of `loss` by
        tokens: all get the same batch, and `loss` returns that of the whole batch on each, with a gradient of its own
        part alone.
        """
        ...

    def count_targets(self, batch: dict[str, "np.ndarray"]) -> int:
        """Count what `loss` will sum over, before the forward pass."""
        ...

    def loss(self, model: "torch.nn.Module", batch: Batch) -> Loss:
        """Run the forward pass on one micro-batch."""
        ...

    def metrics(self, loss: float) -> dict[str, float]:
        """Turn a mean validation loss into the recipe's own figures (perplexity, bits a character)."""
        ...

    def flops_per_sample(self, config: Any, facts: dict[str, Any]) -> float:
        """Floating-point operations of the model, forward and backward, on one sample; no recomputation counted."""
        ...

    def hugging_face(self, config: Any, facts: dict[str, Any]) -> HuggingFaceExport:
        """Name the model's tensors and settings as transformers does; where that has no class, by `own_export`."""
        ...

    def samples_of_text(self, config: Any, model: "torch.nn.Module", facts: dict[str, Any]) -> list[dict[str, str]]:
        """Return a few outputs to look at, each {"prompt": ..., "text": ...}. Collective: every rank must call it."""
        ...


class Further(Protocol):
    """Functions and constants that a recipe module may have; `further(recipe, name)` returns one of them, or None."""

    MODEL_FACTS: tuple[str, ...]
    """Facts that are of the model though no weights, and go with it; a figure of this name, found by each evaluation
    while training, becomes one."""
    FIELDS: tuple[str, ...]
    """What an input of `predictor` consists of, where it is not one text; the first names it in messages."""

    def fields(self, config: Any) -> tuple[str, ...]:
        """Return FIELDS where they depend on the configuration; () for one text."""
        ...

    MAIN_FIGURES: tuple[str, ...]
    """What stands for the task, the first that there is; else it is the first of all figures."""
    WHOLE_SPLIT: bool
    """Several samples of a split are judged as one (the windows of a text, a ranking), so that none may be left out."""
    READS_FILES: bool
    """An input of `predictor` is the path of a file."""
    EXPORTS_OWN: tuple[str, ...]
    """Formats that models which transformers has no class for are exported to."""

    def outputs(self, model: "torch.nn.Module", batch: Batch) -> Outputs:
        """Run the forward pass on one micro-batch for evaluation: `loss`, and what `figures` is made of."""
        ...

    def figures(
        self, config: Any, facts: dict[str, Any], arrays: dict[str, "np.ndarray"], thorough: bool
    ) -> dict[str, Any]:
        """Turn the outputs of a whole split, a row a sample, into figures by name.

        Numbers while training; when `thorough`, also what takes longer or is no number (intervals, a matrix).
        """
        ...

    def figure_names(self, config: Any, facts: dict[str, Any]) -> list[str]:
        """Name the numbers of `figures`."""
        ...

    def generated_figures(
        self, config: Any, facts: dict[str, Any], model: "torch.nn.Module", samples: Samples
    ) -> dict[str, Any]:
        """Return figures of what the model writes for a split; for `bigbatch evaluate` alone, on one rank."""
        ...

    def learning_rate_scales(self, config: Any, model: "torch.nn.Module") -> dict[str, float]:
        """Return, for parameters by name, the factor on the learning rate; 1 for those left out."""
        ...

    def predictor(
        self, config: Any, facts: dict[str, Any], model: "torch.nn.Module"
    ) -> Callable[[list[Any]], list[dict[str, Any]]]:
        """Return a function from inputs to answers, JSON objects; it raises UserError for an input it cannot take.

        An input is a text, or an object with FIELDS.
        """
        ...

    def describe_folder(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Return (config, facts) of a Hugging Face folder of the recipe's kind; no weights are read.

        They are what `build_model` reads them by, and `foreign` needs, and then `predictor`. A folder of `own_export`
        is described without it.
        """
        ...

    def describes(self, folder: Path) -> bool:
        """Tell whether a folder of the right ARCHITECTURE is of the recipe's kind, where that alone does not tell."""
        ...

    def foreign(self, config: Any, facts: dict[str, Any], session: "Session") -> "torch.nn.Module":
        """Return what stands in for `build_model`'s model where a session runs it: for evaluation, not for training."""
        ...


def further(recipe: Any, name: str) -> Any:
    """Return one of a recipe's further functions or constants, or None."""
    return getattr(recipe, name, None)


def recipe_names() -> list[str]:
    """List the folders beside core that hold a recipe."""
    folder = Path(__file__).parents[1]
    return sorted(path.parent.name for path in folder.glob("*/recipe.py") if path.parent.name != "core")


def find_config(name: str) -> type[RunConfig]:
    """Return the class of a recipe's run documents without importing torch."""
    return _module(name, "config").Config


def find(name: str) -> Any:
    """Return the recipe's module, which follows the Recipe protocol."""
    return _module(name, "recipe")


def of_folder(folder: Path) -> str:
    """Return the recipe whose `describe_folder` takes a Hugging Face folder: the one that wrote it, else by its class.

    Of a model that transformers has no class for, the one that model_type names. Raises UserError where none does.
    """
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str((document.get("architectures") or ["a model of no class"])[0])
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(str(folder), f"is no Hugging Face folder: config.json cannot be read ({error})") from None
    if own := own_recipe(folder):
        return _known(own)
    recorded = _recorded_recipe(folder / RECORD_FILE)
    if recorded in recipe_names() and further(find(recorded), "describe_folder"):
        return recorded
    for name in recipe_names():
        recipe = find(name)
        ending, describes = further(recipe, "ARCHITECTURE"), further(recipe, "describes")
        if ending and architecture.endswith(ending) and (describes is None or describes(folder)):
            return name
    raise UserError(str(folder), f"holds {architecture}, which no recipe predicts with")


def own_recipe(folder: Path) -> str | None:
    """Return the recipe of a model that transformers has no class for; None of any other folder."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind.removeprefix(OWN_TYPE) if isinstance(kind, str) and kind.startswith(OWN_TYPE) else None


def read_config(document: dict[str, Any], where: str) -> Any:
    """Return the configuration that a resolved run document is; raise UserError for one that is none."""
    try:
        return find_config(document["recipe"]).model_validate_json(json.dumps(document))
    except KeyError:
        raise UserError(where, "holds no run document: it names no recipe") from None
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(map(str, found["loc"]))
        raise UserError(where, f"holds a run document that this version cannot read: {place}: {found['msg']}") from None


def describe_folder(recipe: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return (config, facts) of a folder; raise UserError also where its files say what cannot be."""
    try:
        return _describe_own(recipe, folder) if own_recipe(folder) else recipe.describe_folder(folder)
    except ValidationError as error:
        found = error.errors()[0]
        why = f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UserError(str(folder), f"config.json, {RECORD_FILE} or the tokenizer's files describe no model ({why})")


def _describe_own(recipe: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return what the run was, and all of its facts, with the folder for the places that it knew."""
    record, name = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")), recipe.__name__.split(".")[-2]
    for found in (own_recipe(folder), record["run"]["recipe"]):
        if found != name:
            raise UserError(str(folder), f"holds a model of the recipe {found!r}; right is one of {name!r}")
    places = {"tokenizer": str(folder)} if (folder / "tokenizer.json").is_file() else {}
    return read_config(record["run"], str(folder / RECORD_FILE)), {**record["facts"], **places, WEIGHTS: str(folder)}


def open_folder(recipe: Any, folder: Path) -> tuple[Any, dict[str, Any], "torch.nn.Module"]:
    """Open a Hugging Face folder of a recipe's kind, as a native model: (config, facts, model)."""
    config, facts = describe_folder(recipe, folder)
    return config, facts, build_described(recipe, config, facts).eval()


def build_described(recipe: Any, config: Any, facts: dict[str, Any]) -> "torch.nn.Module":
    """Build the model of a folder that `describe_folder` has described, with its weights."""
    if WEIGHTS not in facts:
        return recipe.build_model(config, facts)
    from bigbatch.recipes.core.models.hugging_face import load_own  # noqa: PLC0415 - torch, which is not needed above

    model = recipe.build_model(config, facts, initialize=False)
    load_own(model, Path(facts[WEIGHTS]))
    return model


def _recorded_recipe(record: Path) -> str | None:
    if not record.is_file():
        return None
    try:
        return json.loads(record.read_text(encoding="utf-8")).get("recipe")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(str(record), f"cannot be read ({error})") from None


def _known(name: str) -> str:
    if name not in recipe_names():
        raise UserError("recipe", f"there is no recipe {name!r}; there are: {', '.join(recipe_names())}")
    return name


def _module(name: str, part: str) -> ModuleType:
    _known(name)
    return importlib.import_module(f"bigbatch.recipes.{name}.{part}")
