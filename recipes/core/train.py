"""The one training loop: restore, then evaluate, save and step until the last step."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.batch import global_size_at, plan_batch
from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.data.sampler import chain_hash, rank_slice, sample_order
from bigbatch.recipes.core.engine import Engine, StepResult, partitioned_building, to_device
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_REQUEUE, UserError
from bigbatch.recipes.core.metrics import higher_is_better
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.pipeline import stage_building
from bigbatch.recipes.core.precision import DTYPES
from bigbatch.recipes.core.process import StopFlag
from bigbatch.recipes.core.recipe import DataSplits, Outputs, Samples, further
from bigbatch.recipes.core.report import Reporter, StepRecord, measured_peak_flops
from bigbatch.recipes.core.saver import Saved, Saver


@dataclass(frozen=True)
class Run:
    """What a process needs to take part in a run: its folder, and the documents resolved in it."""

    run_dir: Path
    config: RunConfig
    deepspeed: dict[str, Any]
    content_id: str
    recipe: Any


class TrainState(NamedTuple):
    """Everything of the loop that a resume needs, beside the engine's own state."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    order_hash: str = ""
    """Chained hash of the ids of all consumed samples, in order."""
    skipped_in_a_row: int = 0
    best_value: float | None = None
    """Of the figure `evaluate.best_by`, at the step `best_step`."""
    best_step: int = 0
    evaluations_since_best: int = 0


class NonFiniteError(Exception):
    """The loss or the gradient was not a finite number."""

    advice = (
        "lower optimizer.learning_rate, or set precision.on_non_finite to skip; start again from a checkpoint before"
    )


class Session(NamedTuple):
    """The live parts of one process's training."""

    run: Run
    mesh: Mesh
    data: DataSplits
    engine: Engine
    reporter: Reporter
    saver: Saver


