"""A profile written by asking the cluster: valid, accepted by Slurm, and honest about what it does not know."""

import json
import os
from pathlib import Path

import pytest

from bigbatch.launcher import cli, profile_new
from bigbatch.launcher.profiles import NodeRange, load_profile
from bigbatch.launcher.sbatch import JobRequest, render
from bigbatch.launcher.slurm_client import NodeGroup, try_submit


def nodes(partition: str, number: int, gpus: str, cores: int = 64, *, is_default: bool = False) -> NodeGroup:
    return NodeGroup(partition, is_default, True, "1-00:00:00", number, "idle", cores, 512000, gpus, "")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SCRATCH", raising=False)
    return tmp_path


@pytest.mark.slurm
def test_a_profile_is_written_that_slurm_accepts(slurm, home, capsys):
    assert cli.main(["profile", "new", "mine", "--partition", "low"]) == 0
    output = capsys.readouterr()
    assert output.out.strip() == str(home / ".config/bigbatch/profiles/mine.v1.json")
    told = {line.split(": ")[1] for line in output.err.splitlines() if line.startswith("open: ")}
    assert told == {"network.interface", "python", "gpus.card", "scratch"}
    profile = load_profile("mine")
    assert (profile.partition, profile.account, profile.memory, profile.time_limit) == ("low", None, None, "12:00:00")
    assert profile.gpus
    assert (profile.gpus.per_node, profile.gpus.ask_by, profile.cpus_per_rank) == (2, "gpus-per-node", 2)
    script = home / "job.sbatch"
    script.write_text(render(profile, JobRequest(home, home, NodeRange(4, 4), "60", 60, "python3")))
    assert " on nodes node[1-4] in partition low" in try_submit(script)


@pytest.mark.slurm
def test_mistakes_are_told_and_nothing_is_overwritten(slurm, home, capsys):
    assert cli.main(["profile", "new", "mine"]) == 0
    for arguments, told in (
        (["mine"], "is there already"),
        (["other", "--partition", "lo"], "did you mean 'low'?"),
        (["a b"], "right are letters, digits"),
        (["other", "--output", "x.yaml"], "a file ending in .json"),
        ([], "takes the name of a profile"),
    ):
        assert cli.main(["profile", "new", *arguments]) == 2
        assert told in capsys.readouterr().err


def test_away_from_a_cluster_it_says_so(home, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(home))
    assert cli.main(["profile", "new", "mine"]) == 2
    assert "scontrol: not found; this host is no login node" in capsys.readouterr().err


def test_profiles_are_listed_the_users_own_too_and_shown_in_full(home, capsys):
    own = home / ".config/bigbatch/profiles/own.v1.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"version": 1, "partition": "gpu"}')
    assert cli.main(["profile", "ls", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"generic", "test", "own"} <= listed.keys()
    assert listed["own"] == {"name": "own", "purpose": None, "file": str(own)}
    assert cli.main(["profile", "show", "own"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["partition"], shown["requeue"], shown["max_restarts"]) == ("gpu", True, 3)
    assert cli.main(["profile", "show", "owm"]) == 2
    assert "did you mean 'own'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu:4", (None, 4)),
        ("gpu:h100:8(S:0-1)", ("h100", 8)),
        ("shard:16,gpu:nvidia_a100-sxm4-80gb:4", ("nvidia_a100-sxm4-80gb", 4)),
        ("fpga:2", (None, 0)),
        ("", (None, 0)),
    ],
)
def test_slurms_words_for_gpus_are_read(text, expected):
    assert profile_new._parsed_gpus(text) == expected


def test_the_default_partition_is_taken_unless_only_others_have_gpus():
    cpu, few, many = nodes("cpu", 100, "", is_default=True), nodes("few", 2, "gpu:8"), nodes("many", 20, "gpu:4")
    assert profile_new._best_partition([cpu]) == "cpu"
    assert profile_new._best_partition([cpu, few, many]) == "many"
    assert profile_new._best_partition([few._replace(is_default=True), many]) == "few"


def test_most_nodes_with_gpus_are_described_and_the_others_counted():
    groups = [nodes("a", 50, ""), nodes("a", 3, "gpu:v100:4"), nodes("a", 8, "gpu:h100:4"), nodes("b", 90, "gpu:1")]
    kind, others = profile_new._usual_kind(groups, "a")
    assert (kind.gpus, others) == ("gpu:h100:4", 53)
    still_open: dict[str, str] = {}
    assert profile_new._gpus(kind, {"SelectType": "select/cons_res"}, still_open) == {
        "gpus": {"per_node": 4, "ask_by": "gres", "type": "h100", "card": "H100"},
        "cpus_per_rank": 16,
    }
    assert still_open == {}


@pytest.mark.slurm
def test_a_profile_of_nodes_without_gpus_puts_ranks_on_cpus(slurm, home, monkeypatch):
    fake = home / "bin" / "sinfo"  # in front of the real one: a cluster without GPUs
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'main*|up|1:00:00|4|idle|4|4000|(null)|(null)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    found = profile_new.ask_cluster(None)
    assert (found.document["ranks_per_node"], found.document["cpus_per_rank"]) == (1, 4)
    assert "ranks run on CPUs" in found.open["gpus"]
