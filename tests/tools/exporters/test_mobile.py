import json
from argparse import Namespace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.engines.rows import fitting, run_rows
from bigbatch.tools.exporters import executorch_export, litert_export

LAYOUT = {"inputs": ["input_ids", "token_type_ids"], "lengths": [4, 8], "min_length": 2, "max_length": 8}
LAYOUT |= {"outputs": [{"name": "logits", "by_token": False}, {"name": "last_hidden_state", "by_token": True}]}
BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {"image_size": 16, "patch_size": 8, "num_channels": 1} | {name: BERT[name] for name in list(BERT)[1:]}
MODELS = {
    "sentences": ("BertForSequenceClassification", BERT | {"max_position_embeddings": 24, "num_labels": 3}),
    "tokens": ("BertForTokenClassification", BERT | {"max_position_embeddings": 24, "num_labels": 5}),
    "answers": ("BertForQuestionAnswering", BERT | {"max_position_embeddings": 24}),
    "states": ("BertModel", BERT | {"max_position_embeddings": 24}),
    "images": ("ViTForImageClassification", VIT | {"num_labels": 4}),
}


def save(kind, out):
    """Save a random model; return it."""
    name, settings = MODELS[kind]
    torch.manual_seed(2)
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**settings)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    model.save_pretrained(out)
    return model


def test_rows_are_padded_to_the_next_length_and_cut_back():
    lengths = []

    def call(length, inputs):
        lengths.append((length, [array.shape for array in inputs]))
        return [inputs[0].sum(1, keepdims=True), np.stack([inputs[0], inputs[1] + 1], -1)]

    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = run_rows(call, LAYOUT, {"input_ids": tokens, "attention_mask": mask})
    assert lengths == [(4, [(1, 4)] * 2), (8, [(1, 8)] * 2)]
    assert found["logits"].tolist() == [[6], [30]]
    assert found["last_hidden_state"][..., 0].tolist() == tokens.tolist()
    assert found["last_hidden_state"][..., 1].tolist() == mask.tolist()


def test_a_model_of_any_length_gets_no_padding_beyond_the_least():
    layout = LAYOUT | {"lengths": []}
    assert [fitting(num_tokens, layout) for num_tokens in (1, 3, 8)] == [2, 3, 8]
    with pytest.raises(UserError, match="found 9 tokens; the exported model takes 8 at most"):
        fitting(9, layout)


@pytest.mark.parametrize("exporter", [litert_export, executorch_export])
def test_a_model_that_writes_is_refused_before_an_environment_is_made(tmp_path, exporter, monkeypatch):
    monkeypatch.setenv("BIGBATCH_ENVIRONMENTS", str(tmp_path / "environments"))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM, which does not go to .* models that write go to onnx or gguf"
    ):
        exporter.make(SimpleNamespace(path=tmp_path), tmp_path, Namespace(precision="fp32"))
    assert not (tmp_path / "environments").exists()


def test_a_length_beyond_the_positions_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["BertForMaskedLM"], "max_position_embeddings": 24})
    )
    options = Namespace(precision="fp32", lengths=[8, 32])
    with pytest.raises(UserError, match="--lengths: found 8, 32; the model takes from 2 to 24 tokens"):
        litert_export.make(SimpleNamespace(path=tmp_path), tmp_path, options)


def test_a_record_without_a_layout_is_refused_by_name(tmp_path):
    (tmp_path / "deployment.json").write_text(json.dumps({"format": "litert", "file": "model.tflite"}))
    with pytest.raises(UserError, match=r"deployment.json: has no 'inputs': it is of no litert model"):
        import_module("bigbatch.tools.engines.litert_engine").open_session(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("name", ["litert", "executorch"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_gives_the_outputs_of_transformers_in_its_own_engine(tmp_path, kind, name, precision):
    if precision == "int4" and kind not in ("sentences", "images"):
        pytest.skip("the heads differ in nothing that int4 changes")
    model = save(kind, tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    options = Namespace(
        precision=precision, threads=1, lengths=[8, 24] if name == "litert" and kind != "images" else None
    )
    exporter = import_module(f"bigbatch.tools.exporters.{name}_export")
    deployment = exporter.make(SimpleNamespace(path=tmp_path / "source"), out, options)
    (out / "deployment.json").write_text(json.dumps(deployment))
    session = import_module(f"bigbatch.tools.engines.{name}_engine").open_session(out, threads=1)
    generator = torch.Generator().manual_seed(5)
    mask = (torch.arange(20) < torch.tensor([[20], [7], [1]])).long()
    inputs = {"input_ids": torch.randint(99, (3, 20), generator=generator) * mask, "attention_mask": mask}
    if kind == "images":
        inputs = {"pixel_values": torch.randn(3, 1, 16, 16, generator=generator)}
    with torch.no_grad():
        expected = model(**inputs)
    found = session(**inputs)
    for output, array in found.items():
        reference = expected[output]
        if array.shape[:2] == mask.shape:
            reference = reference * (mask if reference.dim() == 2 else mask.unsqueeze(-1))
        bound = 1e-4 if precision == "fp32" else 0.4
        assert (array - reference).abs().max() < bound * reference.abs().max(), output
    assert found.keys() == {output["name"] for output in deployment["outputs"]}
    assert len(session.seconds(3, **inputs)) == 3
    assert session.peak_bytes() > 0
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [("litert", "model.tflite"), ("executorch", "model.pte")])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, file):
    (tmp_path / file).write_bytes(b"no model" * 100)
    (tmp_path / "deployment.json").write_text(json.dumps(LAYOUT | {"file": file}))
    with pytest.raises(UserError, match=f"{file}: is no model that .* can load"):
        import_module(f"bigbatch.tools.engines.{name}_engine").open_session(tmp_path)
