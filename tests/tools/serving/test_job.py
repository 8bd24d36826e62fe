"""A Slurm job serves a model on a node."""

import re
import sys

import httpx
import pytest

from bigbatch.launcher import cli


@pytest.mark.slurm
@pytest.mark.slow
def test_a_node_serves_until_the_job_is_cancelled(slurm, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", str(folder), "--sbatch", "test", "--max-batch", "2"]) == 0
    script = tmp_path / "serve.sbatch"
    script.write_text(capsys.readouterr().out)
    assert sys.executable in script.read_text()
    job = slurm.submit(script, f"--export=ALL,HOME={tmp_path}")
    log = tmp_path / f"serve-{job}.log"
    slurm.wait_for(lambda: log.exists() and "http://" in log.read_text(), "the server")
    url = "http://127.0.0.1:" + re.search(r"http://[^:]+:(\d+)", log.read_text())[1]
    token_file = tmp_path / f".cache/bigbatch/serve-{job}.token"
    assert f"token: {token_file}" in log.read_text()
    assert token_file.stat().st_mode & 0o077 == 0
    asked = {"prompt": "a", "max_tokens": 3}
    assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 401
    headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"}
    assert httpx.post(f"{url}/v1/completions", json=asked, headers=headers).status_code == 200
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED", "COMPLETED", "")
    slurm.wait_for(lambda: "stopping: 0 requests" in log.read_text(), "the end")
