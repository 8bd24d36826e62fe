"""A process in an environment of its own that answers calls: JSON and numpy arrays over its standard streams.

Both sides import this module, so it needs numpy and the standard library alone. A message is the length of a header,
the header in JSON, and the arrays' bytes.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from bigbatch.recipes.core.errors import UserError, one_line

Arrays = Mapping[str, np.ndarray]
Handler = Callable[[dict[str, Any], Arrays], tuple[dict[str, Any], Arrays]]
LENGTH_BYTES = 8
SHOWN_CHARACTERS = 600


class Worker:
    """A module that calls `serve`, run by another environment's Python; calls wait for each other."""

    def __init__(self, environment: str, module: str) -> None:
        """Start it, making the environment where there is none yet."""
        from bigbatch.tools import environments

        python = environments.environment(environment)
        self.lock, self.log = threading.Lock(), tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        variables = os.environ | {"PYTHONPATH": str(environments.code_folder(python))}
        self.process = subprocess.Popen(
            [python, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=variables
        )
        self.close = weakref.finalize(self, _end, self.process, self.log)
        """End the process; it ends with this object too."""

    def call(self, message: dict[str, Any], arrays: Arrays | None = None) -> tuple[dict[str, Any], Arrays]:
        """Send a message with arrays; return the answer. Raises UserError where the worker does, else RuntimeError."""
        assert self.process.stdin and self.process.stdout
        with self.lock:
            try:
                _send(self.process.stdin, message, arrays or {})
                answer, found = _receive(self.process.stdout)
            except (EOFError, BrokenPipeError):
                raise RuntimeError(f"the worker has ended: {self._last_words()}") from None
        if "mistake" in answer:
            raise UserError(*answer["mistake"])
        if "failure" in answer:
            raise RuntimeError(f"in the worker: {answer['failure']}")
        return answer, found

    def __enter__(self) -> "Worker":
        """Return the worker itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.close()

    def _last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        return one_line(self.log.read().decode(errors="replace").strip()[-SHOWN_CHARACTERS:])


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    process.kill()
    process.communicate()
    log.close()


def serve(handle: Handler) -> None:
    """Answer calls until the caller hangs up; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            message, arrays = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(answers, *handle(message, arrays))
        except UserError as error:
            _send(answers, {"mistake": [error.where, error.message]}, {})
        except Exception as error:
            traceback.print_exc()
            _send(answers, {"failure": f"{type(error).__name__}: {error}"[:SHOWN_CHARACTERS]}, {})


def _send(stream: IO[bytes], message: dict[str, Any], arrays: Arrays) -> None:
    contents = [np.ascontiguousarray(array) for array in arrays.values()]
    kinds = [(name, array.dtype.str, array.shape) for name, array in zip(arrays, contents, strict=True)]
    header = json.dumps({"message": message, "arrays": kinds}).encode()
    stream.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
    for array in contents:
        stream.write(array.data)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    header = json.loads(_read(stream, int.from_bytes(_read(stream, LENGTH_BYTES), "little")))
    arrays = {}
    for name, kind, shape in header["arrays"]:
        dtype = np.dtype(kind)
        size = int(np.prod(shape)) * dtype.itemsize
        arrays[name] = np.frombuffer(bytearray(_read(stream, size)), dtype).reshape(shape)
    return header["message"], arrays


def _read(stream: IO[bytes], num_bytes: int) -> bytes:
    found = stream.read(num_bytes)
    if len(found) < num_bytes:
        raise EOFError
    return found
