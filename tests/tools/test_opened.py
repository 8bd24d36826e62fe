"""Every kind of model, opened from a run, from the folder it becomes, and behind a session over that folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.recipes.core.recipe import Outputs
from bigbatch.tools.opened import Opened, open_model, open_session

KINDS = ("classify", "question_answering", "entities", "relations", "match_bi", "match_cross", "translate")
KINDS += ("summarize", "summarize_written", "classify_images", "dialogue", "gpt_llama", "gpt_gpt2")


def in_session(model: Opened) -> Opened:
    """Return the same model, run by transformers behind what stands in for it."""
    return model._replace(model=model.recipe.foreign(model.config, model.facts, open_session(model.path)).eval())


def outputs_of(model: Opened, native: Opened) -> Outputs:
    """Return the outputs on the validation samples of the run that the native model is of, all in one batch."""
    samples = native.recipe.open_data(native.config).validation
    ids = np.arange(samples.num_samples)
    batch = {name: torch.from_numpy(array) for name, array in samples.batch(ids, np.zeros_like(ids)).items()}
    run = recipes.further(native.recipe, "outputs") or (lambda m, b: Outputs(native.recipe.loss(m, b), {}))
    with torch.no_grad():
        return run(model.model, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_gives_what_the_native_model_gives_on_rows_of_several_texts(tiny_folder, kind):
    run, converted = tiny_folder(kind)
    native, opened = open_model(run), open_model(converted)
    right = outputs_of(native, native)
    assert outputs_of(opened, native).loss.sum.item() == pytest.approx(right.loss.sum.item(), rel=1e-6)
    found = outputs_of(in_session(opened), native)
    assert found.loss.num_targets == right.loss.num_targets
    assert found.loss.sum.item() == pytest.approx(right.loss.sum.item(), rel=1e-5)
    assert right.arrays or kind in ("translate", "summarize_written", "dialogue", "gpt_llama", "gpt_gpt2")
    for name, array in right.arrays.items():
        np.testing.assert_allclose(found.arrays[name], array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_llama", "gpt_gpt2"])
def test_a_session_writes_what_the_native_model_writes(tiny_folder, kind):
    opened = open_model(tiny_folder(kind)[1])
    prompts = [[5, 6, 7, 8, 9], [3], [50, 60, 70, 80]]
    for sampling in (
        Sampling(max_new_tokens=30, temperature=0.0),
        Sampling(max_new_tokens=70, temperature=1.0, num_samples=2, seed=3),  # past the last position
    ):
        expected = generate(opened.model, prompts, sampling)
        assert generate(in_session(opened).model, prompts, sampling) == expected


def test_generate_writes_with_a_folder_that_was_deployed(tiny_folder, tmp_path, capsys):
    from bigbatch.tools.generate import main

    converted = shutil.copytree(tiny_folder("gpt_llama")[1], tmp_path / "model")
    asked = ["--prompt", "The old", "--temperature", "0", "--max-new-tokens", "12"]
    assert main([str(converted), *asked]) == 0
    written = capsys.readouterr().out
    (converted / "deployment.json").write_text('{"format": "transformers", "rungs": []}')
    assert main([str(converted), *asked]) == 0
    assert capsys.readouterr().out == written
    classifier = shutil.copytree(tiny_folder("classify")[1], tmp_path / "classifier")
    (classifier / "deployment.json").write_text('{"format": "transformers", "rungs": []}')
    with pytest.raises(UserError, match="is a model of the recipe 'classify', which generates no text"):
        main([str(classifier), *asked])


@pytest.mark.parametrize("kind", ["translate", "summarize_written", "dialogue"])
def test_figures_of_what_is_written_are_the_same_behind_a_session(tiny_folder, kind):
    run, converted = tiny_folder(kind)
    native = open_model(run)
    samples = native.recipe.open_data(native.config).validation
    found = in_session(native._replace(path=converted))
    assert type(found.model) is not type(native.model)
    right = native.recipe.generated_figures(native.config, native.facts, native.model, samples)
    assert native.recipe.generated_figures(native.config, native.facts, found.model, samples) == right
    assert len(right) > 2


def test_a_folder_that_says_another_format_is_run_by_its_engine(tiny_folder, tmp_path):
    converted = shutil.copytree(tiny_folder("classify")[1], tmp_path / "model")
    (converted / "deployment.json").write_text('{"format": "tensorrt"}')
    with pytest.raises(UserError, match=r"format is 'tensorrt'; right is one of transformers, onnx, litert"):
        open_model(converted)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lead_outside(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def change_config(**settings):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


def change_record(**settings):
    def change(folder):
        record = json.loads((folder / "conversion.json").read_text())
        (folder / "conversion.json").write_text(json.dumps(record | settings))

    return change


def change_weights(change):
    def changed(folder):
        tensors = {name: change(one).contiguous() for name, one in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors")

    return changed


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model.safetensors: is damaged, or no safetensors file"),
        (pickle_weights, r"weights in pytorch_model.bin, a pickle, which may run code; right is model.safetensors"),
        (lead_outside, r"names the file '../../secret.safetensors', which does not lie in the folder"),
        (put("model.safetensors.index.json", '{"weight_map": [1]}'), r"has no weight_map"),
        (put("deployment.json", '{"format": ["onnx"]}'), r"format is \['onnx'\]; right"),
        (put("deployment.json", '{"format": "litert"}'), r"deployment.json: has no 'file': it is of no litert model"),
        (change_config(auto_map={"AutoModel": "evil.Model"}), r"has 'auto_map', which asks for code of its own"),
        (change_config(architectures=["NoSuchModel"]), r"holds NoSuchModel, which no recipe predicts with"),
        (put("config.json", "[1]"), r"config.json: holds a list, not an object"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights; right is model.safetensors"),
        (change_record(run=[]), r"conversion.json: run is a list, not an object"),
        (change_record(run={"data": {"evil": 1}}), r"describe no model \(data\.\w+: "),
        (put("conversion.json", "{"), r"conversion.json: cannot be read"),
        (change_config(id2label=7), r"describe no model \(TypeError"),
        (change_config(vocab_size="many"), r"config.json: vocab_size is 'many'; right is a whole number above 0"),
        (change_config(hidden_size=None), r"hidden_size is None; right is a whole number above 0"),
        (change_config(vocab_size=-1), r"vocab_size is -1; right"),
        (change_config(dtype="float7"), r"dtype is 'float7'; right is one of float32, bfloat16, float16"),
        (change_config(architectures=[3]), r"architectures is \[3\]; right is a list of names"),
        (change_config(model_type=["bert"]), r"model_type is \['bert'\]; right is a name"),
        (change_config(model_type="nosuch"), r"model_type is 'nosuch', which transformers [0-9.]+ does not know"),
        (put("config.json", "[" * 100_000), r"config.json: cannot be read as JSON \(maximum recursion"),
        (
            change_weights(lambda tensor: tensor.fill_(torch.nan)),
            r"tensor '.*' holds [0-9,]+ values that are infinite or",
        ),
        (change_weights(lambda tensor: tensor.to(torch.int8)), r"tensor '.*' is torch.int8; right are floating-point"),
        (change_weights(lambda tensor: tensor[..., :-1]), r"tensor '.*' is \(.*\), the model needs"),
        (change_config(hidden_size=10**9), r"hidden_size is 1,000,000,000, but the weights are 41 tensors of"),
        (change_config(num_hidden_layers=10**7), r"num_hidden_layers is 10,000,000, but the weights are 41 tensors"),
        (change_config(hidden_size=16_000, intermediate_size=16_000), r"describes a model of [0-9,]+ numbers, but the"),
        (lose_a_tensor, r"lacks 'bert.pooler.dense.bias'"),
    ],
)
def test_a_hostile_or_damaged_folder_is_refused_in_one_line(tiny_folder, tmp_path, damage, message):
    converted = shutil.copytree(tiny_folder("classify")[1], tmp_path / "model")
    if "NoSuchModel" in message:
        (converted / "conversion.json").unlink()
    damage(converted)
    with pytest.raises(UserError, match=message) as refused:
        open_model(converted)
    assert "\n" not in str(refused.value)


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "file.txt").write_text("text")
    for path, message in (
        (tmp_path / "gone", "there is no such folder"),
        (tmp_path / "file.txt", "is no folder"),
        (tmp_path, "no model that can be opened"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(path)
