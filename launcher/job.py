"""What runs inside a batch job, beside the ranks: `python -m bigbatch.launcher.job RUN_DIR`, started by job.sbatch.

It starts the ranks with srun, has them save ahead of the time limit, passes signals on, and when they have ended
decides: done, again at once, back into the queue under the same number, or given up. Standard library alone.

Every start and end is a line of job_events.jsonl: {"event": "start" | "end" | "requeue" | "give_up" |
"node_excluded", "time", "job_id", "restart_count", "step", ...}. `step` is the newest checkpoint's.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from bigbatch.launcher import slurm_client
from bigbatch.launcher.documents import read_json
from bigbatch.launcher.lead import lead_seconds
from bigbatch.launcher.node_memory import bad_nodes, remember
from bigbatch.launcher.run_dir import RunDir, hold, write_json
from bigbatch.launcher.slurm_client import SlurmAwayError, SlurmRefusedError
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError, one_line
from bigbatch.recipes.core.slurm_ranks import EXPECTED_RANKS, restart_count

EVENTS = "job_events.jsonl"
POLL_SECONDS = 0.2
LEAVING_SECONDS = 60  # for the other ranks, when one has ended or failed
CHECK_SECONDS = 300.0  # the check of the nodes ends by itself long before
AWAY_SECONDS = 1800.0  # for a controller to come back
AWAY_POLL_SECONDS = 5.0
KILLED_SECONDS = 120.0  # for Slurm to end a job that it has put back into the queue
BAD_NODE = 69  # exit status of the check of the nodes
GONE_STATES = ("down", "fail", "power", "reboot", "error", "inval", "*")  # a star: it does not respond
NOT_FOR_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    # With these srun would show each rank one GPU alone; a rank takes its own of the node's by its local number.
    *("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"),
)


class Allocation(NamedTuple):
    """What Slurm has given this job."""

    job_id: str
    """Of a member of an array with its index, as 12_3."""
    restarts: int
    nodes: tuple[str, ...]


class Verdict(NamedTuple):
    """What becomes of a job whose ranks have ended."""

    action: str
    """done; restart: here and at once; requeue; give_up; or end: somebody else has decided."""
    reason: str
    status: int


class Signals:
    """What has been asked of this job; the first is remembered, all are passed on to the step at hand."""

    def __init__(self) -> None:
        self.step: subprocess.Popen | None = None
        self.saves = self.ends = self.reminded = False
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR2, self._remind)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ends |= number == signal.SIGTERM  # Slurm ends the job: cancelled, put back, or out of time
        os.write(2, f"{signal.Signals(number).name}: saving\n".encode())  # print may be at work where this comes
        self.save()

    def _remind(self, number: int, frame: FrameType | None) -> None:
        """Take Slurm's own word that the time limit is near, which it gives up to a minute too early or late."""
        self.reminded = True

    def save(self) -> None:
        """Have the ranks save and end; srun passes the signal on to each of them."""
        self.saves = True
        if self.step and self.step.poll() is None:
            self.step.send_signal(signal.SIGUSR1)


def main(arguments: Sequence[str]) -> int:
    """Run the job of a run folder to its end, or to where it goes back into the queue; return the exit status."""
    signals, run_dir = Signals(), Path(arguments[0])
    try:
        job = read_json(run_dir / "job.json")
        allocation = read_allocation(os.environ)
        with hold(RunDir(run_dir)):
            return Job(run_dir, job, allocation, signals).run()
    except UserError as error:
        _say(f"error: {error}")
        return EXIT_USER_ERROR


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Return the job's number, restarts and nodes; raise UserError outside of a batch job."""
    if not environment.get("SLURM_JOB_ID") or not environment.get("SLURM_JOB_NODELIST"):
        raise UserError("SLURM_JOB_ID", "is not set: this is no batch job; start it with sbatch")
    nodes = tuple(slurm_client.host_names(environment["SLURM_JOB_NODELIST"]))
    array, member = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return Allocation(f"{array}_{member}" if array else environment["SLURM_JOB_ID"], restart_count(environment), nodes)


