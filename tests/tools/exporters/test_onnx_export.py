import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
import transformers

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.recipes.core.models.config import SpeechSection
from bigbatch.recipes.core.models.speech import SpeechModel
from bigbatch.tools import export
from bigbatch.tools.engines.onnx_engine import open_session
from bigbatch.tools.exporters import onnx_export, onnx_models
from bigbatch.tools.exporters.onnx_graph import Graph, quantize_blocks, write_models
from bigbatch.tools.exporters.onnx_speech import speech
from bigbatch.tools.opened import open_model

BERT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
PAIR = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 256))}
PAIR |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")} | {"max_position_embeddings": 40}
PAIR |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None, "d_model": 128}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"intermediate_size": 200, "max_position_embeddings": 64}
IMAGES = {"image_size": 16, "patch_size": 8, "num_channels": 1, "num_labels": 4}
VOCABULARY = 300

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classifier": ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 3}),
    "tagger": ("BertForTokenClassification", "BertConfig", {**BERT, "num_labels": 5}),
    "answerer": ("BertForQuestionAnswering", "BertConfig", BERT),
    "filler": ("BertForMaskedLM", "BertConfig", BERT),
    "images": ("ViTForImageClassification", "ViTConfig", {**BERT, **IMAGES}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "marian": ("MarianMTModel", "MarianConfig", {**PAIR, "activation_function": "swish", "scale_embedding": True}),
    "bart": ("BartForConditionalGeneration", "BartConfig", PAIR),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", {**PAIR, "activation_function": "relu"}),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a name in MODELS to a folder that transformers has written, of weights drawn large."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, config, settings = MODELS[name]
            torch.manual_seed(3)
            vocabulary = {} if name == "images" else {"vocab_size": VOCABULARY}
            model = getattr(transformers, kind)(getattr(transformers, config)(**settings, **vocabulary))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(3)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return make


def exported(folder: Path, out: Path, precision: str = "fp32", opset: int | None = None) -> dict[str, Any]:
    out.mkdir()
    return onnx_export.make(Namespace(path=folder), out, Namespace(precision=precision, opset=opset, threads=1))


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_and_a_cache_agree_with_transformers(name: str, folder_of: Any, tmp_path: Path) -> None:
    record = exported(folder_of(name), tmp_path / "out")["record"]

    assert record["largest_difference"] < 2e-5 * record["largest_output"]
    assert record["largest_output"] > 0.1


@pytest.mark.parametrize(("cell", "bidirectional"), [("lstm", True), ("gru", True), ("gru", False)])
def test_recordings_of_several_lengths_are_heard_as_the_native_model_hears_them(
    cell: Any, bidirectional: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    section = SpeechSection(cell=cell, bidirectional=bidirectional, hidden_size=64)
    model = SpeechModel(section, 8000, 9).eval()
    weights = {f"model.{name}": parameter.detach().numpy() for name, parameter in model.named_parameters()}
    samples, lengths = torch.randint(-9000, 9000, (3, 8000)).short(), torch.tensor([8000, 5000, 170])
    expected, frames = model(samples, lengths)

    for precision, most in (("fp32", 1e-5), ("fp16", 5e-3), ("int8", 0.1)):
        graph = Graph(weights, precision, 20)
        speech(graph, section, 8000)
        write_models(tmp_path, {"model.onnx": graph})
        found = open_session(tmp_path, 1)(samples=samples, lengths=lengths)

        assert found["frames"].tolist() == frames.tolist() == [50, 31, 1]
        for row, count in enumerate(frames.tolist()):
            torch.testing.assert_close(
                found["log_probabilities"][row, :count], expected[row, :count], atol=most, rtol=0
            )


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_both_forms_of_attention_agree_with_transformers(name: str, folder_of: Any, tmp_path: Path) -> None:
    for opset, operator in ((20, "Softmax"), (23, "Attention")):
        record = exported(folder_of(name), tmp_path / str(opset), opset=opset)["record"]

        operators = {node.op_type for node in onnx.load(tmp_path / str(opset) / "model.onnx").graph.node}
        assert operator in operators
        assert record["largest_difference"] < 2e-5 * record["largest_output"]


@pytest.mark.parametrize("name", ["classifier", "images", "llama", "marian"])
def test_smaller_numbers_take_less_room_and_differ_the_more(name: str, folder_of: Any, tmp_path: Path) -> None:
    sizes, differences = [], []
    for precision in onnx_export.PRECISIONS:
        record = exported(folder_of(name), tmp_path / precision, precision)["record"]
        sizes.append((tmp_path / precision / "model.onnx.data").stat().st_size)
        differences.append(record["largest_difference"] / record["largest_output"])

    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.45 * sizes[0]
    assert differences == sorted(differences)
    assert differences[1] < 0.02
    assert differences[2] < 0.15


def test_products_of_8_bits_do_not_overflow_whatever_the_processor(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.choice([-1.0, 1.0], (512, 64)).astype(np.float32)
    states = generator.uniform(0.8, 1, (4, 64)).astype(np.float32)
    graph = Graph({}, "int8", 20)
    graph.output("products", graph.product(graph.input("states", np.float32, "rows", 64), weight), "rows", 512)
    write_models(tmp_path, {"model.onnx": graph})

    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"states": states})[0]

    np.testing.assert_allclose(found, states @ weight.T, atol=64 / 255 / 2)  # each state rounded to a part of 255


@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_no_weight_is_stored_twice(name: str, folder_of: Any, tmp_path: Path) -> None:
    exported(folder_of(name), tmp_path / "out")

    weights = (folder_of(name) / "model.safetensors").stat().st_size
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert written < 1.1 * weights + 100_000  # the graphs themselves, and tables of positions


def test_a_pruned_model_is_written_with_the_widths_that_its_weights_have(tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = {**BERT, "vocab_size": VOCABULARY, "num_labels": 3, "architectures": ["BertForSequenceClassification"]}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings)).eval()
    layer = model.bert.encoder.layer[0]
    attention: Any = layer.attention.self
    for name in ("query", "key", "value"):
        whole = getattr(attention, name)
        whole.weight, whole.bias = (torch.nn.Parameter(part[:32].clone()) for part in (whole.weight, whole.bias))
    output: Any = layer.attention.output.dense
    output.weight = torch.nn.Parameter(output.weight[:, :32].clone())
    attention.num_attention_heads, attention.all_head_size = 1, 32
    model.save_pretrained(tmp_path)

    onnx_export.write_onnx(tmp_path, tmp_path, "fp32", 20)

    tokens = torch.randint(VOCABULARY, (2, 7))
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(open_session(tmp_path, 1)(input_ids=tokens)["logits"], expected.detach())


