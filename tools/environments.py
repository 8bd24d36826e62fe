"""Environments of their own for libraries whose versions do not go with ours: made on demand, kept for the next time.

What an environment holds stands in environments/<name>.txt, a file of requirements. Our code runs in it as a worker
process (worker.py), which sees of bigbatch what is linked for it, and imports no more than the environment has.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bigbatch.recipes.core.errors import UserError

PLACE = "BIGBATCH_ENVIRONMENTS"
READY = "ready"
"""The file that is written last."""
LOG = "pip.log"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SHOWN_LINES = 3


def environment(name: str) -> Path:
    """Return the Python of an environment, making it first where there is none; raise UserError where that fails."""
    requirements = Path(__file__).with_name("environments") / f"{name}.txt"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(requirements.read_bytes() + version.encode()).hexdigest()[:12]
    folder = _home() / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / READY).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            if not (folder / READY).exists():
                _make(folder, requirements)
    return python


def code_folder(python: Path) -> Path:
    """Return a folder for PYTHONPATH by which an environment's Python finds bigbatch's code, and nothing else."""
    root = Path(__file__).parents[1]
    mark = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    folder = python.parents[1] / "code" / mark
    (folder / "bigbatch").mkdir(parents=True, exist_ok=True)
    for name in ("recipes", "tools"):
        with contextlib.suppress(FileExistsError):
            (folder / "bigbatch" / name).symlink_to(root / name)
    return folder


def _home() -> Path:
    return Path(os.environ.get(PLACE) or "~/.cache/bigbatch/environments").expanduser().absolute()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the environment that another process makes: {path.stem}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, requirements: Path) -> None:
    """Install the requirements into a new environment, torch first, in the build for what this machine has."""
    began = time.monotonic()
    print(f"making the environment {folder}, once; this takes minutes", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _run(folder, [sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
    builds = [[f"{torch}+cpu"], [f"{torch}+cpu", "--extra-index-url", TORCH_CPU_INDEX]]
    for build in [] if _has_gpu() or sys.platform != "linux" else builds:
        with contextlib.suppress(UserError):  # where neither is offered, the one with GPU libraries comes below
            _run(folder, [*pip, *build])
            break
    _run(folder, [*pip, "--requirement", str(requirements)])
    (folder / READY).touch()
    print(f"made it in {time.monotonic() - began:.0f} s", file=sys.stderr)


def _has_gpu() -> bool:
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").exists()


def _run(folder: Path, command: list[str]) -> None:
    """Run a step with its output in the log; raise UserError with its last lines where it fails."""
    path = folder / LOG
    with path.open("a+", errors="replace") as log:
        begin = log.tell()
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
        log.seek(begin)
        lines = log.read().split("\n")
    if status:
        told = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()]
        last = " ".join(told[-SHOWN_LINES:])
        raise UserError(str(folder), f"cannot be made: {last} (all of it: {path})")
