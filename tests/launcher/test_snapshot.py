"""What a submitted run is made of stays what it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch.launcher import snapshot
from bigbatch.launcher.snapshot import PACKAGES, freeze, use_frozen, write_diff
from bigbatch.recipes.core.errors import UserError

TINY = [
    'data.train=["text.txt"]',
    "data.tokenizer.vocabulary_size=300",
    "data.validation_fraction=0",
    "data.sequence_length=16",
    "model.num_layers=1",
    "model.hidden_size=32",
    "batch.global_size=4",
    "schedule.total_steps=2",
    "schedule.warmup_steps=1",
    "evaluate.every_steps=100",
    "sample.prompts=[]",
]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path):
    """Give a clone with a commit in it."""
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "a.py").write_text("one = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "begin")
    return folder


def test_the_diff_is_a_patch_that_makes_the_changed_code_of_the_commit(clone, tmp_path):
    (clone / "a.py").write_text("one = 2\n")
    (clone / "new.bin").write_bytes(bytes(range(256)))
    status = git(clone, "status", "--porcelain")
    write_diff(tmp_path, clone)
    assert git(clone, "status", "--porcelain") == status  # nothing is added to the user's own index
    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(clone), str(again))
    git(again, "apply", str(tmp_path / "environment.diff"))
    assert (again / "a.py").read_text() == "one = 2\n"
    assert (again / "new.bin").read_bytes() == bytes(range(256))


def test_a_diff_that_is_too_large_names_the_files_alone(clone, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "LARGEST_DIFF_BYTES", 100)
    (clone / "a.py").write_text("two = 2\n" * 100)
    write_diff(tmp_path, clone)
    told = (tmp_path / "environment.diff").read_text()
    assert told.startswith("# ")
    assert " a.py | 101 +" in told


def test_without_changes_or_a_clone_there_is_no_diff(clone, tmp_path):
    (tmp_path / "environment.diff").write_text("of an earlier start")
    write_diff(tmp_path, clone)
    assert not (tmp_path / "environment.diff").exists()
    write_diff(tmp_path, tmp_path)
    assert not (tmp_path / "environment.diff").exists()


@pytest.fixture
def checkout(tmp_path):
    """Give a copy of the code that may be edited."""
    folder = tmp_path / "checkout" / "bigbatch"
    for name in PACKAGES:
        shutil.copytree((snapshot.SOURCE / name).resolve(), folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_frozen_code_is_found_first_and_a_second_freeze_keeps_it(checkout, tmp_path, capsys):
    run_dir = tmp_path / "a run, 'quoted'"
    freeze(run_dir, checkout)
    (checkout / "recipes" / "core" / "errors.py").write_text("raise SystemExit('edited')")
    code = "import bigbatch.recipes.core.errors as errors, bigbatch.launcher as launcher; "
    code += "print(errors.__file__); print(launcher.__file__)"
    environment = use_frozen(run_dir, {"PYTHONPATH": str(checkout.parent)}, {})
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert all(line.startswith(f"{run_dir}/code/bigbatch/") for line in found.stdout.splitlines())
    freeze(run_dir, checkout)
    assert "the job runs the code frozen in " in capsys.readouterr().err
    assert "edited" not in (run_dir / "code" / "bigbatch" / "recipes" / "core" / "errors.py").read_text()
    assert [path.name for path in run_dir.iterdir()] == ["code"]


def test_what_would_come_before_the_frozen_code_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not go with --snapshot"):
        use_frozen(tmp_path, {}, {"PYTHONPATH": "/somewhere"})
    with pytest.raises(UserError, match="cannot be in PYTHONPATH"):
        use_frozen(tmp_path / "a:b", {}, {})


@pytest.mark.slurm
def test_a_job_runs_frozen_code_whatever_becomes_of_the_checkout_and_leaves_a_bad_node(slurm, checkout, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 1000)
    profile = json.loads((snapshot.SOURCE / "slurm" / "profiles" / "test.v1.json").read_text())
    (tmp_path / "profile.json").write_text(json.dumps(profile | {"check_nodes": True}))
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    slurm.run_on("node1", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(checkpoints))
    environment = {**os.environ, "PYTHONPATH": str(checkout.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "submit", "gpt/quick", "--run-dir", "run"]
    command += ["--profile", "profile.json", "--nodes", "2", "--snapshot"]
    command += [word for setting in TINY for word in ("--set", setting)]
    slurm.run("scontrol", "update", "PartitionName=low", "State=DOWN")  # jobs wait
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for path in checkout.rglob("*.py"):
        path.write_text("raise SystemExit('edited')\n")
    slurm.run("scontrol", "update", "PartitionName=low", "State=UP")
    job = ended.stdout.split()[0]
    logs = tmp_path / "run" / "log"
    slurm.wait_for(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the job's end", 300)
    assert slurm.state(job) == "COMPLETED", [path.read_text() for path in logs.iterdir()]
    assert (checkpoints / "step_00000002" / "manifest.json").exists()
    bad = json.loads((tmp_path / "run" / "bad_nodes.json").read_text())
    assert list(bad) == ["node1"]
    assert bad["node1"]["reason"].endswith("checkpoints cannot be written to: Read-only file system")
    check = json.loads((tmp_path / "run" / "node_check.json").read_text())
    assert (check["status"], list(check["nodes"]), check["restart_count"]) == ("fine", ["node2", "node3"], 1)
