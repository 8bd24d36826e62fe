"""The job that serves a model: its script."""

import pytest

from bigbatch.launcher import cli
from bigbatch.launcher.profiles import load_profile, parse_profile
from bigbatch.launcher.serve_job import render
from bigbatch.recipes.core.errors import UserError


def test_a_job_takes_one_gpu_and_the_partition_of_its_profile(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path), "--sbatch=perlmutter", "--port", "9000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"qos=regular", "constraint=gpu", "nodes=1", "gpus-per-node=1", "signal=B:TERM@90", "no-requeue"} <= set(
        told
    )
    assert not [line for line in lines if "@" in line and "TERM@90" not in line]
    serve = f"serve {tmp_path} --host 0.0.0.0 --port 9000"
    assert lines[-1].startswith("exec ")
    assert lines[-1].endswith(serve)


def test_what_no_job_can_serve_is_told_in_one_line(tmp_path):
    profile = load_profile("generic")
    with pytest.raises(UserError, match="takes the model first: bigbatch serve MODEL --sbatch PROFILE"):
        render(profile, ["--port", "1"])
    with pytest.raises(UserError, match="there is no such folder"):
        render(profile, [str(tmp_path / "nowhere")])
    boxed = parse_profile({"version": 1, "container": {"kind": "apptainer", "image": "a.sif"}})
    with pytest.raises(UserError, match="container: is of training"):
        render(boxed, [str(tmp_path)])
