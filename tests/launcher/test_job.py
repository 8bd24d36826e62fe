"""A job's decisions on a real cluster, its ranks small programs: what ends them, and whether it goes on.

A profile's container command stands where the ranks' interpreter would be, and does what a test says.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bigbatch.launcher import cli, job
from bigbatch.launcher.job import Verdict, decide, read_events
from bigbatch.launcher.node_memory import bad_nodes, remember
from bigbatch.launcher.profiles import parse_profile
from bigbatch.launcher.submit import new_folder
from bigbatch.recipes.core.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError

RANK = f"""#!{sys.executable}
# Stands for `apptainer exec IMAGE python3 -P -m MODULE [PART] RUN_DIR`.
import json, os, signal, sys, time
from pathlib import Path
module, *rest = sys.argv[sys.argv.index("-m") + 1 :]
part = "check" if module.endswith("node_check") else rest.pop(0)
run = Path(rest[0])
rank, node = int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"]
starts = [json.loads(line) for line in (run / "job_events.jsonl").read_text().splitlines()]
start = sum(event["event"] == "start" for event in starts)

def save(step):
    folder = run / "checkpoints" / f"step_{{step:08}}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").touch()

def until_asked():
    (run / f"ready{{rank}}").touch()
    signal.sigwait({{signal.SIGUSR1, signal.SIGTERM}})

signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1, signal.SIGTERM}})
exec(os.environ["BEHAVIOUR"])
"""


class Started(NamedTuple):
    """A submitted run."""

    job_id: str
    run_dir: Path

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir) if kind in ("", event["event"])]

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run_dir / "log").glob("slurm-*.out")))


@pytest.fixture(scope="module")
def submit(slurm, tmp_path_factory) -> Iterator[Callable[..., Started]]:
    """Give a function that submits a run whose ranks behave as the code says, in the folder of all these tests."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "rank").write_text(RANK)
    (folder / "rank").chmod(0o755)

    def submit(name: str, behaviour: str, *flags: str, **settings: Any) -> Started:
        profile = {
            "version": 1,
            "partition": "low",
            "memory": "100",
            "time_limit": "5",
            "check_nodes": False,
            "container": {"kind": "apptainer", "image": "none", "command": str(folder / "rank")},
            "environment": {"BEHAVIOUR": f"if part == 'prepare': sys.exit()\n{behaviour}"},
            **settings,
        }
        (folder / f"{name}.json").write_text(json.dumps(profile))
        command = ["submit", "gpt/quick", "--profile", f"{name}.json", "--run-dir", name, *flags]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main(command) == 0
        return Started(said.getvalue().strip(), folder / name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield submit


# name -> (what the ranks do, flags, settings of the profile): all at work at the same time
USER_ERROR = "json.dump({'exception': 'UserError: model.x: 3', 'exit_status': 2}, open(run / 'failure.json', 'w'))"
ODD = 'it\'s 50% "well", $(a) é #1'  # the name of a run folder, which reaches Slurm in its directives
RUNS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    ODD: ("assert part == 'train'", ["--nodes", "2"], {}),
    "saved": ("save(start); sys.exit(75 if start < 3 else 0)", [], {}),
    "mistake": ("sys.exit(2)", [], {}),
    # srun's status is the highest of all ranks': the digest has to tell.
    "mistake_of_one": (f"rank or {USER_ERROR}; sys.exit(2 if rank == 0 else 75)", ["--nodes", "2"], {}),
    "crash": ("start == 2 and save(5); sys.exit(9)", [], {"max_restarts": 2}),
    "fruitless": ("sys.exit(75)", [], {"max_restarts": 1}),
    "chain": ("save(start); sys.exit(75 if start < 2 else 0)", ["--chain", "3"], {}),
    "gpus": (
        "print(os.environ['SLURM_LOCALID'], os.environ['CUDA_VISIBLE_DEVICES'], flush=True)",
        ["--nodes", "2"],
        {"gpus": {"per_node": 2, "ask_by": "gpus-per-task"}},
    ),
    "sweep": (
        "save(1 + json.load(open(run / 'run.json'))['seed']); sys.exit(75 if start == 1 and run.name == '2' else 0)",
        ["--sweep", "members.json"],
        {},
    ),
}


@pytest.fixture(scope="module")
def runs(submit) -> dict[str, Started]:
    """Submit all of RUNS."""
    members = [{"seed": seed} for seed in range(4)]
    Path("members.json").write_text(json.dumps({"version": 1, "members": members}))
    return {name: submit(name, code, *flags, **settings) for name, (code, flags, settings) in RUNS.items()}


