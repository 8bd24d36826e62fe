"""The folder of a run: chosen, locked, written whole, and what --resume forbids."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch.launcher import run_dir
from bigbatch.launcher.run_dir import RunDir
from bigbatch.recipes.core.errors import UserError

DOCUMENT = {"version": 1, "recipe": "gpt", "seed": 3}


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def begun(folder: RunDir) -> RunDir:
    """Return a folder that has a checkpoint."""
    (folder.checkpoints / "step_00000010").mkdir(parents=True)
    (folder.checkpoints / "step_00000010" / "manifest.json").write_text("{}")
    return folder


def test_a_new_run_gets_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = [run_dir.choose("gpt/quick", None).path for _ in range(3)]
    assert chosen == [Path("runs/gpt-quick-1"), Path("runs/gpt-quick-2"), Path("runs/gpt-quick-3")]
    assert run_dir.choose("/somewhere/mine.json", None).path == Path("runs/mine-1")


def test_a_run_folder_given_as_run_is_gone_on_in(tmp_path, folder):
    folder.path.mkdir()
    run_dir.write(folder, DOCUMENT, {}, "abc")
    assert run_dir.choose(str(folder.path), None) == folder
    with pytest.raises(UserError, match=r"--run-dir: .* is a run folder already"):
        run_dir.choose(str(folder.path), tmp_path / "other")


def test_a_folder_in_use_is_refused_naming_host_and_process_until_that_one_is_gone(folder):
    code = (
        "import sys, time, pathlib\nfrom bigbatch.launcher.run_dir import RunDir, hold\n"
        "with hold(RunDir(pathlib.Path(sys.argv[1]))):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on {os.uname().nodename} since 20"):
            run_dir.hold(folder).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with run_dir.hold(folder):  # a kill leaves no lock behind
        assert json.loads(folder.lock.read_text())["pid"] == os.getpid()


def test_resume_never_refuses_checkpoints_and_must_refuses_their_absence(folder, begun):
    with pytest.raises(UserError, match="--resume: never"):
        run_dir.check_resume(begun, "never")
    run_dir.check_resume(begun, "must")
    run_dir.check_resume(begun, "auto")
    empty = RunDir(folder.path.parent / "empty")
    with pytest.raises(UserError, match="--resume: must"):
        run_dir.check_resume(empty, "must")
    run_dir.check_resume(empty, "never")


def test_a_checkpoint_without_its_manifest_does_not_count(folder):
    (folder.checkpoints / "step_00000010").mkdir(parents=True)
    assert not folder.has_checkpoint()


def test_the_folder_tells_what_it_was_run_with_and_keeps_the_record_of_every_start(folder):
    folder.path.mkdir()
    for content_id in ("first", "second", "third"):
        run_dir.write(folder, DOCUMENT, {"zero_optimization": {"stage": 1}}, content_id)
    environment = json.loads(folder.environment.read_text())
    assert json.loads(folder.run.read_text()) == DOCUMENT
    assert json.loads(folder.deepspeed.read_text()) == {"zero_optimization": {"stage": 1}}
    assert environment["content_id"] == "third"
    assert [start["content_id"] for start in environment["earlier_starts"]] == ["first", "second"]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["packages"]["deepspeed"] == "0.19.8"
    assert sorted(path.name for path in folder.path.iterdir()) == ["deepspeed.json", "environment.json", "run.json"]


def test_the_record_names_the_commit_and_whether_the_code_differs_from_it(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "--message", "one")
    clean = run_dir._describe_git(tmp_path)
    assert (clean["commit"], clean["changed"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "code.py").write_text("2")
    changed = run_dir._describe_git(tmp_path)
    assert (changed["commit"], changed["changed"]) == (clean["commit"], True)
    assert changed["diff_sha256"] != clean["diff_sha256"]


def test_code_inside_somebody_elses_clone_is_not_taken_for_that_clones_commit(tmp_path):
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    (tmp_path / "site-packages").mkdir()
    assert run_dir._describe_git(tmp_path / "site-packages") is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    run_dir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run_dir.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_an_unwritable_place_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run_dir.hold(RunDir(tmp_path / "file" / "run")).__enter__()
