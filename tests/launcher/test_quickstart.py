"""The quick start, whole: what `python3 launcher quickstart` does once everything is installed."""

import json
import os
import subprocess
import sys

import pytest

from bigbatch.launcher.resolve import resolve


@pytest.mark.slow
def test_the_quick_start_goes_the_whole_way_in_five_minutes(tmp_path):
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "quickstart"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, timeout=900, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    run_dir = tmp_path / "runs/quickstart"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows if row.get("event") in ("started", "resumed")] == ["started", "resumed"]
    assert rows[-1]["step"] == resolve("gpt/quick").config.schedule.total_steps
    losses = [row["loss"] for row in rows if row["kind"] == "evaluation"]
    assert losses[-1] < losses[0]
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert (run_dir / "hugging_face/model.safetensors").exists()
    assert "\nReturn the " in ended.stdout  # the generated text is among the results
    assert "Three commands to try next" in ended.stderr