@pytest.mark.slurm
def test_a_job_that_ends_well_is_done(slurm, runs):
    run = runs[ODD]
    assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert (run.run_dir / "log" / f"slurm-{run.job_id}.out").exists()
    assert slurm.run("squeue", "-h", "-t", "all", "-j", run.job_id, "-o", "%j") == f"{ODD}\n"
    assert [(event["event"], event["step"]) for event in run.events()] == [("start", 0), ("end", 0)]
    assert len(run.events("start")[0]["nodes"]) == run.events("start")[0]["ranks"] == 2
    assert run.events("end")[0]["exit_status"] == 0


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("name", "told"), [("mistake", "log/rank0.txt says"), ("mistake_of_one", "UserError: model.x: 3")]
)
def test_a_users_mistake_is_never_requeued(slurm, runs, name, told):
    assert slurm.wait_for_state(runs[name].job_id, "COMPLETED", "FAILED") == "FAILED"
    assert [event["event"] for event in runs[name].events()] == ["start", "end", "give_up"]
    assert told in runs[name].events("give_up")[0]["reason"]


@pytest.mark.slurm
def test_each_rank_sees_all_gpus_of_its_node_however_they_are_asked_for(slurm, runs):
    run = runs["gpus"]
    assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    told = [(run.run_dir / "log" / f"rank{rank}.txt").read_text() for rank in range(4)]
    assert told == ["0 0,1\n", "1 0,1\n", "0 0,1\n", "1 0,1\n"]


@pytest.mark.slurm
def test_a_crash_is_tried_again_at_once_and_given_up_when_nothing_gets_further(slurm, runs):
    run = runs["crash"]
    assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "FAILED"
    # The second start saves before it crashes too; that makes it the last that got further.
    assert [event["step"] for event in run.events("start")] == [0, 0, 5, 5, 5]
    assert [event["restart_count"] for event in run.events("start")] == [0, 0, 0, 0, 1]  # at once, then by the queue
    given_up = run.events("give_up")[0]
    assert given_up["reason"] == "3 starts in a row have brought it no further than step 5; the last: exit status 9"


@pytest.mark.slurm
def test_what_is_saved_goes_back_into_the_queue_under_its_number_until_it_is_done(slurm, runs):
    run = runs["saved"]
    assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert [event["restart_count"] for event in run.events("start")] == [0, 1, 2]
    assert [event["reason"] for event in run.events("requeue")] == ["saved at step 1", "saved at step 2"]


@pytest.mark.slurm
def test_a_job_that_saves_nothing_new_is_given_up(slurm, runs):
    run = runs["fruitless"]
    assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "FAILED"
    assert [event["restart_count"] for event in run.events("start")] == [0, 1]
    assert "2 starts in a row" in run.events("give_up")[0]["reason"]


@pytest.mark.slurm
def test_a_chain_of_three_goes_on_where_the_job_before_it_has_saved(slurm, runs):
    jobs = runs["chain"].job_id.split()
    assert len(jobs) == 3
    states = [slurm.wait_for_state(job, "COMPLETED", "FAILED") for job in jobs]
    assert states == ["FAILED", "COMPLETED", "COMPLETED"]
    assert [event["job_id"] for event in runs["chain"].events("start")] == jobs[:2]  # nothing is left for the third


@pytest.mark.slurm
def test_each_member_of_a_sweep_has_a_run_folder_of_its_own(slurm, runs):
    for member in range(4):
        own = Started(f"{runs['sweep'].job_id}_{member}", runs["sweep"].run_dir / str(member))
        assert slurm.wait_for_state(own.job_id, "COMPLETED", "FAILED") == "COMPLETED"
        assert (own.run_dir / "checkpoints" / f"step_{member + 1:08}").is_dir()
        assert len(own.events("start")) == 1 + (member == 2)
        assert own.events()[0]["job_id"] == own.job_id
        assert json.loads((own.run_dir / "job.json").read_text())["sweep"]["set"] == {"seed": member}


@pytest.mark.slurm
def test_a_cancelled_job_does_not_come_back(slurm, submit):
    run = submit("cancelled", "until_asked(); save(7); sys.exit(75)")
    slurm.wait_for((run.run_dir / "ready0").exists, "the rank")
    slurm.run("scancel", run.job_id)
    slurm.wait_for(lambda: run.events("end"), "the end")
    assert slurm.wait_for_state(run.job_id, "CANCELLED", "PENDING", "COMPLETED", "FAILED") == "CANCELLED"
    assert not run.events("requeue")
    assert "Slurm ended the job" in run.log()


