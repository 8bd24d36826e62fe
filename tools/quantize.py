"""`bigbatch quantize MODEL OUT --method M`: smaller numbers for a trained model, measured before and after."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigbatch.recipes.core.arguments import count
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.recipes.core.precision import DTYPES
from bigbatch.tools import ladder
from bigbatch.tools.quantization import layers as of_model
from bigbatch.tools.quantization.calibration import calibration_inputs
from bigbatch.tools.quantization.methods import GROUP_SIZES, METHODS, NF4_BLOCK, Method, runs_here
from bigbatch.tools.quantization.sensitivity import Sensitivity, measure_layers
from bigbatch.tools.quantization.smoothing import STEPS, Step, steps_of
from bigbatch.tools.quantization.writers import Job, check_installed, write

SENSITIVITY_SAMPLES = 16
SHOWN_LAYERS = 10


class Choice(NamedTuple):
    """What is to be done."""

    method: str
    calibration_samples: int = 128
    seed: int = 0
    group_size: int | None = None
    """None: the largest that divides the rows of all layers."""
    keep: str | None = None
    keep_worst: int = 0
    shows_sensitivity: bool = False
    run: Path | None = None
    dtype: str | None = None
    """Of what is not quantized, by its name in precision.DTYPES; None: as it is."""


def main(argv: list[str]) -> int:
    """Run the verb `quantize`."""
    if not torch.cuda.is_available():  # else DeepSpeed, which transformers imports, prints that it had to guess
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    parser = ladder.rung_parser("quantize", "Store a model's linear layers in 4 or 8 bits.")
    methods = "; ".join(f"{name}: {method.summary} ({method.library})" for name, method in METHODS.items())
    parser.add_argument("--method", choices=tuple(METHODS), required=True, metavar="M", help=methods)
    parser.add_argument("--calibration-samples", type=count, default=128, metavar="N", help="(default %(default)s)")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, help="4 bits: weights that share a scale")
    parser.add_argument("--sensitivity", action="store_true", help="measure what each layer costs")
    worst = "leave the N layers that cost most as they are, and those fused with them"
    parser.add_argument("--keep-worst", type=count, default=0, metavar="N", help=worst)
    names = "leave these as they are: names, the ends of names or patterns, comma-separated"
    parser.add_argument("--keep", metavar="LAYERS", help=names)
    rest = "what the rest is stored and computed in (default: as in MODEL); embeddings are most of a small model"
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=rest)
    arguments = parser.parse_args(argv)
    choice = Choice(
        arguments.method,
        arguments.calibration_samples,
        arguments.seed,
        arguments.group_size,
        arguments.keep,
        arguments.keep_worst,
        arguments.sensitivity,
        arguments.run,
        arguments.dtype,
    )
    method = METHODS[choice.method]
    if choice.group_size and not (method.weights and method.weights["strategy"] == "group"):
        raise UserError(
            "--group-size", f"has no effect on {choice.method}, whose weights do not share scales in groups"
        )
    check_installed(method)
    if note := _hardware_note(method):
        print(f"{choice.method}: {note}", file=sys.stderr, flush=True)
    return ladder.climb("quantize", arguments, lambda source, partial: quantize(source, partial, choice))


def quantize(source: ladder.Source, partial: Path, choice: Choice) -> dict[str, Any]:
    """Write the source's model, quantized, to `partial`; return what deployment.json says of it."""
    method = METHODS[choice.method]
    settings = read_json(source.path / "config.json")
    with tempfile.TemporaryDirectory(dir=partial.parent) as scratch:
        folder = source.path
        if settings.get("model_type") == "gpt2":
            folder = of_model.unfolded_gpt2(folder, Path(scratch) / "unfolded")
        steps = _steps(method, choice.method, read_json(folder / "config.json"), str(source.path))
        model = of_model.open_model(folder, dtype=torch.float32)
        found = of_model.linear_layers(model)
        of_model.check_share(model, found, str(source.path))
        group_size = _group_size(method, found, choice.group_size)
        indivisible = of_model.indivisible(found, group_size)
        if len(indivisible) == len(found):
            message = f"no layer has rows of whole groups of {group_size}; right is --method int8_weight"
            raise UserError(str(source.path), message)
        kept = of_model.chosen(found, choice.keep) if choice.keep else []
        ignored = [*of_model.heads(model), *indivisible]
        inputs, table = [], []
        if method.is_calibrated or choice.shows_sensitivity or choice.keep_worst:
            inputs = calibration_inputs(source, model, choice.calibration_samples, choice.seed, choice.run)
        if choice.shows_sensitivity or choice.keep_worst:
            table = _table(model, choice, group_size, ignored, inputs)
        kept = of_model.with_fused(found, [*kept, *(one.layer for one in table[: choice.keep_worst])])
        num_quantized = len(found) - len({*indivisible, *kept})
        if not num_quantized:
            raise UserError("--keep-worst" if table else "--keep", f"leaves none of {len(found)} layers to quantize")
        dtype = str(DTYPES[choice.dtype]).removeprefix("torch.") if choice.dtype else "auto"
        write(Job(folder, partial, choice.method, group_size, [*ignored, *kept], dtype), inputs, steps)
    record = {
        "method": choice.method,
        "library": method.library,
        "group_size": group_size,
        "dtype_of_the_rest": choice.dtype,
        "quantized_layers": num_quantized,
        "kept_layers": kept,
        "other_layers_in_full_precision": ignored,
        "calibration_samples": len(inputs) if method.is_calibrated else 0,
        "seed": choice.seed,
        "unfolded": "GPT-2 written as OPT" if folder != source.path else None,
        "hardware": _hardware_note(method),
        "sensitivity": [one._asdict() for one in table],
    }
    return {"format": "transformers", "record": record}


def _hardware_note(method: Method) -> str | None:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return runs_here(method, capability)


def _steps(method: Method, name: str, settings: dict[str, Any], where: str) -> list[Step]:
    """Return where a smoothing method may smooth; raise UserError where it may not."""
    if not method.smooths:
        return []
    steps = steps_of(settings)
    if steps is None:
        instead = "gptq_w4a16 or int4_weight" if method.smooths == "awq" else "int8_dynamic"
        message = f"is a {settings.get('model_type')!r}; {name} moves scales into the norms ahead of layers, which"
        raise UserError(where, f"{message} {', '.join(STEPS)} and GPT-2 have; right is --method {instead}")
    return steps


def _group_size(method: Method, layers: dict[str, Any], asked: int | None) -> int | None:
    """Return how many weights share a scale; None where all of a row do."""
    if method.weights is None:
        return NF4_BLOCK
    if method.weights["strategy"] != "group":
        return None
    fitting = [size for size in GROUP_SIZES if not of_model.indivisible(layers, size)]
    return asked or (fitting[0] if fitting else GROUP_SIZES[-1])


def _table(
    model: Any, choice: Choice, group_size: int | None, ignored: list[str], inputs: list[of_model.Inputs]
) -> list[Sensitivity]:
    """Measure, and print, what each layer costs."""
    print("measuring what each layer costs", file=sys.stderr, flush=True)
    table = measure_layers(model, choice.method, group_size, ignored, inputs[:SENSITIVITY_SAMPLES])
    width = max(len(one.layer) for one in table)
    print(f"{'layer':{width}}  parameters  divergence", file=sys.stderr)
    for one in table[: None if choice.shows_sensitivity else SHOWN_LAYERS]:
        print(f"{one.layer:{width}}  {one.parameters:10,}  {one.divergence:.3e}", file=sys.stderr)
    return table
