"""`bigbatch serve` as a process of its own."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.serve import main

VERB = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "serve"]


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*VERB, *map(str, arguments)], env=environment, text=True, **pipes)


@contextlib.contextmanager
def ending(process):
    """Have no process outlive its test."""
    try:
        yield
    finally:
        process.kill()


def test_a_signal_finishes_what_runs_and_ends_with_status_0(folder):
    with start(folder, "--port", "0", "--max-requests", "2") as process, ending(process):
        url = process.stdout.readline().strip()
        asked = {"prompt": "a", "max_tokens": 500, "temperature": 1.0, "seed": 1, "n": 32}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = [pool.submit(httpx.post, f"{url}/v1/completions", json=asked, timeout=60) for _ in range(2)]
            while _running(url) < 2 and not any(one.done() for one in running):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            answers = [one.result() for one in running]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert len(answers[0].json()["choices"]) == 32
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert process.wait(30) == 0
        told = process.stderr.read()
    assert f"vllm serve {folder} --served-model-name tiny" in told
    assert "stopping: 2 requests are finished, none is taken any more" in told


def _running(url):
    told = httpx.get(f"{url}/metrics").text
    return float(next(line for line in told.splitlines() if line.startswith("bigbatch_requests_running ")).split()[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/nowhere"], "/nowhere: there is no such folder"),
        ([".", "--port", "70000"], "bigbatch serve: argument --port: found '70000'; right is a number from 0"),
        ([".", "--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached by others; give --token"),
    ],
)
def test_a_mistake_is_told_before_anything_is_opened(arguments, told):
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert str(caught.value).startswith(told)


def test_a_model_that_brings_code_of_its_own_is_not_opened(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "strange")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(UserError, match="has 'auto_map', which asks for code of its own"):
        main([str(copy)])
