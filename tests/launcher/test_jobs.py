"""How runs are, as a user asks it: on a real cluster, with small jobs that leave behind what a training job leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigbatch.launcher import cli, jobs, slurm_client
from bigbatch.launcher.run_dir import RunDir, hold
from bigbatch.recipes.core.errors import UserError

UNTIL_STOPPED = "while :; do sleep 0.1; done"
SAVES_WHEN_ASKED = """
trap 'mkdir -p checkpoints/step_00000020; echo {} > checkpoints/step_00000020/manifest.json; echo saved; exit 75' USR1
echo ready
"""


def make_run(path: Path, *, step: int | None = None, last_step: int = 100, **files: object) -> Path:
    """Make a run folder that has come to a step."""
    (path / "log").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"schedule": {"total_steps": last_step}}))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    if step is not None:
        lines = [
            {"kind": "event", "step": 0, "session": {"total_steps": last_step}},
            {"kind": "train", "step": step, "loss": 2.5, "samples_per_second": 8.0, "tokens_per_second": 1024.0},
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
        (path / "checkpoints" / f"step_{step:08}").mkdir(parents=True)
        (path / "checkpoints" / f"step_{step:08}" / "manifest.json").write_text("{}")
    return path


def submit(path: Path, body: str, *options: str) -> str:
    """Submit a job for a run folder, as the launcher does, which does `body` there; return its number."""
    script = path / "job.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --output={path}/log/slurm-%j.out\n#SBATCH --open-mode=append\n"
        f"#SBATCH --chdir={path}\n{body}\n"
    )
    job = slurm_client.submit(script, options)
    (path / "job.json").write_text(json.dumps({"version": 1, "job_ids": [job], "lead_seconds": 20.0}))
    return job


def tell(path: Path, **event: object) -> None:
    """Write what a job tells of itself."""
    with (path / "job_events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def status_of(path: Path) -> jobs.Status:
    (found,) = jobs.status([path])
    return found


def wait_for_status(cluster, path: Path, state: str) -> jobs.Status:
    cluster.wait_for(lambda: status_of(path).state == state, f"{path.name} to be {state}")
    return status_of(path)


@pytest.fixture
def ended(slurm):
    """End what a test leaves in the queue."""
    yield
    if left := [job.job_id for job in slurm_client.queued() if job.state.lower() in (*jobs.LIVE, *jobs.WAITING)]:
        slurm_client.cancel(left)
        slurm.wait_for(lambda: slurm.run("squeue", "-h") == "", "an empty queue")


def test_runs_of_this_host_are_told_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    new = make_run(tmp_path / "new")
    stopped = make_run(tmp_path / "stopped", step=20)
    done = make_run(
        tmp_path / "done", step=100, failure={"rank": 1, "host": "here", "exception": "of an earlier start"}
    )
    failed = make_run(tmp_path / "failed", step=20, failure={"rank": 1, "host": "here", "exception": "ValueError: no"})
    busy = make_run(tmp_path / "busy", step=20)
    with hold(RunDir(busy)):
        found = {Path(own.run_dir).name: own for own in jobs.status([tmp_path])}
    assert {name: own.state for name, own in found.items()} == {
        "new": "not_submitted",
        "stopped": "interrupted",
        "done": "completed",
        "failed": "failed",
        "busy": "running",
    }
    assert found["failed"].reason == "rank 1 on here: ValueError: no"
    assert found["stopped"].reason == f"to go on: bigbatch train {stopped}"
    assert found["busy"].reason == f"process {os.getpid()} on {os.uname().nodename}"
    assert (new, done, failed) and status_of(busy).state == "interrupted"


def test_the_figures_are_those_of_the_last_report_and_the_newest_whole_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", step=40)
    old = time.time() - 7200
    os.utime(run / "checkpoints" / "step_00000040" / "manifest.json", (old, old))
    (run / "checkpoints" / "step_00000060").mkdir()
    found = status_of(run)
    assert (found.step, found.last_step, found.loss, found.tokens_per_second) == (40, 100, 2.5, 1024.0)
    assert found.checkpoint_step == 40
    assert found.checkpoint_age_seconds == pytest.approx(7200, abs=60)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('\n{"kind": "event", "step": 30, "session": {"total_steps": 100}}\n')
    assert status_of(run).step == 30  # gone back to a checkpoint
    beat = run / "log" / "heartbeat_rank0.json"
    beat.write_text(json.dumps({"state": "running", "phase": "step", "step": 34, "idle_seconds": 0.5}))
    assert status_of(run).step == 34
    os.utime(beat, (old, old))
    assert status_of(run).step == 30


def test_a_table_has_a_line_a_run_and_json_has_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/a"), step=20)
    make_run(Path("runs/sweep/10"), step=5)
    make_run(Path("runs/sweep/9"), step=100)
    assert cli.main(["status"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["RUN", "STATE", "STEP", "LOSS"]
    assert [line.split()[:2] for line in lines] == [
        ["runs/a", "interrupted"],
        ["runs/sweep/9", "completed"],
        ["runs/sweep/10", "interrupted"],
    ]
    assert cli.main(["status", "runs/sweep", "--json"]) == 0
    assert [own["step"] for own in json.loads(capsys.readouterr().out)] == [100, 5]
    assert cli.main(["status", "runs/a"]) == 0
    assert "last checkpoint: step 20, 0 s ago" in capsys.readouterr().out
    assert cli.main(["status", "runs/b"]) == 2
    assert "runs/b: there is no such folder" in capsys.readouterr().err


@pytest.mark.slurm
def test_a_job_is_followed_through_the_queue(slurm, ended, tmp_path):
    run, second = make_run(tmp_path / "run", step=20), make_run(tmp_path / "second")
    job = submit(run, UNTIL_STOPPED, "-N4", "--exclusive", "--requeue", "--time=60")
    waiting = submit(second, UNTIL_STOPPED, "-N2", "--exclusive")
    found = wait_for_status(slurm, run, "running")
    assert (found.job_id, found.nodes, found.restarts, found.known_by) == (job, "node[1-4]", 0, "slurm")
    assert (found.step, found.time_limit) == (20, "1:00:00")
    assert found.start
    slurm.wait_for(lambda: status_of(second).estimated_start, "an estimate")
    pending = status_of(second)
    assert (pending.state, pending.job_id, pending.nodes) == ("pending", waiting, None)
    assert pending.reason in ("Resources", "Priority")
    assert pending.estimated_start > found.start
    slurm_client.cancel([waiting])
    assert wait_for_status(slurm, second, "cancelled").reason is None
    tell(run, event="start", job_id=job, restart_count=0, nodes=["node1"])
    tell(run, event="requeue", job_id=job, restart_count=0, reason="saved at step 20 ahead of the time limit")
    slurm_client.requeue(job)
    again = wait_for_status(slurm, run, "requeued")
    assert (again.restarts, again.last_end) == (1, "saved at step 20 ahead of the time limit")
    assert again.estimated_start


@pytest.mark.slurm
def test_each_end_has_its_name(slurm, ended, tmp_path):
    failed, done = make_run(tmp_path / "failed", step=20), make_run(tmp_path / "done", step=100)
    given_up, lost_node = make_run(tmp_path / "given_up", step=20), make_run(tmp_path / "lost_node", step=20)
    stubborn = make_run(tmp_path / "stubborn")
    (failed / "failure.json").write_text('{"rank": 3, "host": "node2", "exception": "ValueError: no"}')
    submit(failed, "exit 1")
    submit(done, "exit 0")
    job = submit(given_up, "exit 1")
    tell(given_up, event="give_up", job_id=job, reason="3 restarts without a step", exit_status=1)
    submit(lost_node, UNTIL_STOPPED, "--no-requeue", "--nodelist=node4")
    kept = submit(stubborn, f"trap '' TERM\necho ready\n{UNTIL_STOPPED}")
    assert wait_for_status(slurm, done, "completed").reason is None
    assert wait_for_status(slurm, failed, "failed").reason == "rank 3 on node2: ValueError: no"
    assert wait_for_status(slurm, given_up, "given_up").reason == "3 restarts without a step"
    wait_for_status(slurm, lost_node, "running")
    slurm.run("scontrol", "update", "NodeName=node4", "State=DOWN", "Reason=test")
    wait_for_status(slurm, lost_node, "node_fail")
    slurm.wait_for(lambda: "ready" in jobs_log(stubborn), "the stubborn job")
    slurm_client.cancel([kept])
    wait_for_status(slurm, stubborn, "completing")
    wait_for_status(slurm, stubborn, "cancelled")


def jobs_log(run: Path) -> str:
    return "".join(path.read_text() for path in (run / "log").glob("slurm-*.out"))


@pytest.mark.parametrize("state", ["TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"])
def test_an_end_that_is_slurms_alone_keeps_its_name(tmp_path, monkeypatch, state):
    ended = slurm_client.QueuedJob("7", state, "Resources", "2026-01-02T03:04:05", "node1", "1:00", "1:00", 0)
    monkeypatch.setattr(slurm_client, "queued", lambda *_: [ended])
    run = make_run(tmp_path / "run", step=20, job={"version": 1, "job_ids": ["7"]})
    assert status_of(run)[1:3] == (state.lower(), None)


@pytest.mark.slurm
def test_of_a_chain_the_link_that_runs_is_told_and_then_the_next(slurm, ended, tmp_path):
    run = make_run(tmp_path / "run", step=20)
    chain = ["--job-name=chain", "--dependency=singleton"]
    body = "until [ -e go$SLURM_JOB_ID ]; do sleep 0.1; done"
    numbers = [submit(run, body, *chain) for _ in range(3)]
    (run / "job.json").write_text(json.dumps({"version": 1, "job_ids": numbers}))
    assert wait_for_status(slurm, run, "running").job_id == numbers[0]
    (run / f"go{numbers[0]}").touch()
    slurm.wait_for(
        lambda: status_of(run)[:2] == (str(run), "running") and status_of(run).job_id == numbers[1], "the next"
    )


@pytest.mark.slurm
def test_with_the_controller_away_the_folder_speaks(slurm, tmp_path, capsys):
    run = make_run(tmp_path / "run", step=20)
    job = submit(run, "until [ -e go ]; do sleep 0.1; done")
    tell(run, event="start", job_id=job, restart_count=0, nodes=["node1"])
    wait_for_status(slurm, run, "running")
    slurm.stop_controller()
    began = time.monotonic()
    assert cli.main(["status", str(run)]) == 0
    assert time.monotonic() - began < 60
    shown = capsys.readouterr().out
    slurm.start_controller()
    assert "state:           running\n" in shown
    assert "step:            20 of 100\n" in shown
    assert "note:            squeue: " in shown
    (run / "go").touch()
    wait_for_status(slurm, run, "completed")


@pytest.mark.slurm
def test_a_job_that_slurm_has_forgotten_is_told_by_its_own_words(slurm, tmp_path):
    def forgotten(name: str, step: int, **event: object) -> tuple[str, str | None]:
        run = make_run(tmp_path / name, step=step, job={"version": 1, "job_ids": ["99999"]})
        tell(run, event="start", job_id="99999", restart_count=0)
        if event:
            tell(run, job_id="99999", restart_count=0, **event)
        return status_of(run)[1:3]

    assert forgotten("done", 100, event="end", exit_status=0) == ("completed", None)
    assert forgotten("failed", 20, event="end", exit_status=1, reason="rank 1 died") == ("failed", "rank 1 died")
    assert forgotten("saved", 20, event="end", exit_status=75)[0] == "saved"
    assert forgotten("given_up", 20, event="give_up", reason="no step in 3 restarts")[0] == "given_up"
    assert forgotten("silent_and_done", 100) == ("completed", None)
    state, reason = forgotten("silent", 20)
    assert state == "lost"
    assert "Slurm no longer knows job 99999" in reason


@pytest.mark.slurm
def test_cancel_asks_to_save_and_waits_for_it(slurm, ended, tmp_path, capsys):
    run = make_run(tmp_path / "run", step=10)
    job = submit(run, SAVES_WHEN_ASKED + UNTIL_STOPPED)
    slurm.wait_for(lambda: "ready" in jobs_log(run), "the job")
    assert cli.main(["cancel", str(run)]) == 0
    assert f"cancelled: job {job}" in capsys.readouterr().err
    assert "saved" in jobs_log(run)
    assert status_of(run)[1:3] == ("cancelled", "saved at step 20")
    assert json.loads((run / "cancel.json").read_text())["job_ids"] == [job]
    assert cli.main(["cancel", str(run)]) == 2
    assert "nothing to cancel: cancelled" in capsys.readouterr().err


@pytest.mark.slurm
def test_cancel_now_waits_for_nothing_and_takes_the_whole_chain(slurm, ended, tmp_path):
    run = make_run(tmp_path / "run", step=10)
    numbers = [submit(run, UNTIL_STOPPED, "--job-name=links", "--dependency=singleton") for _ in range(2)]
    (run / "job.json").write_text(json.dumps({"version": 1, "job_ids": numbers}))
    wait_for_status(slurm, run, "running")
    assert cli.main(["cancel", str(run), "--now"]) == 0
    slurm.wait_for(lambda: {slurm.state(job) for job in numbers} == {"CANCELLED"}, "both links")


@pytest.mark.slurm
def test_a_sweep_is_told_and_cancelled_as_one(slurm, ended, tmp_path):
    sweep = tmp_path / "sweep"
    members = [make_run(sweep / str(index), step=10) for index in range(2)]
    (sweep / "log").mkdir()
    job = submit(sweep, f"cd $SLURM_ARRAY_TASK_ID\n{SAVES_WHEN_ASKED}\n{UNTIL_STOPPED}", "--array=0-1")
    for index, member in enumerate(members):
        (member / "job.json").write_text(json.dumps({"version": 1, "job_ids": [f"{job}_{index}"]}))
    slurm.wait_for(lambda: jobs_log(sweep).count("ready") == 2, "both members")
    assert [own.job_id for own in jobs.status([sweep])] == [f"{job}_0", f"{job}_1"]
    assert cli.main(["cancel", str(sweep)]) == 0
    assert jobs_log(sweep).count("saved") == 2
    assert [own[1:3] for own in jobs.status([sweep])] == [("cancelled", "saved at step 20")] * 2


@pytest.mark.slurm
def test_no_run_is_resumed_that_lives_or_has_ended_or_was_never_submitted(slurm, ended, tmp_path, capsys):
    run = make_run(tmp_path / "run", step=10)
    first = submit(run, UNTIL_STOPPED)
    wait_for_status(slurm, run, "running")
    assert cli.main(["resume", str(run)]) == 2
    assert f"job {first} is running" in capsys.readouterr().err
    done = make_run(tmp_path / "done", step=100, job={"version": 1, "job_ids": ["99999"]})
    assert cli.main(["resume", str(done)]) == 2
    assert "has ended: all 100 steps are done" in capsys.readouterr().err
    assert cli.main(["resume", str(make_run(tmp_path / "local", step=10))]) == 2
    assert "was never submitted; to go on with it here: bigbatch train" in capsys.readouterr().err


@pytest.mark.slurm
def test_a_training_is_submitted_watched_cancelled_and_resumed(slurm, ended, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = ({"text": f"The {number}th lamp follows an old river. " * 20} for number in range(60))
    Path("texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    document = {
        "version": 1,
        "extends": "gpt/quick",
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 16},
        "data": {"train": ["texts.jsonl"], "tokenizer": {"vocabulary_size": 300}, "sequence_length": 16},
        "precision": {"dtype": "fp32"},
        "schedule": {"total_steps": 1_000_000},
        "checkpoint": {"every_steps": 1_000_000},
    }
    Path("tiny.json").write_text(json.dumps(document))
    assert cli.main(["submit", "tiny.json", "--profile", "test", "--run-dir", "runs/tiny"]) == 0
    job, run = capsys.readouterr().out.strip(), Path("runs/tiny")
    slurm.wait_for(lambda: status_of(run).loss or status_of(run).state in ("given_up", "failed"), "steps", 240)
    slurm.wait_for(lambda: "  loss " in (run / "log" / "rank0.txt").read_text(), "the report of them")
    found = status_of(run)
    assert (found.state, found.job_id, found.nodes, found.last_step) == ("running", job, "node[1-2]", 1_000_000)
    assert found.step
    assert found.tokens_per_second
    assert found.phase
    assert found.checkpoint_step is None
    assert cli.main(["logs", str(run), "--rank", "0"]) == 0
    assert "/1,000,000  loss " in capsys.readouterr().out
    assert cli.main(["cancel", str(run)]) == 0
    saved = status_of(run)
    assert (saved.state, saved.reason) == ("cancelled", f"saved at step {saved.checkpoint_step}")
    assert saved.checkpoint_step >= found.step
    capsys.readouterr()
    assert cli.main(["resume", str(run)]) == 0
    again = capsys.readouterr().out.strip()
    assert int(again) > int(job)
    slurm.wait_for(lambda: status_of(run).step > saved.step, "further steps", 240)
    log = (run / "metrics.jsonl").read_text()
    assert f"after step {saved.checkpoint_step:,}" in log
    assert status_of(run)[1:5] == ("running", None, None, again)
    assert cli.main(["cancel", str(run), "--now"]) == 0
    wait_for_status(slurm, run, "cancelled")


def test_logs_shows_the_job_one_rank_or_all(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no such log yet; the run is not submitted"):
        jobs.logs(run, None, all_ranks=False, follow=False)
    (run / "log" / "slurm-7.out").write_text("the job\n")
    for rank in (0, 1, 10):
        (run / "log" / f"rank{rank}.txt").write_text(f"here is {rank}\nwithout an end")
    assert cli.main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == (
        "==> log/slurm-7.out <==\nthe job\n==> log/rank0.txt <==\nhere is 0\nwithout an end\n"
    )
    assert cli.main(["logs", str(run), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "here is 1\nwithout an end\n"
    assert cli.main(["logs", str(run), "--all"]) == 0
    assert capsys.readouterr().out.splitlines()[::2] == [f"[rank{rank}] here is {rank}" for rank in (0, 1, 10)]
    for arguments, told in (([str(run), "--rank", "-1"], "from 0 on"), ([str(tmp_path)], "several runs")):
        assert cli.main(["logs", *arguments]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slurm
def test_logs_are_followed_from_the_queue_until_the_job_has_ended(slurm, ended, tmp_path):
    run = make_run(tmp_path / "run", step=20)
    job = submit(run, "echo first\nuntil [ -e go ]; do sleep 0.1; done\necho second\nprintf third", "--hold")
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "logs", "-f", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        assert follower.stderr
        assert follower.stderr.readline() == f"{run} is pending (JobHeldUser)\n"
        slurm.run("scontrol", "release", job)
        assert follower.stdout.readline() == f"==> log/slurm-{job}.out <==\n"
        assert follower.stdout.readline() == "first\n"
        (run / "go").touch()
        assert follower.communicate(timeout=60)[0] == "second\nthird\n"
    assert follower.returncode == 0
