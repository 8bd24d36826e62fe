"""`bigbatch submit`: everything checked, a run folder with a readable job.sbatch in it, and Slurm's queue."""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.launcher import slurm_client
from bigbatch.launcher.begin import document_of, refuse, set_up
from bigbatch.launcher.documents import read_json
from bigbatch.launcher.lead import lead_seconds
from bigbatch.launcher.node_memory import bad_nodes
from bigbatch.launcher.preflight import checkpoint_needs, parameters_of
from bigbatch.launcher.preflight_cluster import ask, check_on
from bigbatch.launcher.problems import shown
from bigbatch.launcher.profiles import NodeRange, Profile, node_range, parse_profile, time_limit_seconds
from bigbatch.launcher.resolve import Resolved, resolve
from bigbatch.launcher.run_dir import RunDir, choose, fresh, hold, run_name, write_json
from bigbatch.launcher.sbatch import JobRequest, render
from bigbatch.launcher.slurm_client import SlurmAwayError
from bigbatch.launcher.snapshot import CODE, freeze, use_frozen, write_diff
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.run_home import enter_home

JOB_VERSION = 1
CARRIED = ("BIGBATCH_DATA", "BIGBATCH_OFFLINE", "HF_HOME", "PYTHONPATH")
"""Variables that a job needs as they were when it was submitted, whoever submits its script again."""
COARSE_SECONDS = 30  # by which Slurm's own timer for the signal may be late
ALIVE_STATES = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "PREEMPTED")


class Wanted(NamedTuple):
    """What the command line asks for beside run and profile."""

    nodes: str | None = None
    time_limit: str | None = None
    run_dir: Path | None = None
    overrides: Sequence[str] = ()
    chain: int | None = None
    """Submit so many jobs that follow each other, for a cluster that does not requeue."""
    dry_run: bool = False
    snapshot: bool = False
    """Freeze the code into the run folder, and run that."""


class Plan(NamedTuple):
    """A run that may be submitted."""

    resolved: Resolved
    profile: Profile
    nodes: NodeRange
    time_limit: str
    documents: dict[int, dict[str, Any]]
    """The DeepSpeed document for each number of nodes that the batch divides over."""


def submit(run: str, profile: Profile, wanted: Wanted) -> int:
    """Submit a run, new or in its folder; a dry run prints the script and changes nothing."""
    if RunDir(Path(run)).exists() and wanted.run_dir is None:
        run = str(enter_home(Path(run)))
    plan = make_plan(run, profile, wanted)
    if wanted.dry_run:
        print(render(profile, _request(plan, planned_folder(run, wanted.run_dir), wanted)), end="")
        return EXIT_DONE
    refuse_queued(planned_folder(run, wanted.run_dir))
    _ask_slurm(render(profile, _request(plan, planned_folder(run, wanted.run_dir), wanted)))
    is_new = wanted.run_dir is None and not RunDir(Path(run)).exists()
    path = new_folder(profile, run_name(run)) if is_new else choose(run, wanted.run_dir).path
    folder = RunDir(path.absolute())
    with hold(folder):
        script = _write(folder, plan, wanted)
    job_ids = [_send(folder.path, script) for _ in range(wanted.chain or 1)]
    _record(folder.path, job_ids)
    return _tell(job_ids, folder.path)


def submit_sweep(run: str, profile: Profile, wanted: Wanted, sweep: Path) -> int:
    """Submit a run once for each object of settings in a file, as one array of jobs with a run folder each."""
    changes = read_sweep(sweep)
    overrides = [[f"{path}={json.dumps(value)}" for path, value in change.items()] for change in changes]
    plans = [make_plan(run, profile, wanted._replace(overrides=[*wanted.overrides, *more])) for more in overrides]
    parent = (wanted.run_dir or Path("runs") / f"{run_name(run)}-sweep").absolute()
    request = _request(plans[0], parent, wanted)._replace(members=len(plans))
    if wanted.dry_run:
        print(render(profile, request), end="")
        return EXIT_DONE
    _ask_slurm(render(profile, request))
    parent = (wanted.run_dir or new_folder(profile, f"{run_name(run)}-sweep")).absolute()
    if (parent / "0").exists():
        raise UserError("--run-dir", f"{parent} holds a sweep already; give a new folder")
    if wanted.snapshot:
        freeze(parent)
    for member, (plan, change) in enumerate(zip(plans, changes, strict=True)):
        facts = {"folder": str(parent), "member": member, "set": change}
        with hold(folder := RunDir(parent / str(member))):
            _write(folder, plan, wanted, sweep=facts)
    write_json(parent / "sweep.json", {"version": 1, "run": run, "members": changes})
    script = parent / "job.sbatch"
    request = _request(plans[0], parent, wanted)._replace(members=len(plans))
    script.write_text(render(profile, request), encoding="utf-8")
    job_id = _send(parent, script)
    for member in range(len(plans)):
        _record(parent / str(member), [f"{job_id}_{member}"])
    return _tell([job_id], parent)