def train(run: Run, mesh: Mesh, stop: StopFlag, phase: dict[str, Any]) -> int:
    """Train to the last step, or until a signal asks to save; return the exit status. Collective."""
    started = time.monotonic()
    phase["phase"] = "data"
    data = run.recipe.open_data(run.config)
    _check_figure(run, data)
    phase["phase"] = "model"
    model = _first_model(run, mesh, data)
    scale = further(run.recipe, "learning_rate_scales")
    engine = Engine(model, run.config, run.deepspeed, mesh, scale(run.config, model) if scale else None)
    phase["phase"] = "restore"
    state = _restore(run, engine, mesh, data)
    reporter = _reporter(run, mesh, data, state.step, time.monotonic() - started)
    try:
        with Saver(run.run_dir, engine, mesh, partial(_tell_saved, reporter)) as saver:
            stopped = _loop(Session(run, mesh, data, engine, reporter, saver), state, stop, phase)
    except BaseException as error:
        reporter.event(phase["step"] or state.step, "failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        reporter.close()
    return EXIT_REQUEUE if stopped else EXIT_DONE


def _check_figure(run: Run, data: DataSplits) -> None:
    """Raise UserError now, not at the first evaluation, if the figure to choose by will not be measured."""
    name, names = run.config.evaluate.best_by, ["loss", *run.recipe.metrics(1.0)]
    if name is None:
        return
    if data.validation is None:
        raise UserError("evaluate.best_by", f"is {name!r}, but there is no validation split to measure it on")
    if more := further(run.recipe, "figure_names"):
        names += more(run.config, data.facts)
    if name not in names:
        raise UserError("evaluate.best_by", f"{name!r} is not measured; right is one of {', '.join(names)}")


def build_model(run: Run, mesh: Mesh, facts: dict[str, Any], initialize: bool) -> nn.Module:
    """Build the run's model, or this tensor or expert rank's share of it."""
    axes = {"tensor": mesh.tensor, "sequence": mesh.sequence, "expert": mesh.expert}
    divided = {name: axis for name, axis in axes.items() if axis.size > 1}
    return run.recipe.build_model(run.config, facts, initialize=initialize, **divided)


def _first_model(run: Run, mesh: Mesh, data: DataSplits) -> nn.Module:
    """Build the model with its first weights, unless a checkpoint is going to overwrite them.

    One that starts from a file is held whole while it is read.
    """
    torch.manual_seed(run.config.seed)
    goes_on = bool(mesh.broadcast_text("yes" if checkpoint.committed(run.run_dir) else ""))
    reads_a_file = getattr(getattr(run.config, "model", None), "initialize_from", None) and not goes_on
    building = partitioned_building(run.deepspeed, mesh)
    if mesh.pipeline.size > 1:
        building = stage_building(run.config.model.num_layers, mesh.pipeline)  # type: ignore[attr-defined]
    with nullcontext() if reads_a_file else building:
        return build_model(run, mesh, data.facts, initialize=not goes_on)


def _loop(session: Session, restored: TrainState, stop: StopFlag, phase: dict[str, Any]) -> bool:
    """Evaluate, save, step; return whether a signal ended it before the last step."""
    run, mesh, data, engine, reporter, saver = session
    config, last_step = run.config, _last_step(run.config)
    state, asked_to_stop = restored, False
    while True:
        advanced = state.step > restored.step
        if advanced and data.validation and _due(state.step, config.evaluate.every_steps, last_step):
            phase.update(phase="evaluate", step=state.step)
            with engine.averaged():
                figures = _evaluate_and_sample(session, data.validation, phase)
            data.facts.update(_model_facts(run, figures))
            state = _judge(session, state, figures)
        is_done = state.step >= last_step or _stands_still(config, state)
        ended, is_best = is_done or asked_to_stop, state.best_step == state.step
        if advanced and (ended or is_best or _due(state.step, config.checkpoint.every_steps, last_step)):
            phase.update(phase="save", step=state.step)
            _save(session, state)
        saver.poll()
        if ended:
            saver.wait()
            break
        phase.update(phase="step", step=state.step)
        begin = time.monotonic()
        batches, order_hash = _next_batches(config, data.train, state, mesh)
        own_targets = sum(run.recipe.count_targets(batch) for batch in batches)
        own_targets *= mesh.counts  # each data rank's count once
        flags = float(bool(stop.signal_name)), float(saver.has_failed)
        num_targets, stops, failed = mesh.sum_of_all(own_targets, *flags)
        if failed:
            phase.update(phase="save")
            saver.wait()
        result = engine.train_step(state.step, batches, run.recipe.loss, int(num_targets))
        state = _advance(config, state, result, order_hash)
        reporter.step(_record(config, state, result, time.monotonic() - begin))
        asked_to_stop = stops > 0
    if not is_done:
        by = stop.signal_name or "a signal to another rank"
        reporter.event(state.step, "stopped", f"by {by}; everything is saved")
    return not is_done


def evaluate(
    run: Run,
    model: nn.Module,
    samples: Samples,
    mesh: Mesh,
    facts: dict[str, Any],
    max_samples: int | None = None,
    thorough: bool = False,
    phase: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the mean loss over a split and the recipe's figures, each sample counted once whatever the ranks.

    `model` is DeepSpeed's engine or a plain module. In `phase` the watchdog sees each batch. Collective: every rank
    must call it.
    """
    outputs = further(run.recipe, "outputs") or (lambda model, batch: Outputs(run.recipe.loss(model, batch), {}))
    size = getattr(samples, "evaluation_size", None) or plan_batch(run.config.batch, mesh.data_ranks).micro_size
    was_training = model.training
    model.eval()
    loss_sum, num_targets = 0.0, 0
    own: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for ids, batch, counts in _evaluation_batches(samples, size, mesh, max_samples):
            if phase is not None:
                phase["evaluated_batches"] = phase.get("evaluated_batches", 0) + 1
            found, arrays = outputs(model, to_device(batch, mesh.device))
            if counts:
                loss_sum += float(found.sum)
                num_targets += found.num_targets
            for name, rows in {"": torch.from_numpy(ids).to(mesh.device), **arrays}.items():
                own.setdefault(name, []).append(rows if counts else rows[:0])
    model.train(was_training)
    total, count = mesh.sum(loss_sum, num_targets)
    loss = total / count
    figures = {"loss": loss, **run.recipe.metrics(loss), "num_targets": int(count)}
    if len(own) > 1:
        gathered = {name: mesh.gather(torch.cat(parts)).cpu().numpy() for name, parts in own.items()}
        order = np.argsort(gathered.pop(""))
        arrays = {name: rows[order] for name, rows in gathered.items()}
        figures |= run.recipe.figures(run.config, facts, arrays, thorough)
    return figures


def _evaluation_batches(
    samples: Samples, size: int, mesh: Mesh, max_samples: int | None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], bool]]:
    """Yield sample ids and their batch; a filler is marked False.

    Equally many on every rank: ZeRO-3 gathers weights in step.
    """
    ids = np.arange(min(samples.num_samples, max_samples or samples.num_samples), dtype=np.int64)
    rounds = math.ceil(len(ids) / (size * mesh.data_ranks))
    for index in range(rounds):
        begin = (index * mesh.data_ranks + mesh.data_rank) * size
        own = ids[begin : begin + size]
        counts = len(own) > 0
        own = own if counts else ids[:1]
        yield own, samples.batch(own, np.zeros_like(own)), counts


def _restore(run: Run, engine: Engine, mesh: Mesh, data: DataSplits) -> TrainState:
    def say(message: str) -> None:
        if mesh.is_writer:
            print(message, file=sys.stderr, flush=True)

    saved = checkpoint.restore(run.run_dir, engine, mesh, say)
    if saved is None:
        return TrainState()
    if saved["data_fingerprint"] != data.train.fingerprint:
        raise UserError(
            "data",
            f"has changed since the checkpoint of step {saved['step']} (fingerprint {data.train.fingerprint[:12]}, "
            f"was {saved['data_fingerprint'][:12]}): bring the data back, or train in a new run folder",
        )
    data.facts.update(_model_facts(run, saved["facts"]))
    state = TrainState(**{name: saved[name] for name in TrainState._fields if name in saved})
    if saved["run"]["evaluate"].get("best_by") != run.config.evaluate.best_by:
        state = state._replace(best_value=None, best_step=0, evaluations_since_best=0)
    say(
        f"resumed after step {state.step}: samples 0..{state.consumed_samples - 1} were seen, "
        f"next is {state.consumed_samples} (order {state.order_hash[:12]})"
    )
    if state.step >= _last_step(run.config):
        say(f"nothing is left to do: step {state.step} is the last (schedule.total_steps, schedule.stop_step)")
    elif _stands_still(run.config, state):
        best = f"{run.config.evaluate.best_by} was best at step {state.best_step}"
        say(f"nothing is left to do: {best}, and evaluate.patience is spent")
    return state


def _last_step(config: RunConfig) -> int:
    return min(config.schedule.total_steps, config.schedule.stop_step or config.schedule.total_steps)


def _reporter(run: Run, mesh: Mesh, data: DataSplits, step: int, seconds: float) -> Reporter:
    return Reporter(
        run.run_dir,
        run.config,
        is_writer=mesh.is_writer,
        total_steps=_last_step(run.config),
        start_step=step,
        num_ranks=mesh.world_size,
        tokens_per_sample=data.facts.get("tokens_per_sample"),
        flops_per_sample=run.recipe.flops_per_sample(run.config, data.facts),
        peak_flops=measured_peak_flops(DTYPES[run.config.precision.dtype]),
        start_up_seconds=seconds,
    )


def _due(step: int, every_steps: int, last_step: int) -> bool:
    return step % every_steps == 0 or step == last_step


def _judge(session: Session, state: TrainState, figures: dict[str, float]) -> TrainState:
    """Compare with the best evaluation so far; say when it is time to stop."""
    settings = session.run.config.evaluate
    if settings.best_by is None:
        return state
    value, sign = figures[settings.best_by], 1 if higher_is_better(settings.best_by) else -1
    if state.best_value is None or sign * value > sign * state.best_value:
        return state._replace(best_value=value, best_step=state.step, evaluations_since_best=0)
    state = state._replace(evaluations_since_best=state.evaluations_since_best + 1)
    if _stands_still(session.run.config, state):
        best = f"{settings.best_by} was best at step {state.best_step} ({state.best_value:.5g})"
        session.reporter.event(state.step, "ended", f"{best}; {settings.patience} evaluations did not better it")
    return state


def _model_facts(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Return what is of the model though no weight, of an evaluation's figures or a checkpoint's facts."""
    return {name: found[name] for name in further(run.recipe, "MODEL_FACTS") or () if name in found}


def _stands_still(config: RunConfig, state: TrainState) -> bool:
    return bool(config.evaluate.patience) and state.evaluations_since_best >= (config.evaluate.patience or 0)


def _evaluate_and_sample(session: Session, samples: Samples, phase: dict[str, Any]) -> dict[str, float]:
    run, mesh, data, engine, reporter, _ = session
    begin, step = time.monotonic(), phase["step"]
    max_samples = run.config.evaluate.max_samples
    figures = evaluate(run, engine.answering, samples, mesh, data.facts, max_samples, phase=phase)
    del figures["num_targets"]  # the same each time
    reporter.evaluation(step, figures, time.monotonic() - begin)
    begin = time.monotonic()
    texts = run.recipe.samples_of_text(run.config, engine.module, data.facts)
    if texts:
        reporter.text(step, texts, time.monotonic() - begin)
    return figures


def _save(session: Session, state: TrainState) -> None:
    run, data = session.run, session.data
    session.reporter.report_steps()
    session.saver.save(
        {
            **state._asdict(),
            "content_id": run.content_id,
            "data_fingerprint": data.train.fingerprint,
            "run": run.config.model_dump(mode="json"),
            "facts": data.facts,
        }
    )


def _tell_saved(reporter: Reporter, saved: Saved) -> None:
    reporter.event(saved.step, "saved", saved.folder.name, saved.stall_seconds, whole_seconds=saved.whole_seconds)


def _next_batches(
    config: RunConfig, samples: Samples, state: TrainState, mesh: Mesh
) -> tuple[list[dict[str, np.ndarray]], str]:
    """Return this rank's micro-batches of the next step, and the order's hash after it."""
    plan = plan_batch(config.batch, mesh.data_ranks, state.step)
    order = sample_order(config.seed, samples.num_samples, state.consumed_samples, plan.global_size)
    batches = []
    for micro in range(plan.accumulation_steps):
        own = rank_slice(0, micro, plan.micro_size, mesh.data_rank, plan.data_ranks)
        batches.append(samples.batch(order.ids[own], order.epochs[own]))
    return batches, chain_hash(bytes.fromhex(state.order_hash), order.ids, order.epochs).hex()


def _advance(config: RunConfig, state: TrainState, result: StepResult, order_hash: str) -> TrainState:
    skipped = state.skipped_in_a_row + 1 if result.skipped else 0
    precision = config.precision
    if result.skipped and precision.dtype != "fp16" and precision.on_non_finite == "stop":
        raise NonFiniteError(
            f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}; earlier checkpoints are whole"
        )
    if skipped > precision.max_skipped_steps:
        raise NonFiniteError(
            f"step {state.step}: {skipped} steps in a row were not finite (precision.max_skipped_steps)"
        )
    consumed = state.consumed_samples + global_size_at(config.batch, state.step)
    return state._replace(
        step=state.step + 1, consumed_samples=consumed, order_hash=order_hash, skipped_in_a_row=skipped
    )


def _record(config: RunConfig, state: TrainState, result: StepResult, seconds: float) -> StepRecord:
    return StepRecord(
        step=state.step,
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        num_targets=result.num_targets,
        num_samples=global_size_at(config.batch, state.step - 1),
        consumed_samples=state.consumed_samples,
        step_seconds=seconds,
        loss_scale=result.loss_scale if config.precision.dtype == "fp16" else None,
        skipped=result.skipped,
    )
