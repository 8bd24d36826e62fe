"""One process of a run: `python -m bigbatch.recipes.core.worker prepare|train|evaluate RUN_DIR`.

It reads the resolved documents in the run folder and nothing else.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from bigbatch.recipes.core import checkpoint, recipe, runtime, train
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, UserError


def main(argv: list[str]) -> int:
    """Run one part of a run; return the exit status. A failure is told in failure.json, not by a traceback."""
    part = {"prepare": run_prepare, "train": run_train, "evaluate": run_evaluate}[argv[0]]
    run_dir = Path(argv[1])
    phase: dict[str, Any] = {"phase": "start", "step": None}
    try:
        with runtime.failure_digest(run_dir, phase):
            return part(load_run(run_dir), phase)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except Exception:
        if os.environ.get("BIGBATCH_DEBUG"):
            raise
        return EXIT_FAILED


def run_prepare(run: train.Run, phase: dict[str, Any]) -> int:
    """Prepare the run's data; say where they are."""
    phase["phase"] = "prepare"
    print(f"data: {run.recipe.prepare(run.config)}", file=sys.stderr)
    return EXIT_DONE


def run_train(run: train.Run, phase: dict[str, Any]) -> int:
    """Take part in training as the rank that the environment says."""
    stop = runtime.StopFlag()
    stop.install()
    mesh = runtime.start_mesh()
    status = train.train(run, mesh, stop, phase)
    runtime.leave_mesh(mesh)
    return status


def run_evaluate(run: train.Run, phase: dict[str, Any]) -> int:
    """Evaluate the newest checkpoint on the validation split; print the figures as JSON."""
    data = run.recipe.open_data(run.config)
    if data.validation is None:
        raise UserError("data.validation", "is empty and data.validation_fraction is 0: nothing to evaluate on")
    mesh = runtime.start_mesh()
    reader = checkpoint.newest(run.run_dir)
    model = run.recipe.build_model(run.config, data.facts, initialize=False)
    checkpoint.load_weights(reader.folder, model)
    phase.update(phase="evaluate", step=reader.manifest["step"])
    figures = train.evaluate(
        run, model.to(mesh.device, train.DTYPES[run.config.precision.dtype]), data.validation, mesh
    )
    print(json.dumps({"step": reader.manifest["step"], **figures}))
    runtime.leave_mesh(mesh)
    return EXIT_DONE


def load_run(run_dir: Path) -> train.Run:
    """Read the resolved documents of a run folder."""
    document = json.loads((run_dir / "run.json").read_text())
    config = recipe.find_config(document["recipe"]).model_validate_json(json.dumps(document))
    deepspeed = json.loads((run_dir / "deepspeed.json").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    return train.Run(run_dir, config, deepspeed, environment["content_id"], recipe.find(config.recipe))


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread of torch's that outlives gloo now and then aborts the interpreter's own end.
    os._exit(exit_status)
