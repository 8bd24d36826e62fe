"""A profile: how one cluster is asked for nodes, and what a job finds on them. A document of its own, versioned."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

import bigbatch.slurm
from bigbatch.launcher.documents import read_json
from bigbatch.launcher.explain import explain
from bigbatch.launcher.problems import InvalidDocumentError, meant
from bigbatch.recipes.core.config import NonNegativeInt, PositiveFloat, PositiveInt, Section
from bigbatch.recipes.core.errors import UserError

SHIPPED = Path(bigbatch.slurm.__file__).parent / "profiles"
OWN = Path("~/.config/bigbatch/profiles")
"""Where a user's own profiles lie, found by name before the shipped ones."""
VERSION_ENDING = re.compile(r"\.v\d+$")
# Options that have a place of their own, or that the job's way to go on depends on.
OWNED_OPTIONS = (
    *("account", "array", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclude", "exclusive"),
    *("export", "gpus-per-node", "gpus-per-task", "gres", "input", "job-name", "mem", "no-requeue", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos", "requeue", "reservation", "signal"),
    *("test-only", "time", "wait", "wrap"),
)


def time_limit_seconds(text: str) -> int:
    """Return the seconds of a time limit in any of Slurm's forms: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    Raise ValueError for what is none of them, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError("right is a time limit as Slurm takes it: 90 (minutes), 12:00:00 or 2-00:00:00")
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is None and parts[2] is None:  # minutes first, not hours
        first, second, third = 0, first, second
    seconds = int(days or 0) * 86400 + first * 3600 + second * 60 + third
    if not seconds:
        raise ValueError("a job needs some time; right is a limit such as 12:00:00")
    return seconds


class NodeRange(NamedTuple):
    """How many nodes a job takes."""

    min_nodes: int
    max_nodes: int

    def __str__(self) -> str:
        return str(self.min_nodes) if self.min_nodes == self.max_nodes else f"{self.min_nodes}-{self.max_nodes}"


def node_range(text: str) -> NodeRange:
    """Read `4` or `2-8`; raise ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise ValueError("right is a number of nodes, or a range such as 2-8")
    return NodeRange(int(match[1]), int(match[2] or match[1]))


def _checked(check: Any) -> AfterValidator:
    def validate(text: str) -> str:
        check(text)
        return text

    return AfterValidator(validate)


def _carried(text: str) -> None:
    """Raise ValueError for what no file name, environment or shell can carry."""
    if "\0" in text:
        raise ValueError("the zero character cannot be carried to a job")


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:&|*+@=/()\[\]-]+$")]
"""A value of one of Slurm's own options."""
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:+@=/-]*$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
Text = Annotated[str, _checked(_carried)]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f\\]*$")]
MountText = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f,]+$")]
"""SOURCE or SOURCE:TARGET[:OPTIONS]; a comma would divide it."""


class AboutProfileSection(Section):
    """What a reader wants to know before using a profile."""

    purpose: str
    """Which machine, and which of its nodes."""
    source: str
    """Where the settings come from: the address of the centre's page, or how they were found out."""
    change: str | None = None
    """What a user has to change in a copy: the account, most of the time."""


class GpuSection(Section):
    """The GPUs of a node and how they are asked for."""

    per_node: PositiveInt
    """As many ranks run on each node."""
    ask_by: Literal["gpus-per-node", "gres", "gpus-per-task"] = "gpus-per-node"
    """The option that the cluster wants them asked by."""
    type: Word | None = None
    """As the cluster names it (`sinfo -o %G`): a100, h100; left out, whichever comes."""
    card: str | None = None
    """The card that memory and time are predicted for: V100, A100-40, A100, H100, H200, B200 or MI300X."""


class NetworkSection(Section):
    """What the ranks' communication has to know."""

    interface: Word | None = None
    """Name of the interface for NCCL's and gloo's sockets (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME): hsn0, ib0."""
    adapters: Word | None = None
    """InfiniBand adapters for NCCL (NCCL_IB_HCA)."""


class PyxisSection(Section):
    """A container started by srun (https://github.com/NVIDIA/pyxis)."""

    kind: Literal["pyxis"]
    image: MountText
    """A .sqsh file, or an image of a registry."""
    mounts: tuple[MountText, ...] = ()
    """SOURCE:TARGET; the run folder and the data have to be among them."""
    python: Text = "python3"
    """The interpreter in the image that has bigbatch installed."""


