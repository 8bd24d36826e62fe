"""A rank's place in a step of srun, one task a rank: what torch's process groups want to know, from Slurm's variables.

Standard library alone. Whatever is missing or contradicts itself is an error: a rank that quietly took localhost for
its first host would train alone.
"""

import os
import re
import socket
from collections.abc import Mapping

from bigbatch.recipes.core.errors import UserError

FIRST_PORT, NUM_PORTS = 10000, 20000  # below those that the kernel gives to outgoing connections
EXPECTED_RANKS = "BIGBATCH_RANKS"


def join_step() -> None:
    """Put this process's rank into its environment if srun has started it as one; elsewhere change nothing."""
    environment = os.environ
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment and "RANK" not in environment:
        facts = rank_facts(environment)
        _check_address(facts["MASTER_ADDR"])
        environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))
        environment.update(facts)


def rank_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE and the others of the step that the variables of Slurm describe."""

    def number(name: str) -> int:
        text = environment.get(name, "")
        if not text.isdecimal():
            raise UserError(name, f"found {text!r} in a step of srun; right is a number, which srun sets")
        return int(text)

    rank, local_rank, node = number("SLURM_PROCID"), number("SLURM_LOCALID"), number("SLURM_NODEID")
    num_ranks, num_nodes = number("SLURM_STEP_NUM_TASKS"), number("SLURM_STEP_NUM_NODES")
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(per_node) != num_nodes or sum(per_node) != num_ranks or len(set(per_node)) != 1:
        found = f"found {per_node} for {num_ranks} tasks on {num_nodes} nodes"
        raise UserError("SLURM_STEP_TASKS_PER_NODE", f"{found}; right is the same number of ranks on every node")
    if rank != node * per_node[0] + local_rank:
        found = f"found {rank}, the task {local_rank} of node {node}, each with {per_node[0]}"
        raise UserError("SLURM_PROCID", f"{found}; right is srun --distribution=block")
    expected = environment.get(EXPECTED_RANKS, str(num_ranks))
    if expected != str(num_ranks):
        raise UserError("SLURM_STEP_NUM_TASKS", f"found {num_ranks}; the run was planned for {expected} ranks")
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(per_node[0]),
        "LOCAL_SIZE": str(per_node[0]),  # DeepSpeed's name for it
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": str(port(number("SLURM_JOB_ID"), number("SLURM_STEP_ID"), restart_count(environment))),
    }


def restart_count(environment: Mapping[str, str]) -> int:
    """Return how often the job has been put back into the queue; Slurm sets nothing in its first start."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def port(job_id: int, step_id: int, restarts: int) -> int:
    """Return a port that other jobs on the node, and this one's other starts and steps, are unlikely to use."""
    return FIRST_PORT + (job_id + 7919 * restarts + 6133 * step_id) % NUM_PORTS


def tasks_per_node(text: str) -> list[int]:
    """Read `2(x3),1` as [2, 2, 2, 1]; raise UserError for anything else."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError("SLURM_STEP_TASKS_PER_NODE", f"found {text!r}; right is such as 4(x2), which srun sets")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's short form of several: node07 of node[07-09,11],login1."""
    name = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError("SLURM_STEP_NODELIST", f"found {nodes!r}; right is the step's nodes, which srun sets")
    return name


def _check_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        message = f"{host}, the first host of this step, has no address on {socket.gethostname()}: {error.strerror}"
        raise UserError("MASTER_ADDR", message) from None
