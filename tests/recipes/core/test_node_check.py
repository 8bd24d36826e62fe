"""A bad node is found before the first step, and named."""

import json
import os
import re
import subprocess
import sys

import pytest

from bigbatch.recipes.core.node_check import EXIT_BAD_NODE, Facts, Suspect, describe, judge
from bigbatch.recipes.core.node_probes import expects_gpu

FACTS = Facts(0, 4, 1, "node1", "node1", 1)


@pytest.fixture(scope="module")
def outcome(run_program, tmp_path_factory):
    """Run all cases of four real ranks once; give a function from a case to its statuses and verdict."""
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], check=False).returncode:
        pytest.skip("this machine lets nobody have a view of the file system of his own")
    out = tmp_path_factory.mktemp("node_cases")
    run_program("node_cases.py", out)

    def read(case: str) -> tuple[list[int], dict]:
        statuses = json.loads((out / case / "outcome.json").read_text())["statuses"]
        return statuses, json.loads((out / case / "node_check.json").read_text())

    return read


def test_four_sound_nodes_are_fine_and_measured(outcome):
    statuses, verdict = outcome("fine")
    assert (statuses, verdict["status"], verdict["bad"]) == ([0] * 4, "fine", [])
    assert list(verdict["nodes"]) == ["node1", "node2", "node3", "node4"]
    for node in verdict["nodes"].values():
        measured = {key: value for key, value in node.items() if key.endswith("_second")}
        assert all(value > 1e6 for value in measured.values()), measured
        assert abs(node["clock_skew_seconds"]) < 1
    assert verdict["all_reduce_bytes_per_second"] > 1e6


@pytest.mark.parametrize(
    ("case", "node", "reason"),
    [
        ("read_only", "node3", "checkpoints cannot be written to: Read-only file system"),
        ("full", "node2", "checkpoints cannot be written to: No space left on device"),
        ("few_inodes", "node1", "4 files may still be made in "),
        ("clock", "node3", r"its clock is \+1(19|20|21)\.\d s off"),
        ("clock_of_rank_0", "node1", r"its clock is -1(19|20|21)\.\d s off"),
        ("product", "node4", "the product of two matrices on cpu is wrong"),
        ("hangs", "node4", "rank 3 hangs, in: folder"),
    ],
)
def test_a_bad_node_is_named_and_all_ranks_say_so(outcome, case, node, reason):
    statuses, verdict = outcome(case)
    assert statuses == [EXIT_BAD_NODE] * 4
    assert (verdict["status"], verdict["bad"]) == ("bad_node", [node])
    assert re.search(reason, verdict["reasons"][node])


@pytest.mark.parametrize(
    ("case", "rank", "name", "reason"),
    [
        ("stopped", 2, "node3", "rank 2 has stopped answering, in: all-reduce"),
        ("killed", 1, "node2", "rank 1 has stopped answering, in: pairs"),
        ("absent", 1, "node number 1", "rank 1 never began"),  # Slurm would know its name
        ("rank_0_stopped", 0, "127.0.0.1", "rank 0 never began"),
    ],
)
def test_a_node_that_keeps_the_others_waiting_is_named_within_the_limit(outcome, case, rank, name, reason):
    statuses, verdict = outcome(case)
    assert statuses[:rank] + statuses[rank + 1 :] == [EXIT_BAD_NODE] * 3
    assert verdict["reasons"] == {name: reason}
    assert verdict["bad"] == [name]


@pytest.mark.parametrize(
    ("case", "mistake"),
    [("read_only_everywhere", "cannot be written to"), ("own_disk_everywhere", "is not the folder that the other")],
)
def test_what_no_node_can_do_is_the_users_mistake(outcome, case, mistake):
    assert outcome(case)[0] == [2] * 4
    if case == "read_only_everywhere":  # there the verdict cannot be written by anybody but rank 0, beside the folder
        assert outcome(case)[1]["bad"] == []
    assert mistake in outcome(case)[1]["user_error"][0]


