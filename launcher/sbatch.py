"""The batch script: a pure function of profile and request. Every value is carried exactly, or refused."""

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import bigbatch.slurm
from bigbatch.launcher.profiles import GpuSection, NodeRange, Profile
from bigbatch.recipes.core.errors import UserError

TEMPLATE = Path(bigbatch.slurm.__file__).parent / "templates" / "job.sbatch"
_BARE = re.compile(r"[A-Za-z0-9_.,:&|*+@=/()\[\]%~-]+")
_NOT_IN_PATHS = re.compile("[\x00-\x1f\x7f\\\\\ud800-\udfff]|\\s$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class JobRequest(NamedTuple):
    """What one submission asks for beside what its profile says."""

    run_dir: Path
    """Absolute. Of a sweep: the folder whose sub-folders 0, 1, ... are the members' run folders."""
    working_directory: Path
    """Absolute: what the run's relative paths begin at."""
    nodes: NodeRange
    time_limit: str
    lead_seconds: int
    """How long before the time limit Slurm has to say so."""
    python: str
    """The interpreter on the nodes."""
    environment: Mapping[str, str] = {}
    """Variables that the job needs whoever submits it; the profile's come after them."""
    exclude: tuple[str, ...] = ()
    """Nodes not to be taken."""
    members: int | None = None
    """Of a sweep: how many."""
    is_chain: bool = False
    """One of several jobs that begin one after another, by Slurm's `singleton`: jobs of one name, one at a time."""

    @property
    def name(self) -> str:
        """The job's: of a chain like no other's, as jobs of one name wait for each other."""
        digest = hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:6]
        return f"{self.run_dir.name}-{digest}" if self.is_chain else self.run_dir.name


def render(profile: Profile, request: JobRequest) -> str:
    """Return the text of job.sbatch; raise UserError for a path that Slurm cannot be given."""
    parts = {
        "@DIRECTIVES@": "\n".join(f"#SBATCH --{option}" for option in directives(profile, request)),
        "@ENVIRONMENT@": "\n".join(f"export {name}={quote(value)}" for name, value in environment(profile, request)),
        "@MODULES@": modules(profile.modules),
        "@COMMAND@": _command(request),
    }
    return fill(TEMPLATE, parts)


def fill(template: Path, parts: Mapping[str, str]) -> str:
    """Return a template with its placeholders filled, each by the lines of a part."""
    lines = template.read_text(encoding="utf-8").splitlines()
    # Each placeholder is a line, or the end of one: what a value contains is never looked at again.
    filled = [re.sub(r"@[A-Z]+@$", lambda match: parts[match[0]], line) for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(filled)) + "\n"


def quote(text: str) -> str:
    """Return a text as one word of bash on one line."""
    if not _CONTROL.search(text):
        return shlex.quote(text)
    # sbatch refuses a script with \r\n in it, and a value of several lines would be hard to read.
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _CONTROL.sub(lambda match: f"\\{ord(match[0]):03o}", escaped) + "'"


def directives(profile: Profile, request: JobRequest) -> Iterator[str]:
    """Yield what #SBATCH lines say."""
    folder = _path("run folder", request.run_dir).replace("%", "%%")  # which begins a pattern in file names
    log = f"{folder}/{'%a/' if request.members else ''}log/slurm-%j.out"
    yield f"job-name={_word(_path('run folder', Path(request.name)))}"
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        if value := getattr(profile, name):
            yield f"{name}={value}"
    yield f"nodes={request.nodes}"
    if request.nodes.min_nodes == request.nodes.max_nodes:
        yield f"ntasks-per-node={profile.ranks_a_node}"
    else:  # told of tasks, Slurm would take the fewest nodes; it is srun that starts them
        yield f"mincpus={profile.ranks_a_node * (profile.cpus_per_rank or 1)}"
    if profile.cpus_per_rank:
        yield f"cpus-per-task={profile.cpus_per_rank}"
    if profile.gpus:
        yield _gpus(profile.gpus, request.nodes)
    if profile.memory:
        yield f"mem={profile.memory}"
    if profile.exclusive:
        yield "exclusive"
    if request.exclude:
        yield f"exclude={','.join(request.exclude)}"
    yield f"time={request.time_limit}"
    yield f"signal=B:USR2@{request.lead_seconds}"  # USR1 is for who wants a save now
    yield "requeue" if profile.requeue and not request.is_chain else "no-requeue"
    if request.is_chain:
        yield "dependency=singleton"
    if request.members:
        yield f"array=0-{request.members - 1}"
    yield f"chdir={_word(_path('working directory', request.working_directory))}"
    yield f"output={_word(log)}"
    yield "open-mode=append"
    for name, value in profile.options.items():
        yield f"{name}={_word(value)}" if value else name


def _gpus(gpus: GpuSection, nodes: NodeRange) -> str:
    kind = f"{gpus.type}:" if gpus.type else ""
    if gpus.ask_by == "gres":
        return f"gres=gpu:{kind}{gpus.per_node}"
    if gpus.ask_by == "gpus-per-node":
        return f"gpus-per-node={kind}{gpus.per_node}"
    if nodes.min_nodes < nodes.max_nodes:
        raise UserError("--nodes", f"found {nodes}; a profile that asks by gpus-per-task takes a number, not a range")
    return f"gpus-per-task={kind}1"


def _word(text: str) -> str:
    """Return a text as one word of a directive: sbatch knows quotes, and a backslash before one within."""
    return text if _BARE.fullmatch(text) else '"' + text.replace('"', '\\"') + '"'


def _path(what: str, path: Path) -> str:
    """Return a path that Slurm's directives can carry."""
    text = str(path)
    if _NOT_IN_PATHS.search(text):
        advice = "Slurm takes no path with a control character or a backslash, or a blank at its end; rename it"
        raise UserError(what, f"{text!a}: {advice}")
    return text


def environment(profile: Profile, request: JobRequest) -> Iterator[tuple[str, str]]:
    """Yield the variables that a job needs."""
    yield from request.environment.items()
    network = profile.network
    for name, value in (
        ("NCCL_SOCKET_IFNAME", network.interface),
        ("GLOO_SOCKET_IFNAME", network.interface),
        ("NCCL_IB_HCA", network.adapters),
    ):
        if value:
            yield name, value
    yield from profile.environment.items()


def modules(names: tuple[str, ...]) -> str:
    """Return the lines that load modules."""
    if not names:
        return ""
    lines = ["type module >/dev/null 2>&1 || . /etc/profile"]
    lines += [f"module load {quote(name)} || exit 2" for name in names]
    return "\n".join(lines)


def _command(request: JobRequest) -> str:
    folder = quote(str(request.run_dir)) + ('/"$SLURM_ARRAY_TASK_ID"' if request.members else "")
    return f"{quote(request.python)} -P -m bigbatch.launcher.job {folder}"
