import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools import ladder, measure, opened
from bigbatch.tools.model_card import Rung


@pytest.fixture(scope="module")
def run(tiny_folder):
    return tiny_folder("classify")[0]


def rounded(source, partial):
    weights = load_file(source.path / "model.safetensors")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(half, partial / "model.safetensors", metadata={"format": "pt"})
    return {"format": "transformers", "record": {"name": "bf16"}}


def climb(make, *arguments):
    return ladder.climb("try", ladder.rung_parser("try", "").parse_args([str(one) for one in arguments]), make)


@pytest.fixture(scope="module")
def climbed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("climbed") / "bf16"
    assert climb(rounded, run, out, "--max-drop", "50") == 0
    return out


def test_a_rung_measures_both_models_by_the_recipes_own_figure(run, climbed):
    rung = Rung.read(json.loads((climbed / "deployment.json").read_text())["rungs"][0])
    whole = opened.open_model(run)
    _, split, samples = measure.open_samples(whole, measure.Options())
    ids = np.arange(samples.num_samples)
    batch = {name: torch.from_numpy(array) for name, array in samples.batch(ids, np.zeros_like(ids)).items()}
    with torch.inference_mode():
        found = whole.recipe.outputs(whole.model, batch).arrays
    right = (found["probabilities"].argmax(-1) == found["labels"]).float().mean()
    assert rung.before.split == split and rung.before.num_samples == samples.num_samples
    assert rung.before.figures["accuracy"] == pytest.approx(float(right), abs=1e-6)
    assert rung.after.num_bytes < 0.8 * rung.before.num_bytes
    assert rung.agreement > 0.5
    assert all(0 < median <= most for median, most in rung.after.latency.values())


def test_a_folder_that_a_rung_has_made_opens_and_is_a_rung_to_stand_on(climbed, tmp_path):
    assert climb(rounded, climbed, tmp_path / "again", "--no-measure") == 0
    document = json.loads((tmp_path / "again" / "deployment.json").read_text())
    assert [rung["verb"] for rung in document["rungs"]] == ["try", "try"]
    assert document["rungs"][1]["after"] is None
    assert opened.open_model(tmp_path / "again").recipe_name == "classify"
    card = (tmp_path / "again" / "model_card.md").read_text()
    assert "bf16" in card and "<svg" in (climbed / "report.html").read_text()


def test_what_is_over_its_budget_is_not_kept_and_ends_with_3(run, tmp_path, capsys):
    assert climb(rounded, run, tmp_path / "out", "--max-size", "1KB", "--no-measure") == 3
    assert "--max-size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_ends_a_rung_leaves_nothing_behind(run, tmp_path):
    def ended(source, partial):
        os.kill(os.getpid(), signal.SIGTERM)
        return rounded(source, partial)

    with pytest.raises(KeyboardInterrupt):
        climb(ended, run, tmp_path / "out", "--no-measure")
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_a_folder_that_was_not_made_are_gone_too(run, tmp_path):
    (tmp_path / "kept").mkdir()
    out = tmp_path / "kept" / "new" / "newer" / "out"
    assert climb(rounded, run, out, "--max-size", "1KB", "--no-measure") == 3
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]
    assert climb(rounded, run, out, "--no-measure") == 0
    assert out.is_dir() and list(out.parent.iterdir()) == [out]


def test_a_place_where_nothing_can_be_made_is_told_by_its_own_name(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/out: cannot be made: Not a directory$"):
        climb(rounded, run, tmp_path / "file" / "out", "--no-measure")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28), "tokenizer.json"), RuntimeError(os.strerror(28))])
def test_a_full_disk_is_told_of_the_folder_that_was_to_be_made(run, tmp_path, error):
    def fails(source, partial):
        raise error

    with pytest.raises(UserError, match=f"^{tmp_path}/out: cannot be made: No space left on device$"):
        climb(fails, run, tmp_path / "out", "--no-measure")
    assert list(tmp_path.iterdir()) == []