def test_the_check_leaves_no_files_behind(outcome, tmp_path_factory):
    outcome("fine")
    assert list((tmp_path_factory.getbasetemp() / "node_cases0" / "fine" / "checkpoints").iterdir()) == []


def report(rank: int, *defects: tuple[str, str, str], **figures: object) -> dict:
    return {"rank": rank, "host": f"node{rank + 1}", "device": "cuda:0", "defects": list(defects), **figures}


def test_a_slow_gpu_is_told_of_and_one_that_is_too_slow_makes_its_node_bad():
    verdict = judge([report(rank, product_rate=rate) for rank, rate in enumerate((600e12, 610e12, 450e12))], [], FACTS)
    assert (verdict["status"], verdict["bad"]) == ("fine", [])
    assert describe(verdict)[1:] == ["warning: node3: its matrix products have 75% of the middle node's rate"]
    verdict = judge([report(rank, product_rate=rate) for rank, rate in enumerate((600e12, 610e12, 200e12))], [], FACTS)
    assert verdict["bad"] == ["node3"]


def test_of_two_slow_pairs_the_node_in_both_has_the_slow_link():
    pairs = [[25e9, 0.0], [25e9, 5e9], [5e9, 5e9], [5e9, 0.0]]  # 1-2 | 2-3, 3-4: the third is in both slow ones
    pairs[3] = [5e9, 24e9]  # which has a sound one with the fifth
    reports = [report(rank, pair_rates=rates) for rank, rates in enumerate([*pairs, [0.0, 24e9]])]
    assert judge(reports, [], FACTS)["bad"] == ["node3"]


def test_a_rank_without_the_gpu_that_others_have_is_on_a_bad_node():
    reports = [report(0), report(1) | {"device": "cpu"}]
    assert judge(reports, [], FACTS)["reasons"] == {"node2": "rank 1 sees no GPU, and others do"}


def test_two_ranks_on_one_gpu_everywhere_are_the_users_mistake():
    reports = [report(rank, device_id="GPU-1") | {"host": f"node{rank // 2}"} for rank in range(4)]
    verdict = judge(reports, [], FACTS)
    assert verdict["user_error"] == ["ranks 0 and 1 have the same GPU; right is one each"]


def test_what_ranks_report_of_a_dead_peer_is_its_echo():
    echoes = [report(rank, ("answer", "error", "connection closed")) for rank in (0, 1, 3)]
    verdict = judge(echoes, [Suspect(2, "node3", "all-reduce", True)], FACTS)
    assert verdict["bad"] == ["node3"]
    assert judge([*echoes, report(2, ("answer", "error", "?"))], [], FACTS)["status"] == "unclear"


def test_where_all_wait_in_the_same_place_nobody_is_blamed():
    suspects = [Suspect(rank, f"node{rank + 1}", "all-reduce", False) for rank in range(4)]
    verdict = judge([], suspects, FACTS)
    assert (verdict["status"], verdict["bad"], len(verdict["unanswered"])) == ("unclear", [], 4)


@pytest.mark.parametrize(
    ("visible", "accelerator", "expected"), [("0,1", "", True), ("0", "cpu", False), ("", "", False), ("-1", "", False)]
)
def test_a_gpu_is_expected_where_one_was_given(monkeypatch, visible, accelerator, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert expects_gpu() == expected


def test_one_rank_checks_its_node_from_the_command_line(tmp_path):
    needs = ["--checkpoint-bytes", str(10**18), "--retained-bytes", str(10**18)]
    command = [sys.executable, "-P", "-m", "bigbatch.recipes.core.node_check", str(tmp_path), *needs]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_PORT": "29417"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    summary, mistake = ended.stderr.splitlines()
    assert summary.startswith("node check: user error, nodes 1, ranks 1, matrix products ")
    assert mistake.endswith(f"are free in {tmp_path}/checkpoints; the checkpoints take 1e+09")
    assert json.loads((tmp_path / "node_check.json").read_text())["status"] == "user_error"
