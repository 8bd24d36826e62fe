"""`bigbatch prune MODEL OUT --method M --ratio R [--recover STEPS]`: take weights out of a model, and train it on.

Unstructured methods set single weights to zero; structured ones make the model smaller. A curve does it at several
ratios and measures each.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bigbatch.recipes.core.arguments import count
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import Piece, piece_shape, read_json
from bigbatch.tools import ladder
from bigbatch.tools.convert import write_state, write_text
from bigbatch.tools.measure import Measurement, Options, measure
from bigbatch.tools.opened import build_native
from bigbatch.tools.pruning.recovery import Recovery, recover
from bigbatch.tools.pruning.structured import Pruned, without_heads, without_layers, without_units
from bigbatch.tools.pruning.training_data import training_batches
from bigbatch.tools.pruning.unstructured import apply_masks, magnitudes, masks, movements, prunable, two_of_four

METHODS = ("magnitude", "movement", "2:4", "heads", "feed_forward", "layers")
STRUCTURED = ("heads", "feed_forward", "layers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str]) -> int:
    """Run the verb `prune`."""
    parser = ladder.rung_parser("prune", "Take weights out of a model, and train it on.")
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument("--method", choices=METHODS, required=True, help="what goes: single weights, or whole parts")
    pruning.add_argument("--ratio", type=_ratio, metavar="R", help="how much of it goes, between 0 and 1 (2:4: half)")
    pruning.add_argument(
        "--scope", choices=("global", "layer"), help="magnitude: compared in all matrices (default), or each"
    )
    pruning.add_argument(
        "--importance",
        choices=("taylor", "magnitude"),
        help="heads, feed_forward: by the loss (default), or by the weights",
    )
    pruning.add_argument("--score-steps", type=count, metavar="N", help="batches that scores come from (default 32)")
    pruning.add_argument("--recover", type=count, metavar="STEPS", help="train so many steps on what is left")
    pruning.add_argument("--recover-rate", type=float, metavar="RATE", help="learning rate (default 0.3 of the run's)")
    pruning.add_argument("--curve", type=_ratios, metavar="R,R", help="do and measure it at these ratios as well")
    arguments = parser.parse_args(argv)
    _check(arguments)
    return ladder.climb("prune", arguments, partial(make, arguments))


def make(arguments: argparse.Namespace, source: ladder.Source, folder: Path) -> dict[str, Any]:
    """Write the pruned model into `folder`; return its part of deployment.json."""
    plan = Plan(
        arguments.method,
        arguments.scope or "global",
        arguments.importance or "taylor",
        arguments.score_steps or 32,
        arguments.seed,
        str(arguments.run.absolute()) if arguments.run else None,
        Recovery(arguments.recover, arguments.recover_rate) if arguments.recover else None,
    )
    curve = []
    for ratio in arguments.curve or ():
        place = folder.with_name("curve")
        place.mkdir()
        record = prune(plan, source, place, ratio)
        curve.append({"ratio": ratio, "parameters": record["parameters"], **_measured(arguments, source, place)})
        shutil.rmtree(place)
    record = prune(plan, source, folder, arguments.ratio)
    return {"format": "transformers", "record": {**record, **({"curve": curve} if curve else {})}}


class Plan(NamedTuple):
    """What is done to a model at any ratio."""

    method: str
    scope: str = "global"
    importance: str = "taylor"
    score_steps: int = 32
    seed: int = 0
    run: str | None = None
    recovery: Recovery | None = None


def prune(plan: Plan, source: ladder.Source, folder: Path, ratio: float) -> dict[str, Any]:
    """Write a pruned model, recovered where the plan says so, and return what was done."""
    told = f"{plan.method} {ratio:.0%}"
    print(f"pruning: {told}", file=sys.stderr, flush=True)
    model = build_native(source.recipe, source.config, source.facts, source.path)
    settings = read_json(source.path / "config.json")
    before = _count(dict(model.named_parameters()), _export(source, settings, {}).tensors)
    pruned = _pruned(plan, source, model, ratio)
    export = _export(source, settings, pruned.shape)
    dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    write_state(folder, pruned.state, export.tensors, DTYPES[dtype])
    write_text(folder / "config.json", {**settings, **export.config, "dtype": dtype})
    if plan.recovery:
        ladder.carry(source.path, folder)
        run = Path(plan.run) if plan.run else None
        recover(source, folder, folder.parent, plan.recovery, run, keep_zeros=not pruned.shape)
    return {
        "name": told,
        "method": plan.method,
        "ratio": ratio,
        "parameters_before": before,
        "parameters": _count(pruned.state, export.tensors),
        "recovery_steps": plan.recovery.steps if plan.recovery else 0,
        **pruned.record,
    }


def _pruned(plan: Plan, source: ladder.Source, model: nn.Module, ratio: float) -> Pruned:
    """Prune a model in memory."""

    def batches() -> Any:
        return training_batches(source, plan.score_steps, plan.seed, plan.run)

    if plan.method in ("heads", "feed_forward"):
        scoring = list(batches()) if plan.importance == "taylor" else None
        take = without_heads if plan.method == "heads" else without_units
        return take(source.recipe, model, scoring, ratio)
    if plan.method == "layers":
        return without_layers(source.recipe, model, list(batches()), ratio)
    if plan.method == "movement":
        found = masks(movements(source.recipe, model, batches(), plan.score_steps, ratio), ratio, is_global=False)
    elif plan.method == "2:4":
        found = two_of_four(magnitudes(model))
    else:
        found = masks(magnitudes(model), ratio, plan.scope == "global")
    apply_masks(model, found)
    weights = prunable(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    share = zeros / sum(weight.numel() for weight in weights.values())
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Pruned(state, {}, {"zeros": zeros, "share_of_zeros": round(share, 4)})


def _count(state: Mapping[str, torch.Tensor], table: dict[str, list[Piece]]) -> int:
    """Count parameters as a folder holds them, without the rows that fill a table up."""
    return sum(math.prod(piece_shape(piece, tuple(state[name].shape))) for name in table for piece in table[name])


def _export(source: ladder.Source, settings: dict[str, Any], shape: dict[str, int]) -> Any:
    """Name tensors and settings of the model in its new shape, as transformers does."""
    config, facts = source.config, {"end_of_text": settings.get("eos_token_id"), **source.facts}
    for place in ("encoder", "shape"):
        if facts.get(place):
            facts = {**facts, place: {**facts[place], **shape}}
            break
    else:
        config = config.model_copy(update={"model": config.model.model_copy(update=shape)})
    return source.recipe.hugging_face(config, facts)


def _measured(arguments: argparse.Namespace, source: ladder.Source, folder: Path) -> dict[str, Any]:
    """Measure a point of the curve as the ladder measures the rung."""
    ladder.carry(source.path, folder)
    write_text(folder / ladder.DEPLOYMENT_FILE, {"format": "transformers"})
    run = str(arguments.run.absolute()) if arguments.run else None
    options = Options(arguments.samples, arguments.seed, arguments.split, arguments.threads, run)
    found: Measurement = measure({folder: folder.with_name("measured")}, options)[0]
    return {"measured": found._asdict()}


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    method = arguments.method
    if method == "2:4":
        if arguments.ratio not in (None, 0.5) or arguments.curve:
            raise UserError("--ratio", "2:4 is one half, and has no curve; leave --ratio and --curve out")
        arguments.ratio = 0.5
    rules: tuple[tuple[str, Callable[[], bool], str], ...] = (
        ("scope", lambda: method == "magnitude", "--method magnitude"),
        ("importance", lambda: method in ("heads", "feed_forward"), "--method heads or feed_forward"),
        ("score_steps", lambda: method in ("movement", *STRUCTURED), "movement or a structured method"),
        ("recover_rate", lambda: arguments.recover is not None, "--recover"),
        ("curve", lambda: not arguments.no_measure, "measuring, not --no-measure"),
    )
    for name, holds, needs in rules:
        if getattr(arguments, name) is not None and not holds():
            raise UserError(f"--{name.replace('_', '-')}", f"has no effect here: it needs {needs}")
    if arguments.ratio is None:
        raise UserError("--ratio", "is missing; right is a share such as 0.3")


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number between 0 and 1")
    return ratio


def _ratios(text: str) -> list[float]:
    return [_ratio(part) for part in text.split(",")]