class Job:
    """One start of a job: its folder, document, nodes, and the events that it adds to those of earlier starts."""

    def __init__(self, run_dir: Path, job: dict[str, Any], allocation: Allocation, signals: Signals) -> None:
        self.run_dir, self.job, self.allocation, self.signals = run_dir, job, allocation, signals
        self.profile: dict[str, Any] = job["profile"]
        self.num_nodes, self._failed_since, self._is_prepared = 0, float("inf"), False
        mates = {allocation.job_id, *job["chain_job_ids"]}
        self.events = [event for event in read_events(run_dir) if event["job_id"] in mates]

    def run(self) -> int:
        """Start the ranks as often as it takes; return the exit status."""
        if ended := self._ended_before():
            return ended.status
        try:
            self.num_nodes = self._plan()
            self._learn_of_earlier_end()
            self._start()
            if verdict := self._leave_bad_nodes():
                return self._conclude(verdict)
            clock = Clock(self.allocation.job_id, lambda: lead_seconds(self.run_dir, self.profile["save_seconds"]))
            verdict = self._attempt(clock)
            while verdict.action == "restart":
                _say(one_line(f"again on the same nodes: {verdict.reason}"))
                self._start()
                verdict = self._attempt(clock)
        except UserError as error:
            _say(f"error: {error}")
            verdict = Verdict("give_up", str(error), EXIT_USER_ERROR)
        return self._conclude(verdict)

    def _ended_before(self) -> Verdict | None:
        """Return how an earlier job of this chain ended the run for good."""
        for event in self.events:
            if event["event"] == "give_up" and event["job_id"] != self.allocation.job_id:
                _say(f"nothing to do: job {event['job_id']} has given up: {event['reason']}")
                return Verdict("end", event["reason"], EXIT_USER_ERROR)
            if event["event"] == "end" and event["exit_status"] == EXIT_DONE:
                _say(f"nothing to do: job {event['job_id']} has finished the run")
                return Verdict("done", "", EXIT_DONE)
        return None

    def _plan(self) -> int:
        """Write the DeepSpeed document of the nodes that have come; return how many of them are used."""
        came, plans = len(self.allocation.nodes), {int(nodes): plan for nodes, plan in self.job["plans"].items()}
        fewest, most = self.job["nodes"]["min"], self.job["nodes"]["max"]
        used = max((nodes for nodes in plans if nodes <= came), default=0)
        if not fewest <= came <= most or not used:
            wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
            right = f"this run was submitted for {wanted}; submit it again with --nodes {came}"
            raise UserError("SLURM_JOB_NUM_NODES", f"found {came} nodes; {right}")
        if used < came:
            _say(f"the batch divides over {used} of the {came} nodes that have come; the others idle")
        folder = RunDir(self.run_dir)
        if read_json(folder.deepspeed) != plans[used]:
            write_json(folder.deepspeed, plans[used])
        return used

    def _learn_of_earlier_end(self) -> None:
        """Remember the nodes that are gone since an earlier start that could not tell of its end."""
        last = next((event for event in reversed(self.events) if event["event"] in ("start", "end", "requeue")), None)
        if last and last["event"] == "start":
            self._remember(dict.fromkeys(gone_nodes(last["nodes"]), "it failed while the run was on it"))
            self._note("end", exit_status=None, reason="Slurm ended it, or its first node failed", of=last["job_id"])

    def _start(self) -> None:
        self._note("start", nodes=self.allocation.nodes[: self.num_nodes], ranks=self._num_ranks)

    def _attempt(self, clock: "Clock") -> Verdict:
        """Check the nodes, prepare the data, train; return what to do next."""
        (self.run_dir / "failure.json").unlink(missing_ok=True)
        self._failed_since = float("inf")
        (self.run_dir / "log").mkdir(exist_ok=True)
        checks = self.profile["check_nodes"]
        status = self._step("check", self._num_ranks, clock, CHECK_SECONDS) if checks else EXIT_DONE
        if status == EXIT_DONE and not self._is_prepared:  # a later start's too: scratch storage is swept
            status = self._step("prepare", 1, clock)
            self._is_prepared = status == EXIT_DONE
        if status == EXIT_DONE:
            status = self._step("train", self._num_ranks, clock)
        failure = _read_object(self.run_dir / "failure.json")
        self._blame(status, failure)
        step = newest_step(self.run_dir)
        self._note("end", exit_status=status, host=failure.get("host"), reason=failure.get("exception", ""))
        verdict = decide(status, failure, self._fruitless(step), self.profile["max_restarts"], step)
        if self.signals.ends:
            verdict = self._after_end(verdict)
        elif verdict.action == "restart":
            verdict = self._leave_bad_nodes() or verdict
        elif verdict.action == "requeue" and status != EXIT_REQUEUE and not self.profile["requeue"]:
            verdict = verdict._replace(action="restart")
        return verdict

    @property
    def _num_ranks(self) -> int:
        return self.num_nodes * self.job["ranks_per_node"]

    def _fruitless(self, step: int) -> int:
        """Count the starts, this one included, since the last that brought the run a checkpoint further."""
        count = 0
        for event in reversed(self.events):
            if event["event"] == "give_up" or (event["event"] == "start" and event["step"] < step):
                break
            count += event["event"] == "start"
        return count

    def _step(self, part: str, num_ranks: int, clock: "Clock", limit_seconds: float = float("inf")) -> int:
        """Run one part on all ranks and return its exit status: srun's, which is the highest of theirs."""
        if self.signals.saves:
            return EXIT_REQUEUE
        command = step_command(self.job, self.run_dir, part, self.num_nodes if num_ranks > 1 else 1, num_ranks)
        environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_RANKS}
        began = time.monotonic()
        step = subprocess.Popen(command, env={**environment, EXPECTED_RANKS: str(num_ranks)}, stdin=subprocess.DEVNULL)
        self.signals.step = step
        if self.signals.saves:  # between the look above and now
            self.signals.save()
        while step.poll() is None:
            time.sleep(POLL_SECONDS)
            if not self.signals.saves and clock.is_time(self.signals.reminded):
                _say(f"the time limit is near: saving ({clock.lead:.0f} s ahead of it)")
                self.signals.save()
            if time.monotonic() - began > limit_seconds or self._is_over():
                _end_step(step)
        return step.returncode if step.returncode >= 0 else 128 - step.returncode

    def _is_over(self) -> bool:
        """Tell whether a rank failed so long ago that the others should have left: srun may wait for a dead node."""
        if self._failed_since == float("inf") and (self.run_dir / "failure.json").exists():
            self._failed_since = time.monotonic()
        return time.monotonic() - self._failed_since > LEAVING_SECONDS

    def _blame(self, status: int, failure: Mapping[str, Any]) -> None:
        """Remember the nodes to stay away from, with the reason."""
        bad: dict[str, str] = {}
        if status == BAD_NODE:
            check = _read_object(self.run_dir / "node_check.json")
            reasons = check.get("reasons", {})
            bad = {node: f"the check before the first step: {reasons.get(node)}" for node in check.get("bad", ())}
        elif status not in (EXIT_DONE, EXIT_USER_ERROR, EXIT_REQUEUE):
            bad = dict.fromkeys(gone_nodes(self.allocation.nodes), "it failed while the run was on it")
            node = self._node_of(failure.get("host", ""))
            ends = (event for event in reversed(self.events) if event["event"] == "end")
            before = next((event for event in ends if event["step"] == newest_step(self.run_dir)), {})
            if node and "has not been heard of" in failure.get("exception", ""):
                bad[node] = "it has not been heard of any more"
            elif node and before.get("host") == failure["host"] and self.num_nodes > 1:
                bad[node] = "it was the first to fail twice in a row"
        self._remember(bad)

    def _node_of(self, host: str) -> str | None:
        """Return the node that calls itself so; one may know its full name, and Slurm the first part."""
        name = host.partition(".")[0]
        return next((node for node in self.allocation.nodes if node.partition(".")[0] == name), None)

    def _remember(self, bad: Mapping[str, str]) -> None:
        remember(self.run_dir, bad, self.profile["bad_node_hours"])
        for node, why in bad.items():
            self._note("node_excluded", node=node, reason=why, until=bad_nodes(self.run_dir)[node]["until"])

    def _leave_bad_nodes(self) -> Verdict | None:
        """Return the verdict for an allocation with a node in it that failed; None for one without."""
        known, step = bad_nodes(self.run_dir), newest_step(self.run_dir)
        found = [node for node in self.allocation.nodes if node in known]
        if not found:
            return None
        reason = f"{', '.join(found)}: {known[found[0]]['reason']}"
        exceeded = self._fruitless(step) > self.profile["max_restarts"]
        return Verdict("give_up" if exceeded else "requeue", reason, EXIT_FAILED)

    def _after_end(self, verdict: Verdict) -> Verdict:
        """Judge anew when Slurm is ending this job: only one that is out of time goes back by our hand."""
        with contextlib.suppress(SlurmAwayError, SlurmRefusedError):
            if slurm_client.show_job(self.allocation.job_id).get("Reason") == "TimeLimit":
                return verdict
        if verdict.action in ("requeue", "restart"):
            return Verdict("end", "Slurm ended the job", verdict.status)
        return verdict

    def _conclude(self, verdict: Verdict) -> int:
        """Carry the verdict out and say it; return the exit status."""
        if verdict.action == "requeue":
            verdict = self._requeue(verdict)
        if verdict.action == "give_up":
            self._note("give_up", reason=verdict.reason, exit_status=verdict.status)
            _say(one_line(f"given up: {verdict.reason}"))
        elif verdict.action == "end":
            for mate in self.job["chain_job_ids"]:
                if mate != self.allocation.job_id:
                    self._exclude(mate)
            _say(one_line(f"ended: {verdict.reason}"))
        return verdict.status

    def _requeue(self, verdict: Verdict) -> Verdict:
        """Put this job back into the queue, away from bad nodes, and wait for its end; else say why it stays out."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the commands too, which Slurm signals with the job
        job_id, is_asked = self.allocation.job_id, False
        deadline = time.monotonic() + AWAY_SECONDS
        while time.monotonic() < deadline:
            try:
                if not is_asked:
                    if why := _stays_out(slurm_client.show_job(job_id)):
                        return Verdict("end", f"{verdict.reason}; {why}", verdict.status)
                    self._note("requeue", reason=verdict.reason, exit_status=verdict.status)
                    is_asked = True
                slurm_client.requeue(job_id)
                break
            except SlurmAwayError as error:
                _say(f"waiting for Slurm's controller: {error}")
                time.sleep(AWAY_POLL_SECONDS)
            except SlurmRefusedError as error:
                if "pending" not in error.message.lower():  # it is back: the answer to an earlier call was lost
                    return Verdict("give_up", f"{verdict.reason}; Slurm does not requeue: {error}", verdict.status)
                break
        else:
            return Verdict("give_up", f"{verdict.reason}; Slurm's controller does not answer", verdict.status)
        _say(one_line(f"back into the queue: {verdict.reason}"))
        self._exclude(job_id, KILLED_SECONDS)
        time.sleep(KILLED_SECONDS)
        return Verdict("end", verdict.reason, verdict.status)

    def _exclude(self, job_id: str, patience_seconds: float = 0.0) -> None:
        """Keep a pending job off the nodes that failed; should that fail, the next start looks again."""
        excluded = ",".join(sorted(bad_nodes(self.run_dir)))
        had = self.job["exclude"] or any(event["event"] == "node_excluded" for event in self.events)
        if not excluded and not had:
            return
        for _ in range(1 + int(patience_seconds / POLL_SECONDS)):
            with contextlib.suppress(SlurmAwayError, SlurmRefusedError):  # it is pending only after a moment
                slurm_client.update_job(job_id, ExcNodeList=excluded)
                break
            time.sleep(POLL_SECONDS)

    def _note(self, event: str, **facts: Any) -> None:
        """Add an event to the folder's."""
        line = {
            "event": event,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "job_id": self.allocation.job_id,
            "restart_count": self.allocation.restarts,
            "step": newest_step(self.run_dir),
            **facts,
        }
        self.events.append(line)
        with (self.run_dir / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Clock:
    """Says when it is time to save ahead of the time limit, which it asks Slurm for again every minute."""

    def __init__(self, job_id: str, lead: Callable[[], float]) -> None:
        self.lead, self._end = lead(), float("inf")
        self._job_id, self._lead = job_id, lead
        threading.Thread(target=self._follow, daemon=True).start()

    def is_time(self, reminded: bool) -> bool:
        """Tell whether a save has to begin now; Slurm's reminder counts while it has not told when the end is."""
        return time.time() > self._end - self.lead or (reminded and self._end == float("inf"))

    def _follow(self) -> None:
        while True:
            pause_seconds = AWAY_POLL_SECONDS
            with contextlib.suppress(SlurmAwayError, SlurmRefusedError):
                facts = slurm_client.show_job(self._job_id)
                pause_seconds = 60.0
                with contextlib.suppress(ValueError):  # without a limit there is no end
                    begin, end = (
                        datetime.fromisoformat(facts.get(f"{name}Time", "")).timestamp() for name in ("Start", "End")
                    )
                    self._end, self.lead = end, min(self._lead(), (end - begin) / 2)
            time.sleep(pause_seconds)


def decide(status: int, failure: Mapping[str, Any], fruitless: int, max_restarts: int, step: int) -> Verdict:
    """Return what becomes of a job whose ranks ended so, after so many starts without a new checkpoint."""
    if status == EXIT_DONE:
        return Verdict("done", "", EXIT_DONE)
    what = failure.get("exception") or f"exit status {status}"
    if EXIT_USER_ERROR in (status, failure.get("exit_status")):
        return Verdict("give_up", failure.get("exception") or "log/rank0.txt says what to change", EXIT_USER_ERROR)
    if fruitless > max_restarts:
        after = f"{fruitless} starts in a row have brought it no further than step {step}"
        return Verdict("give_up", f"{after}; the last: {what}", EXIT_FAILED)
    if status == EXIT_REQUEUE:
        return Verdict("requeue", f"saved at step {step}", EXIT_REQUEUE)
    # A second failure in the same place may be the nodes': in the queue Slurm finds out, and gives others.
    return Verdict("restart" if fruitless <= 1 else "requeue", what, EXIT_FAILED)


def step_command(job: Mapping[str, Any], run_dir: Path, part: str, num_nodes: int, num_ranks: int) -> list[str]:
    """Return srun's arguments for one part of a run: check, prepare or train."""
    profile, container = job["profile"], job["profile"]["container"] or {}
    log = "prepare.txt" if part == "prepare" else "rank%t.txt"
    folder = str(run_dir / "log").replace("%", "%%")
    command = [
        "srun",
        *(f"--nodes={num_nodes}", f"--ntasks={num_ranks}", f"--ntasks-per-node={num_ranks // num_nodes}"),
        *("--distribution=block", "--overlap", "--kill-on-bad-exit=0", f"--wait={LEAVING_SECONDS}"),
        *(f"--output={folder}/{log}", "--open-mode=append", "--export=ALL"),
    ]
    if profile["cpus_per_rank"]:  # srun does not take it from the job
        command.append(f"--cpus-per-task={profile['cpus_per_rank']}")
    if container.get("kind") == "pyxis":
        command.append(f"--container-image={container['image']}")
        if container["mounts"]:
            command.append(f"--container-mounts={','.join(container['mounts'])}")
    elif container.get("kind") == "apptainer":
        binds = [argument for bind in container["binds"] for argument in ("--bind", bind)]
        command += [container["command"], "exec", *(["--nv"] if profile["gpus"] else []), *binds, container["image"]]
    module = ["bigbatch.recipes.core.node_check"] if part == "check" else ["bigbatch.recipes.core.worker", part]
    python = container.get("python") or job["python"]
    needs = [f"--{name.replace('_', '-')}={count}" for name, count in job["needs"].items()] if part == "check" else []
    return [*command, python, "-P", "-m", *module, str(run_dir), *needs]


def _stays_out(facts: Mapping[str, str]) -> str:
    """Say why a job with these facts does not go back into the queue, or ""."""
    if facts.get("Requeue") == "0":
        return "this job may not go back into the queue"
    if facts.get("JobState") not in ("RUNNING", "PREEMPTED") and facts.get("Reason") != "TimeLimit":
        return "Slurm has ended this job"  # by scancel, say: it would start all the same
    return ""


def gone_nodes(nodes: Sequence[str]) -> list[str]:
    """Return those of the nodes that Slurm says are down, or about to be."""
    with contextlib.suppress(SlurmAwayError, SlurmRefusedError):
        states = slurm_client.node_states(nodes)
        return [node for node in nodes if any(word in states.get(node, "") for word in GONE_STATES)]
    return []


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest whole checkpoint; 0 when there is none."""
    manifests = (run_dir / "checkpoints").glob("step_*/manifest.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in manifests), default=0)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of all jobs in a run folder, oldest first; a torn last line is none."""
    events = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / EVENTS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return events


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _end_step(step: subprocess.Popen) -> None:
    """Have srun end its tasks, and itself: at once, which it does when it is asked twice."""
    for _ in range(3):
        if step.poll() is None:
            step.terminate()
            time.sleep(0.5)
    with contextlib.suppress(subprocess.TimeoutExpired):
        step.wait(30)
    step.kill()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
