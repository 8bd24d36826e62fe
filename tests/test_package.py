"""The wheel, and what keeps the namespace clean."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("recipes", "launcher", "tools", "ds_configs", "slurm")


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy: a build in place would leave its own folders, and take up what an older one left."""
    copy = tmp_path_factory.mktemp("clone")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_the_wheel_holds_every_file_of_the_tree_and_nothing_else(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tree = {f"bigbatch/{path.relative_to(ROOT)}" for folder in FOLDERS for path in files_of(ROOT / folder)}
    assert packed == tree


def test_the_wheel_carries_its_licence_and_its_command(wheel):
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    assert wheel.read(f"{info}/entry_points.txt").decode().split() == [
        "[console_scripts]",
        "bigbatch",
        "=",
        "bigbatch.launcher.cli:main",
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imported_beside_the_namespace_says_what_is_right(folder):
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"import bigbatch.{folder}, not {folder}" in result.stderr


def test_every_folder_with_code_is_a_package():
    for folder in FOLDERS:
        homes = {path.parent for path in files_of(ROOT / folder) if path.suffix == ".py"}
        assert [home for home in homes if not (home / "__init__.py").exists()] == []


def test_the_namespace_itself_has_no_code():
    assert not (ROOT / "__init__.py").exists()


def test_the_commit_hooks_use_the_version_of_ruff_that_the_tests_use():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = next(requirement for requirement in extras["test"] if requirement.startswith("ruff=="))
    assert (ROOT / ".pre-commit-config.yaml").read_text().count(f'additional_dependencies: ["{pinned}"]') == 2
