"""Slurm's answers as typed results, from a real cluster with accounting."""

import getpass
import json
import os
import shutil
from pathlib import Path

import pytest

from bigbatch.launcher import slurm_client
from bigbatch.launcher.jobs import Status, status
from bigbatch.launcher.slurm_client import SlurmAwayError, SlurmRefusedError

pytestmark = pytest.mark.slurm


@pytest.fixture
def script(tmp_path):
    """Return a batch script that runs until its folder has a file `go`."""
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\nuntil [ -e {tmp_path}/go ]; do sleep 0.1; done\n")
    return script


def test_a_job_is_followed_from_the_queue_to_the_records(slurm_with_accounting, script):
    cluster = slurm_with_accounting
    options = ["--output=/dev/null", "--requeue", "--exclusive"]
    assert " to start at " in slurm_client.try_submit(script)
    job = slurm_client.submit(script, ["-N2", "--job-name=odd 'name' $(x)", *options])
    waiting = slurm_client.submit(script, ["-N4", *options])
    cluster.wait_for_state(job, "RUNNING")
    assert slurm_client.show_job(job)["JobName"] == "odd 'name' $(x)"
    cluster.wait_for(lambda: slurm_client.queued([waiting])[0].reason in ("Resources", "Priority"), "a reason")
    running, pending = sorted(slurm_client.queued([job, waiting]))
    assert (running.state, running.restarts) == ("RUNNING", 0)
    assert slurm_client.host_names(running.nodes) == ["node1", "node2"]
    assert (pending.state, pending.nodes) == ("PENDING", "")
    assert {job, waiting} <= {own.job_id for own in slurm_client.queued()}
    slurm_client.cancel([waiting])
    slurm_client.requeue(job)
    (script.parent / "go").touch()
    cluster.wait_for_state(job, "COMPLETED")
    assert slurm_client.queued([job])[0].restarts == 1
    cluster.wait_for(lambda: len(slurm_client.accounted([job, waiting])) == 3, "the records")
    found = {(record.job_id, record.state): record for record in slurm_client.accounted([job, waiting])}
    assert set(found) == {(job, "REQUEUED"), (job, "COMPLETED"), (waiting, "CANCELLED")}
    last = found[job, "COMPLETED"]
    assert (last.exit_status, last.signal, last.nodes) == (0, 0, "node[1-2]")
    assert last.start <= last.end


def test_members_of_an_array_have_states_of_their_own(slurm_with_accounting, tmp_path):
    script = tmp_path / "member.sh"
    script.write_text("#!/bin/sh\nexit $SLURM_ARRAY_TASK_ID\n")
    job = slurm_client.submit(script, ["--array=0-2", "--output=/dev/null"])
    members = [f"{job}_{index}" for index in range(3)]
    ended = ("COMPLETED", "FAILED")
    slurm_with_accounting.wait_for(
        lambda: all(own.state in ended for own in slurm_client.queued(members)), "all members"
    )
    assert [own.job_id for own in slurm_client.queued([members[1]])] == [members[1]]
    slurm_with_accounting.wait_for(lambda: len(slurm_client.accounted(members)) == 3, "the records")
    assert [(own.job_id, own.state, own.exit_status) for own in sorted(slurm_client.accounted(members))] == [
        (members[0], "COMPLETED", 0),
        (members[1], "FAILED", 1),
        (members[2], "FAILED", 2),
    ]


def test_the_cluster_is_described(slurm_with_accounting):
    assert slurm_client.show_config()["SchedulerType"] == "sched/backfill"
    partitions = slurm_client.show_partitions()
    assert {name: own["MaxTime"] for name, own in partitions.items()} == dict.fromkeys(
        ("main", "low", "high"), "1-00:00:00"
    )
    groups = [group for group in slurm_client.node_groups() if group.partition == "main"]
    assert sum(group.num_nodes for group in groups) == 4
    assert all(
        (group.is_default, group.cores, group.memory_mb, group.gpus) == (True, 4, 4000, "gpu:2") for group in groups
    )


