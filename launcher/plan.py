"""`bigbatch plan`: the legal plans of a run for a number of cards, those that fit, best first. No torch."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.launcher import memory, step_time
from bigbatch.launcher.cards import GIB, Card, find_card
from bigbatch.launcher.documents import DEEPSPEED_FOLDER, find_document, read_json
from bigbatch.launcher.memory import Memory, Workload, predict_memory, snapshot_bytes
from bigbatch.launcher.predict import vocabulary_of
from bigbatch.launcher.resolve import Resolved, resolve
from bigbatch.launcher.step_time import StepTime, predict_step
from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.engine_config import contradicts_sync, zero_stage
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection
from bigbatch.recipes.core.plan import Job, ParallelPlan, legal_plans

AXES = ("data", "tensor", "pipeline", "sequence", "expert")
MOST_DOUBLINGS = 6
WIDTH = 150  # characters of the table where it is not a terminal that tells


class Cluster(NamedTuple):
    """The cards asked for."""

    card: Card
    gpus: int
    gpus_per_node: int


class Option(NamedTuple):
    """A legal plan with what is predicted of it."""

    plan: ParallelPlan
    recompute: bool
    memory: Memory
    time: StepTime

    @property
    def order(self) -> tuple[float, float]:
        """Sorts the best first: the fastest, of those within about a percent the one with more room."""
        return round(100 * math.log(self.time.total)), self.memory.total


class Answer(NamedTuple):
    """What `bigbatch plan` has found."""

    resolved: Resolved
    work: Workload
    cluster: Cluster
    fitting: list[Option]
    """Best first, of each set of degrees and ZeRO stage the best."""
    nearest: Option
    """The plan that needs least memory."""


def plan(
    run: str,
    overrides: Sequence[str],
    gpus: int,
    card: str = "H100",
    gpu_memory: float | None = None,
    gpus_per_node: int = 8,
    network: float | None = None,
    price: float | None = None,
    top: int = 10,
    as_json: bool = False,
) -> int:
    """Print the plans; return the exit status, that of a mistake if nothing fits.

    `gpu_memory` is in GiB, `network` in GB/s of a card to other nodes, `price` in dollars a card-hour.
    """
    chosen = find_card(card)
    changed = {
        "memory_bytes": gpu_memory and gpu_memory * GIB,
        "network_link": network and network * 1e9,
        "price_per_hour": price,
    }
    chosen = chosen._replace(**{name: value for name, value in changed.items() if value is not None})
    answer = find_plans(resolve(run, overrides), Cluster(chosen, gpus, gpus_per_node))
    if as_json:
        print(json.dumps(to_json(answer, top), indent=2))
    else:
        _print(answer, top)
    return EXIT_DONE if answer.fitting else EXIT_USER_ERROR


def find_plans(resolved: Resolved, cluster: Cluster) -> Answer:
    """Predict every legal plan; raise UserError where there is none, or where nothing can be predicted."""
    work = workload(resolved.config, cluster.card)
    options = list(_options(resolved, work, cluster))
    if not options:
        size = resolved.config.batch.global_size
        raise UserError("--gpus", f"no plan divides batch.global_size {size} over {cluster.gpus} cards")
    best: dict[tuple[int, ...], Option] = {}
    for option in sorted((option for option in options if fits(option, cluster)), key=lambda option: option.order):
        plan = option.plan
        best.setdefault((plan.tensor, plan.pipeline, plan.sequence, plan.zero_stage, plan.expert), option)
    nearest = min(options, key=lambda option: option.memory.total)
    return Answer(resolved, work, cluster, list(best.values()), nearest)


def workload(config: Any, card: Card) -> Workload:
    """Describe a run's arithmetic; raise UserError for a model or a number format that nothing is known of."""
    model, data = getattr(config, "model", None), getattr(config, "data", None)
    if not isinstance(model, DecoderSection | EncoderSection) or data is None:
        raise UserError("recipe", f"{config.recipe!r} cannot be predicted: right is one with the native GPT or BERT")
    dtype = config.precision.dtype
    if dtype not in card.matrix_rates:
        raise UserError("precision.dtype", f"{card.name} has no {dtype}; right is {' or '.join(card.matrix_rates)}")
    return Workload(
        model,
        vocabulary_of(config),
        data.sequence_length,
        dtype,
        config.optimizer,
        config.masking.fraction if hasattr(config, "masking") else 1.0,
        data.packing in ("isolate", True),
        card.is_cpu,
        config.parallel.sync == "local_sgd",
        config.checkpoint.asynchronous,
    )


def fits(option: Option, cluster: Cluster) -> bool:
    """Tell whether a plan fits even where the prediction errs by its bound."""
    return option.memory.total * (1 + memory.ERROR_BOUND) <= cluster.card.memory_bytes


