import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigbatch.launcher import cli
from bigbatch.recipes.core.errors import UserError
from bigbatch.tools import measure, opened
from bigbatch.tools.quantize import main


def quantize(model, out, *arguments):
    return main([str(model), str(out), "--no-measure", "--calibration-samples", "8", *arguments])


def loss_of(model):
    """Return the mean loss of the first training samples by the recipe's own code."""
    whole = opened.open_model(model)
    _, _, samples = measure.open_samples(whole, measure.Options(split="train"))
    ids = np.arange(8)
    batch = {name: torch.from_numpy(array) for name, array in samples.batch(ids, np.zeros_like(ids)).items()}
    with torch.inference_mode():
        found = whole.recipe.loss(whole.model, batch)
    return float(found.sum) / found.num_targets


def record_of(folder):
    return json.loads((folder / "deployment.json").read_text())["rungs"][-1]["record"]


@pytest.mark.parametrize("kind", ["gpt_gpt2", "entities", "translate", "classify_images"])
def test_each_kind_of_model_is_quantized_and_judged_by_its_recipe(tiny_folder, kind, tmp_path):
    run, folder = tiny_folder(kind)
    assert quantize(folder, tmp_path / "out", "--method", "int8_weight") == 0
    assert loss_of(tmp_path / "out") == pytest.approx(loss_of(run), rel=0.02)


@pytest.mark.parametrize("method", ["int4_weight", "fp8"])
def test_an_encoder_decoder_in_vllms_format_writes_as_it_did(tiny_folder, method, tmp_path):
    _, folder = tiny_folder("translate")
    assert quantize(folder, tmp_path / "out", "--method", method) == 0
    whole, small = opened.open_model(folder), opened.open_model(tmp_path / "out")
    _, _, samples = measure.open_samples(whole, measure.Options())
    before, after = (one.recipe.generated_figures(one.config, one.facts, one.model, samples) for one in (whole, small))
    assert before.keys() == after.keys() and len(after) > 2


def test_the_worst_layers_stay_and_all_is_recorded(tiny_folder, tmp_path, capsys):
    run, _ = tiny_folder("gpt_llama")
    arguments = ("--method", "int4_weight", "--sensitivity", "--keep-worst", "1", "--keep", "*.0.mlp.down_proj")
    assert quantize(run, tmp_path / "out", *arguments) == 0
    told = capsys.readouterr().err
    assert "made for vLLM on GPUs" in told
    record = record_of(tmp_path / "out")
    worst = record["sensitivity"][0]
    header = next(line for line in told.splitlines() if line.startswith("layer "))
    assert told.split(header)[1].strip().startswith(worst["layer"])
    assert {worst["layer"], "model.layers.0.mlp.down_proj"} <= set(record["kept_layers"])
    assert record["quantized_layers"] == 14 - len(record["kept_layers"])
    assert record["group_size"] == 32 and record["method"] == "int4_weight"
    with pytest.raises(UserError, match="is quantized already; right is the folder that it was made from"):
        quantize(tmp_path / "out", tmp_path / "twice", "--method", "nf4")


def test_the_rest_is_stored_in_half_as_many_bytes_where_asked_for(tiny_folder, tmp_path):
    run, folder = tiny_folder("gpt_gpt2")
    assert quantize(folder, tmp_path / "out", "--method", "int4_weight", "--dtype", "bf16") == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} <= {torch.bfloat16, torch.int32, torch.int64}
    assert loss_of(tmp_path / "out") == pytest.approx(loss_of(run), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq_w4a16", "awq_w4a16", "smoothquant_w8a8"])
@pytest.mark.parametrize("kind", ["gpt_llama", "gpt_gpt2", "classify_images", "translate", "entities"])
def test_llmcompressor_calibrates_what_it_can(tiny_folder, kind, method, tmp_path):
    run, folder = tiny_folder(kind)
    arguments = (folder, tmp_path / "out", "--method", method, "--keep-worst", "1")
    if kind in ("translate", "entities") and method != "gptq_w4a16":
        with pytest.raises(UserError, match=f"{method} moves scales into the norms ahead of layers"):
            quantize(*arguments)
        return
    assert quantize(*arguments) == 0
    assert loss_of(tmp_path / "out") == pytest.approx(loss_of(run), rel=0.2)
    assert record_of(tmp_path / "out")["calibration_samples"] >= 8


def test_a_tensor_that_is_not_there_is_missed_and_not_drawn_at_random(tiny_folder, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder("classify")[1], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["bert.embeddings.position_embeddings.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 'bert\.embeddings\.position_embeddings\.weight', one of 1"):
        quantize(folder, tmp_path / "out", "--method", "int8_weight")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--method", "int3"),
            "invalid choice: 'int3' (choose from 'int8_dynamic', 'int8_weight', 'int4_weight', 'nf4'",
        ),
        (("--method", "nf4", "--group-size", "32"), "--group-size: has no effect on nf4"),
        (("--method", "int8_weight", "--keep", "*"), "--keep: leaves none of 13 layers"),
        (("--method", "awq_w4a16"), "is a 'bert'; awq_w4a16 moves scales into the norms ahead of layers"),
        (("--method", "gptq_w4a16", "--calibration-samples", "4"), "--calibration-samples: found 4"),
        (("--method", "gptq_w4a16", "--calibration-samples", "4000"), "--calibration-samples: found 4000"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(tiny_folder, arguments, said, tmp_path, capsys):
    folder = tiny_folder("classify")[1]
    arguments = ("quantize", str(folder), str(tmp_path / "out"), "--no-measure", *arguments)
    assert cli.main(list(arguments)) == 2
    told = capsys.readouterr().err
    assert said.replace("'", "") in told.splitlines()[-1].replace("'", "")
    assert not list(tmp_path.iterdir())
