"""What can be known on a login node of a run on a cluster: the profile, the plan's memory and time, storage, software.

In under three seconds and without torch: each command that is asked has a second to answer.

Longer than other files: one list of findings, each of a few lines, over the same request.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.launcher import memory, plan, slurm_client, storage
from bigbatch.launcher.bundle import missing
from bigbatch.launcher.cards import GIB, Card, card_names, find_card
from bigbatch.launcher.lead import lead_seconds
from bigbatch.launcher.memory import CPU_FRAMEWORK_BYTES, predict_memory
from bigbatch.launcher.preflight import (
    NEEDS_GPU,
    RUNS,
    Finding,
    amount,
    check,
    checkpoint_needs,
    existing_folder,
    in_order,
    parameters_of,
    without_gpu,
)
from bigbatch.launcher.prepared import find_prepared
from bigbatch.launcher.problems import InvalidDocumentError
from bigbatch.launcher.profiles import NodeRange, Profile, load_profile, node_range, time_limit_seconds
from bigbatch.launcher.resolve import Resolved, resolve
from bigbatch.launcher.sbatch import JobRequest, render
from bigbatch.launcher.slurm_client import NodeGroup, SlurmAwayError, SlurmRefusedError
from bigbatch.launcher.step_time import ERROR_FACTOR, predict_step
from bigbatch.recipes.core import offline
from bigbatch.recipes.core.data.sources import HUGGING_FACE, as_table, locate
from bigbatch.recipes.core.engine_config import complete, count_data_ranks
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.plan import ParallelPlan

ANSWER_SECONDS = 1.0
START_SECONDS = 120.0  # of a job, until its first step: imports, data, restoring
FAST_BYTES_PER_SECOND = 5e9
"""More than a save reaches on most of the parallel file systems that there are."""
MEMORY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
PLANS_SHOWN = 3
DEGREES = ("tensor", "pipeline", "sequence", "expert")
NO_MODULE_COMMAND = 99
FIND_MODULE = """
type module >/dev/null 2>&1 || . /etc/profile >/dev/null 2>&1
type module >/dev/null 2>&1 || exit 99
module is-avail "$1" >/dev/null 2>&1 || module -t avail "$1" 2>&1 | grep -q -F -- "$1"
"""


class Asked(NamedTuple):
    """What a run asks of a cluster."""

    resolved: Resolved
    profile: Profile
    nodes: NodeRange
    time_limit: str
    run_dir: Path

    @property
    def divides(self) -> dict[int, bool]:
        """Whether batch and plan divide over the ranks, by number of nodes."""
        return {nodes: self._divides(nodes) for nodes in range(self.nodes.min_nodes, self.nodes.max_nodes + 1)}

    @property
    def ranks(self) -> int:
        """Ranks on the most nodes that the run can use."""
        usable = [nodes for nodes, divides in self.divides.items() if divides]
        return max(usable or [self.nodes.max_nodes]) * self.profile.ranks_a_node

    def _divides(self, nodes: int) -> bool:
        try:
            complete(self.resolved.config, self.resolved.deepspeed, nodes * self.profile.ranks_a_node)
        except UserError:
            return False
        return True

    @property
    def where_nodes(self) -> str:
        """The setting that the number of nodes comes from, for messages."""
        return "profile.nodes" if self.profile.nodes == str(self.nodes) else "--nodes"


def check_run_on(
    run: str, overrides: Sequence[str], profile: str, nodes: str | None, time_limit: str | None
) -> list[Finding]:
    """Resolve run and profile and check them together; mistakes in documents and options are findings too."""
    found: list[Any] = []
    findings: list[Finding] = []
    for load, before in ((lambda: resolve(run, overrides), ""), (lambda: load_profile(profile), "profile.")):
        try:
            found.append(load())
        except InvalidDocumentError as error:
            findings += [Finding("document", "error", before + where, message) for where, message in error.problems]
        except UserError as error:
            findings.append(Finding("document", "error", error.where, error.message))
    if findings:
        return findings
    resolved, settings = found
    try:
        return check_on(ask(resolved, settings, nodes, time_limit))
    except UserError as error:
        return [Finding("document", "error", error.where, error.message)]


def ask(
    resolved: Resolved, profile: Profile, nodes: str | None, time_limit: str | None, run_dir: Path | None = None
) -> Asked:
    """Put options in the place of what the profile says; raise UserError for one that is no such thing."""
    try:
        asked_nodes = node_range(nodes or profile.nodes)
    except ValueError as error:
        raise UserError("--nodes", f"found {nodes!r}; {error}") from None
    try:
        time_limit_seconds(time_limit or profile.time_limit)
    except ValueError as error:
        raise UserError("--time", f"found {time_limit!r}; {error}") from None
    scratch = os.path.expandvars(profile.scratch or "")
    if run_dir is None:
        run_dir = Path(scratch).expanduser() if scratch and "$" not in scratch else RUNS
    return Asked(resolved, profile, asked_nodes, time_limit or profile.time_limit, run_dir)


def check_on(asked: Asked) -> list[Finding]:
    """Check a resolved run for the nodes of a profile: the gravest findings first."""
    findings = check(asked.resolved, asked.ranks, asked.run_dir, is_here=False)
    wrong = {finding.rule for finding in findings if finding.severity == "error"}
    if asked.profile.gpus is None:
        for finding in without_gpu(asked.resolved.config, asked.resolved.deepspeed):
            findings.append(finding._replace(severity="error") if finding.rule == NEEDS_GPU else finding)
    findings += [*_range(asked), *_scratch(asked), *_prepared(asked), *_offline(asked)]
    if not wrong & {"batch", "tokenizer", "weights"}:
        findings += [*_memory_and_time(asked), *_room(asked)]
    elif wrong == {"batch"}:
        findings += _nearest_plans(asked)
    findings += [*_lead(asked), *_script(asked), *_software(asked), *_cluster(asked)]
    return in_order(findings)


# ------------------------------------------------------------------------------------------------- plan, memory, time


def _range(asked: Asked) -> Iterator[Finding]:
    """Name the numbers of nodes that the run cannot go on with, where it can with others."""
    wrong = [str(nodes) for nodes, divides in asked.divides.items() if not divides]
    if wrong and len(wrong) < len(asked.divides):
        message = f"batch and plan do not divide over {', '.join(wrong)} of {asked.nodes} nodes"
        yield Finding("range", "warning", asked.where_nodes, message, "on so many, some nodes are left idle")


def _nearest_plans(asked: Asked) -> Iterator[Finding]:
    """Offer plans for the ranks asked for, where they are known to be right for the model."""
    card = _card(asked.profile)
    if card is None:
        return
    try:
        answer = plan.find_plans(asked.resolved, plan.Cluster(card, asked.ranks, asked.profile.ranks_a_node))
    except UserError as error:
        yield Finding("plan", "info", error.where, error.message)
        return
    for option in answer.fitting[:PLANS_SHOWN]:
        settings = " ".join(f"--set {line}" for line in plan.settings(option, asked.resolved))
        yield Finding("plan", "info", "parallel", f"would fit: {settings}")


def _card(profile: Profile) -> Card | None:
    """Return the card that a profile names, or its type when that is one of the table; a CPU where there are none."""
    if profile.gpus is None:
        return find_card("CPU")
    name = profile.gpus.card or profile.gpus.type or ""
    return find_card(name) if name.lower() in map(str.lower, card_names()) else None


def _plan(asked: Asked) -> ParallelPlan:
    config = asked.resolved.config
    document = complete(config, asked.resolved.deepspeed, asked.ranks)
    return ParallelPlan(
        count_data_ranks(config, asked.ranks),
        **{axis: getattr(config.parallel, axis) for axis in DEGREES},
        zero_stage=document["zero_optimization"]["stage"],
        micro_size=document["train_micro_batch_size_per_gpu"],
        accumulation_steps=document["gradient_accumulation_steps"],
    )


def _memory_and_time(asked: Asked) -> Iterator[Finding]:
    profile, card = asked.profile, _card(asked.profile)
    if profile.gpus and profile.gpus.card and card is None:
        known = ", ".join(card_names())
        yield Finding("memory", "error", "profile.gpus.card", f"found {profile.gpus.card!r}; there are: {known}")
    if card is None:
        message = "neither memory nor time is predicted: the profile does not say which card"
        yield Finding("memory", "info", "profile.gpus.card", message, "give one that `bigbatch plan --card` knows")
        return
    try:
        work = plan.workload(asked.resolved.config, card)
    except UserError as error:
        yield Finding("memory", "info", error.where, f"neither memory nor time is predicted: {error.message}")
        return
    zero = complete(asked.resolved.config, asked.resolved.deepspeed, asked.ranks)["zero_optimization"]
    recompute = work.model.recompute_activations
    needed = predict_memory(work, _plan(asked), zero, recompute).total
    if card.is_cpu:
        yield from _cpu_memory(asked, needed)
        return  # what a CPU does in a second depends on which it is
    yield from _card_memory(asked, needed, card)
    offloads = bool(zero.get("offload_optimizer"))
    seconds = predict_step(work, _plan(asked), card, profile.ranks_a_node, recompute, offloads).total
    yield from _time(asked, seconds)


def _card_memory(asked: Asked, needed: float, card: Card) -> Iterator[Finding]:
    have, bound = card.memory_bytes, memory.ERROR_BOUND
    severity = "error" if needed * (1 - bound) > have else "warning" if needed * (1 + bound) > have else "info"
    message = f"about {needed / GIB:.1f} of the {have / GIB:.0f} GiB of a {card.name} (within {bound:.0%})"
    yield Finding("memory", severity, "batch.micro_size", message, "" if severity == "info" else "the plans below fit")
    if severity != "info":
        yield from _nearest_plans(asked)
    yield from _host_memory(asked)


def _host_memory(asked: Asked) -> Iterator[Finding]:
    """Compare the copies that asynchronous saves keep in a node's memory with what the job asks for."""
    config, have = asked.resolved.config, _node_memory(asked.profile)
    parameters = parameters_of(config)
    if have is None or parameters is None or not config.checkpoint.asynchronous:
        return
    copies = checkpoint_needs(config, parameters, asked.ranks).checkpoint_bytes / asked.nodes.min_nodes
    needed = copies + asked.profile.ranks_a_node * CPU_FRAMEWORK_BYTES
    if needed > have:
        message = f"{needed / GIB:.0f} GiB of a node's memory for its ranks and the copies that saves are written from"
        advice = "set checkpoint.asynchronous=false, or ask for more"
        yield Finding("host-memory", "warning", "profile.memory", f"{message}, and {have / GIB:.0f} are asked", advice)


