"""Run a verb from a clone, setting everything up first: needs Python's standard library and nothing else.

    python3 launcher quickstart                      the whole way once, from raw text to generated text
    python3 launcher test [--slow] [PYTEST ARGS]     ruff, pyright and the tests; with PYTEST ARGS the tests alone
    python3 launcher VERB ...                        what `bigbatch VERB ...` does, see `python3 launcher help`

The first call makes .venv beside pyproject.toml and installs the project into it; a later one finds it done and needs
no network. To start afresh, delete .venv.
"""

from __future__ import annotations  # an older Python must get as far as the line that says so

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bigbatch-installed.json"  # written last: without it an installation is not whole
LOCK = VENV / "bigbatch-install.lock"  # also marks the folder as made here, so that it may be emptied
LOG = VENV / "bigbatch-install.log"

MIN_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
RUN_EXTRAS = ("train",)
TEST_EXTRAS = ("deploy", "low-bit", "search", "serve", "test", "train")
CPU_INSTALL_BYTES = 3 * 10**9
GPU_INSTALL_BYTES = 12 * 10**9
# Of two processes: the emulated cluster mostly waits, and many tests start ranks. tests/conftest.py makes the groups.
WORKERS = ("--numprocesses=2", "--dist=loadscope", "--no-loadscope-reorder", "--durations=40")
MAPPED_FOLDERS = ("recipes", "launcher", "tools", "ds_configs", "slurm")


class InstallError(Exception):
    """One line for the user: why the set-up cannot go on, and what to do; before it, the end of what a tool printed."""

    def __init__(self, message: str, output: str = "") -> None:
        self.output = output
        super().__init__(message)