def test_a_drop_counts_in_points_of_a_hundred_or_in_per_cent_of_what_is_better_when_lower(climbed):
    rung = Rung.read(json.loads((climbed / "deployment.json").read_text())["rungs"][0])

    def lost(name, before, after):
        pair = (
            one._replace(figure=measure.Figure(name, value, None, None))
            for one, value in ((rung.before, before), (rung.after, after))
        )
        return Rung(*rung[:3], *pair, None)

    for worse, told in (
        (lost("accuracy", 0.91, 0.90), "accuracy lost 1.00 points"),
        (lost("bleu", 37.5, 36.5), "bleu lost 1.00 points"),
        (lost("perplexity", 200.0, 202.0), "perplexity lost 1.00 %"),
    ):
        assert told in ladder.over_budget(worse, climbed, ladder.Budget(0.9))[0]
        assert ladder.over_budget(worse, climbed, ladder.Budget(1.1)) == []
    assert ladder.over_budget(rung, climbed, ladder.Budget(max_latency_milliseconds=0.0))


def test_mistakes_are_told_before_anything_is_made(run, climbed, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        climb(rounded, run, climbed)
    with pytest.raises(UserError, match="such as 4G"):
        climb(rounded, run, tmp_path / "out", "--max-size", "large")
    with pytest.raises(UserError, match="quality is to be measured"):
        climb(rounded, run, tmp_path / "out", "--max-drop", "1", "--no-measure")
    for flag, value in (("--max-drop", "nan"), ("--max-latency", "-1"), ("--max-latency", "inf")):
        with pytest.raises(UserError, match=f"{flag}: found .*; right is a number such as 0.5"):
            climb(rounded, run, tmp_path / "out", flag, value)
    for place, message in ((tmp_path / "gone", "there is no such folder"), (tmp_path, "has no run.json")):
        with pytest.raises(UserError, match=f"--run: {place}: {message}; right is a run folder"):
            climb(rounded, run, tmp_path / "out", "--run", place)
    shutil.copytree(climbed, tmp_path / "foreign")
    (tmp_path / "foreign" / "conversion.json").unlink()
    with pytest.raises(UserError, match="does not say what data it was trained on"):
        climb(rounded, tmp_path / "foreign", tmp_path / "out")
    shutil.rmtree(tmp_path / "foreign")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("deployment.json", {"format": "transformers", "rungs": [1]}, "deployment.json: rungs tell of no measurements"),
        ("deployment.json", {"rungs": [{"verb": "x"}], "format": "transformers"}, "rungs tell of no measurements"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "is quantized already; right is the folder"),
    ],
)
def test_a_folder_that_no_rung_can_stand_on_is_refused_before_anything_is_made(run, tmp_path, file, text, message):
    folder = tmp_path / "folder"
    shutil.copytree(run.with_name("model"), folder)
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(known | text))
    with pytest.raises(UserError, match=message):
        climb(lambda *_: pytest.fail("was made"), folder, tmp_path / "out", "--no-measure")
    assert list(tmp_path.iterdir()) == [folder]


def test_weights_that_are_no_numbers_are_no_rung_to_stand_on(run, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(run.with_name("model"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(one, torch.nan) for name, one in weights.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="values that are infinite or no number"):
        climb(rounded, folder, tmp_path / "out", "--no-measure")
    assert list(tmp_path.iterdir()) == [folder]


def test_calibration_is_a_seeded_choice_of_training_samples(run, tmp_path):
    source = ladder.open_source(run, tmp_path)
    one, same, other = (ladder.calibration(source, 8, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(one, other, strict=True))
    with pytest.raises(UserError, match="training samples are there"):
        ladder.calibration(source, 10**6, 0)


def test_the_interval_of_random_halves_is_that_of_the_closed_formula():
    answers = np.random.default_rng(1).random(2000) < 0.8
    low, high = measure._interval(len(answers), lambda rows: answers[rows].mean())
    width = 2 * 1.96 * math.sqrt(answers.mean() * (1 - answers.mean()) / len(answers))
    assert high - low == pytest.approx(width, rel=0.2)
    assert low < answers.mean() < high