def _cpu_memory(asked: Asked, needed: float) -> Iterator[Finding]:
    have, ranks = _node_memory(asked.profile), asked.profile.ranks_a_node
    if have is not None:
        severity = "warning" if ranks * needed * (1 - memory.ERROR_BOUND) > have else "info"
        message = (
            f"about {ranks * needed / GIB:.1f} GiB of a node's memory for {ranks} ranks, {have / GIB:.1f} are asked"
        )
        yield Finding("memory", severity, "profile.memory", message)


def _node_memory(profile: Profile) -> float | None:
    """Return the bytes of a node that a profile asks for; None where that is all, or what the cluster gives."""
    number, unit = (profile.memory or "0").rstrip("KMGT"), (profile.memory or "")[-1:]
    return int(number) * MEMORY_UNITS.get(unit, 2**20) or None


def _time(asked: Asked, step_seconds: float) -> Iterator[Finding]:
    """Compare the time that the run takes with what a job has, start by start."""
    config, profile = asked.resolved.config, asked.profile
    steps, limit = plan.schedule_steps(config), time_limit_seconds(asked.time_limit)
    total = steps * step_seconds
    usable = limit - lead_seconds(asked.run_dir, profile.save_seconds) - START_SECONDS
    about = f"about {_duration(total)} for {steps:,.0f} steps of {step_seconds:.3g} s (a factor of {ERROR_FACTOR} off)"
    if usable <= 0:
        return  # told by the rule `lead`
    starts = math.ceil(total / usable)
    if starts == 1:
        yield Finding("time", "info", "schedule.total_steps", f"{about}: within the {asked.time_limit} of one job")
    elif profile.requeue:
        yield Finding("time", "info", "schedule.total_steps", f"{about}: {starts} starts of {asked.time_limit} each")
    else:
        message = f"{about}: one job of {asked.time_limit} gets {usable / total:.0%} of the way, and requeues not"
        yield Finding("time", "warning", "profile.requeue", message, f"submit with --chain {starts}")
    lost = config.checkpoint.every_steps * step_seconds
    if lost > 3600:
        message = f"{config.checkpoint.every_steps} steps between saves: a crash costs up to {_duration(lost)}"
        yield Finding("time", "warning", "checkpoint.every_steps", message, "save more often")


