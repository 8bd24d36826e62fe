"""What the engines' workers answer. Runs in their environments: needs numpy and the standard library alone."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigbatch.tools.engines.rows import Call, run_rows
from bigbatch.tools.worker import Arrays, Handler


def answer(open_call: Callable[[str, Any, int | None], Call]) -> Handler:
    """Return the handler of an engine: `open` a file, `run` rows, `time` that without the pipe, tell the `peak`."""
    state: dict[str, Any] = {}

    def handle(message: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        if message["do"] == "open":
            state["before"] = _memory_bytes("VmRSS")
            state["layout"] = message["layout"]
            state["call"] = open_call(message["file"], message["layout"], message["threads"])
            return {}, {}
        if message["do"] == "run":
            return {}, run_rows(state["call"], state["layout"], arrays)
        if message["do"] == "time":
            return {"seconds": [_seconds(state, arrays) for _ in range(message["repeats"])]}, {}
        return {"bytes": _memory_bytes("VmHWM") - state["before"]}, {}

    return handle


def _seconds(state: dict[str, Any], arrays: Arrays) -> float:
    begin = time.perf_counter()
    run_rows(state["call"], state["layout"], arrays)
    return time.perf_counter() - begin


def _memory_bytes(name: str) -> int:
    """Return a number of /proc/self/status; getrusage's begins with the memory of the process that started this one."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
