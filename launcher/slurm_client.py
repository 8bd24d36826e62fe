"""Every call of Slurm's commands: list form, a time limit, plain text read into typed results. Standard library alone.

Plain text, because the layout of Slurm's JSON output changes between releases.
"""

import getpass
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bigbatch.recipes.core.errors import UserError, one_line

ANSWER_SECONDS = 20.0  # commands hang while slurmctld is away
SUBMIT_SECONDS = 60.0
UNKNOWN_JOB = "invalid job id"
AWAY = (
    "unable to contact slurm controller",
    "connection refused",
    "connect failure",
    "socket timed out",
    "problem talking to database",
    "failed to open persistent connection",
    "zero bytes were transmitted",
    "could not establish a configuration source",
    "unexpected message received",
)
NO_ACCOUNTING = "accounting storage is disabled"
FIELD_END = "\x1f"  # nothing that a name of a job or a node may hold


class SlurmRefusedError(UserError):
    """Slurm answered that it will not."""


class SlurmAwayError(UserError):
    """Slurm gave no answer: not installed here, or its controller or database is away."""


class QueuedJob(NamedTuple):
    """A job as the controller knows it; one that ended stays for `MinJobAge` (minutes)."""

    job_id: str
    """Of a member of an array with its index, as 12_3."""
    state: str
    """As RUNNING."""
    reason: str
    start: str
    """Local time of the start, estimated while it is pending; empty when not known."""
    nodes: str
    """In Slurm's short form, as node[1-4]."""
    time_used: str
    time_limit: str
    restarts: int
    """Earlier starts under the same number."""


class AccountedJob(NamedTuple):
    """One start of a job as accounting has kept it."""

    job_id: str
    state: str
    """The first word, without who cancelled it."""
    exit_status: int
    signal: int
    start: str
    end: str
    nodes: str


class NodeGroup(NamedTuple):
    """Nodes of one partition that are alike."""

    partition: str
    is_default: bool
    is_up: bool
    time_limit: str
    num_nodes: int
    state: str
    cores: int
    memory_mb: int
    gpus: str
    """As gpu:h100:4, Slurm's `gres`; empty when none."""
    features: str


def submit(script: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> str:
    """Submit a batch script and return the job's number.

    Raises SlurmRefusedError, or SlurmAwayError: then the job may be queued all the same.
    """
    answer = _ask(["sbatch", "--parsable", *options, str(script)], SUBMIT_SECONDS, environment)
    return answer.strip().splitlines()[-1].partition(";")[0]  # NUMBER;CLUSTER with several clusters


def try_submit(script: Path, options: Sequence[str] = ()) -> str:
    """Have Slurm judge a batch script without queueing it; return its words on when and where it would start."""
    said = _run(["sbatch", "--test-only", *options, str(script)], SUBMIT_SECONDS, None).stderr
    return said.strip().removeprefix("sbatch: ")


def queued(job_ids: Sequence[str] = (), seconds: float = ANSWER_SECONDS) -> list[QueuedJob]:
    """Return what the controller knows of these jobs, or of all of this user's; none of those that it has forgotten."""
    names = ("JobArrayID", "State", "Reason", "StartTime", "NodeList", "TimeUsed", "TimeLimit", "RestartCnt")
    command = [
        "squeue",
        "--noheader",
        "--states=all",
        "--array",
        "-O",
        ",".join(f"{name}:{FIELD_END}" for name in names),
    ]
    command += ["--jobs", ",".join(job_ids)] if job_ids else ["--me"]
    try:
        lines = _ask(command, seconds).splitlines()
    except SlurmRefusedError as error:
        if UNKNOWN_JOB not in error.message.lower():
            raise
        return []
    return [_queued(line.split(FIELD_END)) for line in lines]


def accounted(job_ids: Sequence[str], seconds: float = ANSWER_SECONDS) -> list[AccountedJob]:
    """Return all starts of these jobs from accounting, oldest first; none where the cluster keeps none.

    Raises SlurmAwayError when there is accounting, but it does not answer. It lags a second or two.
    """
    names = "JobID,State,ExitCode,Start,End,NodeList"
    command = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", "-o", names]
    try:
        lines = _ask([*command, "--jobs", ",".join(job_ids)], seconds).splitlines()
    except SlurmRefusedError as error:
        if NO_ACCOUNTING not in error.message.lower():
            raise
        return []
    return [_accounted(line.split("|")) for line in lines]


def show_job(job_id: str) -> dict[str, str]:
    """Return all that `scontrol show job` says; empty when the controller does not know the job."""
    try:
        return _pairs(_ask(["scontrol", "--oneliner", "show", "job", job_id]))
    except SlurmRefusedError as error:
        if UNKNOWN_JOB not in error.message.lower():
            raise
        return {}


def update_job(job_id: str, **settings: str) -> None:
    """Change settings of a job by the names that `scontrol show job` has for them, as Requeue="0"."""
    _ask(["scontrol", "update", f"JobId={job_id}", *(f"{name}={value}" for name, value in settings.items())])


def requeue(job_id: str) -> None:
    """Put a running job back into the queue under its number."""
    _ask(["scontrol", "requeue", job_id])


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs, wherever they are."""
    _ask(["scancel", *job_ids])


def signal_batch(job_id: str, name: str) -> None:
    """Send a signal, as USR1, to the batch script, and not to what srun has started."""
    _ask(["scancel", "--batch", f"--signal={name}", job_id])


def host_names(nodes: str) -> list[str]:
    """Return the names that Slurm's short form of them stands for."""
    return _ask(["scontrol", "show", "hostnames", nodes]).split()


def show_config() -> dict[str, str]:
    """Return the cluster's settings by name."""
    lines = (line.partition("=") for line in _ask(["scontrol", "show", "config"]).splitlines())
    return {name.strip(): value.strip() for name, equal, value in lines if equal}


def show_partitions() -> dict[str, dict[str, str]]:
    """Return what is set for each partition that this user may see."""
    partitions = (_pairs(line) for line in _ask(["scontrol", "--oneliner", "show", "partition"]).splitlines())
    return {pairs["PartitionName"]: pairs for pairs in partitions if "PartitionName" in pairs}


def accounts() -> list[str]:
    """Return the accounts that this user may charge; none where the cluster keeps none."""
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}"]
    try:
        return sorted(set(_ask([*command, "format=Account"]).split()))
    except SlurmRefusedError:
        return []