def test_a_graph_that_differs_is_not_written(folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_models, "MASKED", 0.0)

    with pytest.raises(UserError, match="not written: outputs differ from transformers' own by"):
        exported(folder_of("classifier"), tmp_path / "out")


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_by_blocks_are_what_the_operator_multiplies_with(bits: int, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(256, 100)).astype(np.float32)
    graph = Graph({"layer.weight": weight}, f"int{bits}", 20, writes=True)
    graph.output("logits", graph.linear(graph.input("input_ids", np.float32, "rows", 100), "layer"), "rows", 256)
    write_models(tmp_path, {"model.onnx": graph})

    found = open_session(tmp_path, 1).model.run({"input_ids": torch.eye(100)})["logits"].numpy()

    values, scales = quantize_blocks(weight, bits)
    if bits == 4:
        values = np.stack((values & 15, values >> 4), -1).reshape(256, -1, 32)
    stored = (values.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    np.testing.assert_allclose(found.T, stored.reshape(256, -1)[:, :100], atol=1e-4)
    assert np.abs(found.T - weight).max() < 1.01 * np.abs(scales).max()


def test_a_run_of_a_recipe_without_a_class_of_transformers_is_exported(tiny_folder: Any, tmp_path: Path) -> None:
    record = exported(tiny_folder("transcribe")[1], tmp_path / "out")["record"]

    assert record["largest_difference"] < 2e-5 * record["largest_output"]


@pytest.mark.parametrize("kind", ["entities", "translate", "classify_images"])
def test_a_recipe_finds_in_an_exported_folder_the_loss_of_its_run(kind: str, tiny_folder: Any, tmp_path: Path) -> None:
    run, converted = tiny_folder(kind)
    assert export.main([str(converted), str(tmp_path / "out"), "--format", "onnx", "--no-measure"]) == 0

    native, foreign = open_model(run), open_model(tmp_path / "out", threads=1)
    samples = native.recipe.open_data(native.config).validation
    arrays = samples.batch(np.arange(samples.num_samples), np.zeros(samples.num_samples, np.int64))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        expected, found = (one.recipe.loss(one.model, batch) for one in (native, foreign))
    assert found.num_targets == expected.num_targets
    torch.testing.assert_close(found.sum, expected.sum)


def test_a_model_writes_the_same_when_exported(tiny_folder: Any, tmp_path: Path) -> None:
    run, converted = tiny_folder("gpt_llama")
    arguments = [str(converted), str(tmp_path / "out"), "--format", "onnx", "--no-measure"]

    assert export.main(arguments) == 0

    native, foreign = open_model(run).model, open_model(tmp_path / "out", threads=1).model
    prompts = [[5, 9, 12, 40, 7], [8], [30, 31]]
    for sampling in (Sampling(12, temperature=0), Sampling(12, seed=3, num_samples=2)):
        assert generate(foreign, prompts, sampling) == generate(native, prompts, sampling)
    described = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert (described["format"], described["precision"], described["opset"]) == ("onnx", "fp32", 23)
    assert described["files"] == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "out" / "genai_config.json").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_onnxruntime_genai_opens_the_folder_and_writes_what_transformers_writes(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    exported(folder_of(name), tmp_path / "out")
    prompts = torch.tensor([[5, 9, 12, 40], [8, 30, 31, 7]])

    model = onnxruntime_genai.Model(str(tmp_path / "out"))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=16, min_length=16, batch_size=2)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompts.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()

    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name))
    mask = torch.ones_like(prompts)
    expected = theirs.generate(prompts, attention_mask=mask, max_length=16, min_length=16, do_sample=False)
    assert [generator.get_sequence(row).tolist() for row in range(2)] == expected.tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "q8_0"], "--dtype: found 'q8_0'; right for onnx is one of fp32, fp16, int8, int4"),
        (["--opset", "17"], "--opset: found 17; right for a llama is 23 to 24"),
    ],
)
def test_what_cannot_be_written_is_told(flags: list[str], message: str, tiny_folder: Any, tmp_path: Path) -> None:
    arguments = [str(tiny_folder("gpt_llama")[1]), str(tmp_path / "out"), "--format", "onnx", "--no-measure", *flags]

    with pytest.raises(UserError) as caught:
        export.main(arguments)

    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_graph_and_a_damaged_file_are_refused(folder_of: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="model_type is 'mamba'; right is one of bert, vit, gpt2"):
        exported(tmp_path, tmp_path / "none")
    exported(folder_of("tagger"), tmp_path / "out")
    graph = tmp_path / "out" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.onnx: cannot be opened by onnxruntime"):
        open_session(tmp_path / "out")