class ApptainerSection(Section):
    """A container started by apptainer (or singularity) in each rank."""

    kind: Literal["apptainer"]
    image: Text
    """A .sif file."""
    command: Word = "apptainer"
    binds: tuple[MountText, ...] = ()
    """SOURCE:TARGET; the run folder and the data have to be among them, if the image does not see them anyway."""
    python: Text = "python3"
    """The interpreter in the image that has bigbatch installed."""


class Profile(Section):
    """One way to ask one cluster."""

    version: Literal[1]
    about: AboutProfileSection | None = None
    partition: Word | None = None
    """One, or several divided by commas; left out, the cluster's default."""
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    """Features that the nodes must have."""
    reservation: Word | None = None
    nodes: Annotated[str, _checked(node_range)] = "1"
    """How many unless --nodes says it: `4`, or `2-8` for a run that may go on with any number in between."""
    gpus: GpuSection | None = None
    """Left out, the ranks run on CPUs."""
    ranks_per_node: PositiveInt | None = None
    """On nodes without GPUs; by default 1."""
    cpus_per_rank: PositiveInt | None = None
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    """Of a node, in MB or with a unit; `0` is all that it has."""
    exclusive: bool = False
    """No other job on the same nodes."""
    time_limit: Annotated[str, _checked(time_limit_seconds)] = "12:00:00"
    """Unless --time says it."""
    options: dict[OptionName, Line] = Field(default={})
    """Further options of sbatch, by their long name: {"hint": "nomultithread"}; "" for one without a value."""
    modules: tuple[ModuleName, ...] = ()
    """Loaded in this order, onto what the submitting shell has loaded."""
    environment: dict[VariableName, Text] = Field(default={})
    """Variables of the job, carried exactly: nothing in them is expanded."""
    network: NetworkSection = NetworkSection()
    python: Text | None = None
    """The interpreter that has bigbatch installed, on the nodes; by default the one that submits."""
    container: Annotated[PyxisSection | ApptainerSection, Field(discriminator="kind")] | None = None
    """For the ranks; left out, they run in `python`'s own environment."""
    scratch: Text | None = None
    """Folder for new run folders, which runs/ then links to; variables such as $SCRATCH are those of who submits."""
    requeue: bool = True
    """Whether a job may put itself back into the queue; where it may not, --chain goes on."""
    max_restarts: NonNegativeInt = 3
    """Give up after so many restarts in a row that brought the run no further."""
    save_seconds: PositiveFloat = 120.0
    """How long a save takes, until one has been measured: a job is told so much, and more, ahead of its time limit."""
    check_nodes: bool = True
    """Check every node before the first step."""
    bad_node_hours: PositiveFloat = 24.0
    """For so long a node that failed is not asked for again."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.gpus and self.ranks_per_node:
            raise ValueError("ranks_per_node is gpus.per_node where there are gpus; leave it out")
        if taken := sorted(self.options.keys() & set(OWNED_OPTIONS)):
            raise ValueError(f"options.{taken[0]} is not free: a setting of its own, or the launcher, sets it")
        return self

    @property
    def ranks_a_node(self) -> int:
        """How many ranks run on each node."""
        return self.gpus.per_node if self.gpus else self.ranks_per_node or 1


def load_profile(name_or_path: str) -> Profile:
    """Return the profile of this name or path; raise InvalidDocumentError with every mistake in it."""
    return parse_profile(read_json(find_profile(name_or_path)))


def parse_profile(document: dict[str, Any]) -> Profile:
    """Return a profile from its document; raise InvalidDocumentError with every mistake in it."""
    try:
        return Profile.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise InvalidDocumentError(explain(Profile, error.errors())) from None


def find_profile(name_or_path: str) -> Path:
    """Return the file of a path ending in .json, or of a name: the user's own first, then the shipped ones."""
    if name_or_path.endswith(".json"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise UserError("--profile", f"there is no file {path}")
        return path
    profiles = profile_files()
    if name_or_path not in profiles:
        message = f"no profile of the name {name_or_path!r}; {meant(name_or_path, profiles)}"
        raise UserError("--profile", f"{message} (`bigbatch profile new` writes one)")
    return profiles[name_or_path]


def profile_files() -> dict[str, Path]:
    """Return the file of each profile that a name finds: its newest version, the user's own before a shipped one."""
    files: dict[str, Path] = {}
    for folder in (SHIPPED, OWN.expanduser()):
        ordered = sorted(folder.glob("*.json"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)])
        files.update({VERSION_ENDING.sub("", path.stem): path for path in ordered})
    return dict(sorted(files.items()))
