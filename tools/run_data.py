"""The prepared data of the run that a model comes from, to judge the model on, in whatever format it is."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.data.tokenizing import TOKENIZER_FILE, fingerprint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import conversion_record, read_json
from bigbatch.recipes.core.recipe import DataSplits

PLACES = ("tokenizer", "prepared")
"""Facts that say where the data are prepared; all others are the model's own."""


class RunData(NamedTuple):
    """What a recipe's functions judge a model by."""

    config: Any
    splits: DataSplits
    facts: dict[str, Any]
    """Of the model, with the places of these data."""


def open_data(opened: Any, run: Path | dict[str, Any] | None = None) -> RunData:
    """Open the data of a run (its folder or document), by default of the one that an opened model comes from.

    The current folder becomes the one that the run was started from, where it is still there. Raises UserError where
    the data are not here, or are of other tokens or labels than the model's.
    """
    record = conversion_record(opened.path)
    document = read_json(run / "run.json") if isinstance(run, Path) else run or record["run"]
    if not document and (opened.path / "config.json").exists():
        raise UserError(str(opened.path), "does not say what data it was trained on; --run RUN_DIR names a run's")
    if document and (found := document.get("recipe")) != opened.recipe_name:
        raise UserError("--run", f"is of the recipe {found!r}, the model of {opened.recipe_name!r}")
    home = record.get("working_directory")
    if run is None and home and Path(home).is_dir():
        os.chdir(home)  # the document's relative paths lead from there
    config = recipes.read_config(document, str(opened.path)) if document else opened.config
    try:
        splits = opened.recipe.open_data(config)
    except UserError as error:
        message = f"the data to judge it on are not here ({error}); --run RUN_DIR names a run's"
        raise UserError(str(opened.path), message) from error
    facts = {**splits.facts, **opened.facts, **{name: splits.facts[name] for name in PLACES if name in splits.facts}}
    _check_fits(opened, splits.facts)
    return RunData(config, splits, facts)


def _check_fits(opened: Any, facts: dict[str, Any]) -> None:
    for name in ("labels", "alphabet"):
        ours, theirs = opened.facts.get(name), facts.get(name)
        if ours != theirs and ours is not None and theirs is not None:
            raise UserError("--run", f"its data have the {name} {theirs}, the model {ours}")
    files = [Path(found.get("tokenizer", "")) / TOKENIZER_FILE for found in (facts, opened.facts)]
    if all(file.is_file() for file in files) and len({fingerprint(file) for file in files}) > 1:
        raise UserError("--run", f"its data have another tokenizer ({files[0]}) than the model ({files[1]})")
