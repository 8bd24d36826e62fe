"""The emulated cluster is one: jobs run on several nodes, nodes fail and return, the controller goes and returns."""

import pytest

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_nodes_that_know_their_names(slurm):
    assert sorted(slurm.run("srun", "-N4", "hostname").split()) == ["node1", "node2", "node3", "node4"]


def test_gpus_are_asked_for_and_given(slurm):
    command = ["srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES"]
    assert slurm.run(*command).splitlines()[-1] == "0,1"
    assert "not available" in slurm.run("srun", "--gpus-per-node=3", "true", check=False)


def test_a_job_on_a_node_without_power_is_requeued(slurm, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(
        '#!/bin/sh\necho $(hostname) ${SLURM_RESTART_COUNT:-0}\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 600\n'
    )
    log = tmp_path / "log"
    job = slurm.submit(script, "--requeue", "--open-mode=append", f"--output={log}", "--nodelist=node3")
    slurm.wait_for(lambda: log.exists() and log.read_text() == "node3 0\n", "the first start")
    slurm.power_off("node3")
    # The controller would notice by itself after half a minute.
    slurm.run("scontrol", "update", "NodeName=node3", "State=DOWN", "Reason=no power")
    slurm.wait_for_state(job, "PENDING")
    slurm.power_on("node3")
    slurm.wait_for_state(job, "COMPLETED")
    assert log.read_text() == "node3 0\nnode3 1\n"


def test_a_job_outlives_the_absence_of_the_controller(slurm, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\nuntil [ -e {tmp_path}/go ]; do sleep 0.1; done\n")
    job = slurm.submit(script, f"--output={tmp_path}/log")
    slurm.wait_for_state(job, "RUNNING")
    slurm.stop_controller()
    assert "DOWN" in slurm.run("scontrol", "ping", check=False)
    (tmp_path / "go").touch()
    slurm.start_controller()
    slurm.wait_for_state(job, "COMPLETED")