@pytest.mark.slurm
def test_a_job_that_is_cancelled_through_us_saves_first(slurm, submit, capsys):
    run = submit("asked", "until_asked(); save(7); sys.exit(75)")
    slurm.wait_for((run.run_dir / "ready0").exists, "the rank")
    assert cli.main(["cancel", str(run.run_dir)]) == 0
    assert slurm.state(run.job_id) in ("FAILED", "CANCELLED")
    assert [event["event"] for event in run.events()] == ["start", "end"]
    assert run.events("end")[0]["step"] == 7
    assert cli.main(["resume", str(run.run_dir)]) == 0
    again = capsys.readouterr().out.split()[-1]
    assert again != run.job_id
    slurm.wait_for(lambda: len(run.events("start")) == 2, "the next start")
    assert run.events("start")[1] | {"job_id": again, "step": 7} == run.events("start")[1]
    slurm.run("scancel", again)


@pytest.mark.slurm
@pytest.mark.slow  # a minute: srun waits for the controller too
def test_a_controller_that_is_away_is_waited_for(slurm, submit):
    run = submit("away", "save(start); until_asked() if start == 1 else None; sys.exit(75 if start == 1 else 0)")
    slurm.wait_for((run.run_dir / "ready0").exists, "the rank")
    slurm.stop_controller()
    try:
        (pid,) = [path.name for path in Path("/proc").glob("[0-9]*") if is_job(path, run.run_dir)]
        os.kill(int(pid), signal.SIGUSR1)
        slurm.wait_for(lambda: "waiting for Slurm's controller" in run.log(), "the job to notice")
    finally:
        slurm.start_controller()
    assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert [event["restart_count"] for event in run.events("start")] == [0, 1]


def is_job(process: Path, run_dir: Path) -> bool:
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"bigbatch.launcher.job" in arguments and str(run_dir).encode() in arguments


@pytest.mark.slurm
def test_a_node_that_fails_the_check_is_remembered_and_left(slurm, submit):
    fails = "if part == 'check' and start == 1"
    bad = f"{fails}: rank or json.dump({{'bad': [node]}}, open(run / 'node_check.json', 'w')); sys.exit(69)"
    run = submit("checked", f"{bad}\nsys.exit(0)", "--nodes", "2", check_nodes=True)
    assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    first, second = run.events("start")
    left = first["nodes"][0]
    assert left not in second["nodes"]
    assert second["restart_count"] == 1
    assert list(bad_nodes(run.run_dir)) == [left]
    assert "check before the first step" in bad_nodes(run.run_dir)[left]["reason"]
    assert f"ExcNodeList={left}" in slurm.run("scontrol", "show", "job", run.job_id)


