"""A process's start and end: the digest of a failure, and the process group."""

import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bigbatch.recipes.core import runtime
from bigbatch.recipes.core.errors import UserError


def digest_of(run_dir: Path, error: BaseException, **phase) -> dict:
    with pytest.raises(type(error)), runtime.failure_digest(run_dir, phase):
        raise error
    return json.loads((run_dir / "failure.json").read_text())


def test_a_digest_says_who_where_when_what_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    digest = digest_of(tmp_path, ValueError("seven is too many"), phase="step", step=41)
    assert time.time() - time.mktime(time.strptime(digest.pop("time")[:19], "%Y-%m-%dT%H:%M:%S")) < 60
    trace = digest.pop("traceback")
    assert "raise error" in trace
    assert trace.rstrip().endswith("ValueError: seven is too many")
    assert digest.pop("launch")
    assert digest == {
        "rank": 3,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "phase": "step",
        "step": 41,
        "exception": "ValueError: seven is too many",
        "what_to_do": "read the traceback; then start the same command again, "
        f"or `bigbatch train {tmp_path}`: it goes on from the last checkpoint",
    }


def test_the_phase_is_that_of_the_moment_of_the_failure(tmp_path):
    phase = {"phase": "start", "step": None}
    with pytest.raises(RuntimeError), runtime.failure_digest(tmp_path, phase):
        phase.update(phase="save", step=7)
        raise RuntimeError("no")
    digest = json.loads((tmp_path / "failure.json").read_text())
    assert (digest["phase"], digest["step"]) == ("save", 7)


def test_the_first_failure_stays_and_its_echo_does_not_replace_it(tmp_path):
    digest_of(tmp_path, ValueError("the cause"))
    assert digest_of(tmp_path, RuntimeError("connection closed by peer"))["exception"] == "ValueError: the cause"


def test_the_digest_of_an_earlier_launch_gives_way_to_this_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    digest_of(tmp_path, ValueError("the first time"))
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    assert digest_of(tmp_path, ValueError("the second"))["exception"] == "ValueError: the second"


def test_a_users_mistake_and_an_orderly_end_leave_no_digest(tmp_path):
    for error in (UserError("data.train", "is empty"), SystemExit(75), KeyboardInterrupt()):
        with pytest.raises(type(error)), runtime.failure_digest(tmp_path, {}):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_users_to_mend_and_leaves_no_digest(tmp_path):
    with pytest.raises(UserError, match="No space left on device"), runtime.failure_digest(tmp_path, {}):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_digest_that_cannot_be_written_is_printed(tmp_path, capfd):
    with pytest.raises(ValueError, match="the cause"), runtime.failure_digest(tmp_path / "gone", {}):
        raise ValueError("the cause")
    assert capfd.readouterr().err == (
        f"error: ValueError: the cause ({tmp_path}/gone/failure.json cannot be written: No such file or directory)\n"
    )


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", "lower batch.micro_size"),
        ("DefaultCPUAllocator: can't allocate memory", "lower batch.micro_size"),
        ("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1", "another rank ended first"),
        ("something else", "read the traceback"),
    ],
)
def test_the_advice_fits_the_failure(tmp_path, message, advice):
    assert advice in digest_of(tmp_path, RuntimeError(message))["what_to_do"]


def test_a_free_port_can_be_listened_on():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", runtime.free_port()))
        listener.listen()


def test_a_process_that_was_told_nothing_is_a_mesh_of_one(tmp_path):
    code = """
        import os
        from bigbatch.recipes.core import runtime
        mesh = runtime.start_mesh()
        print(mesh.rank, mesh.world_size, mesh.is_writer, mesh.sum(2.5, 1e15 + 1), mesh.first_text(""), end="|")
        print(mesh.broadcast_text("größer"), mesh.first_text("why"), flush=True)
        runtime.leave_mesh(mesh)
        os._exit(0)
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment["OMP_NUM_THREADS"] = "1"
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=tmp_path,
        timeout=120,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "0 1 True [2.5, 1000000000000001.0] |größer why"


def test_nccl_takes_its_ring_where_the_run_asks_for_it(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "")  # so that it is put back in the end
    monkeypatch.delenv("NCCL_ALGO")
    for sync, algorithm in ((None, None), ("all_reduce", None), ("local_sgd", None), ("ring", "Ring")):
        runtime.choose_algorithm(sync)
        assert os.environ.get("NCCL_ALGO") == algorithm
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    runtime.choose_algorithm("ring")
    assert os.environ["NCCL_ALGO"] == "Ring"
