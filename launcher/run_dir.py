"""A run's folder: layout, creation, going on in one that exists, environment record, lock."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import bigbatch.recipes
from bigbatch.launcher.documents import read_json
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.run_home import describe_home

Resume = Literal["auto", "never", "must"]
RECORDED_PACKAGES = (
    "bigbatch",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "pyarrow",
    "pydantic",
    "tensorboard",
    "bitsandbytes",
    "apex",
)


class RunDir(NamedTuple):
    """Where everything of a run lies."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def exists(self) -> bool:
        """Tell whether a run has been set up here."""
        return self.run.is_file()

    def has_checkpoint(self) -> bool:
        """Tell whether a finished checkpoint lies here; whether it is sound is for the worker to find out."""
        return any(self.checkpoints.glob("step_*/manifest.json"))


def choose(run: str, run_dir: Path | None) -> RunDir:
    """Return the folder that the command line means: RUN if it is one, else --run-dir, else a new one under runs/."""
    if RunDir(Path(run)).exists():
        if run_dir is not None and run_dir.resolve() != Path(run).resolve():
            raise UserError("--run-dir", f"{run} is a run folder already; leave --run-dir out to go on in it")
        return RunDir(Path(run))
    if run_dir is not None:
        return RunDir(run_dir)
    return RunDir(fresh(Path("runs"), run_name(run)))


def run_name(run: str) -> str:
    """Return what the folders of a run document are called, without their numbers."""
    return Path(run).stem if run.endswith(".json") else run.replace("/", "-")


def fresh(parent: Path, name: str) -> Path:
    """Make and return parent/name-1, or the first of the higher numbers that is free."""
    number = 1
    while True:
        path = parent / f"{name}-{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unwritable(path, error) from None
        else:
            return path


@contextlib.contextmanager
def hold(run_dir: RunDir) -> Iterator[None]:
    """Keep the folder for this process; raise UserError naming the one that has it. Freed even by a kill."""
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        lock = run_dir.lock.open("a+")
    except OSError as error:
        raise _unwritable(run_dir.path, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(str(run_dir.path), _in_use(run_dir.lock)) from None
        lock.seek(0)
        lock.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}, lock)
        lock.flush()
        yield


def _in_use(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_text())
    except json.JSONDecodeError:  # the other process is just writing it
        return "in use by another process; wait for it, or give another --run-dir"
    return (
        f"in use by process {holder['pid']} on {holder['host']} since {holder['started']}; "
        "wait for it, or give another --run-dir"
    )


def check_resume(run_dir: RunDir, resume: Resume) -> None:
    """Refuse what --resume forbids."""
    if resume == "must" and not run_dir.has_checkpoint():
        raise UserError("--resume", f"must: {run_dir.path} has no checkpoint; auto would begin at step 0")
    if resume == "never" and run_dir.has_checkpoint():
        raise UserError(
            "--resume", f"never: {run_dir.path} has checkpoints; give another --run-dir, or auto to go on from them"
        )


def write(run_dir: RunDir, document: dict[str, Any], deepspeed: dict[str, Any], content_id: str) -> None:
    """Write what the workers read, and what a later reader of the folder wants to know."""
    try:
        home = describe_home(run_dir.path)
        write_json(run_dir.environment, home | describe_environment(content_id, _starts(run_dir)))
        write_json(run_dir.deepspeed, deepspeed)
        write_json(run_dir.run, document)  # last: with it the folder is a run
    except OSError as error:
        raise _unwritable(run_dir.path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def describe_environment(content_id: str, earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return what it takes to run this again: code, versions, machine, command; and the same of earlier starts."""
    return {
        "started": _now(),
        "command": sys.argv,
        "content_id": content_id,
        "git": _describe_git(Path(bigbatch.recipes.__file__).parents[1]),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "earlier_starts": list(earlier),
    }


def _starts(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the records of this folder's starts so far, oldest first."""
    if not run_dir.environment.is_file():
        return []
    last = read_json(run_dir.environment)
    return [*last.pop("earlier_starts"), last]


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _describe_git(root: Path) -> dict[str, Any] | None:
    """Return commit and a hash of what differs from it; None when the code does not lie in a clone of its own."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        changes = _git(root, "diff", "HEAD") + _git(root, "ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):  # no git here, or a clone that belongs to somebody else
        return None
    return {"commit": commit, "changed": bool(changes), "diff_sha256": hashlib.sha256(changes).hexdigest()}


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(str(path), f"cannot be written: {error.strerror}")
