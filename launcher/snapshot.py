"""The code of a submitted run: what differs from its commit, and with --snapshot a frozen copy that the job runs."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import bigbatch.recipes
from bigbatch.recipes.core.errors import UserError

PACKAGES = ("recipes", "launcher", "tools", "ds_configs", "slurm")
CODE, DIFF = "code", "environment.diff"
LARGEST_DIFF_BYTES = 2**22
SOURCE = Path(bigbatch.recipes.__file__).parents[1]
"""The folder that this code's five packages lie in."""


def freeze(run_dir: Path, source: Path = SOURCE) -> Path:
    """Copy the five packages into RUN_DIR/code, unless they are there already; return that folder."""
    code = run_dir / CODE
    if code.exists():
        print(f"the job runs the code frozen in {code}; remove it to take this one", file=sys.stderr, flush=True)
        return code
    stage = run_dir / f".{CODE}.{os.getpid()}"
    try:
        for name in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree((source / name).resolve(), stage / "bigbatch" / name, ignore=ignored)
        stage.rename(code)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return code


def use_frozen(run_dir: Path, environment: Mapping[str, str], profile_environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job in which Python finds the frozen packages first."""
    if "PYTHONPATH" in profile_environment:
        where = "profile.environment.PYTHONPATH"
        raise UserError(where, "does not go with --snapshot, whose code it would come before; leave one out")
    if os.pathsep in str(run_dir):
        raise UserError(str(run_dir), f"a path with {os.pathsep!r} cannot be in PYTHONPATH; rename it, for --snapshot")
    others = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    return {**environment, "PYTHONPATH": os.pathsep.join([str(run_dir / CODE), *others])}


def write_diff(run_dir: Path, root: Path = SOURCE) -> None:
    """Write what differs from the last commit, new files too, as a patch; nothing where the code is in no clone."""
    path = run_dir / DIFF
    path.unlink(missing_ok=True)
    if not (root / ".git").exists():
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            index = {**os.environ, "GIT_INDEX_FILE": str(Path(folder) / "index")}  # the user's own is left alone
            _git(root, index, "read-tree", "HEAD")
            _git(root, index, "add", "--all", "--intent-to-add", ".")
            diff = _git(root, index, "diff", "--binary", "HEAD")
            if len(diff) > LARGEST_DIFF_BYTES:
                note = f"# {len(diff)} bytes, more than the {LARGEST_DIFF_BYTES} that are kept; what changed:\n"
                diff = note.encode() + _git(root, index, "diff", "--stat", "HEAD")
    except (OSError, subprocess.CalledProcessError):  # no git here, or a clone that belongs to somebody else
        return
    if diff:
        path.write_bytes(diff)


def _git(root: Path, environment: Mapping[str, str], *arguments: str) -> bytes:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, check=True).stdout
