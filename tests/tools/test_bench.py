import json
import pydoc_data.topics
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from bigbatch.launcher import cli
from bigbatch.recipes.core.models.decoder import hugging_face_config, hugging_face_state
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig
from bigbatch.tools import bench_checkpoint, bench_convert
from bigbatch.tools.bench import Work, summarize

WORK = Work(samples_per_step=16, tokens_per_sample=256, flops_per_sample=5e9, peak_flops=1e12)


def test_figures_are_medians_over_steps_and_ratios_of_the_rounds_medians():
    seconds = {
        "ours": [[0.2, 0.1, 0.9], [0.4, 0.4, 0.4]],  # medians of the rounds 0.2 and 0.4
        "theirs": [[0.3, 0.3, 7.0], [1.0, 0.8, 0.6]],  # 0.3 and 0.8
    }
    ours, theirs = summarize(seconds, {"ours": 2.5, "theirs": 2.6}, WORK)
    assert (ours.name, ours.loss, ours.ratio) == ("ours", 2.5, 1.0)
    assert ours.step_seconds == pytest.approx(0.4)  # of 0.1 0.2 0.4 0.4 0.4 0.9
    assert ours.tokens_per_second == pytest.approx(16 * 256 / 0.4)
    assert ours.model_flops_utilization == pytest.approx(16 / 0.4 * 5e9 / 1e12)
    assert theirs.step_seconds == pytest.approx(0.7)  # of 0.3 0.3 0.6 0.8 1.0 7.0
    assert theirs.ratio == pytest.approx((0.3 / 0.2 + 0.8 / 0.4) / 2)  # not 0.7 / 0.4


def test_a_machine_that_slows_down_half_way_changes_no_ratio():
    steady = {"ours": [[0.1, 0.1]] * 4, "theirs": [[0.2, 0.2]] * 4}
    slowing = {
        name: rounds[:2] + [[3 * time for time in times] for times in rounds[2:]] for name, rounds in steady.items()
    }
    losses = {"ours": 1.0, "theirs": 1.0}
    ratios = [summarize(seconds, losses, WORK)[1].ratio for seconds in (steady, slowing)]
    assert ratios == pytest.approx([2.0, 2.0])


def test_only_useful_tokens_count_where_batches_hold_padding():
    seconds = {"ours": [[0.2], [0.2]], "padded": [[0.4], [0.4]]}
    ours, padded = summarize(seconds, {"ours": 1.0, "padded": 1.0}, WORK, {"padded": 1024.0})  # a quarter
    assert padded.tokens_per_second == pytest.approx(1024 / 0.4)
    assert padded.ratio == pytest.approx(2 * 4)
    assert padded.model_flops_utilization == pytest.approx(ours.model_flops_utilization / 8)


@pytest.fixture
def document(tmp_path):
    """Write a run document of a tiny GPT far from uniform guesses, whose batch is the whole training set."""
    (tmp_path / "text.txt").write_text(pydoc_data.topics.topics["for"][:3000])
    content = {
        "version": 1,
        "recipe": "gpt",
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "initializer_range": 0.3},
        "data": {
            "train": [str(tmp_path / "text.txt")],
            "prepared_dir": str(tmp_path / "prepared"),
            "tokenizer": {"kind": "character"},
            "sequence_length": 64,
        },
        "batch": {"global_size": 1},
        "optimizer": {"learning_rate": 1e-12},  # the weights stay what they were at first
        "schedule": {"name": "constant", "total_steps": 100},
        "sample": {"prompts": ["for"]},
    }
    config = GptConfig.model_validate_json(json.dumps(content))
    recipe.prepare(config)
    content["batch"]["global_size"] = recipe.open_data(config).train.num_samples
    (tmp_path / "tiny.json").write_text(json.dumps(content))
    return tmp_path / "tiny.json"


def first_losses(document, seed):
    """Return the loss of transformers' own model on all samples: with all next tokens, and with those of the sample."""
    config = GptConfig.model_validate_json(document.read_text())
    data = recipe.open_data(config)
    torch.manual_seed(seed)
    model = recipe.build_model(config, data.facts)
    settings = transformers.AutoConfig.for_model(**hugging_face_config(config.model, model.vocabulary_size))
    twin = transformers.AutoModelForCausalLM.from_config(settings).eval()
    twin.load_state_dict(hugging_face_state(model), strict=False)
    ids = np.arange(data.train.num_samples)
    batch = data.train.batch(ids, np.zeros_like(ids))
    with torch.no_grad():
        logits = twin(torch.from_numpy(batch["tokens"].copy())).logits
        losses = F.cross_entropy(logits.transpose(1, 2), torch.from_numpy(batch["labels"].copy()), reduction="none")
    return losses.mean().item(), losses[:, :-1].mean().item()


