"""Going on with a run from another folder than the one it was started from."""

import json
import shutil
from pathlib import Path

import pytest

from bigbatch.recipes.core.run_home import describe_home, enter_home


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Give a project folder with a run in it; the current folder is another."""
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (folder / "runs" / "one" / "checkpoints" / "step_00000001").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(folder)
    record = describe_home(folder / "runs" / "one")
    (folder / "runs" / "one" / "environment.json").write_text(json.dumps(record))
    monkeypatch.chdir(elsewhere)
    return folder


@pytest.mark.parametrize("inside", ["runs/one", "runs/one/checkpoints/step_00000001"])
def test_a_run_is_gone_on_with_where_its_relative_paths_lead(project, monkeypatch, inside, capsys):
    relative = Path("../project") / inside
    found = enter_home(relative)
    assert Path.cwd() == project
    assert found.samefile(project / inside)
    assert capsys.readouterr().err == f"working in {project}, where this run was started\n"
    assert enter_home(found) == found
    assert capsys.readouterr().err == ""


def test_what_was_moved_or_says_nothing_stays_with_the_current_folder(project, tmp_path, capsys):
    here = Path.cwd()
    moved = (project / "runs" / "one").rename(tmp_path / "moved")
    assert enter_home(moved) == moved
    (moved / "environment.json").write_text("no JSON")
    assert enter_home(moved) == moved
    assert enter_home(Path("nowhere")) == Path("nowhere")
    assert Path.cwd() == here
    assert capsys.readouterr().err == ""


def test_a_copy_of_a_whole_project_is_a_project_of_its_own(project, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    assert enter_home(Path("runs/one")) == Path("runs/one")
    assert Path.cwd() == copy