def _lead(asked: Asked) -> Iterator[Finding]:
    """Compare the time that a job is told ahead of its end with what a save takes."""
    profile, limit = asked.profile, time_limit_seconds(asked.time_limit)
    lead = lead_seconds(asked.run_dir, profile.save_seconds)
    if lead + START_SECONDS > limit:
        message = (
            f"of {_duration(limit)}, {_duration(lead)} are for the last save and {START_SECONDS:.0f} s for a start"
        )
        advice = "give a longer --time, or a smaller profile.save_seconds if saves are faster"
        severity = "error" if lead > limit else "warning"
        yield Finding("lead", severity, "--time", f"{message}: nothing is left to train in", advice)
    try:
        parameters = parameters_of(asked.resolved.config)
    except UserError:
        return  # told by another rule
    if parameters is None:
        return
    size = checkpoint_needs(asked.resolved.config, parameters, asked.ranks).checkpoint_bytes
    rate = size / profile.save_seconds
    if rate > FAST_BYTES_PER_SECOND:
        message = f"{amount(size, 'B')} in {profile.save_seconds:g} s are {amount(rate, 'B/s')}"
        advice = "give the time that a save really takes: the job is told so long ahead of its end"
        yield Finding("lead", "warning", "profile.save_seconds", message, advice)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


