import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bigbatch.recipes.classify import recipe
from bigbatch.recipes.classify.config import ClassifyConfig
from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.tensor_file import Entry, write_tensors
from bigbatch.tools.predict import lines_as_they_come, main, shaped

TEXTS = ["you have won a prize", "see you at home", "call now to win", "what is for dinner"]


def make_run(folder, multi_label=False, **data):
    """Prepare four rows and write a checkpoint of a model with its first weights; return its parts."""
    folder.mkdir()
    labels = [["spam"], ["ham"], ["spam", "loud"], ["ham"]] if multi_label else ["spam", "ham", "spam", "loud"]
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, labels, strict=True)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    document = {
        "version": 1,
        "model": {"backbone": "attention", "embedding_size": 16, "num_heads": 2},
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "multi_label": multi_label,
            "tokenizer": {"kind": "wordpiece", "vocabulary_size": 120},
            "sequence_length": 24,
            "prepared_dir": str(folder / "prepared"),
            **data,
        },
        "batch": {"global_size": 4},
        "optimizer": {"learning_rate": 0.1},
        "schedule": {"total_steps": 1},
    }
    config = ClassifyConfig.model_validate_json(json.dumps(document))
    recipe.prepare(config)
    facts = recipe.open_data(config).facts
    torch.manual_seed(5)
    model = recipe.build_model(config, facts).eval()
    with torch.no_grad():
        model.head.weight.normal_(0, 30)  # answers that differ
    save(folder / "checkpoints" / "step_00000001", model, {"run": config.model_dump(mode="json"), "facts": facts})
    (folder / "run.json").write_text(json.dumps(config.model_dump(mode="json")))
    return model, Tokenizer.from_file(f"{facts['tokenizer']}/tokenizer.json"), facts["labels"]


