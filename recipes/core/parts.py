"""The parts of a run that a process may take: prepare, train, evaluate. Collective where several ranks take part."""

import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pydantic

from bigbatch.recipes.core import checkpoint, precision, recipe, runtime, train
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError, one_line
from bigbatch.recipes.core.heartbeat import this_rank, write_failure
from bigbatch.recipes.core.process import StopFlag, Stopped, raise_on_stop
from bigbatch.recipes.core.slurm_ranks import EXPECTED_RANKS
from bigbatch.recipes.core.watchdog import watched


def run_part(part: str, run_dir: Path, stop: StopFlag, log_dir: Path) -> int:
    """Take one part in a run; return the exit status. A failure is told in `log_dir`/failure.json, no traceback."""
    phase: dict[str, Any] = {"phase": "start", "step": None}
    threading.excepthook = _tell_thread
    try:
        with runtime.failure_digest(log_dir, phase):
            part, _, split = part.partition(":")
            run = load_run(run_dir)
            if part == "evaluate":
                return run_evaluate(run, stop, phase, split or "validation")
            return {"prepare": run_prepare, "train": run_train}[part](run, stop, phase)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if EXPECTED_RANKS in os.environ:  # nobody here waits for all ranks: the others end when they see it
            digest = {"rank": this_rank(), "host": socket.gethostname(), **phase, "exception": f"UserError: {error}"}
            write_failure(run_dir, {**digest, "exit_status": EXIT_USER_ERROR, "what_to_do": "change what was asked"})
        return EXIT_USER_ERROR
    except Stopped:
        return EXIT_REQUEUE
    except Exception:
        if os.environ.get("BIGBATCH_DEBUG"):
            raise
        return EXIT_FAILED


def _tell_thread(failed: threading.ExceptHookArgs) -> None:
    """Say in one line what a library's own thread failed of, as TensorBoard's does on a full disk."""
    what = one_line(f"{failed.exc_type.__name__}: {failed.exc_value}")
    print(f"warning: a thread in the background has ended: {what}", file=sys.stderr, flush=True)


def run_prepare(run: train.Run, stop: StopFlag, phase: dict[str, Any]) -> int:
    """Prepare the run's data; say where they are."""
    raise_on_stop(stop)
    phase["phase"] = "prepare"
    print(f"data: {run.recipe.prepare(run.config)}", file=sys.stderr)
    return EXIT_DONE


def run_train(run: train.Run, stop: StopFlag, phase: dict[str, Any]) -> int:
    """Take part in training as the rank that the environment says."""
    if stop.signal_name:  # nothing to save yet
        return EXIT_REQUEUE
    limit_seconds = run.config.watchdog.limit_seconds
    runtime.choose_algorithm(run.config.parallel.sync)
    with watched(run.run_dir, phase, limit_seconds):
        degrees = run.config.parallel
        mesh = runtime.start_mesh(limit_seconds, degrees.tensor, degrees.pipeline, degrees.sequence, degrees.expert)
        status = train.train(run, mesh, stop, phase)
        runtime.leave_mesh(mesh)
    return status


def run_evaluate(run: train.Run, stop: StopFlag, phase: dict[str, Any], split: str = "validation") -> int:
    """Evaluate the best checkpoint, else the newest, on a split; print the figures as JSON."""
    raise_on_stop(stop)
    data = run.recipe.open_data(run.config)
    samples = data.test if split == "test" else data.validation
    if samples is None:
        raise UserError(f"data.{split}", "is empty and nothing is cut from the training data: nothing to evaluate on")
    mesh = runtime.start_mesh()
    reader = checkpoint.best(run.run_dir)
    facts, step = reader.manifest["facts"], reader.manifest["step"]
    model = run.recipe.build_model(run.config, facts, initialize=False)
    checkpoint.fill(reader, model)
    phase.update(phase="evaluate", step=step)
    model = precision.place(model, mesh.device, run.config.precision.dtype)
    figures = train.evaluate(run, model, samples, mesh, facts, thorough=True)
    if write := recipe.further(run.recipe, "generated_figures"):
        figures |= write(run.config, facts, model, samples)
    print(json.dumps({"step": step, "split": split, **figures}))
    runtime.leave_mesh(mesh)
    return EXIT_DONE


def load_run(run_dir: Path) -> train.Run:
    """Read the resolved documents of a run folder."""
    document = _read(run_dir / "run.json")
    try:
        config = recipe.find_config(document["recipe"]).model_validate_json(json.dumps(document))
    except (KeyError, pydantic.ValidationError) as error:
        raise UserError(str(run_dir / "run.json"), f"is no resolved run document: {error}") from None
    deepspeed = _read(run_dir / "deepspeed.json")
    content_id = _read(run_dir / "environment.json")["content_id"]
    return train.Run(run_dir, config, deepspeed, content_id, recipe.find(config.recipe))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from None