# ----------------------------------------------------------------------------------------------------- data and storage


def _scratch(asked: Asked) -> Iterator[Finding]:
    if "$" in os.path.expandvars(asked.profile.scratch or ""):
        message = f"{asked.profile.scratch} names a variable that is not set here"
        yield Finding("run-folder", "error", "profile.scratch", message, "set it, or give --run-dir")


def _prepared(asked: Asked) -> Iterator[Finding]:
    config: Any = asked.resolved.config
    data: Any = getattr(config, "data", None)
    start = getattr(getattr(config, "model", None), "initialize_from", None)
    if not hasattr(data, "prepared_dir"):
        return
    found = find_prepared(data, Path(start) if start else None, _environment(asked).get(offline.VARIABLE) == "1")
    if found is None:
        message = f"{data.prepared_dir} holds no data of these settings yet: the job prepares them first"
        advice = "`bigbatch prepare` does it here"
        yield Finding("prepared", "info", "data.prepared_dir", message, advice)
    elif found.damage:
        message = f"{found.damage} is missing or has another size than when it was written"
        yield Finding("prepared", "error", "data.prepared_dir", message, f"remove {found.folder} and prepare again")
    elif found.stale:
        message = f"{found.folder} is out of date: {found.stale}; the job prepares anew"
        yield Finding("prepared", "warning", "data.prepared_dir", message)
    else:
        message = f"{found.folder} is whole: {amount(found.size_bytes, 'B')}"
        yield Finding("prepared", "info", "data.prepared_dir", message)


def _offline(asked: Asked) -> Iterator[Finding]:
    """Find what a job without a network would try to fetch."""
    for name in missing(Path()):
        message = f"{name} is not here, or not whole, and bundle.json names it"
        yield Finding("offline", "error", "bundle.json", message, "unpack the bundle again")
    environment = _environment(asked)
    if not any(environment.get(name) == "1" for name in (offline.VARIABLE, *offline.LIBRARIES)):
        return
    data: Any = getattr(asked.resolved.config, "data", None)
    if hasattr(data, "prepared_dir") and find_prepared(data, is_offline=True):
        return
    for number, source in enumerate(getattr(data, "train", ())):
        name = as_table(source).path
        if name.startswith(HUGGING_FACE) and not _is_cached(name.removeprefix(HUGGING_FACE).split(":")[0], environment):
            message = f"{name} is neither here nor in the cache, and the job has no network"
            advice = "`bigbatch prepare`, or `bigbatch bundle`, where there is one"
            yield Finding("offline", "error", f"data.train[{number}]", message, advice)


