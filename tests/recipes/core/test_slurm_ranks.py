"""A rank's place in a step of srun, from the variables that Slurm sets."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.slurm_ranks import FIRST_PORT, NUM_PORTS, first_host, port, rank_facts, tasks_per_node

# As srun of Slurm 22.05 set them for the last of two tasks on each of three nodes.
STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_a_rank_takes_its_place_from_slurm():
    assert rank_facts(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": str(FIRST_PORT + 4711),
    }


@pytest.mark.parametrize("name", sorted(STEP))
def test_a_variable_that_is_missing_or_makes_no_sense_is_named(name):
    for broken in ({key: value for key, value in STEP.items() if key != name}, {**STEP, name: "x y"}):
        with pytest.raises(UserError) as error:
            rank_facts(broken)
        assert error.value.where == name


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "3,2,1"}, "the same number of ranks on every node"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "for 8 tasks on 3 nodes"),
        ({"SLURM_LOCALID": "0"}, "srun --distribution=block"),
        ({"BIGBATCH_RANKS": "4"}, "found 6; the run was planned for 4 ranks"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(changed, told):
    with pytest.raises(UserError, match=told):
        rank_facts({**STEP, **changed})


def test_the_ports_of_a_jobs_starts_and_steps_differ():
    ports = {port(4711, step, restart) for step in range(20) for restart in range(50)}
    assert len(ports) == 1000
    assert min(ports) >= FIRST_PORT
    assert max(ports) < FIRST_PORT + NUM_PORTS <= 32768  # where the kernel's own begin


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_tasks_per_node_are_read_as_slurm_writes_them(counts):
    written: list[list[int]] = []
    for count in counts:
        if written and written[-1][0] == count:
            written[-1][1] += 1
        else:
            written.append([count, 1])
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in written)
    assert tasks_per_node(text) == counts


FIRST_OF = {
    "a": "a",
    "a,b": "a",
    "n[1-3]": "n1",
    "n[07-09,11],login1": "n07",
    "gpu[3,1]": "gpu3",
    "r[1-2]n[10-12]": "r1n10",
    "x-a5.cluster,y": "x-a5.cluster",
}


@pytest.mark.parametrize("nodes", FIRST_OF)
def test_the_first_host_is_the_one_before_the_others_in_the_short_form(nodes):
    assert first_host(nodes) == FIRST_OF[nodes]


@pytest.mark.slurm
def test_the_first_host_is_the_one_that_slurm_itself_names_first(slurm):
    for nodes in FIRST_OF:
        command = ["scontrol", "show", "hostnames", nodes]
        named = subprocess.run(command, capture_output=True, text=True, check=True, env=slurm.environment).stdout
        assert first_host(nodes) == named.split()[0]
