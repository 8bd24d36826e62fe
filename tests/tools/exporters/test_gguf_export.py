from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.tokenizing import load_tokenizer, make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling, load_model, stream
from bigbatch.tools.engines.llama_cpp_engine import LlamaSession
from bigbatch.tools.exporters.gguf_export import make

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TEXT = ["Über den Fluß 東京 and back, 12 times; the other the thing 🙂\n\tnaïve — don't, we've\n" * 3]
POSITIONS = 64


def shapes(family, size):
    llama = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
    llama |= {"vocab_size": size, "intermediate_size": 512, "num_key_value_heads": 2}
    return {
        "gpt2": {"vocab_size": size, "n_layer": 2, "n_embd": 256, "n_head": 4, "n_positions": POSITIONS},
        "llama": llama,
        "mixtral": llama | {"num_local_experts": 3, "sliding_window": None},
    }[family]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the function that saves a random model of a family with a tokenizer of a kind."""
    made = {}

    def save(family, kind="bpe", **further):
        key = (family, kind, *further)
        if key in made:
            return made[key]
        out = made[key] = tmp_path_factory.mktemp(f"{family}-{kind}")
        extent = {"vocabulary_size": 300} if kind == "bpe" else {}
        size = make_tokenizer(TokenizerSection(kind=kind, **extent), TEXT, out).vocabulary_size
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(family, **shapes(family, size) | further)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1) if "bias" in name else parameter.data.mul_(2)
        model.save_pretrained(out)
        return out

    return save


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """Return the function that exports such a folder: (deployment, file)."""
    made = {}

    def export(family, precision, **further):
        key = (family, precision, *further)
        if key not in made:
            out = tmp_path_factory.mktemp("gguf")
            options = Namespace(precision=precision, threads=1)
            made[key] = make(SimpleNamespace(path=folder(family, **further)), out, options), out / "model.gguf"
        return made[key]

    return export


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_llama_cpp_gives_the_logits_of_transformers(exported, family):
    deployment, _ = exported(family, "f32")
    record = deployment["record"]
    kind = "median" if family == "mixtral" else "largest"  # where a token gets another expert, logits are far off
    assert record[f"{kind}_difference"] < 0.004 * record["largest_logit"]  # keys and values are float16
    assert record["agreement"] >= 0.95
    assert record["num_tokens"] == 64 + 32


def test_a_tied_llama_in_float16_has_no_matrix_twice(exported):
    deployment, file = exported("llama", "f16", tie_word_embeddings=True)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert deployment["record"]["largest_difference"] < 0.01 * deployment["record"]["largest_logit"]


def test_a_llama_with_heads_of_a_size_of_their_own_is_the_same(exported):
    record = exported("llama", "f32", head_dim=32)[0]["record"]
    assert record["largest_difference"] < 0.004 * record["largest_logit"]


def test_a_gpt2_whose_tensors_have_no_prefix_is_the_same(folder, exported, tmp_path):
    whole, bare = folder("gpt2"), tmp_path / "bare"
    transformers.AutoModelForCausalLM.from_pretrained(whole).transformer.save_pretrained(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((whole / name).read_bytes())
    make(SimpleNamespace(path=bare), tmp_path, Namespace(precision="f32", threads=1))
    assert (tmp_path / "model.gguf").read_bytes() == exported("gpt2", "f32")[1].read_bytes()


@pytest.mark.parametrize(("precision", "error"), [("q8_0", 0.01), ("q4_k_m", 0.13)])
def test_quantized_weights_are_those_of_the_folder_to_their_precision(exported, precision, error):
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(exported("gpt2", "f32")[1]).tensors}
    for tensor in gguf.GGUFReader(exported("gpt2", precision)[1]).tensors:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(found - exact[tensor.name]).max() <= error * np.abs(exact[tensor.name]).max(), tensor.name


def test_q4_k_m_keeps_the_layers_finer_that_llama_cpp_keeps(exported):
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(exported("llama", "q4_k_m")[1]).tensors}
    assert kinds["output.weight"] == kinds["blk.1.ffn_down.weight"] == kinds["blk.1.attn_v.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_down.weight"] == "Q4_K"
    assert kinds["output_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_llama_cpp_cuts_unseen_text_into_the_tokens_of_the_folder(folder, tmp_path, kind):
    path = folder("gpt2", kind)
    assert make(SimpleNamespace(path=path), tmp_path, Namespace(precision="q8_0"))["record"]["tokenizer_agrees"]
    text = "den 東 the 🙂🙂 ways\n\n—dönt"
    known = load_tokenizer(path).tokenizer
    text = "".join(c for c in text if kind == "bpe" or known.token_to_id(c) is not None)
    assert LlamaSession(tmp_path / "model.gguf").tokenize(text) == known.encode(text).ids


def test_greedy_text_of_several_prompts_is_the_likeliest_by_transformers(folder, exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder("llama")).eval()
    session = LlamaSession(exported("llama", "f32")[1], threads=1)
    rows = [[5, 6, 7], [200], list(range(30))]
    prompts = [list(row) for row in rows]
    steps = list(session.stream_tokens(prompts, Sampling(max_new_tokens=50, temperature=0, stop_tokens=(7,))))
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            row.extend([] if token is None else [token])
    for row, prompt in zip(rows, prompts, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([row])).logits[0, len(prompt) - 1 :]
        chosen = logits[:-1].gather(1, torch.tensor(row[len(prompt) :]).unsqueeze(1))[:, 0]
        assert (logits[:-1].max(-1).values - chosen).max() < 0.02
        assert len(row) == min(POSITIONS, len(prompt) + 50) or abs(logits[-1].max() - logits[-1, 7]) < 0.02


def test_samples_are_drawn_as_the_native_model_draws_them(folder, exported):
    native, session = load_model(folder("llama")).model, LlamaSession(exported("llama", "f32")[1], threads=1)
    sampling = Sampling(max_new_tokens=6, num_samples=2, seed=3)
    expected = list(stream(native, [[1, 2], [9, 8, 7]], sampling))
    assert list(session.stream_tokens([[1, 2], [9, 8, 7]], sampling)) == expected


def test_padded_rows_have_the_logits_of_the_unpadded(exported):
    session = LlamaSession(exported("llama", "f32")[1], threads=1)
    tokens, mask = torch.tensor([[3, 4, 5, 0], [0, 0, 8, 9]]), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    found = session(input_ids=tokens, attention_mask=mask)["logits"]
    torch.testing.assert_close(found[0, :3], session(input_ids=tokens[:1, :3])["logits"][0], atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1, 2:], session(input_ids=tokens[1:, 2:])["logits"][0], atol=2e-3, rtol=0)
    assert not found[0, 3].any()


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(folder, tmp_path):
    path = folder("gpt2", "word")
    with pytest.raises(UserError, match=r"tokenizer.json: is a WordLevel .* right is byte-level BPE, or characters"):
        make(SimpleNamespace(path=path), tmp_path, Namespace(precision="f16"))


def test_a_model_that_does_not_write_is_refused_with_the_format_that_takes_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    source = SimpleNamespace(path=tmp_path)
    with pytest.raises(UserError, match=r"is a 'bert'; of llama.*writes gpt2, .*; right is --format onnx"):
        make(source, tmp_path, Namespace(precision="f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_truncated_file_is_refused_by_name(exported, tmp_path):
    whole = exported("llama", "f16")[1].read_bytes()
    for size in (100, len(whole) - 1000):
        (tmp_path / "model.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.gguf: is no model that llama.cpp can load: .*\w"):
            LlamaSession(tmp_path / "model.gguf")


def test_a_token_outside_the_vocabulary_is_told(exported):
    with pytest.raises(UserError, match="found 999; the vocabulary has 300 tokens"):
        LlamaSession(exported("llama", "f16")[1])(input_ids=torch.tensor([[1, 999]]))


def test_a_row_longer_than_the_positions_is_told(exported):
    session = LlamaSession(exported("gpt2", "f32")[1])
    assert session(input_ids=torch.ones(1, POSITIONS, dtype=torch.long))["logits"].isfinite().all()
    with pytest.raises(UserError, match="found 65 tokens; the model has 64 positions"):
        session(input_ids=torch.ones(1, POSITIONS + 1, dtype=torch.long))
