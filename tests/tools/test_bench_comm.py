"""What `bigbatch bench comm` measures: real processes over gloo, and bandwidths by nccl-tests' formula."""

import json
import subprocess
import sys

import pytest

from bigbatch.launcher import cli
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig
from bigbatch.tools.bench_comm import SIZES, bus_bandwidth

DOCUMENT = {
    "version": 1,
    "recipe": "gpt",
    "model": {"family": "gpt2", "num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 16},
    "batch": {"global_size": 6, "micro_size": 1},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "parallel": {"sync": "local_sgd", "local_sgd": {"every_steps": 5}},
    "schedule": {"total_steps": 10},
}


def test_bus_bandwidth_is_that_of_nccl_tests():
    # 1 GB in a second over 4 ranks: an all-reduce moves 2 x 3/4 of it over each link, a broadcast all of it once.
    assert bus_bandwidth("all_reduce", 10**9, 1.0, 4) == pytest.approx(1.5)
    assert bus_bandwidth("sharded", 10**9, 2.0, 4) == pytest.approx(0.75)
    assert bus_bandwidth("broadcast", 10**9, 1.0, 4) == pytest.approx(1.0)


def test_three_ranks_are_measured_strategy_by_strategy_and_as_a_share_of_a_step(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog\n" * 30)
    data = {"train": [str(tmp_path / "text.txt")], "tokenizer": {"kind": "character"}, "sequence_length": 16}
    document = {**DOCUMENT, "data": data | {"prepared_dir": str(tmp_path / "prepared")}}
    (tmp_path / "run.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "bigbatch.launcher.cli", "bench", "comm", str(tmp_path / "run.json")]
    result = subprocess.run(
        [*command, "--ranks", "3", "--rounds", "2", "--json"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert (measured["ranks"], measured["backend"], measured["rounds"]) == (3, "gloo", 2)
    strategies = ["all_reduce", "sharded", "broadcast", "local_sgd"]
    assert [(row["strategy"], row["bytes"]) for row in measured["transfers"]] == [
        (name, size) for size in SIZES for name in strategies
    ]
    for row in measured["transfers"]:
        factor = 1 if row["strategy"] == "broadcast" else 4 / 3
        expected = factor * row["bytes"] / row["seconds"] / 1e9
        assert row["bus_gigabytes_per_second"] == pytest.approx(expected)
        assert 0 < row["seconds"] < 10
    config = GptConfig.model_validate_json(json.dumps(document))
    facts = {"vocabulary_size": recipe.open_data(config).facts["vocabulary_size"]}
    parameters = sum(parameter.numel() for parameter in recipe.build_model(config, facts).parameters())
    assert measured["parameters"] == parameters
    sizes = {"all_reduce": 2 * parameters, "sharded": 2 * parameters, "local_sgd": 4 * parameters}  # bf16, float32
    assert {row["strategy"]: row["bytes"] for row in measured["shares"]} == sizes
    for row in measured["shares"]:
        assert row["share"] == pytest.approx(row["seconds"] / (row["seconds"] + measured["step_seconds"]))
    seconds = {row["strategy"]: row["seconds"] for row in measured["shares"]}
    assert seconds["local_sgd"] < seconds["all_reduce"]


def test_ranks_that_cannot_be_are_told_before_anything_starts(capsys):
    assert cli.main(["bench", "comm", "--ranks", "1"]) == 2
    assert "--ranks: found 1; communication takes 2 or more" in capsys.readouterr().err
    assert cli.main(["bench", "train", "--ranks", "2"]) == 2
    assert "--ranks: found 2; bench train takes one rank, only bench comm several" in capsys.readouterr().err
    assert cli.main(["bench", "comm", "--ranks", "3"]) == 2  # its batch is 16
    assert "batch.global_size: 16 samples do not divide over 3 data ranks" in capsys.readouterr().err