def test_all_trainers_start_from_the_loss_of_one_and_the_same_model(document):
    command = [sys.executable, "-m", "bigbatch.launcher.cli", "bench", "train", str(document)]
    command += ["--rounds", "2", "--steps", "1", "--json", "--set", "seed=7"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert (measured["rounds"], measured["steps"], measured["dtype"]) == (2, 1, "bf16")
    assert measured["tokens_per_sample"] == 64
    losses = {row["name"]: row["loss"] for row in measured["results"]}
    assert list(losses) == ["bigbatch", "transformers Trainer", "plain torch loop"]
    ours, theirs = first_losses(document, seed=7)
    bf16_noise = 3e-3
    assert losses["bigbatch"] == pytest.approx(ours, rel=bf16_noise)
    # The others leave out the token that follows a sample; the Trainer counts it all the same when it divides.
    assert losses["plain torch loop"] == pytest.approx(theirs, rel=bf16_noise)
    assert losses["transformers Trainer"] == pytest.approx(theirs * 63 / 64, rel=bf16_noise)
    assert first_losses(document, seed=8)[0] != pytest.approx(ours, rel=3 * bf16_noise)  # another model's is another
    for row in measured["results"]:
        assert row["tokens_per_second"] == pytest.approx(measured["samples_per_step"] * 64 / row["step_seconds"])


def test_a_benchmark_of_what_cannot_run_is_refused_before_anything_starts(document, capsys):
    assert cli.main(["bench", "train", str(document), "--set", "model.num_heads=5"]) == 2
    assert "hidden_size 32 is not a multiple of num_heads 5" in capsys.readouterr().err
    for what in ("train", "checkpoint", "comm"):
        for axis in ("tensor", "pipeline"):
            assert cli.main(["bench", what, str(document), "--set", f"parallel.{axis}=2"]) == 2
            assert f"error: parallel.{axis}: found 2; bench {what} measures a model" in capsys.readouterr().err
    assert cli.main(["bench", "train", str(document), "--rounds", "0"]) == 2
    assert "found '0'; right is a number from 1 on" in capsys.readouterr().err
    assert cli.main(["bench", "sleep"]) == 2
    assert "invalid choice: 'sleep'" in capsys.readouterr().err


def test_saves_are_measured_in_turns_of_a_run_whose_data_are_not_there(document, tmp_path):
    content = json.loads(document.read_text())
    content["data"] |= {"prepared_dir": str(tmp_path / "empty"), "tokenizer": {"kind": "bpe", "vocabulary_size": 300}}
    content["data"]["train"] = [str(tmp_path / "no such file.txt")]
    document.write_text(json.dumps(content))
    command = [sys.executable, "-m", "bigbatch.launcher.cli", "bench", "checkpoint", str(document)]
    result = subprocess.run([*command, "--rounds", "2", "--json"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    decoder = recipe.build_model(GptConfig.model_validate_json(document.read_text()), {"vocabulary_size": 300})
    assert measured["bytes"] == 12 * sum(parameter.numel() for parameter in decoder.parameters())
    seconds = measured["seconds"]
    assert len(seconds) == 7
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    parts = (seconds[name] for name in (bench_checkpoint.STALL, bench_checkpoint.COPIED, bench_checkpoint.BEHIND))
    assert all(stall < copied < whole for stall, copied, whole in zip(*parts, strict=True))
    for row in measured["ratios"]:
        a, b = (np.array(seconds[row[side]]) for side in ("name", "over"))
        assert row["ratio"] == pytest.approx(np.median(a / b))


def test_converters_are_compared_by_what_lies_above_the_bare_interpreter():
    turns = {
        "convert": [bench_convert.Turn(2.0, 1100), bench_convert.Turn(3.0, 1400)],
        "zero_to_fp32": [bench_convert.Turn(4.0, 2000), bench_convert.Turn(12.0, 2000)],
    }
    ours = bench_convert.summarize(turns, bare_bytes=1000)["convert"]
    assert ours == {"peak_bytes": 250, "seconds": 2.5, "peak_ratio": 0.25, "seconds_ratio": 0.375}


@pytest.mark.slow
def test_both_converters_run_and_are_measured(document, capsys):
    assert cli.main(["bench", "convert", str(document), "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["results"]) == 5
    assert found["bare_bytes"] > 100e6
    assert all(own["peak_bytes"] > 0 and own["seconds"] > 0 for own in found["results"].values())
