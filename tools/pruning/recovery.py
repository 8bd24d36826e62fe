"""A pruned folder is trained on, through `bigbatch train`, and comes back as a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.tools.convert import convert

SLOWER = 0.3  # of the run's learning rate: the model is trained already


class Recovery(NamedTuple):
    """How long, and how fast."""

    steps: int
    learning_rate: float | None
    """None: SLOWER times the run's."""


def recover(source: Any, pruned: Path, scratch: Path, recovery: Recovery, run: Path | None, keep_zeros: bool) -> None:
    """Train the model of a folder on and put its weights in the place of those there.

    Raises UserError where the folder does not say what it was trained on, or the training fails.
    """
    document = read_json(run / "run.json") if run else source.record["run"]
    if not document:
        raise UserError("--recover", f"{source.path} does not say what it was trained on; --run RUN_DIR names a run")
    path, run_dir, converted = scratch / "recovery.json", scratch / "recovery", scratch / "recovered"
    path.write_text(json.dumps(recovery_document(source, document, pruned, recovery, keep_zeros)), encoding="utf-8")
    command = [sys.executable, "-m", "bigbatch.launcher.cli", "train", str(path), "--run-dir", str(run_dir)]
    home = source.record.get("working_directory")
    status = subprocess.run(
        [*command, "--ranks", "1"], check=False, stdout=sys.stderr, cwd=home if home and Path(home).is_dir() else None
    ).returncode
    if status != EXIT_DONE:
        told = "see above" if status == EXIT_USER_ERROR else f"it ended with status {status}"
        raise UserError("--recover", f"the training has failed: {told}")
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[read_json(pruned / "config.json")["dtype"]]
    convert(run_dir, converted, dtype)
    for weights in pruned.glob("model*.safetensors*"):
        weights.unlink()
    for weights in converted.glob("model*.safetensors*"):
        weights.rename(pruned / weights.name)
    for folder in (run_dir, converted):
        shutil.rmtree(folder)


def recovery_document(
    source: Any, document: dict[str, Any], pruned: Path, recovery: Recovery, keep_zeros: bool
) -> dict[str, Any]:
    """Return the run's document for a short training that starts from a folder."""
    config, _ = source.recipe.describe_folder(pruned)
    model = config.model.model_dump(mode="json", exclude_defaults=True)
    model = {key: value for key, value in model.items() if key not in ("initializer_range", "vocabulary_multiple")}
    # In transit the folder may lie where relative paths do not lead.
    model["initialize_from"] = os.fspath(pruned.absolute())
    rate = recovery.learning_rate or SLOWER * document["optimizer"]["learning_rate"]
    schedule = {
        "name": "linear",
        "total_steps": recovery.steps,
        "warmup_steps": recovery.steps // 10,
        "final_ratio": 0.0,
    }
    data = dict(document["data"])
    if hasattr(config.model, "backbone") or config.start_brings_tokenizer:
        data.pop("tokenizer", None)
        data["prepared_dir"] = os.fspath(pruned.absolute().with_name("prepared"))  # by a tokenizer that lies in transit
    changed = {
        "model": model,
        "data": data,
        "deepspeed": None,
        "parallel": {},
        "precision": {"dtype": document["precision"]["dtype"]},
        "batch": {"global_size": document["batch"]["global_size"]},
        "optimizer": {**document["optimizer"], "learning_rate": rate, "keep_zeros": keep_zeros},
        "schedule": schedule,
        "checkpoint": {"every_steps": recovery.steps, "keep": 1},
        "evaluate": {"every_steps": recovery.steps, "max_samples": document["evaluate"]["max_samples"]},
        "report": {"tensorboard": False},
    }
    return {**document, **changed}