def figures(option: Option, answer: Answer) -> dict[str, float]:
    """Return what follows from the memory and the time of a step."""
    config, (card, gpus, _) = answer.resolved.config, answer.cluster
    seconds, size = option.time.total, config.batch.global_size
    hours = schedule_steps(config) * seconds / 3600
    flops = sum(step_time.model_flops(answer.work)) * size
    return {
        "memory_gib": option.memory.total / GIB,
        "step_seconds": seconds,
        "tokens_per_second": size * answer.work.sequence_length / seconds,
        "model_flops_utilization": flops / (seconds * gpus * card.matrix_rates[answer.work.dtype]),
        "days": hours / 24,
        "energy_kwh": gpus * card.power_watts * hours / 1000,
        "cost_dollars": gpus * card.price_per_hour * hours,
    }


def schedule_steps(config: RunConfig) -> float:
    """Return the run's steps; those of the ramp count by their share of the whole batch."""
    schedule, batch = config.schedule, config.batch
    last = min(schedule.total_steps, schedule.stop_step or schedule.total_steps)
    steps, begin = float(last), 0
    for stage in batch.ramp:
        end = min(stage.until_step, last)
        steps -= max(0, end - begin) * (1 - stage.global_size / batch.global_size)
        begin = end
    return steps


def settings(option: Option, resolved: Resolved) -> list[str]:
    """Return the plan as `--set` takes it."""
    plan = option.plan
    lines = [f"parallel.{axis}={getattr(plan, axis)}" for axis in AXES[1:] if getattr(plan, axis) > 1]
    if plan.tensor_sequence != resolved.config.parallel.tensor_sequence:  # which not every plan goes with
        lines.append("parallel.tensor_sequence=false")
    if plan.zero_stage != zero_stage(resolved.config, resolved.deepspeed):  # stated in one place alone
        shipped = ["parallel.zero_stage=null", f"deepspeed=zero{plan.zero_stage}"]
        lines += shipped if plan.zero_stage else ["parallel.zero_stage=0", "deepspeed=null"]
    recompute = f"model.recompute_activations={json.dumps(option.recompute)}"
    return [*lines, f"batch.micro_size={plan.micro_size}", recompute]


def to_json(answer: Answer, top: int) -> dict[str, Any]:
    """Return everything as JSON objects."""

    def row(option: Option) -> dict[str, Any]:
        plan = option.plan
        return {
            **{axis: getattr(plan, axis) for axis in AXES},
            "zero_stage": plan.zero_stage,
            "micro_size": plan.micro_size,
            "accumulation_steps": plan.accumulation_steps,
            "recompute_activations": option.recompute,
            **figures(option, answer),
            "host_snapshot_bytes": snapshot_bytes(answer.work, plan),
            "memory_bytes": {**option.memory._asdict(), "total": option.memory.total},
            "seconds": option.time._asdict(),
            "set": settings(option, answer.resolved),
        }

    return {
        "card": answer.cluster.card._asdict(),
        "gpus": answer.cluster.gpus,
        "gpus_per_node": answer.cluster.gpus_per_node,
        "memory_error_bound": memory.ERROR_BOUND,
        "step_time_error_factor": step_time.ERROR_FACTOR,
        "plans": [row(option) for option in answer.fitting[:top]],
        "nearest": row(answer.nearest),
        "advice": [] if answer.fitting else advice(answer),
    }


def advice(answer: Answer) -> list[str]:
    """Say what would make the run fit where nothing does."""
    resolved, work, cluster = answer.resolved, answer.work, answer.cluster
    parts = {name: size for name, size in answer.nearest.memory._asdict().items() if name != "phase"}
    largest = max(parts, key=parts.__getitem__)
    lines = [f"most of it is {largest}: {parts[largest] / GIB:.3g} GiB"]
    for doubling in range(1, MOST_DOUBLINGS + 1):
        more = cluster._replace(gpus=cluster.gpus * 2**doubling)
        if any(fits(option, more) for option in _options(resolved, work, more)):
            lines.append(f"{more.gpus} cards are enough")
            break
    offloaded = _options(resolved, work, cluster, {"offload_optimizer": {"device": "cpu"}})
    if any(fits(option, cluster) for option in offloaded):
        lines.append("it fits with the optimizer in the host's memory: deepspeed=zero2_offload or zero3_offload")
    if len(lines) == 1:
        lines.append("take cards with more memory, a shorter data.sequence_length or a smaller model")
    return lines