@pytest.mark.slurm
def test_a_run_may_go_on_with_another_number_of_nodes_when_its_range_allows(slurm, submit):
    told = "rank or print(os.environ['SLURM_STEP_NUM_TASKS'], flush=True)"
    wait = "start == 2 and until_asked()"
    run = None
    try:
        slurm.run("scontrol", "update", "NodeName=node[2-4]", "State=DRAIN", "Reason=test")
        run = submit("range", f"{told}; save(start); {wait}; sys.exit(75 if start < 3 else 0)", "--nodes", "1-4")
        slurm.wait_for(lambda: run.events("requeue"), "the first start")
        slurm.run("scontrol", "update", "NodeName=node[2-4]", "State=RESUME")
        # All of its ranks: one that has not come to block the signal dies of it, and the start is repeated as it was.
        slurm.wait_for(lambda: len(list(run.run_dir.glob("ready*"))) == 4, "the second start")
        slurm.run("scontrol", "update", "NodeName=node[3-4]", "State=DRAIN", "Reason=test")
        slurm.run("scancel", "--signal=USR1", run.job_id)
        assert slurm.wait_for_state(run.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    finally:
        slurm.run("scontrol", "update", "NodeName=node[2-4]", "State=RESUME", check=False)
    assert [event["ranks"] for event in run.events("start")] == [1, 4, 2]
    assert (run.run_dir / "log" / "rank0.txt").read_text().split() == ["1", "4", "2"]
    assert json.loads((run.run_dir / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"] == 16


@pytest.mark.slurm
def test_a_wrong_number_of_nodes_is_refused(slurm, submit, tmp_path):
    run = submit("wrong", "sys.exit()", "--nodes", "2")
    slurm.wait_for_state(run.job_id, "COMPLETED")
    job = slurm.submit(run.run_dir / "job.sbatch", "--nodes=3")
    assert slurm.wait_for_state(job, "COMPLETED", "FAILED") == "FAILED"
    assert "found 3 nodes; this run was submitted for 2" in run.events("give_up")[0]["reason"]
    again = slurm.submit(run.run_dir / "job.sbatch")  # by hand, from anywhere
    assert slurm.wait_for_state(again, "COMPLETED", "FAILED") == "COMPLETED"


@pytest.mark.slurm
def test_two_jobs_do_not_train_in_one_folder(slurm, submit, capsys):
    run = submit("taken", "until_asked()")
    slurm.wait_for((run.run_dir / "ready0").exists, "the rank")
    assert cli.main(["submit", str(run.run_dir), "--profile", "taken.json"]) == 2
    assert f"job {run.job_id} is running for this run already" in capsys.readouterr().err
    job = slurm.submit(run.run_dir / "job.sbatch")
    assert slurm.wait_for_state(job, "COMPLETED", "FAILED") == "FAILED"
    assert len(run.events("start")) == 1
    slurm.run("scancel", run.job_id)


@pytest.mark.slurm
def test_a_misspelt_key_never_reaches_the_queue(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = job_ids(slurm)
    assert cli.main(["submit", "gpt/quick", "--profile", "test", "--set", "optimizer.learning_rat=1"]) == 2
    assert "learning_rat" in capsys.readouterr().err
    assert cli.main(["submit", "gpt/quick", "--profile", "test", "--nodes", "3"]) == 2  # 32 samples
    assert cli.main(["submit", "gpt/quick", "--profile", "test", "--nodes", "9-12"]) == 2
    (tmp_path / "p.json").write_text('{"version": 1, "partition": "nowhere"}')
    assert cli.main(["submit", "gpt/quick", "--profile", "p.json"]) == 2
    assert "partition" in capsys.readouterr().err
    assert job_ids(slurm) <= before
    assert not (tmp_path / "runs").exists()


def job_ids(slurm):
    return set(slurm.run("squeue", "-h", "-t", "all", "-o", "%A").split())


def test_new_runs_lie_on_scratch_storage_and_runs_links_to_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAST", str(tmp_path / "fast"))
    profile = parse_profile({"version": 1, "scratch": "$FAST/me"})
    for number in (1, 2):
        folder = new_folder(profile, "gpt-quick")
        assert folder == tmp_path / "runs" / f"gpt-quick-{number}"
        assert folder.resolve() == tmp_path / "fast" / "me" / f"gpt-quick-{number}"
    with pytest.raises(UserError, match="a variable in it is not set here"):
        new_folder(parse_profile({"version": 1, "scratch": "$NOWHERE/x"}), "gpt-quick")


@pytest.mark.slurm
def test_a_dry_run_prints_the_script_and_changes_nothing(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", "gpt/quick", "--profile", "test", "--dry-run"]) == 0
    assert f"bigbatch.launcher.job {tmp_path}/runs/gpt-quick-1" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_requeue_is_asked_for_until_the_controller_answers(tmp_path, monkeypatch, capsys):
    program = """#!/bin/sh
echo "$@" >> "$LOG"
case "$(wc -l < "$LOG")" in 1|3) echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1;; esac
echo JobId=7 JobState=RUNNING Reason=None Requeue=1
"""
    (tmp_path / "scontrol").write_text(program)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    for name, seconds in (("AWAY_POLL_SECONDS", 0.01), ("KILLED_SECONDS", 0.01)):
        monkeypatch.setattr(job, name, seconds)
    document = {"profile": {}, "chain_job_ids": [], "exclude": []}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        own = job.Job(tmp_path, document, job.Allocation("7", 0, ("n1",)), job.Signals())
        assert own._requeue(Verdict("requeue", "saved at step 3", 75)).status == 75
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked == ["--oneliner show job 7"] * 2 + ["requeue 7"] * 2
    assert [event["event"] for event in read_events(tmp_path)] == ["requeue"]
    assert capsys.readouterr().err.count("waiting for Slurm's controller") == 2


@pytest.mark.parametrize(
    ("status", "failure", "fruitless", "expected"),
    [
        (0, {}, 9, Verdict("done", "", 0)),
        (75, {}, 0, Verdict("requeue", "saved at step 40", EXIT_REQUEUE)),
        (2, {}, 1, Verdict("give_up", "log/rank0.txt says what to change", EXIT_USER_ERROR)),
        (75, {"exit_status": 2, "exception": "x"}, 1, Verdict("give_up", "x", EXIT_USER_ERROR)),
        (137, {"exception": "gone"}, 1, Verdict("restart", "gone", 1)),
        (137, {"exception": "gone"}, 2, Verdict("requeue", "gone", 1)),
        (
            137,
            {"exception": "gone"},
            3,
            Verdict("give_up", "3 starts in a row have brought it no further than step 40; the last: gone", 1),
        ),
    ],
)
def test_the_exit_of_the_ranks_decides(status, failure, fruitless, expected):
    assert decide(status, failure, fruitless, 2, 40) == expected


def test_a_bad_node_is_forgotten_when_its_time_is_over(tmp_path):
    remember(tmp_path, {"n1": "bad"}, hours=1 / 3600)
    remember(tmp_path, {"n2": "worse"}, hours=1)
    assert set(bad_nodes(tmp_path)) == {"n1", "n2"}
    time.sleep(1.2)
    assert set(bad_nodes(tmp_path)) == {"n2"}
