import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from bigbatch.launcher import cli
from bigbatch.recipes.core import checkpoint, language_model
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.recipes.core.models.decoder import Decoder
from bigbatch.recipes.core.tensor_file import Entry, write_json, write_tensors
from bigbatch.recipes.gpt.config import GptConfig
from bigbatch.tools import convert as tool
from bigbatch.tools.convert import Sizes, convert, main, parse_bytes

RUNS = ("gpt2_tied", "gpt2_untied", "llama_tied", "llama_grouped_untied")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def native(run_dir, dtype=torch.float32):
    """Load the run's model from its checkpoint, weights rounded to `dtype`, and its facts."""
    config = GptConfig.model_validate_json((run_dir / "run.json").read_text())
    reader = checkpoint.newest(run_dir)
    model = Decoder(config.model, reader.manifest["facts"]["vocabulary_size"])
    checkpoint.load_weights(run_dir, model)
    return model.to(dtype).float().eval(), reader.manifest["facts"]


def no_trace(out):
    """Tell whether neither the folder nor what it is written in is there."""
    return not list(out.parent.glob(f"{out.name}*"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", RUNS)
def test_transformers_own_model_gives_the_trained_models_logits(runs, run, dtype, tmp_path):
    parity = convert(runs / run, tmp_path / "out", dtype)
    assert parity.largest_difference < 1e-4 < 1 < parity.largest_logit
    assert parity.largest_difference < parity.bound / 3
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(notes.values())
    ours, facts = native(runs / run, DTYPES[dtype])
    tokens = torch.randint(facts["vocabulary_size"], (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(tokens), theirs.eval()(tokens).logits
    assert (found - expected).abs().max() < 3e-5
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == DTYPES[dtype]
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {DTYPES[dtype]}
    assert ("lm_head.weight" in stored) == run.endswith("untied")


@pytest.mark.parametrize("run", RUNS)
def test_the_padding_of_the_vocabulary_stays_behind(runs, run, tmp_path):
    convert(runs / run, tmp_path / "out")
    ours, facts = native(runs / run)
    assert ours.embed.tokens.weight.shape[0] == 320 > facts["vocabulary_size"] == 300
    config = json.loads((tmp_path / "out/config.json").read_text())
    stored = load_file(tmp_path / "out/model.safetensors")
    embedding = stored["transformer.wte.weight" if run.startswith("gpt2") else "model.embed_tokens.weight"]
    assert config["vocab_size"] == embedding.shape[0] == 300
    assert torch.equal(embedding, ours.embed.tokens.weight[:300])
    if "lm_head.weight" in stored:
        assert torch.equal(stored["lm_head.weight"], ours.head.weight[:300])


@pytest.mark.parametrize("run", RUNS)
def test_transformers_generates_from_the_folder_what_this_project_generates(runs, run, tmp_path):
    convert(runs / run, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The statement", return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    written = theirs.generate(**prompt, do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=20)
    ours, facts = native(runs / run)
    sampling = Sampling(max_new_tokens=20, temperature=0.0, stop_tokens=(facts["end_of_text"],))
    ((completion,),) = generate(ours, [prompt["input_ids"][0].tolist()], sampling)
    assert written[0, length:].tolist() == completion.tokens
    assert tokenizer.decode(written[0]).startswith("The statement")
    settings = theirs.generation_config  # the document's section `sample`
    assert (settings.do_sample, settings.max_new_tokens, settings.temperature) == (True, 12, 0.7)
    assert (settings.top_k, settings.top_p, settings.eos_token_id) == (9, 0.5, facts["end_of_text"])


def test_the_card_and_the_record_say_what_was_compared(runs, tmp_path, capsys):
    assert main([str(runs / "llama_tied"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n"
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    model, _ = native(runs / "llama_tied")
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (record["step"], record["consumed_samples"], record["dtype"]) == (3, 12, "bf16")
    assert record["parity"]["num_tokens"] == 2 * 48
    card = (tmp_path / "out/README.md").read_text()
    assert (
        f"differ from those of the model that was trained by at most {record['parity']['largest_difference']:.2e}"
        in (" ".join(card.split()))
    )
    assert "logits of 96 tokens equal transformers' own" in shown.err


def test_small_shards_with_an_index_are_the_same_model(runs, tmp_path):
    convert(runs / "gpt2_untied", tmp_path / "whole")
    assert main([str(runs / "gpt2_untied"), str(tmp_path / "out"), "--max-shard-size", "40000"]) == 0
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert not (tmp_path / "out/model.safetensors").exists()
    assert all(path.stat().st_size < 40_000 + 5_000 for path in shards)  # and a header
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    stored = load_file(tmp_path / "whole/model.safetensors")
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in stored.values())
    assert index["weight_map"].keys() == stored.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), stored[name])
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values())
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])


def test_a_training_that_starts_from_the_folder_and_changes_nothing_converts_to_equal_files(runs, tmp_path):
    convert(runs / "llama_grouped_untied", tmp_path / "first")
    document = json.loads((runs / "llama_grouped_untied/run.json").read_text())
    document["model"]["initialize_from"] = str(tmp_path / "first")
    document["optimizer"]["learning_rate"] = 1e-30  # below half a step of any float32 weight
    del document["model"]["initializer_range"]
    document["parallel"], document["precision"], document["batch"] = {}, {"dtype": "fp32"}, {"global_size": 4}
    (tmp_path / "again.json").write_text(json.dumps(document))
    assert cli.main(["train", str(tmp_path / "again.json"), "--ranks", "1", "--run-dir", str(tmp_path / "run")]) == 0
    convert(tmp_path / "run", tmp_path / "second")
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_folder_that_is_converted_already_or_none_at_all_is_refused(runs, tmp_path):
    convert(runs / "gpt2_tied", tmp_path / "first")
    with pytest.raises(UserError, match="is a Hugging Face folder already"):
        convert(tmp_path / "first", tmp_path / "second")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no checkpoint that verifies"):
        convert(tmp_path / "empty", tmp_path / "second")
    assert no_trace(tmp_path / "second")


def test_a_checkpoint_named_itself_is_converted_and_the_newest_sound_one_of_a_run(runs, tmp_path):
    shutil.copytree(runs / "gpt2_untied", tmp_path / "run")
    (sound,) = (tmp_path / "run/checkpoints").glob("step_*")
    newer = sound.with_name("step_00000009")
    shutil.copytree(sound, newer)
    shard = newer / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    convert(tmp_path / "run", tmp_path / "a")
    assert json.loads((tmp_path / "a/conversion.json").read_text())["step"] == 3
    convert(sound, tmp_path / "b")
    assert load_file(tmp_path / "b/model.safetensors").keys() == load_file(tmp_path / "a/model.safetensors").keys()
    with pytest.raises(UserError, match=r"the checkpoint is damaged: rank_00000\.safetensors has"):
        convert(newer, tmp_path / "c")
    shutil.rmtree(sound)
    with pytest.raises(UserError, match="has no checkpoint that verifies"):
        convert(tmp_path / "run", tmp_path / "c")
    assert no_trace(tmp_path / "c")


# ------------------------------------------------------------------------------------------------- what must not pass


SWAPS = {
    "attention outputs of two layers": ("gpt2_tied", "h.0.attn.c_proj.weight", "h.1.attn.c_proj.weight"),
    "biases": ("gpt2_tied", "h.0.attn.c_proj.bias", "h.0.mlp.c_proj.bias"),
    "embedding and head": ("gpt2_untied", "transformer.wte.weight", "lm_head.weight"),
    "keys and values": ("llama_grouped_untied", "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"),
    "gate and up": ("llama_tied", "layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight"),
    "norms": ("llama_tied", "layers.0.input_layernorm.weight", "layers.1.post_attention_layernorm.weight"),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_two_tensors_that_change_places_are_found_by_the_logits(runs, swap, tmp_path, monkeypatch, capsys):
    run, first, second = SWAPS[swap]
    original = language_model.hugging_face_tensors

    def swapped(*arguments):
        table = original(*arguments)
        names = [piece.name for pieces in table.values() for piece in pieces]
        (a,), (b,) = ([name for name in names if name.endswith(end)] for end in (first, second))
        other = {a: b, b: a}
        return {
            name: [piece._replace(name=other.get(piece.name, piece.name)) for piece in pieces]
            for name, pieces in table.items()
        }

    monkeypatch.setattr(language_model, "hugging_face_tensors", swapped)
    assert cli.main(["convert", str(runs / run), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    told = re.fullmatch(
        r"error: .*/out: not written: logits differ from transformers' own by (\S+), at most (\S+) would be right\n",
        shown.err,
    )
    assert told
    assert float(told[1]) > 10 * float(told[2])  # the bound is not near
    assert no_trace(tmp_path / "out")


def test_a_weight_that_is_not_a_number_is_refused(runs, tmp_path, monkeypatch):
    original = tool._parts
    monkeypatch.setattr(tool, "_parts", lambda *arguments: (part * math.nan for part in original(*arguments)))
    with pytest.raises(UserError, match="not written: logits differ from transformers' own by nan"):
        convert(runs / "gpt2_tied", tmp_path / "out")
    assert no_trace(tmp_path / "out")


def test_a_folder_that_exists_is_refused_and_left_alone(runs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert cli.main(["convert", str(runs / "gpt2_tied"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: exists already; name a folder that does not\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_prepared_data_that_have_gone_are_told_and_leave_nothing(runs, tmp_path):
    shutil.copytree(runs / "gpt2_untied", tmp_path / "run")
    path = next((tmp_path / "run/checkpoints").glob("step_*")) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"]["tokenizer"] = str(tmp_path / "gone")
    write_manifest(path.parent, manifest)
    with pytest.raises(UserError, match=r"gone: holds no tokenizer\.json"):
        convert(tmp_path / "run", tmp_path / "out")
    assert no_trace(tmp_path / "out")


def test_a_signal_that_ends_a_conversion_leaves_nothing_behind(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "compare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_folder("classify")[0], tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_killed_anywhere_leaves_no_folder_of_that_name(runs):
    killed = json.loads((runs / "killed.json").read_text())
    assert len(killed) == 6
    assert set(killed.values()) == {-signal.SIGKILL}
    for place in killed:
        left = [path.name for path in (runs / "killed" / place).iterdir()]
        assert len(left) == 1
        assert left[0].startswith(".out.partial-")
    convert(runs / "gpt2_tied", runs / "killed/compare/out")  # what is left is not in the way


# ----------------------------------------------------------------------------------------------------- bounded memory


def write_manifest(folder, manifest):
    """Write a manifest with its own hash."""
    manifest.pop("xxh3_128", None)
    write_json(folder / "manifest.json", {**manifest, "xxh3_128": checkpoint._manifest_hash(manifest)})


@pytest.fixture
def large_run(runs, tmp_path):
    """Write a run of 100 million random parameters as a checkpoint, without training it; return it and its bytes."""
    run_dir = tmp_path / "large"
    shutil.copytree(runs / "gpt2_untied", run_dir)
    folder = next((run_dir / "checkpoints").glob("step_*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    size = {"num_layers": 8, "hidden_size": 1024, "num_heads": 16, "initializer_range": 0.02}
    manifest["run"]["model"] |= size
    config = GptConfig.model_validate_json(json.dumps(manifest["run"]))
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Decoder(config.model, 300).named_parameters()}
    random = torch.Generator().manual_seed(0)
    parts = (torch.randn(shape, generator=random) * 0.02 for shape in shapes.values())
    shard = "rank_00000.safetensors"
    entries = [Entry(f"master/{name}", torch.float32, (math.prod(shape),)) for name, shape in shapes.items()]
    manifest["files"] = [write_tensors(folder / shard, entries, parts)]
    manifest["tensors"] = {
        name: {"shape": shape, "dtype": "F32", "pieces": [[shard, "master", 0, math.prod(shape)]]}
        for name, shape in shapes.items()
    }
    write_manifest(folder, manifest)
    return run_dir, manifest["files"][0]["bytes"]


MEASURE = """
import resource, sys
import accelerate, torch, transformers
from transformers import GPT2LMHeadModel  # transformers loads a model's module when it is named
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
from bigbatch.tools.convert import main
before = peak()
status = main(sys.argv[1:])
print(status, peak() - before)
"""


def test_memory_stays_far_below_the_model(large_run, tmp_path):
    run_dir, num_bytes = large_run
    assert num_bytes > 400e6
    command = [sys.executable, "-c", MEASURE, str(run_dir), str(tmp_path / "out"), "--max-ram", "72M"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    status, used_bytes = map(int, result.stdout.splitlines()[-1].split())
    assert status == 0
    assert (tmp_path / "out/model.safetensors").stat().st_size > 400e6
    # The largest layer has 17 MB: 72 MB to write it, and a few copies while the two models are compared.
    assert used_bytes < 150e6, f"{used_bytes / 1e6:.0f} MB"


def test_a_bound_too_small_for_one_tensor_is_told_with_what_it_needs(runs, tmp_path):
    with pytest.raises(UserError) as error:
        convert(runs / "gpt2_tied", tmp_path / "out", sizes=Sizes(max_ram=2**14))
    assert re.search(
        r"transformer\.h\.0\.attn\.c_attn\.weight has to be transposed whole; it needs 49,152", str(error.value)
    )
    assert no_trace(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4G", 2**32), ("512M", 2**29), ("1.5K", 1536), ("1000000", 10**6), ("2g", 2**31), ("20MB", 20_000_000)],
)
def test_a_size_is_read_with_its_unit(text, expected):
    assert parse_bytes(text, "--max-ram") == expected


@pytest.mark.parametrize("text", ["", "G", "4T", "four", "-1G", "1.2.3M", "0", "²G"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="right is a size such as 4G, 512M or 20MB"):
        parse_bytes(text, "--max-ram")
