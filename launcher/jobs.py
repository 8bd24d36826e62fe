"""The user's view of submitted runs: status, logs, cancel, resume; with Slurm's word where it gives one."""

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.launcher import slurm_client
from bigbatch.launcher.run_dir import RunDir, write_json
from bigbatch.launcher.run_facts import CANCEL_FILE, RunFacts, read_facts, runs_under
from bigbatch.launcher.slurm_client import AccountedJob, QueuedJob, SlurmAwayError, SlurmRefusedError
from bigbatch.launcher.submit import resubmit
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_REQUEUE, UserError

STATUS_SECONDS = 10.0  # each of at most two questions to Slurm
POLL_SECONDS = 1.0
FOLLOW_SECONDS = 0.3
ASK_EVERY_SECONDS = 5.0
FOLLOW_LINES = 20
MIN_SAVE_SECONDS = 60.0
LIVE = ("pending", "configuring", "running", "suspended", "stopped", "signaling", "stage_out", "completing", "requeued")
WAITING = ("pending", "requeued", "requeue_hold", "special_exit", "resv_del_hold", "requeue_fed")


class Status(NamedTuple):
    """How a run is; None is what nobody knows."""

    run_dir: str
    state: str
    """Of Slurm: pending, requeued (pending again), configuring, running, completing, suspended, completed, failed,
    cancelled, timeout, preempted, node_fail, out_of_memory and so on; saved: ended early, and not requeued; given_up:
    restarted in vain too often; lost: Slurm has forgotten the job and the folder tells no end. Of this host:
    not_submitted, running, completed, interrupted, failed.
    """
    reason: str | None = None
    """Why it waits, or ended."""
    last_end: str | None = None
    """Why the start before this one ended."""
    job_id: str | None = None
    nodes: str | None = None
    estimated_start: str | None = None
    """Local time, of a job that waits."""
    start: str | None = None
    time_used: str | None = None
    time_limit: str | None = None
    restarts: int = 0
    phase: str | None = None
    """What rank 0 does, of a run that runs: data, model, restore, step, evaluate or save."""
    idle_seconds: float | None = None
    """For how long it has not moved on."""
    step: int | None = None
    last_step: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None
    known_by: str = "run folder"
    """slurm, accounting or run folder: who told the state."""
    note: str | None = None
    """What a reader has to know of how this was found out."""


class _Answers(NamedTuple):
    """What Slurm said of all jobs that were asked about."""

    queued: dict[str, QueuedJob]
    records: dict[str, list[AccountedJob]]
    away: str | None
    """Why it said nothing."""


def status(paths: Sequence[Path]) -> list[Status]:
    """Return how each of these runs is, or each under runs/; asks Slurm two questions at most, and never waits long."""
    runs = runs_under(list(paths)) if paths else (runs_under([Path("runs")]) if Path("runs").is_dir() else [])
    facts = [read_facts(path) for path in runs]
    answers = _ask_slurm([job_id for own in facts for job_id in job_ids(own)])
    return [_status(own, answers) for own in facts]


def render(statuses: Sequence[Status]) -> str:
    """Return a table of several runs, or all that is known of one."""
    if len(statuses) == 1:
        return _render_one(statuses[0])
    head = ("RUN", "STATE", "STEP", "LOSS", "SPEED", "SAVED", "RESTARTS", "JOB", "NODES", "WHY")
    rows = [head, *(_row(own) for own in statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    notes = sorted({f"note: {own.note}" for own in statuses if own.note})
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *notes])


