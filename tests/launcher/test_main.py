"""`python3 launcher VERB`: the set-up, tried with a clone whose only dependency is a stand-in for torch."""

import ast
import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "bigbatch"
"""

# The project's own build: a wheel that puts src/ on the path. No setuptools, so no network.
BACKEND = '''
import os, zipfile

WHEEL = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
METADATA = """Metadata-Version: 2.1
Name: bigbatch
Version: 0.1.0
Provides-Extra: train
Provides-Extra: test
Provides-Extra: low-bit
Provides-Extra: search
Requires-Dist: torch>=2.11,<2.14; extra == "train"
"""

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "bigbatch-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        wheel.writestr("bigbatch-0.1.0.dist-info/METADATA", METADATA)
        wheel.writestr("bigbatch-0.1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("bigbatch-0.1.0.dist-info/RECORD", "")
        wheel.writestr("bigbatch.pth", os.path.join(os.getcwd(), "src"))
    return name
'''

VERB = """
import importlib.metadata, sys
print("verb", sys.argv[1:], importlib.metadata.version("torch"))
sys.exit(7)
"""


def make_wheel(folder: Path, name: str, version: str) -> None:
    buffer = io.BytesIO()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / f"{name}-{version}-py3-none-any.whl").write_bytes(buffer.getvalue())


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clone that can be installed without network, from the folder `wheels` beside it."""
    root = tmp_path_factory.mktemp("main") / "clone"
    package = root / "src" / "bigbatch" / "launcher"
    package.mkdir(parents=True)
    (package / "cli.py").write_text(VERB)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "backend.py").write_text(BACKEND)
    (root / "launcher").mkdir()
    shutil.copy(ROOT / "launcher" / "__main__.py", root / "launcher")
    wheels = root.parent / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "torch", "2.12.0+cpu")
    make_wheel(wheels, "torch", "2.13.0+cpu")
    return root


def call(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(clone.parent / "wheels")}
    command = [sys.executable, str(clone / "launcher"), *arguments]
    return subprocess.run(command, env={**ours, **pip}, capture_output=True, text=True, check=False, cwd=clone.parent)


