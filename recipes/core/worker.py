"""One process of a run: `python -m bigbatch.recipes.core.worker prepare|train|evaluate RUN_DIR`.

It reads run.json and deepspeed.json in the run folder and nothing else.
"""

import json
import sys
from pathlib import Path

from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_USER_ERROR, UserError


def main(argv: list[str]) -> int:
    """Run one part of a run; return the exit status."""
    verb, run_dir = argv[0], Path(argv[1])
    try:
        return {"prepare": prepare, "train": train, "evaluate": evaluate}[verb](run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def prepare(run_dir: Path) -> int:
    """Prepare the run's data; print the folder."""
    document = json.loads((run_dir / "run.json").read_text())
    recipe = recipes.find(document["recipe"])
    folder = recipe.prepare(recipes.find_config(document["recipe"]).model_validate_json(json.dumps(document)))
    print(f"data: {folder}", file=sys.stderr)
    return EXIT_DONE


def train(run_dir: Path) -> int:
    """Take part in training as the rank that the environment says."""
    # Imported here: torch and DeepSpeed take seconds, and prepare needs neither.
    from bigbatch.recipes.core import runtime  # noqa: PLC0415
    from bigbatch.recipes.core.train import train as train_loop  # noqa: PLC0415

    stop = runtime.StopFlag()
    stop.install()
    phase: dict[str, object] = {"phase": "start", "step": None}
    with runtime.failure_digest(run_dir, phase):
        mesh = runtime.start_mesh()
        status = train_loop(load_run(run_dir), mesh, stop, phase)
        runtime.leave_mesh(mesh)
    return status


def evaluate(run_dir: Path) -> int:
    """Evaluate the newest checkpoint on the validation split; print the figures as JSON."""
    import torch  # noqa: PLC0415

    from bigbatch.recipes.core import checkpoint, runtime  # noqa: PLC0415
    from bigbatch.recipes.core.train import evaluate as evaluate_split  # noqa: PLC0415

    run = load_run(run_dir)
    data = run.recipe.open_data(run.config)
    if data.validation is None:
        raise UserError(
            "data.validation", "is empty and data.validation_fraction is 0: there is nothing to evaluate on"
        )
    mesh = runtime.start_mesh()
    reader = checkpoint.newest(run_dir)
    model = run.recipe.build_model(run.config, data.facts)
    checkpoint.load_weights(reader.folder, model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.config.precision.dtype]
    figures = evaluate_split(run, model.to(mesh.device, dtype), data.validation, mesh)
    print(json.dumps({"step": reader.manifest["step"], **figures}))
    runtime.leave_mesh(mesh)
    return EXIT_DONE


def load_run(run_dir: Path):  # noqa: ANN201
    """Read the resolved documents of a run folder."""
    from bigbatch.recipes.core.train import Run  # noqa: PLC0415

    document = json.loads((run_dir / "run.json").read_text())
    config = recipes.find_config(document["recipe"]).model_validate_json(json.dumps(document))
    deepspeed = json.loads((run_dir / "deepspeed.json").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    return Run(run_dir, config, deepspeed, environment["content_id"], recipes.find(config.recipe))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