def resubmit(run_dir: Path) -> int:
    """Submit a run again as its job.json says, with what has been measured since."""
    job = read_json(run_dir / "job.json")
    nodes = NodeRange(job["nodes"]["min"], job["nodes"]["max"])
    wanted = Wanted(str(nodes), job["time_limit"], chain=job["chain"], snapshot=job["snapshot"])
    return submit(str(run_dir), parse_profile(job["profile"]), wanted)


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """Read a file of the form {"version": 1, "members": [{"a.b": value, ...}, ...]}."""
    document = read_json(path)
    members = document.get("members")
    if document.get("version") != 1 or document.keys() - {"version", "members"}:
        raise UserError(str(path), 'right is {"version": 1, "members": [{"section.key": value}, ...]}')
    if not isinstance(members, list) or not members:
        raise UserError(f"{path} members", f"found {shown(members)}; right is a list of objects")
    for number, member in enumerate(members):
        if not isinstance(member, dict):
            raise UserError(f"{path} members[{number}]", f"found {shown(member)}; right is an object of settings")
    return members


def make_plan(run: str, profile: Profile, wanted: Wanted) -> Plan:
    """Resolve and check a run for the nodes asked for; raise UserError with all that is wrong."""
    try:
        nodes = node_range(wanted.nodes or profile.nodes)
    except ValueError as error:
        raise UserError("--nodes", f"found {wanted.nodes!r}; {error}") from None
    time_limit = wanted.time_limit or profile.time_limit
    try:
        time_limit_seconds(time_limit)
    except ValueError as error:
        raise UserError("--time", f"found {time_limit!r}; {error}") from None
    resolved = resolve(document_of(run), wanted.overrides)
    documents, reason = {}, None
    for count in range(nodes.min_nodes, nodes.max_nodes + 1):
        try:
            documents[count] = complete(resolved.config, resolved.deepspeed, count * profile.ranks_a_node)
        except UserError as error:
            reason = error
    if reason and not documents:
        raise reason
    refuse(check_on(ask(resolved, profile, wanted.nodes, wanted.time_limit, wanted.run_dir)))
    return Plan(resolved, profile, nodes, time_limit, documents)


def planned_folder(run: str, run_dir: Path | None) -> Path:
    """Return the folder that a run would get, without making it."""
    if RunDir(Path(run)).exists():
        return Path(run).absolute()
    if run_dir is not None:
        return run_dir.absolute()
    number = 1
    while (path := Path("runs") / f"{run_name(run)}-{number}").exists():
        number += 1
    return path.absolute()


def refuse_queued(run_dir: Path) -> None:
    """Raise UserError while a job of this folder is in the queue or runs."""
    job_ids = _read_job_ids(run_dir)
    alive = [job for job in slurm_client.queued(job_ids) if job.state in ALIVE_STATES] if job_ids else []
    if alive:
        where = f"job {alive[0].job_id} is {alive[0].state.lower()}"
        raise UserError(str(run_dir), f"{where} for this run already; wait for it, or `bigbatch cancel` it")


def new_folder(profile: Profile, name: str) -> Path:
    """Make and return runs/NAME-N; where the profile has scratch storage, a link to a folder there."""
    if profile.scratch is None:
        return fresh(Path("runs"), name)
    scratch = Path(os.path.expandvars(profile.scratch)).expanduser()
    if "$" in str(scratch):
        raise UserError("scratch", f"found {profile.scratch!r}; a variable in it is not set here")
    target = fresh(scratch, name)
    link = planned_folder(name, None)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target.absolute())
    return link


