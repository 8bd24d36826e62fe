import sys
from pathlib import Path

import numpy as np
import pytest

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools import environments
from bigbatch.tools.worker import Worker

ECHO = """
from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.worker import serve

def handle(message, arrays):
    print("what a library prints")
    if message == {"do": "refuse"}:
        raise UserError("model.tflite", "is no model")
    if message == {"do": "divide"}:
        1 / 0
    if message == {"do": "die"}:
        import os, sys
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    return {"heard": message}, {name: array * 2 for name, array in arrays.items()}

serve(handle)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGBATCH_ENVIRONMENTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def worker(home, monkeypatch):
    """Start a worker of this Python in an environment that is there already."""
    with pytest.raises(UserError), monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")  # leaves the folder behind, without the mark of a whole one
        environments.environment("litert")
    folder = next(path for path in home.iterdir() if path.is_dir())
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(Path(sys.executable).resolve())
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    (folder / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (folder / "ready").touch()
    (environments.code_folder(folder / "bin/python") / "echo.py").write_text(ECHO)
    with Worker("litert", "echo") as started:
        yield started


def test_arrays_of_any_shape_and_kind_come_back(worker):
    arrays = {
        "ids": np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::-1],
        "number": np.float64(1.5) * np.ones(()),
        "none": np.empty((0, 4), np.float32),
    }
    answer, found = worker.call({"do": "échö", "n": 1}, arrays)
    assert answer == {"heard": {"do": "échö", "n": 1}}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array * 2)


def test_mistakes_and_failures_are_told_and_the_worker_goes_on(worker):
    with pytest.raises(UserError, match=r"model.tflite: is no model"):
        worker.call({"do": "refuse"})
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        worker.call({"do": "divide"})
    assert worker.call({})[0] == {"heard": {}}


def test_what_a_worker_that_died_said_last_is_told(worker):
    with pytest.raises(RuntimeError, match=r"the worker has ended: .*out of luck"):
        worker.call({"do": "die"})


def test_an_environment_that_cannot_be_made_is_told_in_a_line_and_tried_again(home, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    for _ in range(2):
        # Where pip is told of constraints, it speaks of these.
        found = r"(No matching distribution found for|Cannot install) torch"
        with pytest.raises(UserError, match=rf"litert-\w+: cannot be made: ERROR: .*{found}"):
            environments.environment("litert")