def main(arguments: list[str]) -> int:
    """Install what the verb needs, then run it; on success the process becomes the verb's own."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        if arguments[0] == "test":
            ensure_installed(TEST_EXTRAS)
            return run_tests(arguments[1:])
        ensure_installed(RUN_EXTRAS)
    except InstallError as error:
        say(f"{error.output}error: {error}")
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    return become_verb(arguments)


def become_verb(arguments: list[str]) -> int:
    """Replace this process by the verb's, so that signals and the exit status are the verb's own."""
    verb = ["--help", *arguments[1:]] if arguments[0] == "help" else arguments
    # -P: a file called random.py in the user's folder is not to be imported.
    os.execv(VENV_PYTHON, [str(VENV_PYTHON), "-P", "-m", "bigbatch.launcher.cli", *verb])  # noqa: S606


def ensure_installed(extras: tuple[str, ...]) -> None:
    """Install the project with at least these extras unless that is done; one process at a time."""
    if sys.version_info < MIN_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise InstallError(f"Python {found} is too old; run this with Python 3.11 or newer, for example python3.12")
    if is_installed(extras, read_stamp()):
        return
    with install_lock():
        stamp = read_stamp()  # another process may have finished while this one waited
        if not is_installed(extras, stamp):
            install(sorted({*extras, *stamp.get("extras", ())}), stamp)


def is_installed(extras: tuple[str, ...], stamp: dict) -> bool:
    """Tell whether the stamp covers these extras, this clone, this Python and this project file."""
    return is_usable(stamp) and stamp["project"] == project_hash() and set(extras) <= set(stamp["extras"])


def is_usable(stamp: dict) -> bool:
    """Tell whether .venv holds a whole installation, though maybe of an older project file."""
    if stamp.get("place") != place() or not VENV_PYTHON.exists():
        return False
    # On a home folder that a cluster's nodes share, the first node with a GPU exchanges the CPU build.
    return stamp["gpu"] or not has_nvidia_gpu()


def place() -> list:
    """Return what an environment cannot change; the first number is the form of the stamp."""
    return [1, str(ROOT), *sys.version_info[:2]]


def project_hash() -> str:
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + TORCH.encode()).hexdigest()


def read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


@contextlib.contextmanager
def install_lock() -> Iterator[None]:
    """Hold .venv for this process; refuse a folder that somebody else made."""
    if VENV.exists() and not LOCK.exists() and any(VENV.iterdir()):
        raise InstallError(f"{VENV} was not made by this launcher: move it away, or activate it and pip install -e .")
    try:
        VENV.mkdir(exist_ok=True)
        lock = LOCK.open("a")
    except OSError as error:
        raise InstallError(f"{VENV} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another process is installing into {VENV}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(extras: list[str], stamp: dict) -> None:
    """Bring .venv to the state of pyproject.toml; leave a stamp when, and only when, all went well."""
    check_space()
    STAMP.unlink(missing_ok=True)
    if not is_usable(stamp):
        make_environment()
    torch = choose_torch()
    pip(f"Installing {torch.requirement}{torch.note}", "install", torch.requirement, *torch.options)
    constraints = VENV / "bigbatch-constraints.txt"  # nothing else may exchange the build
    constraints.write_text(f"torch=={installed_version('torch')}\n")
    project = f"{ROOT}[{','.join(extras)}]"
    pip(f"Installing bigbatch[{','.join(extras)}]", "install", "--constraint", str(constraints), "--editable", project)
    stamp = {"place": place(), "project": project_hash(), "extras": extras, "gpu": has_nvidia_gpu()}
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp))
    temporary.replace(STAMP)


def check_space() -> None:
    needed = GPU_INSTALL_BYTES if has_nvidia_gpu() else CPU_INSTALL_BYTES
    free = shutil.disk_usage(ROOT).free
    if free < needed:
        raise InstallError(f"{ROOT} has {free / 1e9:.1f} GB free; the installation needs {needed / 1e9:.0f} GB")


def make_environment() -> None:
    """Empty .venv of what an interrupted installation left, then make the environment."""
    try:
        import ensurepip  # noqa: F401  Debian keeps it in a package of its own
        import venv  # noqa: F401
    except ImportError:
        package = "python{}.{}-venv".format(*sys.version_info)
        raise InstallError(f"Python's venv module is missing; on Debian or Ubuntu: apt-get install {package}") from None
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path not in (LOCK, LOG):
            path.unlink()
    run_logged(f"Making {VENV}", [sys.executable, "-m", "venv", str(VENV)])
    # An older pip downloads the whole of what it is only asked about (choose_torch). Without a newer one, it stays.
    with contextlib.suppress(InstallError):
        pip("Looking for a newer pip", "install", "--upgrade", "pip>=24")


class TorchChoice(NamedTuple):
    """Which build of torch to install."""

    requirement: str
    note: str = ""
    options: tuple[str, ...] = ()


def choose_torch() -> TorchChoice:
    """Take the CPU build where there is no NVIDIA GPU: from where pip looks anyhow, else from the PyTorch CPU index."""
    if has_nvidia_gpu():
        return TorchChoice(TORCH, " for the NVIDIA GPU")
    if sys.platform != "linux":
        return TorchChoice(TORCH)  # elsewhere the default build is the small one
    for options in ((), ("--extra-index-url", TORCH_CPU_INDEX)):
        version = offered_torch(options)
        if version.endswith("+cpu"):
            return TorchChoice(f"torch=={version}", " (there is no NVIDIA GPU here)", options)
    say(f"No CPU build of torch: neither pip's own sources nor {TORCH_CPU_INDEX} offer one to this machine.")
    return TorchChoice(TORCH, ", the default build: several gigabytes of GPU libraries come with it")


def offered_torch(options: tuple[str, ...]) -> str:
    """Ask pip which version it would install, without installing; empty when it finds none or nobody answers."""
    what = ["--no-deps", "--ignore-installed", *options, TORCH]
    how = ["--dry-run", "--quiet", "--report", "-", "--retries", "0", "--timeout", "15"]
    command = [str(VENV_PYTHON), "-m", "pip", "install", *how, *what]
    try:
        answer = subprocess.run(command, capture_output=True, env=pip_environment(), timeout=120, check=False)
        return json.loads(answer.stdout)["install"][0]["metadata"]["version"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError, KeyError):
        return ""


def has_nvidia_gpu() -> bool:
    return bool(shutil.which("nvidia-smi")) or any(map(os.path.exists, ("/proc/driver/nvidia", "/dev/nvidia0")))


def installed_version(package: str) -> str:
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return subprocess.check_output([VENV_PYTHON, "-I", "-c", code, package], text=True).strip()


def pip(what: str, *arguments: str) -> None:
    run_logged(what, [str(VENV_PYTHON), "-m", "pip", *arguments])


def pip_environment() -> dict[str, str]:
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    return {**os.environ, **quiet, "PIP_USER": "0", "PIP_ROOT_USER_ACTION": "ignore"}


def run_logged(what: str, command: list[str]) -> None:
    """Run a step of the set-up with its output in the log; raise InstallError with the log's end when it fails."""
    began = time.monotonic()
    ticks = sys.stderr.isatty()
    with LOG.open("a+", encoding="utf-8", errors="replace") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        begin = log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=pip_environment())
        while process.poll() is None:
            if ticks:
                print(f"\r{what} ... {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
            time.sleep(0.2)
        log.seek(begin)
        output = log.read()
    say(f"{chr(13) if ticks else ''}{what} ... {time.monotonic() - began:.0f} s")
    if process.returncode:
        tail = "".join(f"  {line}\n" for line in output.splitlines()[-15:])
        raise InstallError(f"{what} failed: {reason(output)} (all of it: {LOG})", tail)


def reason(output: str) -> str:
    """Turn what pip said into what to do."""
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return "the disk is full"
    offline = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Network is unreachable")
    if any(sign in output for sign in offline):
        return "the network does not answer; connect, or point pip at a mirror (pip config set global.index-url URL)"
    return "see the lines above"


def run_tests(arguments: list[str]) -> int:
    """Check style and types when the whole suite is asked for, then run the tests; pytest has the last word."""
    slow = "--slow" in arguments
    chosen = [argument for argument in arguments if argument != "--slow"]
    if chosen:
        say("Tests alone; `python3 launcher test` without arguments also checks style and types")
        return subprocess.run(pytest(slow, *chosen), cwd=ROOT, env=test_environment(), check=False).returncode
    failed = [name for name, command in checks() if not passes(name, command)]
    if failed:
        say(f"FAILED: {', '.join(failed)} (the exit status will say so; the tests follow)")
    suite = subprocess.run(pytest(slow, *WORKERS), cwd=ROOT, env=test_environment(), check=False)
    return suite.returncode or int(bool(failed))


def pytest(slow: bool, *arguments: str) -> list[str]:
    """Return the command that runs tests, with the slow ones or without."""
    return [str(VENV_PYTHON), "-P", "-m", "pytest", *([] if slow else ["-m", "not slow"]), *arguments]


def checks() -> list[tuple[str, list[str]]]:
    """List the checks that come before the tests, by name."""
    python = [str(VENV_PYTHON), "-P", "-m"]
    checks = [
        ("ruff check", [*python, "ruff", "check", "--quiet"]),
        ("ruff format", [*python, "ruff", "format", "--check", "--quiet"]),
    ]
    pyright = [*python, "pyright"]
    trial = subprocess.run([*pyright, "--version"], capture_output=True, text=True, env=test_environment(), check=False)
    if trial.returncode:
        say(f"SKIPPED: pyright does not start here: {(trial.stderr.strip() or 'no reason given').splitlines()[-1]}")
        return checks
    link_namespace()
    return [*checks, ("pyright", [*pyright, "--pythonpath", str(VENV_PYTHON)])]


def passes(name: str, command: list[str]) -> bool:
    began = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env=test_environment(), check=False).returncode
    say(f"{name}: {'FAILED' if status else 'passed'} ({time.monotonic() - began:.0f} s)")
    return status == 0


def link_namespace() -> None:
    """Lay the mapped folders out as packages of one namespace: type checkers cannot follow the editable finder."""
    namespace = ROOT / "build" / "ns" / "bigbatch"
    namespace.mkdir(parents=True, exist_ok=True)
    for name in MAPPED_FOLDERS:
        link = namespace / name
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", "..", name))


def test_environment() -> dict[str, str]:
    defaults = {
        "OMP_NUM_THREADS": "1",  # tests start several ranks on few cores
        "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",  # no question to the network for a newer version
        # A lock that a killed build left in the user's own cache must not stall the tests.
        "TORCH_EXTENSIONS_DIR": str(ROOT / "build" / "torch_extensions"),
    }
    return {**defaults, **os.environ}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if __package__:  # python -m bigbatch.launcher: installed already
        from bigbatch.launcher.cli import main as run_verb

        sys.exit(run_verb())
    sys.exit(main(sys.argv[1:]))