def logs(run_dir: Path, rank: int | None, *, all_ranks: bool, follow: bool) -> int:
    """Print what a run's job and rank 0, one rank or all have written; with `follow`, what comes until it ends."""
    if runs_under([run_dir]) != [run_dir]:
        raise UserError(str(run_dir), "holds several runs; give the folder of one")
    if not _log_files(run_dir, rank, all_ranks=all_ranks) and not follow:
        (own,) = status([run_dir])
        raise UserError(str(run_dir), f"no such log yet; the run is {_words(own.state)}" + _because(own.reason))
    tails: dict[Path, _Tail] = {}
    asked, ended, is_first, last, waits_as = time.monotonic(), False, True, None, None
    while True:
        for path in _log_files(run_dir, rank, all_ranks=all_ranks):
            tail = tails.setdefault(path, _Tail(path, FOLLOW_LINES if follow and is_first else None))
            for line in tail.new_lines(whole=not follow or ended):
                if path != last and not all_ranks and rank is None:
                    print(f"==> {path.relative_to(run_dir)} <==")
                last = path
                print(f"[{path.stem}] {line}" if all_ranks else line, flush=follow)
        if not follow or ended:
            return EXIT_DONE
        if is_first or time.monotonic() - asked > ASK_EVERY_SECONDS:
            (own,) = status([run_dir])
            ended, asked = own.state not in LIVE and not own.note, time.monotonic()
            if not tails and own.state != waits_as:
                waits_as = own.state
                _say(f"{run_dir} is {_words(own.state)}{_because(own.reason)}")
        is_first = False
        time.sleep(FOLLOW_SECONDS if not ended else 0)