def test_the_accounts_of_a_user_are_those_that_may_be_charged(slurm_with_accounting):
    before = slurm_client.accounts()
    slurm_with_accounting.run("sacctmgr", "--immediate", "add", "account", "lab")
    slurm_with_accounting.run("sacctmgr", "--immediate", "add", "user", getpass.getuser(), "account=lab")
    assert slurm_client.accounts() == sorted([*before, "lab"])


def test_what_slurm_refuses_is_told_in_its_words(slurm_with_accounting, script):
    with pytest.raises(SlurmRefusedError, match=r"sbatch: .*invalid partition specified: nowhere"):
        slurm_client.try_submit(script, ["--partition=nowhere"])
    with pytest.raises(SlurmRefusedError, match="Invalid job id"):
        slurm_client.requeue("99999")
    assert slurm_client.queued(["99999"]) == []
    assert slurm_client.show_job("99999") == {}


def test_what_a_site_says_beside_an_answer_is_no_part_of_it(slurm_with_accounting, script, tmp_path, monkeypatch):
    for name in ("sbatch", "squeue"):
        talking = tmp_path / name
        real = shutil.which(name)
        talking.write_text(f'#!/bin/sh\n{real} "$@"\nstatus=$?\necho "sbatch: lua: welcome" >&2\nexit $status\n')
        talking.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = slurm_client.submit(script, ["--output=/dev/null"])
    assert [own.job_id for own in slurm_client.queued([job])] == [job]
    slurm_client.cancel([job])


def test_an_absent_controller_is_no_endless_wait(slurm_with_accounting):
    slurm_with_accounting.stop_controller()
    try:
        with pytest.raises(SlurmAwayError, match="no answer in 2 s"):
            slurm_client.queued(["1"], seconds=2.0)
    finally:
        slurm_with_accounting.start_controller()


def test_a_host_without_slurm_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmAwayError, match="squeue: not found"):
        slurm_client.queued(["1"])


def test_a_status_comes_from_accounting_when_the_controller_has_forgotten_the_job(slurm_with_accounting, tmp_path):
    def submit(name: str, body: str, *options: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / name / "job.sh").write_text(f"#!/bin/sh\n{body}\n")
        job = slurm_client.submit(tmp_path / name / "job.sh", ["--output=/dev/null", *options])
        (tmp_path / name / "job.json").write_text(json.dumps({"version": 1, "job_ids": [job]}))
        return job

    def statuses() -> dict[str, Status]:
        return {Path(own.run_dir).name: own for own in status([tmp_path])}

    cluster, whole = slurm_with_accounting, ("-N4", "--exclusive", "--requeue")
    cluster.wait_for(lambda: not cluster.run("squeue", "-h"), "an empty queue")
    submit("failed", "exit 3")
    preempted = submit("preempted", "sleep 600", *whole, "--partition=low")
    cluster.wait_for_state(preempted, "RUNNING")
    urgent = submit("urgent", "sleep 600", *whole, "--partition=high")
    cluster.wait_for(lambda: statuses()["preempted"].last_end == "preempted", "the record of the preemption")
    found = statuses()["preempted"]
    assert (found.state, found.restarts, found.job_id) == ("requeued", 1, preempted)
    slurm_client.cancel([preempted, urgent])
    cluster.wait_for(lambda: not cluster.run("squeue", "-h"), "an empty queue")
    ended = {"failed": ["FAILED"], "preempted": ["PREEMPTED", "CANCELLED"], "urgent": ["CANCELLED"]}
    for name, states in ended.items():
        job = statuses()[name].job_id
        cluster.wait_for(lambda: [own.state for own in slurm_client.accounted([job])] == states, name)  # noqa: B023
    cluster.stop_controller()
    cluster.start_controller("-c")  # without its state
    assert {(name, own.state, own.reason, own.known_by) for name, own in statuses().items()} == {
        ("failed", "failed", "exit status 3", "accounting"),
        ("preempted", "cancelled", None, "accounting"),
        ("urgent", "cancelled", None, "accounting"),
    }