def _options(
    resolved: Resolved, work: Workload, cluster: Cluster, change: dict[str, Any] | None = None
) -> Iterator[Option]:
    config = resolved.config
    axes = getattr(config, "axes", AXES[1:])
    job = Job(
        work.model, work.vocabulary_size, work.sequence_length, config.batch, axes, config.parallel.tensor_sequence
    )
    documents = [_zero_document(resolved, stage) | (change or {}) for stage in range(4)]
    for plan in legal_plans(job, cluster.gpus):
        zero = documents[plan.zero_stage]
        offloads = bool(zero.get("offload_optimizer"))
        if contradicts_sync(config, plan.zero_stage) or (work.trains_alone and plan.pipeline > 1):
            continue
        if plan.zero_ranks == 1 and plan.zero_stage > 1 and not offloads:
            continue  # there is nobody to share with
        for recompute in (False, True):
            seconds = predict_step(work, plan, cluster.card, cluster.gpus_per_node, recompute, offloads)
            yield Option(plan, recompute, predict_memory(work, plan, zero, recompute), seconds)


def _zero_document(resolved: Resolved, stage: int) -> dict[str, Any]:
    """Return the run's own settings of ZeRO, for another stage those of the shipped document."""
    if stage == zero_stage(resolved.config, resolved.deepspeed):
        return resolved.deepspeed.get("zero_optimization", {})
    if stage == 0:
        return {}
    return read_json(find_document(f"zero{stage}", Path(), DEEPSPEED_FOLDER))["zero_optimization"]


# ------------------------------------------------------------------------------------------- for people


def _print(answer: Answer, top: int) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    card, gpus, per_node = answer.cluster
    console.print(f"{gpus} x {card.name} with {card.memory_bytes / GIB:.4g} GiB, {per_node} a node")
    if answer.fitting:
        console.print(_table(answer.fitting[:top], answer))
        more = len(answer.fitting) - top
        console.print(f"{more} more fit (--top {len(answer.fitting)})" if more > 0 else "no other plan fits")
        _print_best(console, answer)
    else:
        console.print("nothing fits; the nearest:")
        console.print(_table([answer.nearest], answer))
        for line in advice(answer):
            console.print(f"- {line}")
    for line in _how_sure(answer):
        console.print(line)


def _table(options: list[Option], answer: Answer) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    axes = AXES if any(option.plan.expert > 1 for option in options) else AXES[:-1]
    names = [*axes, "ZeRO", "micro x steps", "recompute", "GiB", "seconds a step"]
    for name in [*names, "tokens/s", "MFU", "days", "kWh", "$"]:
        table.add_column(name, justify="right")
    for option in options:
        plan, found = option.plan, figures(option, answer)
        degrees = [str(getattr(plan, axis)) for axis in axes]
        micro = f"{plan.micro_size} x {plan.accumulation_steps}"
        table.add_row(
            *degrees,
            str(plan.zero_stage),
            micro,
            "yes" if option.recompute else "no",
            f"{found['memory_gib']:.1f}",
            f"{found['step_seconds']:.3g}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['model_flops_utilization']:.0%}",
            *(_short(found[name]) for name in ("days", "energy_kwh", "cost_dollars")),
        )
    return table


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.001 else "0"


def _print_best(console: Any, answer: Answer) -> None:
    """Print what the first plan's memory and time are made of, and how to ask for it."""
    best = answer.fitting[0]
    parts = [f"{name} {size / GIB:.2f}" for name, size in best.memory._asdict().items() if name != "phase" and size]
    console.print(f"the first: GiB at its peak ({best.memory.phase}): {', '.join(parts)}")
    if (copied := snapshot_bytes(answer.work, best.plan)) and not answer.work.on_cpu:
        console.print(f"the first: {copied / GIB:.2f} GiB a card in the host's memory, for checkpoint.asynchronous")
    parts = [f"{name} {seconds:.3g}" for name, seconds in best.time._asdict().items() if seconds]
    console.print(f"the first: seconds a step: {', '.join(parts)}")
    console.print("to take it: " + " ".join(f"--set {line}" for line in settings(best, answer.resolved)))


def _how_sure(answer: Answer) -> list[str]:
    card = answer.cluster.card
    framework = (memory.CPU_FRAMEWORK_BYTES if card.is_cpu else memory.FRAMEWORK_BYTES) / GIB
    peak = card.matrix_rates[answer.work.dtype] / 1e12
    return [
        f"memory: within {memory.ERROR_BOUND:.0%} of what CPU ranks held, on a GPU not measured; {framework:.2g} GiB "
        "of it, the framework's, are assumed; what fits does so with that error",
        f"time: published runs on A100 and H100 lie within a factor of {step_time.ERROR_FACTOR}; "
        f"{card.sustained_fraction:.0%} of {peak:.4g} TFLOP/s counted for matrix products; "
        "loading, evaluation and saving left out",
        f"energy: {card.power_watts:.0f} W a card, of the cards alone; cost: ${card.price_per_hour:.2f} a card-hour "
        "(--price changes it; sources: launcher/cards.json)",
    ]