def _environment(asked: Asked) -> dict[str, str]:
    """Return the variables that the job finds, as far as they are known here."""
    return {**os.environ, **asked.profile.environment}


def _is_cached(name: str, environment: dict[str, str]) -> bool:
    home = Path(environment.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(environment.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    return locate(name).is_dir() or any(cache.glob(f"{name.replace('/', '___')}*"))


def _room(asked: Asked) -> Iterator[Finding]:
    """Compare inodes and quota with what the checkpoints take; the free bytes have been compared."""
    config = asked.resolved.config
    parameters, folder = parameters_of(config), existing_folder(asked.run_dir)
    if parameters is None:
        return
    needs, room = checkpoint_needs(config, parameters, asked.ranks), storage.find_room(folder)
    advice = "lower checkpoint.keep or keep_every_steps, or make room"
    if needs.retained_files > room.free_files:
        message = f"{needs.retained_files:,} files at most, and {room.free_files:,.0f} more may be made in {folder}"
        yield Finding("inodes", "error", str(asked.run_dir), message, advice)
    if not room.has_quota:
        message = f"no quota is known of on {folder}: neither `quota` nor `lfs quota` tells one"
        yield Finding("quota", "info", str(asked.run_dir), message)
    elif needs.retained_bytes > room.free_bytes:
        severity = "error" if needs.checkpoint_bytes > room.free_bytes else "warning"
        message = f"{amount(needs.retained_bytes, 'B')} at most, and the quota leaves {amount(room.free_bytes, 'B')}"
        yield Finding("quota", severity, str(asked.run_dir), message, advice)


# ------------------------------------------------------------------------------------------------- script and software


def _script(asked: Asked) -> Iterator[Finding]:
    """Render the batch script and have bash read it."""
    profile = asked.profile
    lead = math.ceil(lead_seconds(asked.run_dir, profile.save_seconds))
    python = profile.python or sys.executable
    request = JobRequest(asked.run_dir.absolute(), Path.cwd(), asked.nodes, asked.time_limit, lead, python)
    try:
        text = render(profile, request)
    except UserError as error:
        yield Finding("script", "error", error.where, error.message)
        return
    read = subprocess.run(["bash", "-n"], input=text.encode(), capture_output=True, check=False)
    if read.returncode:
        yield Finding("script", "error", "job.sbatch", f"bash cannot read it: {read.stderr.decode(errors='replace')}")


def _software(asked: Asked) -> Iterator[Finding]:
    profile = asked.profile
    yield from _modules(profile.modules)
    if profile.container is None:
        python = profile.python or sys.executable
        if python.startswith("/") and not os.access(python, os.X_OK):
            message = f"there is no program {python}"
            yield Finding("environment", "error", "profile.python", message, "give the python of a venv with bigbatch")
        return
    image = profile.container.image
    if image.endswith((".sif", ".sqsh")) or image.startswith(("/", "./")):
        if not Path(image).is_file():
            yield Finding("container", "error", "profile.container.image", f"there is no file {image}")
    else:
        yield Finding("container", "info", "profile.container.image", f"{image} is not looked for in its registry")
    mounts = profile.container.mounts if profile.container.kind == "pyxis" else profile.container.binds
    for number, mount in enumerate(mounts):
        source = mount.partition(":")[0]
        if not Path(os.path.expandvars(source)).exists():
            key = "mounts" if profile.container.kind == "pyxis" else "binds"
            yield Finding("container", "error", f"profile.container.{key}[{number}]", f"there is no {source}")


def _modules(names: Sequence[str]) -> Iterator[Finding]:
    for number, name in enumerate(names):
        where = f"profile.modules[{number}]"
        try:
            command = ["bash", "-c", FIND_MODULE, "bash", name]
            status = subprocess.run(command, capture_output=True, timeout=ANSWER_SECONDS, check=False).returncode
        except subprocess.TimeoutExpired:
            yield Finding("modules", "info", where, f"`module` gave no answer about {name} in {ANSWER_SECONDS:.0f} s")
            return
        if status == NO_MODULE_COMMAND:
            message = f"there is no `module` command here to load {name} with"
            yield Finding("modules", "warning", where, message, "leave modules out if the nodes have none either")
            return
        if status:
            yield Finding("modules", "error", where, f"there is no module {name}", "`module avail` lists them")


# -------------------------------------------------------------------------------------------------------- the cluster


def _cluster(asked: Asked) -> Iterator[Finding]:
    """Compare the profile with the cluster at hand, where there is one."""
    profile = asked.profile
    if not shutil.which("sinfo"):
        yield Finding("cluster", "info", "profile", "Slurm is not on this host: the profile is not compared with it")
        return
    try:
        groups = slurm_client.node_groups(ANSWER_SECONDS)
    except (SlurmAwayError, SlurmRefusedError) as error:
        yield Finding("cluster", "warning", "profile", f"the cluster cannot be asked: {error.message}")
        return
    names = profile.partition.split(",") if profile.partition else [g.partition for g in groups if g.is_default][:1]
    known = sorted({group.partition for group in groups})
    for name in names:
        if name not in known:
            message = f"found {name!r}; this cluster has: {', '.join(known)}"
            yield Finding("cluster", "error", "profile.partition", message)
    groups = [group for group in groups if group.partition in names]
    if groups:
        yield from _partition(asked, groups)


def _partition(asked: Asked, groups: Sequence[NodeGroup]) -> Iterator[Finding]:
    profile, shown = asked.profile, ",".join(sorted({group.partition for group in groups}))
    if not any(group.is_up for group in groups):
        yield Finding("cluster", "warning", "profile.partition", f"{shown} is not up: jobs wait")
    longest = max(_limit(group.time_limit) for group in groups)
    if time_limit_seconds(asked.time_limit) > longest:
        message = f"{asked.time_limit} is longer than the {_duration(longest)} that {shown} allows"
        yield Finding("cluster", "error", "--time", message)
    fitting = [group for group in groups if not _lacks(group, profile)]
    if not fitting:
        for where, message in _lacks(groups[0], profile):
            yield Finding("cluster", "error", where, f"{message}, nor another node of {shown}")
        return
    count = sum(group.num_nodes for group in _by_names(fitting))
    if asked.nodes.min_nodes > count:
        message = f"{asked.nodes} nodes, and {shown} has {count} of this kind"
        yield Finding("cluster", "error", asked.where_nodes, message)


def _by_names(groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """Return the groups of the partition that has most nodes: a node may be in several."""
    partitions: dict[str, list[NodeGroup]] = {}
    for group in groups:
        partitions.setdefault(group.partition, []).append(group)
    return max(partitions.values(), key=lambda found: sum(group.num_nodes for group in found))


def _lacks(group: NodeGroup, profile: Profile) -> list[tuple[str, str]]:
    """Return what a profile asks for that the nodes of a group do not have, by the setting that asks."""
    lacks = []
    if profile.gpus:
        kind, count = _gpus(group.gpus, profile.gpus.type)
        if count < profile.gpus.per_node:
            asked = f"{profile.gpus.per_node} {profile.gpus.type or 'GPUs'}"
            there = f"{group.gpus or 'no GPU'}"
            lacks.append(("profile.gpus.type" if kind else "profile.gpus.per_node", f"{asked} a node: it has {there}"))
    cores = profile.ranks_a_node * (profile.cpus_per_rank or 1)
    if cores > group.cores:
        lacks.append(("profile.cpus_per_rank", f"{cores} cores a node: it has {group.cores}"))
    if (need := _node_memory(profile)) and need > group.memory_mb * 2**20:
        lacks.append(("profile.memory", f"{profile.memory} a node: it has {group.memory_mb} MB"))
    if profile.constraint and re.fullmatch(r"\w+", profile.constraint):
        features = group.features.split(",")
        if profile.constraint not in features:
            lacks.append(
                ("profile.constraint", f"{profile.constraint}: it has the features {group.features or 'none'}")
            )
    return lacks


def _gpus(gres: str, kind: str | None) -> tuple[bool, int]:
    """Return whether only the type is wrong, and how many GPUs of it gpu:a100:4(S:0-1),... is."""
    total = right = 0
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = part.split(":")
        if name == "gpu" and rest and rest[-1].isdecimal():
            total += int(rest[-1])
            right += int(rest[-1]) * (kind is None or rest[0].lower() == kind.lower())
    return total > right, right


def _limit(text: str) -> float:
    try:
        return time_limit_seconds(text)
    except ValueError:  # infinite
        return math.inf