def cancel(run_dir: Path, *, now: bool) -> int:
    """End a run's jobs and have none start again; running ones are asked to save first, unless `now`."""
    facts = [read_facts(path) for path in runs_under([run_dir])]
    ids = [job_id for own in facts for job_id in job_ids(own)]
    live = [job for job in slurm_client.queued(ids) if job.state.lower() in (*LIVE, *WAITING)] if ids else []
    if not live:
        raise UserError(str(run_dir), f"nothing to cancel: {_summary(facts)}")
    waiting = [job.job_id for job in live if job.state.lower() in WAITING]
    running = [job.job_id for job in live if job.state.lower() not in WAITING]
    for own in facts:
        if mine := [job.job_id for job in live if job.job_id in job_ids(own)]:
            write_json(own.path / CANCEL_FILE, {"job_ids": mine, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    if waiting:  # first: the next link of a chain is not to start when the one before it ends
        slurm_client.cancel(waiting)
    if running and not now:
        for job_id in running:
            with contextlib.suppress(SlurmRefusedError):  # it has just ended
                slurm_client.update_job(job_id, Requeue="0")  # else a job that has saved would put itself back
                slurm_client.signal_batch(job_id, "USR1")
        _say(f"asked {_jobs(running)} to save and end; `bigbatch cancel --now` does not wait for it")
        running = _wait_for_end(running, _patience_seconds(facts))
    if running:
        slurm_client.cancel(running)
    _say(f"cancelled: {_jobs([job.job_id for job in live])}")
    return EXIT_DONE


def resume(run_dir: Path) -> int:
    """Submit a run again, or what is not done of a sweep, as before; it goes on from its last checkpoint."""
    facts = [read_facts(path.absolute()) for path in runs_under([run_dir])]
    ids = [job_id for own in facts for job_id in job_ids(own)]
    queued = {job.job_id: job.state.lower() for job in slurm_client.queued(ids)} if ids else {}
    reasons = {own.path: _why_no_resume(own, queued) for own in facts}
    if all(reasons.values()):
        raise UserError(str(run_dir), "; ".join(sorted({str(reason) for reason in reasons.values()})))
    for path in [path for path, reason in reasons.items() if not reason]:
        resubmit(path)
    return EXIT_DONE


def _why_no_resume(facts: RunFacts, queued: Mapping[str, str]) -> str | None:
    if not facts.job:
        return f"was never submitted; to go on with it here: bigbatch train {shlex.quote(str(facts.path))}"
    for job_id in job_ids(facts):
        if queued.get(job_id) in (*LIVE, *WAITING):
            return f"job {job_id} is {queued[job_id]}; there is nothing to resume"
    return f"has ended: all {facts.last_step:,} steps are done" if facts.is_done else None


def job_ids(facts: RunFacts) -> list[str]:
    """Return the numbers of a run's jobs, oldest first: as submitted, and then by hand with `sbatch job.sbatch`."""
    known = [str(job_id) for job_id in facts.job.get("job_ids", [])]
    told = {str(event["job_id"]) for event in facts.events if "job_id" in event}
    newest = max(map(_number, known), default=(0,))
    return known + sorted((job_id for job_id in told if _number(job_id) > newest), key=_number)


def _number(job_id: str) -> tuple[int, ...]:
    """Return what orders jobs: they are numbered as they are submitted."""
    return tuple(int(part) for part in job_id.split("_"))


def _ask_slurm(ids: Sequence[str]) -> _Answers:
    """Ask the controller, and accounting about the jobs that it has forgotten or that were restarted."""
    if not ids:
        return _Answers({}, {}, None)
    queued: dict[str, QueuedJob] = {}
    records: dict[str, list[AccountedJob]] = {}
    away = None
    try:
        queued = {job.job_id: job for job in slurm_client.queued(ids, STATUS_SECONDS)}
    except (SlurmAwayError, SlurmRefusedError) as error:
        away = str(error)
    unclear = [job_id for job_id in ids if job_id not in queued or queued[job_id].restarts]
    if unclear:
        # A refusal, as of a damaged set-up, says as little as an absence: the state comes from elsewhere.
        with contextlib.suppress(SlurmAwayError, SlurmRefusedError):
            for record in slurm_client.accounted(unclear, STATUS_SECONDS):
                records.setdefault(record.job_id, []).append(record)
    return _Answers(queued, records, away)


def _status(facts: RunFacts, answers: _Answers) -> Status:
    ids = job_ids(facts)
    found = _of_slurm(facts, ids, answers) if ids else _of_this_host(facts)
    if facts.holder and found.state not in (*LIVE, *WAITING):
        found = _of_this_host(facts)  # somebody goes on here with what was once submitted
    age = time.time() - facts.checkpoint_time if facts.checkpoint_time else None
    is_running = found.state == "running"
    return found._replace(
        phase=facts.phase if is_running else None,
        idle_seconds=facts.idle_seconds if is_running else None,
        step=facts.step,
        last_step=facts.last_step,
        loss=facts.loss,
        tokens_per_second=facts.tokens_per_second,
        samples_per_second=facts.samples_per_second,
        checkpoint_step=facts.checkpoint_step,
        checkpoint_age_seconds=round(max(age, 0.0), 1) if age is not None else None,
    )


def _of_this_host(facts: RunFacts) -> Status:
    """Return the state of a run that nobody has submitted."""
    run_dir = str(facts.path)
    if facts.holder:
        return Status(run_dir, "running", facts.holder)
    if facts.is_done:
        return Status(run_dir, "completed")
    if facts.failure:
        return Status(run_dir, "failed", facts.failure)
    if facts.step is not None:
        return Status(run_dir, "interrupted", f"to go on: bigbatch train {shlex.quote(run_dir)}")
    return Status(run_dir, "not_submitted")


def _of_slurm(facts: RunFacts, ids: list[str], answers: _Answers) -> Status:
    job = _current([answers.queued[job_id] for job_id in ids if job_id in answers.queued])
    if job:
        return _of_queue(facts, job, answers.records.get(job.job_id, []))
    records = answers.records.get(ids[-1], [])
    # A record may say running long after the end, when the controller could not tell accounting: the folder knows more.
    if records and (records[-1].state.lower() not in LIVE or not _events_of(facts, ids[-1])):
        return _of_records(facts, records[-1], len(records) - 1)._replace(note=answers.away)
    found = _of_events(facts, ids[-1])
    if answers.away:
        return found._replace(note=answers.away)
    if found.state in LIVE:
        why = f"Slurm no longer knows job {ids[-1]}, and the run folder tells no end of it"
        return found._replace(state="completed" if facts.is_done else "lost", reason=None if facts.is_done else why)
    return found


def _current(jobs: Sequence[QueuedJob]) -> QueuedJob | None:
    """Return the job of a chain that tells most: the one that runs, else the next one, else the last one."""
    for states in (set(LIVE) - set(WAITING), WAITING):
        for job in jobs:
            if job.state.lower() in states:
                return job
    return jobs[-1] if jobs else None


def _of_queue(facts: RunFacts, job: QueuedJob, records: list[AccountedJob]) -> Status:
    state = job.state.lower()
    is_waiting = state in WAITING
    found = Status(
        str(facts.path),
        "requeued" if state == "pending" and job.restarts else state,
        job.reason if job.reason != "None" else None,
        _last_end(facts, job.job_id, records) if job.restarts else None,
        job.job_id,
        job.nodes or None,
        estimated_start=(job.start or None) if is_waiting else None,
        start=None if is_waiting else job.start or None,
        time_used=job.time_used,
        time_limit=job.time_limit,
        restarts=max(job.restarts, _restarts(facts, job.job_id)),
        known_by="slurm",
    )
    return found if state in LIVE or is_waiting else _explained(facts, found)


def _of_records(facts: RunFacts, record: AccountedJob, restarts: int) -> Status:
    found = Status(
        str(facts.path),
        record.state.lower(),
        job_id=record.job_id,
        nodes=record.nodes or None,
        start=record.start or None,
        restarts=max(restarts, _restarts(facts, record.job_id)),
        known_by="accounting",
    )
    return found if found.state in LIVE else _explained(facts, found, record)


def _of_events(facts: RunFacts, job_id: str) -> Status:
    """Return the state that the job's own words tell."""
    events = _events_of(facts, job_id)
    found = Status(str(facts.path), "pending", job_id=job_id, restarts=_restarts(facts, job_id))
    told = [event for event in events if event.get("event") in ("start", "end", "requeue", "give_up")]
    if not told:
        return found
    last = told[-1]
    found = found._replace(nodes=_joined(last.get("nodes")), start=last.get("time"), reason=last.get("reason"))
    if last["event"] == "start":
        return found._replace(state="running", reason=None)
    if last["event"] == "requeue":
        return found._replace(state="requeued", reason=None, last_end=last.get("reason"))
    state = "completed" if last.get("exit_status") == EXIT_DONE else "failed"
    return _explained(facts, found._replace(state=state, start=None))


def _explained(facts: RunFacts, found: Status, record: AccountedJob | None = None) -> Status:
    """Say why a job has ended, in the words of who knows it best."""
    events = _events_of(facts, found.job_id or "")
    last: dict[str, Any] = next((own for own in reversed(events) if own.get("event") in ("end", "give_up")), {})
    if found.state == "completed":
        return found._replace(reason=None)
    if found.job_id in facts.cancelled_jobs:
        saved = f"saved at step {facts.checkpoint_step}" if facts.checkpoint_step else None
        return found._replace(state="cancelled", reason=saved)
    if last.get("event") == "give_up":
        return found._replace(state="given_up", reason=last.get("reason"))
    if found.state == "failed" and last.get("exit_status") == EXIT_REQUEUE:
        return found._replace(state="saved", reason=f"to go on: bigbatch resume {shlex.quote(str(facts.path))}")
    if found.state == "failed":
        by_slurm = f"exit status {record.exit_status}" if record else found.reason
        return found._replace(reason=last.get("reason") or facts.failure or by_slurm)
    return found._replace(reason=None)  # Slurm's is why it waited once


def _last_end(facts: RunFacts, job_id: str, records: list[AccountedJob]) -> str | None:
    """Return why the job's last start but this ended: in its own words, or else in Slurm's."""
    told = [own for own in _events_of(facts, job_id) if own.get("event") in ("start", "requeue")]
    if told and told[-1]["event"] == "start" and len(told) > 1:  # this start's own
        told.pop()
    if told and told[-1]["event"] == "requeue":
        return told[-1].get("reason")
    ended = [record.state.lower() for record in records if record.state not in ("PENDING", "RUNNING")]
    return _words(ended[-1]) if ended else None


def _events_of(facts: RunFacts, job_id: str) -> list[dict[str, Any]]:
    return [event for event in facts.events if str(event.get("job_id")) == job_id]


def _restarts(facts: RunFacts, job_id: str) -> int:
    """Count the starts after the first that the job tells of, those on the same nodes among them."""
    return max(0, sum(event.get("event") == "start" for event in _events_of(facts, job_id)) - 1)


def _joined(nodes: Any) -> str | None:
    return ",".join(nodes) if isinstance(nodes, list) else nodes


def _wait_for_end(ids: list[str], limit_seconds: float) -> list[str]:
    """Wait for jobs to end by themselves; return those that are left, because they would start again or are late."""
    deadline = time.monotonic() + limit_seconds
    left = ids
    while left and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        states = {job.job_id: job.state.lower() for job in slurm_client.queued(ids)}
        left = [job_id for job_id in ids if states.get(job_id) in (*LIVE, *WAITING)]
        if left and all(states[job_id] in WAITING for job_id in left):
            return left
    if left:
        _say(f"{_jobs(left)} did not end within {limit_seconds:.0f} s")
    return left


def _patience_seconds(facts: Sequence[RunFacts]) -> float:
    """Return how long to wait for a save: longer than the job itself would take for it ahead of its time limit."""
    return MIN_SAVE_SECONDS + max(own.job.get("lead_seconds") or 0.0 for own in facts)


def _summary(facts: Sequence[RunFacts]) -> str:
    states = {own.state for own in status([own.path for own in facts])}
    return ", ".join(map(_words, sorted(states)))


class _Tail:
    """A log file and how far it has been read."""

    def __init__(self, path: Path, last_lines: int | None) -> None:
        self._path = path
        self._offset = 0
        if last_lines is not None:
            lines = path.read_bytes().split(b"\n")
            self._offset = sum(len(line) + 1 for line in lines[: -last_lines - 1])

    def new_lines(self, *, whole: bool) -> Iterator[str]:
        """Give the lines that have come; a last line without an end waits for it, unless there will be no more."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            raw = file.read()
        if not whole:
            raw = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(raw)
        yield from raw.decode(errors="replace").splitlines()


def _log_files(run_dir: Path, rank: int | None, *, all_ranks: bool) -> list[Path]:
    """Return the logs that are meant: all ranks', one rank's, or the newest job's and rank 0's, the latest last."""
    folder = RunDir(run_dir).path / "log"
    if all_ranks:
        return sorted(folder.glob("rank*.txt"), key=lambda path: (len(path.name), path.name))
    if rank is not None:
        return [path for path in [folder / f"rank{rank}.txt"] if path.exists()]
    of_jobs = sorted(folder.glob("slurm-*.out"), key=_written)[-1:]
    return sorted([*of_jobs, *folder.glob("prepare.txt"), *folder.glob("rank0.txt")], key=_written)


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _row(own: Status) -> tuple[str, ...]:
    return (
        own.run_dir,
        _words(own.state),
        _step(own),
        "-" if own.loss is None else f"{own.loss:.4f}",
        _speed(own),
        _ago(own.checkpoint_age_seconds),
        str(own.restarts),
        own.job_id or "-",
        own.nodes or "-",
        own.reason or own.last_end or "",
    )


def _render_one(own: Status) -> str:
    saved = None
    if own.checkpoint_step is not None:
        saved = f"step {own.checkpoint_step:,}, {_ago(own.checkpoint_age_seconds)} ago"
    used = f"{own.time_used} of {own.time_limit}" if own.time_used and own.start else own.time_limit
    lines = {
        "run": own.run_dir,
        "state": _words(own.state) + _because(own.reason),
        "ended before": own.last_end,
        "job": own.job_id,
        "nodes": own.nodes,
        "estimated start": own.estimated_start,
        "started": own.start,
        "time": used,
        "restarts": str(own.restarts) if own.job_id else None,
        "phase": own.phase and own.phase + (f", for {_ago(own.idle_seconds)}" if own.idle_seconds else ""),
        "step": _step(own),
        "loss": None if own.loss is None else f"{own.loss:.4f}",
        "speed": _speed(own),
        "last checkpoint": saved or "none",
        "note": own.note,
    }
    return "\n".join(f"{name + ':':<17}{text}" for name, text in lines.items() if text and text != "-")


def _step(own: Status) -> str:
    if own.step is None:
        return "-" if own.last_step is None else f"- of {own.last_step:,}"
    return f"{own.step:,}" + (f" of {own.last_step:,}" if own.last_step else "")


def _speed(own: Status) -> str:
    if own.tokens_per_second:
        return f"{own.tokens_per_second:,.0f} tokens/s"
    return f"{own.samples_per_second:,.1f} samples/s" if own.samples_per_second else "-"


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _words(state: str) -> str:
    return state.replace("_", " ")


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _jobs(ids: Sequence[str]) -> str:
    return f"job{'s' if len(ids) > 1 else ''} {', '.join(ids)}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
