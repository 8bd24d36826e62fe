"""`bigbatch evaluate` of a model folder or a checkpoint: the figures that its run's evaluation has."""

import json
from pathlib import Path
from typing import Any

from bigbatch.recipes.core.errors import EXIT_DONE, UserError


def judge(path: Path, split: str, run: dict[str, Any] | None = None, threads: int | None = None) -> dict[str, Any]:
    """Evaluate a model on a split of the run that it comes from, or of the given document's; return the figures."""
    from bigbatch.recipes.core import precision, runtime, train
    from bigbatch.recipes.core.recipe import further
    from bigbatch.tools.opened import open_model
    from bigbatch.tools.run_data import open_data

    path = path.absolute()  # before the current folder may change
    opened = open_model(path, threads)
    config, splits, facts = open_data(opened, run)
    samples = splits.test if split == "test" else splits.validation
    if samples is None:
        raise UserError(f"data.{split}", "is empty and nothing is cut from the training data: nothing to evaluate on")
    mesh = runtime.start_mesh()
    model = precision.place(opened.model, mesh.device, config.precision.dtype)
    whole = train.Run(path, config, {}, "", opened.recipe)
    figures = train.evaluate(whole, model, samples, mesh, facts, thorough=True)
    if write := further(opened.recipe, "generated_figures"):
        figures |= write(config, facts, model, samples)
    runtime.leave_mesh(mesh)
    return {"model": str(path), "split": split, **figures}


def print_figures(path: Path, split: str, run: dict[str, Any] | None = None) -> int:
    """Do what `bigbatch evaluate` does with a model folder or a checkpoint."""
    print(json.dumps(judge(path, split, run)))
    return EXIT_DONE