@pytest.fixture(scope="module")
def first(clone: Path) -> subprocess.CompletedProcess:
    """Return the outcome of the first call, which installs."""
    return call(clone, "train", "gpt/quick", "--set", "a b")


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the module, set to work in an empty folder."""
    spec = importlib.util.spec_from_file_location("launcher_main", ROOT / "launcher" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("VENV", "STAMP", "LOCK", "LOG", "VENV_PYTHON"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).relative_to(ROOT))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_it_needs_nothing_but_the_standard_library():
    module = ast.parse((ROOT / "launcher" / "__main__.py").read_text())
    names = {alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
    outside = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside == {"bigbatch.launcher.cli"}  # once installed, as `python -m bigbatch.launcher`


def test_its_torch_is_one_that_the_project_admits(launcher):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    low, high = next(r for r in extras["train"] if r.startswith("torch")).removeprefix("torch>=").split(",<")
    version = launcher.TORCH.removeprefix("torch==")
    assert [int(part) for part in low.split(".")] <= [int(part) for part in version.split(".")]
    assert [int(part) for part in version.split(".")] < [int(part) for part in high.split(".")]
    assert set(launcher.RUN_EXTRAS) < set(launcher.TEST_EXTRAS) == set(extras)


def test_a_first_call_installs_the_cpu_build_of_torch_then_runs_the_verb(first):
    assert first.stdout == "verb ['train', 'gpt/quick', '--set', 'a b'] 2.13.0+cpu\n", first.stderr
    assert first.returncode == 7  # the verb's own
    assert "Installing torch==2.13.0" in first.stderr


def test_a_second_call_needs_nothing_to_install_from_and_says_nothing(clone, first):
    hidden = clone.parent / "wheels.away"
    (clone.parent / "wheels").rename(hidden)
    second = call(clone, "show")
    hidden.rename(clone.parent / "wheels")
    assert (second.stdout, second.stderr) == ("verb ['show'] 2.13.0+cpu\n", "")


def test_an_interrupted_installation_is_made_anew(clone, first):
    (clone / ".venv" / "bigbatch-installed.json").unlink()
    leftover = clone / ".venv" / "lib" / "half-written"
    leftover.mkdir()
    again = call(clone, "show")
    assert again.stdout == "verb ['show'] 2.13.0+cpu\n", again.stderr
    assert not leftover.exists()


def test_a_changed_project_file_is_installed_into_the_same_environment(clone, first):
    keep = clone / ".venv" / "keep"
    keep.touch()
    (clone / "pyproject.toml").write_text(PYPROJECT + "# changed\n")
    assert "Installing bigbatch[train]" in call(clone, "show").stderr
    assert keep.exists()
    assert call(clone, "show").stderr == ""


def test_a_failed_installation_shows_pips_words_and_one_line_and_leaves_no_stamp(clone, first):
    (clone / "pyproject.toml").write_text(PYPROJECT + "# changed again\n")
    backend = clone / "backend.py"
    backend.write_text("raise SystemExit('the build is broken')")
    failed = call(clone, "show")
    backend.write_text(BACKEND)
    assert failed.returncode == 1
    assert "the build is broken" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: Installing bigbatch[train] failed: ")
    assert not (clone / ".venv" / "bigbatch-installed.json").exists()


def test_an_environment_that_somebody_else_made_is_left_alone(launcher):
    launcher.VENV.mkdir()
    (launcher.VENV / "pyvenv.cfg").touch()
    with pytest.raises(launcher.InstallError, match="was not made by this launcher"), launcher.install_lock():
        pass
    assert [path.name for path in launcher.VENV.iterdir()] == ["pyvenv.cfg"]


def test_two_installations_at_a_time_are_kept_apart(launcher, capsys):
    launcher.VENV.mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    command = [sys.executable, "-c", f"{hold} time.sleep(0.7)", str(launcher.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with launcher.install_lock():
            assert other.wait(timeout=5) == 0  # it had ended, else the lock would not be ours
            with launcher.LOCK.open("a") as third, pytest.raises(BlockingIOError):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert "Another process is installing" in capsys.readouterr().err


def test_an_older_python_is_told_so_in_one_line(launcher, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "MIN_PYTHON", (99, 1))
    assert launcher.main(["show"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: Python {sys.version.split()[0]} is too old")


def test_a_disk_without_room_is_told_before_anything_is_installed(launcher, monkeypatch, capsys):
    (launcher.ROOT / "pyproject.toml").touch()
    monkeypatch.setattr(launcher, "CPU_INSTALL_BYTES", 10**18)
    monkeypatch.setattr(launcher, "GPU_INSTALL_BYTES", 10**18)
    assert launcher.main(["show"]) == 1
    assert "GB free; the installation needs 1000000000 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("NewConnectionError('<pip._vendor...>: Failed to establish', )", "the network does not answer"),
        ("ERROR: something else", "see the lines above"),
    ],
)
def test_what_stopped_pip_is_told_in_plain_words(launcher, said, told):
    launcher.VENV.mkdir()
    with pytest.raises(launcher.InstallError, match=told) as error:
        launcher.run_logged("Installing", [sys.executable, "-c", f"print({said!r}); raise SystemExit(1)"])
    assert said in error.value.output
    assert said in launcher.LOG.read_text()


def test_a_machine_that_gets_a_gpu_makes_the_environment_anew_once(launcher, monkeypatch):
    (launcher.ROOT / "pyproject.toml").touch()
    project = hashlib.sha256(launcher.TORCH.encode()).hexdigest()
    stamp = {"place": launcher.place(), "project": project, "extras": ["train"], "gpu": False}
    launcher.VENV_PYTHON.parent.mkdir(parents=True)
    launcher.VENV_PYTHON.touch()
    monkeypatch.setattr(launcher, "has_nvidia_gpu", lambda: False)
    assert launcher.is_installed(("train",), stamp)
    assert not launcher.is_installed(("test", "train"), stamp)
    assert not launcher.is_installed(("train",), {**stamp, "place": ["/elsewhere", 3, 11]})
    monkeypatch.setattr(launcher, "has_nvidia_gpu", lambda: True)
    assert not launcher.is_usable(stamp)
    assert launcher.is_installed(("train",), {**stamp, "gpu": True})


def test_the_namespace_is_linked_for_the_type_checker(launcher):
    launcher.link_namespace()
    launcher.link_namespace()
    links = launcher.ROOT / "build" / "ns" / "bigbatch"
    assert {link.name: link.resolve() for link in links.iterdir()} == {
        name: launcher.ROOT / name for name in launcher.MAPPED_FOLDERS
    }
