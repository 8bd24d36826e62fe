"""Models that transformers has no class for: what convert makes of them does all that the run did, without the run."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bigbatch.launcher import cli
from bigbatch.launcher.preflight import check_run
from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.errors import UserError
from bigbatch.tools import convert as tool
from bigbatch.tools.convert import OWN, convert
from bigbatch.tools.judge import judge
from bigbatch.tools.opened import open_model
from bigbatch.tools.prune import main as prune
from bigbatch.tools.search import main as search
from bigbatch.tools.serving.opening import open_served

TEXTS = ["the old rose near the hedge", "two kettle behind butter the", "In 1830 Ada lives in Bern again."]
MARKED = ["In 1830 <e1>Ada</e1> lives in <e2>Bern</e2> again.", "<e1>Bo Lin</e1> left <e2>Oslo</e2>."]
PAIRS = [{"left": "red rose", "right": "a red rose"}, {"left": "old oven", "right": "Near the wall it is blue."}]
SENTENCES = ["The rose is red.", "In all, we found that a lawn stands at home.", "The desk is old at home."]
RATED = [{"source": "a1 a1", "translation": "a1"}, {"source": "a7 a7", "translation": "a7 a7 a7"}]
PRUNING = ("--method", "magnitude", "--ratio", "0.3", "--no-measure")
INPUTS = {
    "classify_attention": TEXTS,
    "classify_rnn": TEXTS,
    "classify_mean": TEXTS,
    "entities_words": TEXTS,
    "entities_crf": TEXTS,
    "relations_words": MARKED,
    "match_words": PAIRS,
    "next_word": TEXTS,
    "next_word_ngram": ["the old", "a narrow road", ""],
    "summarize_layers": [{"document": SENTENCES}],
    "translate_quality": RATED,
}


@contextlib.contextmanager
def without(run):
    """Have a run folder, and the prepared data in it, away for a while."""
    away = run.rename(run.with_name("away"))
    try:
        yield
    finally:
        away.rename(run)


def predict(model, inputs):
    """Return what an opened model says of its inputs."""
    return model.recipe.predictor(model.config, model.facts, model.model)(inputs)


@pytest.mark.parametrize("kind", INPUTS)
def test_the_folder_alone_predicts_and_serves_what_the_run_does_bit_for_bit(tiny_folder, kind):
    run, folder = tiny_folder(kind)
    expected = predict(open_model(run), INPUTS[kind])
    assert any(one != expected[0] for one in expected[1:]) or len(expected) == 1
    with without(run):
        opened = open_model(folder, must_predict=True)
        assert predict(opened, INPUTS[kind]) == expected
        assert open_served(folder).predict(INPUTS[kind]) == expected
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == f"bigbatch_{opened.recipe_name}"
    record = json.loads((folder / "conversion.json").read_text())
    assert (record["parity"]["largest_difference"], record["parity"]["model"]) == (0, OWN)
    assert record["parity"]["largest_logit"] > 0.01


@pytest.mark.parametrize("kind", INPUTS)
def test_the_folder_is_evaluated_as_the_run_is(tiny_folder, kind):
    run, folder = tiny_folder(kind)
    right, found = judge(run, "validation"), judge(folder, "validation")
    assert {**found, "model": ""} == {**right, "model": ""}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_rounded_as_is_asked_for(tiny_folder, dtype, tmp_path):
    run, folder = tiny_folder("classify_rnn")
    parity = convert(run, tmp_path / "out", dtype)
    assert (parity.largest_difference, parity.unit, parity.model) == (0, "tokens", OWN)
    whole, rounded = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert whole.keys() == rounded.keys()
    assert all(torch.equal(tensor.to(kind), rounded[name]) for name, tensor in whole.items())
    assert predict(open_model(tmp_path / "out"), TEXTS) != predict(open_model(run), TEXTS)


@pytest.mark.parametrize(
    ("kind", "verb", "flags"),
    [
        ("entities_words", "quantize", ["--method", "int8_dynamic"]),
        ("next_word", "prune", PRUNING),
        ("match_words", "export", ["--format", "onnx"]),
        ("translate_quality", "export", ["--format", "gguf"]),
    ],
)
@pytest.mark.parametrize("of_run", [True, False])
def test_what_needs_a_class_of_transformers_is_refused_in_one_line(
    tiny_folder, kind, verb, flags, of_run, tmp_path, capsys
):
    run, folder = tiny_folder(kind)
    model, out = run if of_run else folder, tmp_path / "new" / "out"
    assert cli.main([verb, str(model), str(out), "--no-measure", *flags]) == 2
    shown = capsys.readouterr()
    name = recipes.of_folder(folder)
    assert shown.err.splitlines()[-1] == (
        f"error: {model}: holds a {name} model that transformers has no class for, which {verb} needs; "
        "right is predict, evaluate or serve, as it is"
    )
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_speech_model_is_told_how_it_is_exported(tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"which prune needs; right is bigbatch export --format onnx"):
        prune([str(tiny_folder("transcribe")[1]), str(tmp_path / "out"), *PRUNING])
    assert list(tmp_path.iterdir()) == []


def test_search_finds_with_the_folder_of_a_bag_of_words_alone(tiny_folder, tmp_path, capsys):
    run, folder = tiny_folder("match_words")
    (tmp_path / "documents.txt").write_text("red rose\nold oven\ngreen lawn\n")
    told = ["old oven", "--documents", str(tmp_path / "documents.txt"), "--by", "model"]
    assert search([str(run), *told]) == 0
    expected = capsys.readouterr().out
    assert json.loads(expected)["hits"][0]["text"] == "old oven"
    with without(run):
        assert search([str(folder), *told]) == 0
        assert capsys.readouterr().out == expected
        with pytest.raises(UserError, match="holds a model of the recipe 'match'; right is one of 'classify'"):
            open_model(folder, recipe_name="classify")
        with pytest.raises(UserError, match="--documents: is missing: a model folder holds none"):
            search([str(folder), "old oven"])


def changed(folder, to, name, **settings):
    """Copy a folder and change settings of one of its JSON files."""
    shutil.copytree(folder, to)
    found = json.loads((to / name).read_text())
    (to / name).write_text(json.dumps({**found, **settings}))
    return to


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("config.json", {"model_type": "bigbatch_nothing"}, "there is no recipe 'nothing'; there are: bert_pretrain"),
        ("config.json", {"model_type": "bigbatch_match"}, "holds a model of the recipe 'classify'; right is one of"),
        ("config.json", {"quantization_config": {"a": 1}}, "is quantized, though transformers has no class for it"),
        ("conversion.json", {"facts": None}, "describe no model .TypeError"),
        ("conversion.json", {"run": {}}, "describe no model .KeyError: 'recipe'"),
        ("conversion.json", {"facts": {"labels": ["a"], "vocabulary_size": "x"}}, "do not belong together .TypeError"),
        ("conversion.json", {"facts": {"labels": ["a"], "vocabulary_size": 10**9}}, "but the weights are"),
    ],
)
def test_a_folder_that_says_what_cannot_be_is_refused(tiny_folder, name, settings, message, tmp_path):
    folder = changed(tiny_folder("classify_rnn")[1], tmp_path / "folder", name, **settings)
    with pytest.raises(UserError, match=message):
        open_model(folder)


def test_a_folder_in_a_form_that_none_has_or_without_its_record_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("next_word")[1], tmp_path / "folder")
    (folder / "deployment.json").write_text('{"format": "onnx"}')
    with pytest.raises(UserError, match="is in the form of onnx, though transformers has no class for it"):
        open_model(folder)
    (folder / "deployment.json").unlink()
    (folder / "conversion.json").unlink()
    with pytest.raises(UserError, match=r"describe no model .FileNotFoundError"):
        open_model(folder)


def test_counts_of_ngrams_that_have_gone_or_changed_are_told(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("next_word_ngram")[1], tmp_path / "folder")
    (tables,) = folder.glob("ngrams_3_*")
    found = json.loads((tables / "ngrams.json").read_text())
    (tables / "ngrams.json").write_text(json.dumps({**found, "text": "another"}))
    with pytest.raises(UserError, match="holds other counts than those that the run was trained with"):
        predict(open_model(folder), ["the old"])
    shutil.rmtree(tables)
    with pytest.raises(UserError, match="holds no counts of n-grams"):
        predict(open_model(folder), ["the old"])


def test_a_weight_that_changes_on_the_way_is_found(tiny_folder, tmp_path, monkeypatch):
    original = tool._parts
    monkeypatch.setattr(tool, "_parts", lambda *arguments: (part * 1.01 for part in original(*arguments)))
    with pytest.raises(UserError, match="not written: logits differ from this project's own by"):
        convert(tiny_folder("summarize_layers")[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["classify_mean", "entities_crf", "summarize_layers", "translate_quality"])
def test_training_starts_from_the_folder_as_from_the_run(tiny_folder, kind, tmp_path):
    run, folder = tiny_folder(kind)
    document = json.loads((run / "run.json").read_text())
    document["data"]["prepared_dir"] = str(tmp_path / "prepared")
    del document["data"]["tokenizer"]
    shape = "shape" if kind == "translate_quality" else "encoder"
    document["model"] |= {shape: None} | ({"keep_head": True} if shape == "encoder" else {})
    begun = []
    for start in (run, folder):
        document["model"]["initialize_from"] = str(start)
        (tmp_path / "run.json").write_text(json.dumps(document))
        found = check_run(str(tmp_path / "run.json"), [], 1, tmp_path / "runs")
        assert not [one for one in found if one.severity == "error"]
        recipe = recipes.find(document["recipe"])
        config = recipes.read_config(document, "")
        recipe.prepare(config)
        torch.manual_seed(0)
        facts = recipe.open_data(config).facts
        begun.append(recipe.build_model(config, facts).state_dict())
        shutil.rmtree(tmp_path / "prepared")
    assert begun[0].keys() == begun[1].keys()
    assert all(torch.equal(tensor, begun[1][name]) for name, tensor in begun[0].items())


def test_a_folder_without_what_is_needed_is_no_start(tiny_folder, tmp_path):
    for name, kind in (("match", "match_bi"), ("translate", "translate")):
        document = json.loads((tiny_folder(kind)[0] / "run.json").read_text())
        document["model"] |= {"shape" if name == "translate" else "encoder": None}
        document["model"]["initialize_from"] = str(tiny_folder("classify_rnn")[1])
        del document["data"]["tokenizer"]
        with pytest.raises(UserError, match="is a model of the recipe 'classify', which has no encoder"):
            recipes.find(name).prepare(recipes.read_config(document, ""))