def save(folder, model, state):
    """Write a checkpoint as one rank does."""
    folder.mkdir(parents=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    entries = [Entry(f"master/{name}", tensor.dtype, (tensor.numel(),)) for name, tensor in tensors.items()]
    file = write_tensors(folder / "a.safetensors", entries, (tensor.flatten() for tensor in tensors.values()))
    pieces = [[name, list(t.shape), ["a.safetensors", "master", 0, t.numel()]] for name, t in tensors.items()]
    (folder / "rank_00000.json").write_text(json.dumps({"file": file, "pieces": pieces}))
    checkpoint._commit(folder, 1, {"step": 1, **state})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    return folder, *make_run(folder)


@pytest.fixture(scope="module")
def multi_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "multi"
    return folder, *make_run(folder, multi_label=True)


def logits_of(model, tokenizer, text):
    """Run the model on a row of its own."""
    with torch.inference_mode():
        return model(torch.tensor([tokenizer.encode(text).ids]))[0]


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_text_has_the_label_and_probability_that_the_model_gives_it(run, capsys):
    folder, model, tokenizer, labels = run
    assert main([str(folder), *TEXTS]) == 0
    found = lines(capsys)
    for text, line in zip(TEXTS, found, strict=True):
        chances = logits_of(model, tokenizer, text).softmax(0)
        assert list(line) == ["text", "label", "probability"]
        assert (line["text"], line["label"]) == (text, labels[chances.argmax()])
        assert line["probability"] == pytest.approx(float(chances.max()), abs=2e-6)
    assert len({line["label"] for line in found}) > 1


def test_a_checkpoint_is_a_model_and_the_likeliest_labels_are_ranked(run, capsys):
    folder, model, tokenizer, labels = run
    main([str(folder / "checkpoints" / "step_00000001"), TEXTS[0], "--top", "2"])
    (line,) = lines(capsys)
    chances = logits_of(model, tokenizer, TEXTS[0]).softmax(0)
    best = chances.argsort(descending=True)[:2].tolist()
    assert [item["label"] for item in line["labels"]] == [labels[index] for index in best]
    assert [item["probability"] for item in line["labels"]] == pytest.approx(chances[best].tolist(), abs=2e-6)
    assert line["labels"][0] == {"label": line["label"], "probability": line["probability"]}


def test_of_any_number_of_labels_those_from_the_threshold_on_are_given(multi_run, capsys):
    folder, model, tokenizer, labels = multi_run
    main([str(folder), *TEXTS])
    main([str(folder), *TEXTS, "--top", "3"])
    found = lines(capsys)
    for text, given, ranked in zip(TEXTS, found[:4], found[4:], strict=True):
        chances = dict(zip(labels, logits_of(model, tokenizer, text).sigmoid().tolist(), strict=True))
        assert {item["label"] for item in given["labels"]} == {label for label in labels if chances[label] >= 0.5}
        assert [item["label"] for item in ranked["labels"]] == sorted(labels, key=lambda label: -chances[label])
        assert "label" not in given
    assert len({len(given["labels"]) for given in found[:4]}) > 1


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.tsv", "x.txt.gz"])
def test_a_file_is_answered_in_its_order_whatever_the_batch(run, tmp_path, capsys, name):
    import gzip

    texts = TEXTS * 3
    bodies = {
        "x.txt": "\n".join(texts),
        "x.jsonl": "\n".join(json.dumps({"body": text}) for text in texts),
        "x.csv": "id,body\n" + "\n".join(f'1,"{text}"' for text in texts),
        "x.tsv": "body\tid\n" + "\n".join(f"{text}\t1" for text in texts),
    }
    body = bodies[name.removesuffix(".gz")].encode()
    (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    column = [] if ".txt" in name else ["--text-column", "body"]
    for size in ("1", "5", "32"):
        assert main([str(run[0]), "--file", str(tmp_path / name), "--batch-size", size, *column]) == 0
    found = lines(capsys)
    assert [line["text"] for line in found] == texts * 3
    for index, line in enumerate(found):
        assert line["label"] == found[index % 4]["label"]
        assert line["probability"] == pytest.approx(found[index % 4]["probability"], abs=1e-5)


def test_a_line_that_cannot_be_taken_is_answered_in_its_place_and_counted(run, tmp_path, capsys):
    rows = [TEXTS[0], "  ", TEXTS[1], 5, "\ud800", TEXTS[2], None]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    assert main([str(run[0]), "--file", str(tmp_path / "x.jsonl")]) == 0
    shown = capsys.readouterr()
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert ["error" in line for line in found] == [False, True, False, True, True, False, True]
    assert found[1] == {"text": "  ", "error": "is empty: there is nothing to classify"}
    assert found[3] == {"text": "5", "error": "'text' is 5, not a text"}
    assert "is not Unicode" in found[4]["error"]
    main([str(run[0]), *TEXTS[:3]])
    alone = lines(capsys)
    assert [line["label"] for line in found if "label" in line] == [line["label"] for line in alone]
    assert shown.err.splitlines()[-1] == "4 of them could not be taken; their answers say why (error)"
    assert "7 texts in " in shown.err


def test_a_pipe_is_answered_while_it_is_open(run, monkeypatch, capfd):
    reader, writer = os.pipe()
    stdin = os.fdopen(reader)
    monkeypatch.setattr("sys.stdin", stdin)
    thread = threading.Thread(target=main, args=([str(run[0]), "-"],))
    thread.start()
    out = ""
    for count, text in enumerate((TEXTS[0], TEXTS[1]), 1):
        os.write(writer, f"{text}\n".encode())
        deadline = time.monotonic() + 20
        while out.count("\n") < count and time.monotonic() < deadline:
            time.sleep(0.01)
            out += capfd.readouterr().out
        assert json.loads(out.splitlines()[-1])["text"] == text
    os.close(writer)
    thread.join(20)
    assert not thread.is_alive()
    stdin.close()


def test_a_streams_lines_come_in_full_batches_and_what_is_left_at_a_pause():
    reader, writer = os.pipe()
    batches = lines_as_they_come(reader, 2)
    os.write(writer, b"a\nb\r\nc\nhalf")
    assert [item.text for item in next(batches)] == ["a", "b"]
    assert [item.text for item in next(batches)] == ["c"]  # after a moment without more
    os.write(writer, "é\n\n".encode() + b"\xff\nend")
    os.close(writer)
    rest = [item for batch in batches for item in batch]
    assert [item.text for item in rest] == ["halfé", "", "\ufffd", "end"]
    assert [item.problem for item in rest] == ["", "", "is not UTF-8: the first wrong byte is at offset 0", ""]
    os.close(reader)


def test_a_terminal_gets_a_table_and_no_control_characters(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    main([str(run[0]), "call now\x1b[31m", "win " * 100])
    first, second = capsys.readouterr().out.splitlines()
    label, chance, *_ = first.split()
    assert label in run[3]
    assert chance.endswith("%")
    assert first.endswith(r"call now\x1b[31m")
    assert len(second) == 60
    assert second.endswith("...")
    main([str(run[0]), "call now", "--format", "jsonl"])
    assert json.loads(capsys.readouterr().out)["text"] == "call now"


def test_answers_of_another_kind_are_printed_as_they_are():
    assert shaped({"start": 3, "end": 5}, 2) == {"start": 3, "end": 5}


def problem_of(*arguments):
    with pytest.raises(UserError) as raised:
        main([str(argument) for argument in arguments])
    return str(raised.value)


def test_a_mistake_is_told_in_one_line(run, tmp_path, capsys):
    folder = run[0]
    (tmp_path / "x.csv").write_text("body\nhello\n")
    (tmp_path / "empty.txt").touch()
    for arguments, told in (
        ([folder, TEXTS[0], " "], "TEXT 2: is empty: there is nothing to classify"),
        ([folder, os.fsdecode(b"\xff")], "TEXT 1: is not Unicode: half a character, or bytes"),
        ([folder, "x", "--file", "y"], "--file: is given beside the text 'x'; give one or the other"),
        ([folder, "--file", tmp_path / "no.txt"], f"--file: '{tmp_path}/no.txt' is no file, folder or glob in "),
        ([folder, "--file", tmp_path / "empty.txt"], f"--file: {tmp_path}/empty.txt is empty"),
        (
            [folder, "--file", tmp_path / "x.csv"],
            f"{tmp_path}/x.csv: has no column 'text' (--text-column); there are: 'body'",
        ),
        ([folder, "x", "--top", "0"], "bigbatch predict: argument --top: found '0'; right is a number from 1 on"),
        ([tmp_path / "none", "x"], f"{tmp_path}/none: there is no such folder; give a run folder, a checkpoint or"),
        ([tmp_path, "x"], f"{tmp_path}: has no run.json, no manifest.json and no config.json"),
    ):
        assert problem_of(*arguments).startswith(told)
    assert capsys.readouterr().out == ""


def test_a_text_that_is_too_long_is_refused_where_the_run_says_so(tmp_path):
    make_run(tmp_path / "strict", on_long_text="refuse")
    assert problem_of(tmp_path / "strict", "win " * 30).startswith("TEXT 1: has ")


def test_a_model_without_labels_is_refused_by_its_recipe(tmp_path):
    state = {"run": {"recipe": "gpt", "model": {"family": "gpt2"}}, "facts": {}}
    save(tmp_path / "checkpoint", torch.nn.Linear(1, 1), state)
    told = "is a model of the recipe 'gpt', which predicts none; right is bigbatch generate"
    assert problem_of(tmp_path / "checkpoint", "x") == f"{tmp_path}/checkpoint: {told}"
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Model"]}')
    assert "GPT2Model, which no recipe predicts with" in problem_of(tmp_path, "x")


def test_a_hugging_face_folder_answers_as_transformers_does(run, tmp_path, capsys):
    import transformers

    tokenizer = run[2]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), id2label={0: "no", 1: "yes"}, initializer_range=0.5, **sizes
    )
    torch.manual_seed(0)
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main([str(tmp_path), *TEXTS]) == 0
    for text, line in zip(TEXTS, lines(capsys), strict=True):
        with torch.inference_mode():
            chances = theirs(torch.tensor([tokenizer.encode(text).ids])).logits[0].softmax(0)
        assert line["label"] == ("no", "yes")[int(chances.argmax())]
        assert line["probability"] == pytest.approx(float(np.max(chances.numpy())), abs=1e-5)
