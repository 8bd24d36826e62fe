"""What several test files need: the toy model, one run of all engine cases, and a Slurm cluster."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

WAITING = "pytest.mark.slurm"
PROGRAMS = Path(__file__).parent / "programs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that mostly wait: where there are two workers, the other one has both cores meanwhile."""
    items.sort(key=lambda item: _group(item.nodeid.partition("::")[0]) != WAITING)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have one worker do all that shares something costly (pytest-xdist's own groups do not work with pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.partition("::")[0])

    return Scheduling(config, log)


@functools.cache
def _group(file: str) -> str:
    """Name the group of a test file: the users of clusters, of a fixture, or all of a folder; else it is alone."""
    path = Path(__file__).parents[1] / file
    text = path.read_text()
    return next(
        (word for word in (WAITING, "engine_cases") if word in text),
        str(path.parent) if (path.parent / "conftest.py").exists() else file,
    )


class Outcome(NamedTuple):
    """What a case of engine_cases.py left behind."""

    folder: Path
    """A run folder, with its checkpoints."""
    steps: list[dict[str, Any]]
    """Each step's StepResult."""


def load_program(name: str) -> ModuleType:
    """Import one of the programs."""
    specification = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """Load the toy model that the programs train."""
    return load_program("toy")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Give a function that returns an untrained run of a kind of tiny_models.py and its Hugging Face folder.

    Both are made once and are not to be changed.
    """

    @functools.cache
    def make(kind: str) -> tuple[Path, Path]:
        from bigbatch.tools.convert import convert

        run = load_program("tiny_models").write_run(tmp_path_factory.mktemp(kind) / "run", kind)
        convert(run, run.with_name("model"))
        return run, run.with_name("model")

    return make


@pytest.fixture(scope="session")
def kept_golden() -> Callable[[str, Callable[[], Any]], Any]:
    """Give a function that returns what tests/golden keeps under a name; measured and written first when asked to."""

    def kept(name: str, measure: Callable[[], Any]) -> Any:
        path = Path(__file__).parent / "golden" / f"{name}.json"
        if os.environ.get("BIGBATCH_WRITE_GOLDEN") == "1":
            path.write_text(json.dumps(measure(), indent=2) + "\n")
        return json.loads(path.read_text())

    return kept


@pytest.fixture(scope="session")
def run_program() -> Callable[..., str]:
    """Give a function that runs one of the programs to its end and returns what it printed."""

    def run(name: str, *arguments: object, timeout_seconds: float = 1500.0, status: int = 0) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        environment["MASTER_ADDR"] = "127.0.0.1"
        environment.pop("MASTER_PORT", None)
        command = [sys.executable, str(PROGRAMS / name), *map(str, arguments)]
        ended = subprocess.run(
            command,
            check=False,
            env=environment,
            timeout=timeout_seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ended.returncode == status, ended.stdout
        return ended.stdout

    return run


@pytest.fixture(scope="session")
def engine_cases(run_program: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Train all cases once; give a function from (phase, ranks, case) to what it left behind."""
    out = tmp_path_factory.mktemp("engine_cases")
    run_program("engine_cases.py", out)

    def outcome(phase: str, ranks: int, case: str) -> Outcome:
        folder = out / f"{phase}_{ranks}" / case
        results = [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(ranks)]
        for result in results:
            assert "error" not in result, result["error"]
        assert (
            len({json.dumps(result["steps"]) for result in results}) == 1
        )  # the ranks agree; NaN is equal to NaN here
        return Outcome(folder, results[0]["steps"])

    return outcome


@pytest.fixture(scope="module")
def slurm() -> Iterator[Any]:
    """Give a Slurm cluster of four nodes (programs/slurm_cluster.py) for the tests of a file; commands find it."""
    yield from cluster_here(accounting=False)


@pytest.fixture(scope="module")
def slurm_with_accounting() -> Iterator[Any]:
    """Give the same with slurmdbd, so that sacct answers."""
    yield from cluster_here(accounting=True)


def cluster_here(*, accounting: bool) -> Iterator[Any]:
    """Start a cluster and make it the one of this process; skip where there can be none."""
    program = load_program("slurm_cluster")
    if reason := program.why_none(accounting=accounting):
        pytest.skip(f"no Slurm cluster: {reason}")
    with program.start_cluster(accounting=accounting) as cluster, pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - cluster.environment.keys():
            patch.delenv(name)
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, cluster.environment[name])
        yield cluster
