"""What can be known before a run starts."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from bigbatch.launcher.predict import checkpoint_bytes, count_parameters
from bigbatch.launcher.preflight import check, check_run, has_errors, render, to_json
from bigbatch.launcher.resolve import resolve
from bigbatch.recipes.core.config import OptimizerSection
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection

DATA = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in an empty folder, with a text beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BIGBATCH_DATA", raising=False)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 1000)
    return tmp_path


def findings_of(*overrides, ranks=2, run="gpt/quick"):
    return check(resolve(run, overrides), ranks)


def told(findings, severity="error"):
    return [f"{finding.path}: {finding.message}" for finding in findings if finding.severity == severity]


def test_a_sound_run_is_ready_and_its_numbers_are_told():
    findings = findings_of("batch.micro_size=4")
    assert told(findings, "error") == []
    assert told(findings, "info")[0] == "batch.global_size: 32 samples = 4 a forward pass x 4 accumulated x 2 ranks"
    assert told(findings, "info")[2:] == [
        # 128 x 256 positions + 4096 x 256 tokens + 4 x (12 x 256^2 + 13 x 256) + 2 x 256
        "model: 4.26 M parameters",
        "schedule.total_steps: 4,096 tokens a step, 1.23 M in all",
    ]
    assert render(findings).splitlines()[-1] == "ready: 0 errors, 0 warnings"


def test_every_problem_of_a_document_is_a_finding():
    findings = check_run("gpt/quick", ["seed=-1", "batch.global_size=0"], 2)
    assert told(findings) == ["batch.global_size: found 0; right is more than 0", "seed: found -1; right is 0 or more"]
    assert told(check_run("gpt/quik", [], 2)) == ["gpt/quik: no document of this name; did you mean 'gpt/quick'?"]
    assert has_errors(findings)
    assert render(findings).splitlines()[-1] == "will not run: 2 errors, 0 warnings"


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    assert told(findings_of(ranks=3)) == [
        "batch.global_size: 32 samples do not divide over 3 data ranks; right would be 30 or 33"
    ]
    assert told(findings_of("batch.micro_size=5", ranks=2))[0].startswith("batch.micro_size: 5 does not divide")


def test_a_missing_source_says_where_it_was_looked_for(here, monkeypatch):
    monkeypatch.setenv("BIGBATCH_DATA", "/nowhere")
    assert told(findings_of('data.train=["text.txt", "no/*.txt"]')) == [
        f"data.train[1]: 'no/*.txt' is neither in {here} nor in $BIGBATCH_DATA (/nowhere)"
    ]


@pytest.mark.parametrize("source", ["text.txt", "*.txt", "**/*.txt", ".", "{here}/text.txt", "{here}/*.txt", "{here}"])
def test_a_source_is_a_file_a_folder_or_a_glob(here, source):
    source = source.format(here=here)
    findings = findings_of(f"data.train={json.dumps([source])}", "data.validation_fraction=0")
    assert told(findings) == []
    # 19,000 bytes at 4 a token, in samples of 128 tokens, 32 a step
    assert "data.train: about 1 steps an epoch, 259 epochs in all" in told(findings, "info")


def test_a_source_is_also_looked_for_under_the_data_folder(here, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("BIGBATCH_DATA", str(here))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert told(findings_of('data.train=["text.txt"]')) == []
    assert told(findings_of('data.train=["te*.txt"]')) == []


def test_sources_that_are_not_on_this_disk_are_not_looked_for():
    assert told(findings_of('data.train=["hf:some/set:config", "python:stdlib"]')) == []


def test_an_empty_source_and_one_that_is_no_text_are_refused(here):
    (here / "empty.txt").touch()
    (here / "picture.png").write_bytes(b"x")
    assert told(findings_of('data.train=["empty.txt", "picture.png"]')) == [
        "data.train[0]: empty.txt is empty",
        "data.train[1]: picture.png is none of .txt, .jsonl, .csv, .tsv, .parquet",
    ]


TOKENIZER = ["data.tokenizer.kind=pretrained", "data.tokenizer.vocabulary_size=null", "data.tokenizer.path=t"]


def test_a_missing_or_broken_tokenizer_is_refused(here):
    assert told(findings_of(*TOKENIZER)) == ["data.tokenizer.path: there is no t; give a tokenizer.json"]
    (here / "t").mkdir()
    assert told(findings_of(*TOKENIZER)) == ["data.tokenizer.path: there is no t/tokenizer.json; give a tokenizer.json"]
    (here / "t" / "tokenizer.json").write_text('{"model": 3}')
    assert told(findings_of(*TOKENIZER)) == [
        "data.tokenizer.path: t/tokenizer.json is no tokenizer.json of Hugging Face's tokenizers"
    ]


@pytest.mark.parametrize("vocabulary", [{"a": 0, "b": 9_998}, [["a", 0.0]] * 9_999])
def test_the_parameters_count_a_given_tokenizers_vocabulary(here, vocabulary):
    (here / "t").mkdir()
    document = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 9_999, "content": "<s>"}]}
    (here / "t" / "tokenizer.json").write_text(json.dumps(document))
    findings = findings_of(*TOKENIZER, "model.vocabulary_multiple=1")
    # As for quick, with ten thousand rows of 256 for its 4096.
    assert f"model: {(4_262_144 + (10_000 - 4096) * 256) / 1e6:.3g} M parameters" in told(findings, "info")


def test_a_missing_folder_of_first_weights_is_refused():
    assert told(findings_of("model.initialize_from=gpt2")) == ["model.initialize_from: there is no config.json in gpt2"]


def test_a_run_folder_that_cannot_be_made_is_refused(here):
    (here / "runs").write_text("in the way")
    assert told(findings_of()) == [f"runs: {here / 'runs'} cannot be written to"]


@pytest.mark.parametrize(
    ("free_bytes", "severity"), [(50_000_000, "error"), (100_000_000, "warning"), (200_000_000, "info")]
)
def test_the_disk_must_hold_one_checkpoint_and_should_hold_all(monkeypatch, free_bytes, severity):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free_bytes))
    findings = findings_of()
    (finding,) = [finding for finding in findings if finding.rule == "disk"]
    assert finding.severity == severity
    # 4,262,144 parameters x 12 bytes; two are kept and a third is written before the oldest goes.
    assert finding.message.startswith("51.1 MB a checkpoint, 153 MB at most; ")


def test_what_needs_a_gpu_is_told_where_there_is_none():
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has an NVIDIA GPU")
    assert told(findings_of("precision.dtype=fp16"), "warning") == [
        "precision.dtype: there is no NVIDIA GPU here, and few CPUs can do fp16"
    ]


def test_a_folder_for_offloading_that_is_not_there_is_told():
    warnings = told(findings_of("parallel.zero_stage=null", "deepspeed=zero3_nvme"), "warning")
    assert warnings[0] == "zero_optimization.offload_param.nvme_path: /local_nvme cannot be written to here"


def test_the_findings_are_json_too():
    findings = findings_of(ranks=3)
    assert json.loads(to_json(findings))[0] == {
        "rule": "batch",
        "severity": "error",
        "path": "batch.global_size",
        "message": "32 samples do not divide over 3 data ranks; right would be 30 or 33",
        "advice": "",
    }


def test_preflight_is_quick_and_needs_no_torch():
    code = (
        "import sys, time; from bigbatch.launcher.preflight import check_run, render;"
        "print(render(check_run('gpt/quick', ['deepspeed=zero2', 'parallel.zero_stage=null'], 2)));"
        "print({'torch', 'deepspeed', 'numpy'} & set(sys.modules), time.process_time() < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["ready: 0 errors, 0 warnings", "set() True"]


@pytest.mark.parametrize(
    ("shape", "vocabulary", "published"),
    [
        # The counts of the models that Hugging Face serves under these names.
        ({}, 50257, 124_439_808),  # gpt2
        ({"num_layers": 24, "hidden_size": 1024, "num_heads": 16}, 50257, 354_823_168),  # gpt2-medium
        (
            {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "feed_forward_size": 11008},
            32000,
            6_738_415_616,  # Llama-2-7b
        ),
        (
            {
                "num_layers": 32,
                "hidden_size": 4096,
                "num_heads": 32,
                "num_key_value_heads": 8,
                "feed_forward_size": 14336,
            },
            128256,
            8_030_261_248,  # Llama-3.1-8B
        ),
    ],
)
def test_parameters_are_counted_as_in_published_models(shape, vocabulary, published):
    llama = {"family": "llama", "tie_embeddings": False} if "feed_forward_size" in shape else {}
    model = DecoderSection(vocabulary_multiple=1, **shape, **llama)
    assert count_parameters(model, vocabulary) == published


@pytest.mark.parametrize(
    ("name", "momentum", "expected"),
    [("adamw", 0.0, 1200), ("lion", 0.0, 800), ("adagrad", 0.0, 800), ("sgd", 0.0, 400), ("sgd", 0.9, 800)],
)
def test_a_checkpoint_holds_masters_and_moments_in_float32(name, momentum, expected):
    section = OptimizerSection(name=name, learning_rate=1.0, momentum=momentum)
    assert checkpoint_bytes(100, section) == expected


def test_the_shakespeare_preset_finds_its_data(monkeypatch):
    if not (DATA / "tinyshakespeare").is_dir():
        pytest.skip(f"real data are missing: {DATA / 'tinyshakespeare'} (set BIGBATCH_TEST_DATA)")
    monkeypatch.setenv("BIGBATCH_DATA", str(DATA))
    findings = findings_of("data.sequence_length=100", "batch.global_size=10", run="gpt/shakespeare_char")
    assert told(findings) == []
    # 1,115,394 characters, nine tenths of them to train on, 1000 a step
    assert any(line.startswith("data.train: about 1,003 steps an epoch, ") for line in told(findings, "info"))


@pytest.mark.parametrize("changes", [{}, {"norm": "pre", "positions": "rotary"}], ids=["bert", "pre_rotary"])
def test_an_encoders_parameters_are_counted_without_building_it(changes):
    from bigbatch.recipes.core.models.encoder import MaskedLanguageModel

    section = EncoderSection(num_layers=2, hidden_size=32, num_heads=4, feed_forward_size=48, **changes)
    built = sum(parameter.numel() for parameter in MaskedLanguageModel(section, 101).parameters())
    # The last norm is where each form has one: behind the embedding or behind the layers.
    assert count_parameters(section, 101) == built


def test_the_published_size_of_bert_base_is_met():
    # transformers' BertForMaskedLM of bert-base-uncased: 109,514,298; ours has 6 rows of padding.
    assert count_parameters(EncoderSection(), 30522) == 109_514_298 + 6 * (768 + 1)