def node_groups(seconds: float = ANSWER_SECONDS) -> list[NodeGroup]:
    """Return the nodes of all partitions, those that are alike as one."""
    lines = _ask(["sinfo", "--noheader", "-o", "%P|%a|%l|%D|%T|%c|%m|%G|%f"], seconds).splitlines()
    return [_node_group(line.split("|")) for line in lines]


def node_states(nodes: Sequence[str]) -> dict[str, str]:
    """Return the state of each of these nodes, as idle or down*, with Slurm's marks: a star does not respond."""
    lines = _ask(["sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "-o", "%N|%T"]).splitlines()
    return dict(line.strip().split("|") for line in lines)


def _ask(command: Sequence[str], seconds: float = ANSWER_SECONDS, environment: Mapping[str, str] | None = None) -> str:
    """Return what a command answered; what a site's own plugins say beside it goes to another stream."""
    return _run(command, seconds, environment).stdout


def _run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    words = {**(environment or os.environ), "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    try:
        ended = subprocess.run(
            command,
            env=words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmAwayError(command[0], "not found; this host is no login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmAwayError(command[0], f"no answer in {seconds:.0f} s; Slurm's controller may be away") from None
    if not ended.returncode:
        return ended
    what = one_line(f"{ended.stderr.strip()}\n{ended.stdout.strip()}".strip()) or f"exit status {ended.returncode}"
    is_away = any(sign in what.lower() for sign in AWAY)
    raise (SlurmAwayError if is_away else SlurmRefusedError)(command[0], what)


def _queued(fields: Sequence[str]) -> QueuedJob:
    job_id, state, reason, start, nodes, time_used, time_limit, restarts = (field.strip() for field in fields[:8])
    return QueuedJob(job_id, state, reason, _known(start), nodes, time_used, time_limit, int(restarts or 0))


def _accounted(fields: Sequence[str]) -> AccountedJob:
    job_id, state, exit_code, start, end, nodes = fields[:6]
    status, _, number = exit_code.partition(":")
    times = _known(start), _known(end)
    return AccountedJob(job_id, state.split()[0], int(status or 0), int(number or 0), *times, _known(nodes))


def _node_group(fields: Sequence[str]) -> NodeGroup:
    partition, available, time_limit, num_nodes, state, cores, memory_mb, gpus, features = fields
    return NodeGroup(
        partition.removesuffix("*"),
        partition.endswith("*"),
        available == "up",
        time_limit,
        int(num_nodes),
        state.rstrip("*~#!%$@^-"),  # marks: not responding, asleep, waking, ...
        int(cores.rstrip("+")),
        int(memory_mb.rstrip("+")),
        _known(gpus),
        _known(features),
    )


def _known(text: str) -> str:
    return "" if text.strip("()").lower() in ("n/a", "null", "unknown", "none", "none assigned") else text


def _pairs(line: str) -> dict[str, str]:
    """Read Key=Value Key=Value, where a value may hold blanks."""
    found = re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", line.strip(), re.DOTALL)
    return dict(found)
