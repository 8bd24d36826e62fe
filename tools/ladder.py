"""A rung of the ladder from a checkpoint to a deployed model: make, measure before and after, keep the budget, commit.

A verb gives `make`; all the rest is the same for each. What is made lies beside OUT until it is whole and within its
budget, and is renamed then: a folder called OUT has been measured.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.arguments import Parser, count
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.models.hugging_face import conversion_record, read_json
from bigbatch.recipes.core.recipe import RECORD_FILE
from bigbatch.recipes.core.run_home import enter_home
from bigbatch.recipes.core.tensor_file import sync_folder
from bigbatch.tools.convert import TOKENIZER_FILES, convert, parse_bytes, scratch_beside, write_text
from bigbatch.tools.measure import Measurement, Options, agreement, measure, open_samples
from bigbatch.tools.model_card import Rung, print_table, write_card, write_report
from bigbatch.tools.opened import DEPLOYMENT_FILE, check_config, check_numbers, check_weights, format_of, is_quantized

EXIT_OVER_BUDGET = 3
CARRIED = ("config.json", "generation_config.json", "preprocessor_config.json", "README.md", RECORD_FILE)
LEAST_CALIBRATION = 8  # samples


class Source(NamedTuple):
    """The Hugging Face folder that a rung starts from."""

    path: Path
    recipe_name: str
    recipe: Any
    config: Any
    facts: dict[str, Any]
    record: dict[str, Any]
    """conversion.json."""


class Budget(NamedTuple):
    """What may be lost and taken; None is any amount."""

    max_drop: float | None = None
    """Points of a hundred of a figure that is better when higher; else per cent of the figure."""
    max_bytes: int | None = None
    max_latency_milliseconds: float | None = None
    """Median, of batch 1."""


def rung_parser(verb: str, description: str) -> Parser:
    """Return a parser of what every rung takes."""
    parser = Parser(prog=f"bigbatch {verb}", description=description)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run folder, a checkpoint or a model folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    budget = parser.add_argument_group("budget (what is over it is not kept; exit status 3)")
    drop = "points of a hundred that the figure may lose; per cent that a loss or a perplexity may rise"
    budget.add_argument("--max-drop", type=float, metavar="POINTS", help=drop)
    budget.add_argument("--max-size", metavar="SIZE", help="of the folder, such as 20MB")
    budget.add_argument("--max-latency", type=float, metavar="MS", help="median at batch 1, in milliseconds")
    measuring = parser.add_argument_group("measuring")
    defaults = Options()
    measuring.add_argument("--samples", type=count, default=defaults.num_samples, help="(default %(default)s)")
    measuring.add_argument("--seed", type=int, default=defaults.seed, help="of every choice of samples")
    measuring.add_argument("--split", choices=("test", "validation", "train"), help="(default: the first of these)")
    measuring.add_argument("--threads", type=count, default=defaults.threads, help="(default %(default)s)")
    measuring.add_argument("--run", type=Path, metavar="RUN_DIR", help="whose data are used (default: the model's own)")
    measuring.add_argument("--no-measure", action="store_true", help="make only: no table, no --max-drop")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    return parser


def climb(verb: str, arguments: argparse.Namespace, make: Callable[[Source, Path], dict[str, Any]]) -> int:
    """Run a rung; return the exit status: 0, or 3 where the budget is not kept and OUT is not written."""
    budget = read_budget(arguments)
    out = arguments.out.absolute()
    if out.exists():
        raise UserError(str(arguments.out), "exists already; name a folder that does not")
    run = str(arguments.run.absolute()) if arguments.run else None
    if run:
        _check_run(arguments.run)
    options = Options(arguments.samples, arguments.seed, arguments.split, arguments.threads, run)
    with scratch_beside(out) as scratch:
        source = open_source(arguments.model, scratch)
        _check_class(verb, source, arguments.model)
        rungs = _rungs_of(source.path)
        partial = scratch / "made"
        partial.mkdir()
        made = make(source, partial)
        carry(source.path, partial)
        rung = _measured(verb, source, partial, scratch, made, None if arguments.no_measure else options)
        rungs.append(rung)
        described = {key: value for key, value in made.items() if key != "record"}
        write_text(partial / DEPLOYMENT_FILE, {**described, "rungs": [one.document() for one in rungs]})
        write_card(partial, source, rungs)
        write_report(partial, source, rungs)
        over = over_budget(rung, partial, budget)
        if arguments.json:
            print(json.dumps({"out": str(arguments.out), "over_budget": over, **rung.document()}, indent=2))
        else:
            print_table(rungs)
        if over:
            for line in over:
                print(f"error: {line}; {arguments.out} is not written", file=sys.stderr)
            return EXIT_OVER_BUDGET
        sync_folder(partial)
        partial.rename(out)
    if not arguments.json:
        print(arguments.out)
    return EXIT_DONE


def open_source(model: Path, scratch: Path) -> Source:
    """Describe a model folder; convert a run or a checkpoint into one first."""
    if (model / "config.json").is_file():
        path = model.absolute()
        check_config(path)
        check_weights(path)
        if (made := format_of(path)) != "transformers":
            raise UserError(str(model), f"holds a model exported as {made}; right is the folder that it was made from")
        if is_quantized(path):
            raise UserError(str(model), "is quantized already; right is the folder that it was made from")
        check_numbers(path)
    else:
        path = scratch / "converted"
        convert(enter_home(model), path)
    recipe_name = recipes.of_folder(path)
    recipe = recipes.find(recipe_name)
    config, facts = recipes.describe_folder(recipe, path)
    return Source(path, recipe_name, recipe, config, facts, conversion_record(path))


def _check_class(verb: str, source: Source, model: Path) -> None:
    """Raise UserError for a model that transformers has no class for, unless its recipe tells how it is exported."""
    if recipes.own_recipe(source.path) is None:
        return
    formats = recipes.further(source.recipe, "EXPORTS_OWN") or ()
    if not (verb == "export" and formats):
        instead = f"bigbatch export --format {formats[0]}" if formats else "predict, evaluate or serve, as it is"
        found = f"holds a {source.recipe_name} model that transformers has no class for, which {verb} needs"
        raise UserError(str(model), f"{found}; right is {instead}")


def _check_run(run: Path) -> None:
    """Raise UserError for a --run that is no run folder, before the work that its data are for."""
    if not (run / "run.json").is_file():
        what = "has no run.json" if run.is_dir() else "there is no such folder"
        raise UserError("--run", f"{run}: {what}; right is a run folder, such as bigbatch train writes")


def calibration(source: Source, num_samples: int, seed: int, run: Path | None = None) -> list[dict[str, torch.Tensor]]:
    """Return a seeded choice of training samples, each {name: [1, ...]} as the recipe's native model takes them.

    Raises UserError where there are fewer than are asked for.
    """
    options = Options(split="train", run=str(run.absolute()) if run else None)
    _, _, samples = open_samples(source, options)
    if not LEAST_CALIBRATION <= num_samples <= samples.num_samples:
        message = (
            f"found {num_samples}; {samples.num_samples} training samples are there, {LEAST_CALIBRATION} are the least"
        )
        raise UserError("--calibration-samples", message)
    chosen = np.sort(np.random.default_rng(seed).choice(samples.num_samples, num_samples, replace=False))
    batches = (samples.batch(chosen[at : at + 1], np.zeros(1, np.int64)) for at in range(num_samples))
    return [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]


def carry(source: Path, partial: Path) -> None:
    """Copy what belongs to a model folder and has not been made anew."""
    for name in (*CARRIED, *TOKENIZER_FILES, *_further_files(source)):
        if (source / name).is_file() and not (partial / name).exists():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, partial / name)


def _further_files(source: Path) -> list[str]:
    """Name small files that a recipe has put beside the weights."""
    known = {*CARRIED, DEPLOYMENT_FILE, "model_card.md", "report.html", "model.safetensors.index.json"}
    files = (path.relative_to(source) for path in source.rglob("*.json"))
    return [str(path) for path in files if str(path) not in known]


def _measured(
    verb: str, source: Source, partial: Path, scratch: Path, made: dict[str, Any], options: Options | None
) -> Rung:
    record, kind = made.get("record", {}), made["format"]
    if options is None:
        return Rung(verb, kind, record, None, None, None)
    print(f"measuring {source.path.name} and what was made of it", file=sys.stderr, flush=True)
    write_text(partial / DEPLOYMENT_FILE, {key: value for key, value in made.items() if key != "record"})
    results = {source.path: scratch / "before", partial: scratch / "after"}
    before, after = measure(results, options)
    return Rung(verb, kind, record, before, after, agreement(scratch / "before", scratch / "after"))


def _rungs_of(folder: Path) -> list[Rung]:
    path = folder / DEPLOYMENT_FILE
    try:
        return [Rung.read(document) for document in read_json(path).get("rungs", [])] if path.exists() else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"rungs tell of no measurements ({type(error).__name__}: {error}); right is to leave them out"
        raise UserError(str(path), found) from None


def read_budget(arguments: argparse.Namespace) -> Budget:
    """Read the budget; raise UserError for one that cannot be kept."""
    if arguments.max_drop is not None and arguments.no_measure:
        raise UserError("--max-drop", "is given with --no-measure: quality is to be measured, or not")
    if arguments.max_latency is not None and arguments.no_measure:
        raise UserError("--max-latency", "is given with --no-measure: latency is to be measured, or not")
    drop, latency = arguments.max_drop, arguments.max_latency
    for flag, value, least in (("--max-drop", drop, -math.inf), ("--max-latency", latency, 0)):
        if value is not None and not least < value < math.inf:
            raise UserError(flag, f"found {value}; right is a number such as 0.5")
    size = parse_bytes(arguments.max_size, "--max-size") if arguments.max_size else None
    return Budget(drop, size, latency)


def over_budget(rung: Rung, folder: Path, budget: Budget) -> list[str]:
    """Return a line for each part of the budget that is not kept."""
    over = []
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if budget.max_bytes is not None and num_bytes > budget.max_bytes:
        over.append(f"--max-size: {num_bytes:,} bytes, at most {budget.max_bytes:,} are allowed")
    if rung.before is None or rung.after is None:
        return over
    drop = rung.drop
    if budget.max_drop is not None and not drop <= budget.max_drop:
        name = rung.after.figure.name
        over.append(f"--max-drop: {name} lost {drop:.2f} {rung.drop_unit}, at most {budget.max_drop:g} are allowed")
    median = rung.after.latency["1"][0]
    if budget.max_latency_milliseconds is not None and median > budget.max_latency_milliseconds:
        over.append(f"--max-latency: {median:.2f} ms, at most {budget.max_latency_milliseconds:g} ms are allowed")
    return over


__all__ = ["Budget", "Measurement", "Rung", "Source", "calibration", "climb", "open_source", "rung_parser"]
