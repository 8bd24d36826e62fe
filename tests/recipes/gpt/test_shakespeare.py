"""The run document gpt/shakespeare_char on the real text."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from bigbatch.launcher.resolve import resolve

TEXT = "tinyshakespeare/input.txt"


def final_evaluation(run_dir: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "evaluation"][-1]


def entropy(text: str) -> float:
    """Return the entropy of a text's characters in nats: the loss of the best guess that looks at no context."""
    return -sum(count / len(text) * math.log(count / len(text)) for count in Counter(text).values())


def test_in_forty_steps_a_small_model_uses_more_than_the_frequency_of_characters(bigbatch, shakespeare, tmp_path):
    small = {
        "model.num_layers": 2,
        "model.hidden_size": 128,
        "data.sequence_length": 64,
        "batch.global_size": 32,
        "precision.dtype": '"fp32"',
        "optimizer.learning_rate": 0.005,
        "schedule.total_steps": 40,
        "schedule.warmup_steps": 3,
        "evaluate.max_samples": 200,
        "sample.prompts": "[]",
    }
    changes = [argument for key, value in small.items() for argument in ("--set", f"{key}={value}")]
    bigbatch(tmp_path, "train", "gpt/shakespeare_char", "--run-dir", "run", *changes, BIGBATCH_DATA=str(shakespeare))
    evaluation = final_evaluation(tmp_path / "run")
    text = (shakespeare / TEXT).read_text()
    validation = text[int(0.9 * len(text)) :][: 200 * 64]
    assert evaluation["step"] == 40
    assert evaluation["loss"] < entropy(validation) - 0.2


@pytest.mark.slow
def test_the_whole_run_reaches_the_loss_that_its_document_promises(bigbatch, shakespeare, tmp_path):
    arguments = ("train", "gpt/shakespeare_char", "--run-dir", "run", "--ranks", "2")
    bigbatch(tmp_path, *arguments, BIGBATCH_DATA=str(shakespeare))
    evaluation = final_evaluation(tmp_path / "run")
    assert evaluation["step"] == resolve("gpt/shakespeare_char").config.schedule.total_steps
    assert evaluation["loss"] < 1.60
