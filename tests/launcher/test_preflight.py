"""What can be known before a run starts."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bigbatch.launcher import cli
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
    assert told(findings, "info")[3:] == [
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


def test_a_pipeline_with_too_few_micro_batches_is_warned_of():
    settings = ["parallel.pipeline=2", "batch.global_size=32"]
    assert told(findings_of(*settings, "batch.micro_size=32", ranks=2), "warning") == [
        "batch.micro_size: 1 micro-batches keep 2 stages busy 50% of the time"
    ]
    assert told(findings_of(*settings, "batch.micro_size=8", ranks=4), "warning") == []


def test_a_missing_source_says_where_it_was_looked_for(here, monkeypatch):
    monkeypatch.setenv("BIGBATCH_DATA", "/nowhere")
    assert told(findings_of('data.train=["text.txt", "no/*.txt"]')) == [
        f"data.train[1]: 'no/*.txt' is no file, folder or glob in {here}, nor in $BIGBATCH_DATA (/nowhere)"
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
        f"data.train[0]: {here}/empty.txt is empty",
        "data.train[1]: picture.png is no .txt, .jsonl, .csv, .tsv (each also .gz) or .parquet file; "
        "`format` says how to read another",
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


def test_ranks_that_train_alone_each_have_their_own_in_a_checkpoint():
    stage0 = ["parallel.zero_stage=null", "parallel.local_sgd.every_steps=100"]
    findings = findings_of("parallel.sync=local_sgd", "batch.micro_size=4", *stage0)
    (disk,) = [finding for finding in findings if finding.rule == "disk"]
    # 4,262,144 parameters x (12 bytes of each of 2 ranks and 8 of the outer optimizer).
    assert disk.message.startswith("136 MB a checkpoint, ")
    assert told(findings, "info")[0] == "batch.global_size: 32 samples = 4 a forward pass x 4 accumulated x 2 ranks"


@pytest.mark.parametrize(("pages", "severity"), [(10**6, "info"), (10**4, "warning")])
def test_the_copy_that_saves_behind_the_steps_take_is_told(monkeypatch, pages, severity):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4000, "SC_PHYS_PAGES": pages}.__getitem__)
    (finding,) = [finding for finding in check_run("gpt/quick", [], 2) if finding.rule == "host-memory"]
    assert finding.severity == severity
    assert finding.message.endswith(f"51.1 MB in all; {'4 GB' if severity == 'info' else '40 MB'} are here")
    waits = check_run("gpt/quick", ["checkpoint.asynchronous=false"], 2)
    assert [finding for finding in waits if finding.rule == "host-memory"] == []


def test_what_a_ring_is_on_this_backend_is_told():
    ring = "parallel.sync: NCCL gets NCCL_ALGO=Ring; on CPUs gloo's all-reduce is a ring by itself"
    assert ring in told(findings_of("parallel.sync=ring", "parallel.zero_stage=null"), "info")
    assert ring not in told(findings_of(), "info")


def test_what_needs_a_gpu_is_told_where_there_is_none():
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has an NVIDIA GPU")
    assert told(findings_of("precision.dtype=fp16"), "warning") == [
        "precision.dtype: there is no NVIDIA GPU here, and few CPUs can do fp16"
    ]


def test_quantized_communication_is_refused_where_it_would_run_without_a_gpu(capsys):
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has an NVIDIA GPU")
    asked = ["--set", "parallel.zero_stage=null", "--set", "deepspeed=zero3_quantized", "--set", "precision.dtype=fp16"]
    assert cli.main(["check", "gpt/quick", "--ranks", "8", *asked]) == 0
    assert "zero_optimization.zero_quantized_gradients" in capsys.readouterr().out
    assert cli.main(["train", "gpt/quick", "--ranks", "8", *asked]) == 2
    problems = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in problems if line.startswith("error")] == [
        "zero_optimization.zero_quantized_weights",
        "zero_optimization.zero_quantized_gradients",
    ]
    assert all("needs a GPU; there is none here" in line for line in problems if line.startswith("error"))


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
        (
            {
                "num_layers": 32,
                "hidden_size": 4096,
                "num_heads": 32,
                "num_key_value_heads": 8,
                "feed_forward_size": 14336,
                "num_experts": 8,
            },
            32000,
            46_702_792_704,  # Mixtral-8x7B
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


@pytest.mark.parametrize("has_pairs", [False, True], ids=["", "pairs"])
@pytest.mark.parametrize("changes", [{}, {"norm": "pre", "positions": "rotary"}], ids=["bert", "pre_rotary"])
def test_an_encoders_parameters_are_counted_without_building_it(changes, has_pairs):
    from bigbatch.recipes.core.models.encoder import MaskedLanguageModel

    section = EncoderSection(num_layers=2, hidden_size=32, num_heads=4, feed_forward_size=48, **changes)
    built = sum(parameter.numel() for parameter in MaskedLanguageModel(section, 101, has_pairs).parameters())
    # The last norm is where each form has one: behind the embedding or behind the layers.
    assert count_parameters(section, 101, 2 if has_pairs else 0) == built


def test_the_published_size_of_bert_base_is_met():
    # transformers' BertForMaskedLM of bert-base-uncased: 109,514,298; ours has 6 rows of padding.
    assert count_parameters(EncoderSection(), 30522) == 109_514_298 + 6 * (768 + 1)


# ------------------------------------------------------------------------------------------------- classification

TINY_ENCODER = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 64}


@pytest.fixture
def classify(here):
    """Give a function that checks a classification of the rows in rows.csv, with changes to its sections."""
    (here / "rows.csv").write_text("text,label\n" + "you won,spam\nsee you,ham\n" * 50)

    def check_classify(**changes):
        document = {
            "version": 1,
            "recipe": "classify",
            "model": {"backbone": "attention"},
            "data": {"train": ["rows.csv"], "sequence_length": 64, "tokenizer": {"kind": "wordpiece"}},
            "batch": {"global_size": 10},
            "optimizer": {"learning_rate": 0.001},
            "schedule": {"total_steps": 30},
        }
        for section, values in changes.items():
            replaces = "backbone" in values
            document[section] = values if replaces else {**document.get(section, {}), **values}
        if not document["model"].get("initialize_from"):
            document["data"]["tokenizer"]["vocabulary_size"] = 500
        (here / "run.json").write_text(json.dumps(document))
        return check_run("run.json", [], 1)

    return check_classify


def test_a_classification_is_told_its_size_and_its_steps(classify):
    findings = classify(data={"labels": ["ham", "spam"]})
    assert told(findings) == []
    assert told(findings, "info")[3:] == [
        "model: 296 k parameters",
        "data.train: about 100 rows, 10 steps an epoch, 3 epochs in all",
    ]


def test_what_is_cut_or_left_out_is_no_row_to_train_on(classify):
    source = {"path": "rows.csv", "skip_every": 10}
    findings = classify(data={"train": [source], "validation_fraction": 0.2, "test_fraction": 0.5})
    # 100 rows, nine tenths taken, half of them the test split's, a fifth of the rest the validation split's
    assert "data.train: about 36 rows, 3 steps an epoch, 8.33 epochs in all" in told(findings, "info")


def test_rows_are_counted_in_an_archive_too(classify, here):
    with zipfile.ZipFile("rows.zip", "w") as archive:
        archive.writestr("deep/down.dat", "you won\tspam\n" * 70)
    source = {"path": "rows.zip!deep/down.dat", "format": "tsv", "columns": ["text", "label"]}
    findings = classify(data={"train": [source]})
    assert told(findings) == []
    assert any("about 70 rows" in line for line in told(findings, "info"))
    assert told(classify(data={"train": [source], "test": ["rows.zip!deep/downn.csv"]})) == [
        "data.test[0]: rows.zip holds no 'deep/downn.csv'; nearest: deep/down.dat"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "text,kind\nyou won,spam\n"),
        ("x.tsv", "text\tkind\nyou won\tspam\n"),
        ("x.jsonl", '{"text": "you won", "kind": "spam"}\n'),
    ],
)
def test_a_missing_column_is_told_with_those_there(classify, here, name, content):
    (here / name).write_text(content)
    data = {"train": ["rows.csv"], "validation": [name]}
    message = f'{here}/{name} (data.validation[0]) has no column "label"; there are: "text", "kind"'
    assert told(classify(data=data)) == [f"data.label_column: {message}"]
    assert told(classify(data={**data, "train": [name], "label_column": "kind"})) == []
    assert told(classify(data={**data, "train": [name], "label_column": "kind", "text_columns": ["text", "body"]})) == [
        f'data.text_columns[1]: {here}/{name} ({where}) has no column "body"; there are: "text", "kind"'
        for where in ("data.train[0]", "data.validation[0]")
    ]


def test_a_constant_is_a_column_and_so_is_a_group_of_the_pattern(classify, here):
    (here / "good.txt").write_text("fine\n" * 10)
    (here / "both.txt").write_text("ham fine\n" * 10)
    constant = {"path": "good.txt", "format": "lines", "constants": {"label": "ham"}}
    pattern = {"path": "both.txt", "format": "lines", "pattern": "(?P<label>\\w+) (?P<text>.*)"}
    assert told(classify(data={"train": [constant, pattern]})) == []
    assert told(classify(data={"train": ["good.txt"]})) == [
        f'data.label_column: {here}/good.txt (data.train[0]) has no column "label"; there are: "text"'
    ]


def test_the_text_key_of_a_language_models_source_is_looked_for_too(here):
    (here / "rows.jsonl").write_text('{"body": "to be"}\n')
    assert told(findings_of('data.train=["rows.jsonl"]')) == [
        f'data.text_key: {here}/rows.jsonl (data.train[0]) has no column "text"; there are: "body"'
    ]


@pytest.mark.parametrize(
    "model",
    [
        {"backbone": "attention", "embedding_size": 24, "num_heads": 3},
        {"backbone": "attention", "embedding_size": 16, "num_layers": 0},
        {"backbone": "attention", "embedding_size": 16, "num_layers": 2},
        {"backbone": "rnn", "embedding_size": 12, "hidden_size": 8},
        {"backbone": "rnn", "embedding_size": 12, "hidden_size": 8, "cell": "gru", "num_layers": 3},
        {"backbone": "rnn", "embedding_size": 12, "hidden_size": 8, "bidirectional": False, "num_layers": 2},
        {"backbone": "encoder", "encoder": TINY_ENCODER},
        {"backbone": "encoder", "encoder": {**TINY_ENCODER, "norm": "pre", "positions": "rotary"}, "pooling": "mean"},
    ],
    ids=lambda model: "-".join(str(value) for value in model.values() if not isinstance(value, dict)),
)
def test_a_classifiers_parameters_are_counted_without_building_it(classify, here, model):
    from bigbatch.recipes.classify.models import build_classifier

    findings = classify(model=model, data={"labels": ["x", "y", "z"]})
    assert told(findings) == []
    config = resolve("run.json").config
    facts = {"vocabulary_size": 500, "labels": ["x", "y", "z"], "encoder": model.get("encoder")}
    built = build_classifier(config, facts, initialize=False)
    assert count_parameters(config.model, 500, 3) == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "ngram", "order": 4},
        {"kind": "rnn", "embedding_size": 12},
        {"kind": "rnn", "cell": "gru", "embedding_size": 12, "hidden_size": 20, "num_layers": 3},
    ],
)
def test_the_parameters_of_a_model_of_the_next_word_are_counted_without_building_it(here, model):
    from bigbatch.recipes.next_word.recipe import build_model

    (here / "text.txt").write_text("some words\n")
    document = {
        "version": 1,
        "recipe": "next_word",
        "model": model,
        "data": {"train": ["text.txt"], "tokenizer": {"kind": "word", "vocabulary_size": 500}},
        "batch": {"global_size": 10},
        "optimizer": {"learning_rate": 0.001},
        "schedule": {"total_steps": 30},
    }
    (here / "run.json").write_text(json.dumps(document))
    assert told(check_run("run.json", [], 1)) == []
    config = resolve("run.json").config
    built = build_model(config, {"vocabulary_size": 500, "discounts": [[0.5, 1.0, 1.5]] * 4}, initialize=False)
    assert count_parameters(config.model, 500) == sum(parameter.numel() for parameter in built.parameters())


def start_from(folder, **settings):
    return {"backbone": "encoder", "initialize_from": str(folder), **settings}


@pytest.fixture
def bert(tmp_path):
    """Write a folder as transformers does, of a BERT with 2 layers, 64 positions and 1,600 weights in two files."""
    folder = tmp_path / "bert"
    folder.mkdir()
    config = {"model_type": "bert", "max_position_embeddings": 64, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    for number, tensor in enumerate((np.zeros((99, 16), np.float16), np.zeros(16, np.float32)), 1):
        save_file({f"bert.{number}": tensor}, folder / f"model-{number}.safetensors", {"format": "pt"})
    return folder


def test_a_model_to_start_from_says_its_size_without_being_read(classify, bert):
    findings = classify(model=start_from(bert, freeze_layers=1, redraw_layers=1, keep_head=True))
    assert told(findings) == []
    assert "model: about 1.6 k parameters" in told(findings, "info")


def test_settings_that_do_not_fit_the_model_to_start_from_are_refused(classify, bert):
    assert told(classify(model=start_from(bert, freeze_layers=1, redraw_layers=2), data={"sequence_length": 65})) == [
        f"data.sequence_length: found 65; the model in {bert} has 64 positions",
        f"model.redraw_layers: 1 frozen and 2 redrawn layers are more than the 2 of the model in {bert}",
    ]


def test_settings_that_transformers_own_model_does_not_follow_are_refused(classify, bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "model_type": "distilbert"}))
    assert told(classify(model=start_from(bert, keep_head=True))) == []
    assert told(classify(model=start_from(bert, layer_decay=0.5))) == [
        "model.layer_decay: found 0.5, which has no effect on a distilbert, run by transformers"
    ]


def checkpoint_of(run, folder, tensors, model):
    folder.mkdir(parents=True)
    manifest = {"run": {"recipe": run, "model": model}, "facts": {}, "tensors": tensors}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_run_and_a_checkpoint_are_models_to_start_from(classify, here):
    tensors = {"encoder.embed.tokens.weight": {"shape": [500, 16]}, "head.bias": {"shape": [500]}}
    model = {"max_positions": 32, "num_layers": 2}
    checkpoint = checkpoint_of("bert_pretrain", here / "run/checkpoints/step_00000100", tensors, model)
    for folder in (here / "run", checkpoint):
        findings = classify(model=start_from(folder), data={"sequence_length": 32})
        assert told(findings) == []
        assert "model: about 8.5 k parameters" in told(findings, "info")
        (line,) = told(classify(model=start_from(folder), data={"sequence_length": 33}))
        assert line == f"data.sequence_length: found 33; the model in {folder} has 32 positions"


def test_a_folder_that_is_no_model_to_start_from_is_refused(classify, here):
    (here / "empty/checkpoints").mkdir(parents=True)
    gpt = checkpoint_of("gpt", here / "gpt", {"embed.tokens.weight": {"shape": [9, 9]}}, {})
    (here / "weightless").mkdir()
    (here / "weightless/config.json").write_text("{}")
    advice = "give a run or checkpoint of an encoder, or a folder that transformers has saved"
    for folder, message in (
        (here / "none", f"is not there; {advice}"),
        (here / "empty", f"holds no finished checkpoint; {advice}"),
        (gpt, "is a model of the recipe 'gpt', which has no encoder"),
        (here / "weightless", "holds no weights in safetensors files"),
    ):
        assert told(classify(model=start_from(folder))) == [f"model.initialize_from: {folder} {message}"]
    (here / "weightless/model.safetensors").write_bytes(b"not weights")
    (line,) = told(classify(model=start_from(here / "weightless")))
    assert line.endswith("weightless/model.safetensors is no safetensors file")
    (here / "weightless/config.json").write_text("[]")
    (line,) = told(classify(model=start_from(here / "weightless")))
    assert line.endswith("weightless/config.json holds no JSON object")