def _request(plan: Plan, run_dir: Path, wanted: Wanted) -> JobRequest:
    carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
    seconds = lead_seconds(run_dir, plan.profile.save_seconds) + COARSE_SECONDS
    return JobRequest(
        run_dir,
        Path.cwd(),
        plan.nodes,
        plan.time_limit,
        int(min(seconds, time_limit_seconds(plan.time_limit) / 2)),
        plan.profile.python or sys.executable,
        environment=use_frozen(run_dir, carried, plan.profile.environment) if wanted.snapshot else carried,
        exclude=tuple(sorted(bad_nodes(run_dir))),
        is_chain=wanted.chain is not None,
    )


def _ask_slurm(script: str) -> None:
    """Have Slurm judge a script before there is anything of the run; raise what it says against it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        said = slurm_client.try_submit(Path(file.name))
    _say(said.splitlines()[-1])


def _write(folder: RunDir, plan: Plan, wanted: Wanted, sweep: dict[str, Any] | None = None) -> Path:
    """Write all that a job reads; return its script."""
    request = _request(plan, folder.path, wanted)
    set_up(folder, plan.resolved, plan.documents[max(plan.documents)], "auto")
    (folder.path / "log").mkdir(exist_ok=True)
    write_diff(folder.path)
    if wanted.snapshot and sweep is None:
        freeze(folder.path)
    elif wanted.snapshot:  # all members run the same
        (folder.path / CODE).symlink_to(Path("..") / CODE)
    job = {
        "version": JOB_VERSION,
        "profile": plan.profile.model_dump(mode="json"),
        "nodes": {"min": plan.nodes.min_nodes, "max": plan.nodes.max_nodes},
        "ranks_per_node": plan.profile.ranks_a_node,
        "plans": plan.documents,
        "time_limit": plan.time_limit,
        "lead_seconds": request.lead_seconds,
        "needs": _needs(plan),
        "python": request.python,
        "exclude": request.exclude,
        "chain": wanted.chain,
        "snapshot": wanted.snapshot,
        "sweep": sweep,
        "job_ids": _read_job_ids(folder.path),
        "chain_job_ids": [],
        "submitted": None,
    }
    write_json(folder.path / "job.json", job)
    script = folder.path / "job.sbatch"
    script.write_text(render(plan.profile, request), encoding="utf-8")
    return script


def _needs(plan: Plan) -> dict[str, int]:
    """Return what the check of the nodes compares their storage with."""
    parameters = parameters_of(plan.resolved.config)
    ranks = max(plan.documents) * plan.profile.ranks_a_node
    return checkpoint_needs(plan.resolved.config, parameters, ranks)._asdict() if parameters else {}


def _send(run_dir: Path, script: Path) -> str:
    """Submit the script as if from a login shell, should this be one inside another job."""
    environment = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith("SLURM_")}
    try:
        return slurm_client.submit(script, environment=environment)
    except SlurmAwayError as error:
        advice = f"squeue --me tells whether the job is queued all the same; if not: sbatch {script}"
        raise UserError(str(run_dir), f"{error}; {advice}") from None


def _record(run_dir: Path, job_ids: Sequence[str]) -> None:
    job = read_json(run_dir / "job.json")
    submitted = datetime.now().astimezone().isoformat(timespec="seconds")
    chain = list(job_ids) if job["chain"] else []
    all_ids = [*job["job_ids"], *job_ids]
    write_json(run_dir / "job.json", {**job, "job_ids": all_ids, "chain_job_ids": chain, "submitted": submitted})


def _read_job_ids(run_dir: Path) -> list[str]:
    path = run_dir / "job.json"
    job: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    return list(job.get("job_ids", ()))


def _tell(job_ids: Sequence[str], run_dir: Path) -> int:
    print(" ".join(job_ids))
    shown_dir = os.path.relpath(run_dir) if run_dir.is_relative_to(Path.cwd()) else run_dir
    _say(f"submitted; to follow it: bigbatch logs -f {shlex.quote(str(shown_dir))}")
    return EXIT_DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
