import fcntl
import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from bigbatch.recipes.core.config import TableSource
from bigbatch.recipes.core.data.manifest import read_manifest, verify
from bigbatch.recipes.core.data.prepare import prepare_tokens, prepared_folder
from bigbatch.recipes.core.data.shards import TokenSamples
from bigbatch.recipes.core.errors import UserError

PREPARE = """
import sys
from bigbatch.recipes.core.config import TokenDataSection
from bigbatch.recipes.core.data.prepare import prepare_tokens
from bigbatch.recipes.core.errors import UserError
try:
    print(prepare_tokens(TokenDataSection.model_validate_json(sys.argv[1])))
except UserError as error:
    sys.exit(str(error))
assert "torch" not in sys.modules and "datasets" not in sys.modules
"""


def start(data, code=PREPARE):
    command = [sys.executable, "-W", "error", "-c", code, data.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(process):
    out, error = process.communicate(timeout=120)
    return process.returncode, out.strip(), error.strip()


def content_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts(count, seed=0):
    """Make texts of a few hundred characters."""
    generator = np.random.default_rng(seed)
    words = np.array(["the", "ship", "sails", "towards", "morning", "über", "seas,", "and", "nobody", "knows\n"])
    return [" ".join(words[generator.integers(0, 10, generator.integers(10, 120))]) for _ in range(count)]


def json_lines(path, rows):
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def stream_of(folder, split):
    manifest = read_manifest(folder)
    names = [shard.name for shard in manifest.splits[split].shards]
    return np.concatenate([np.fromfile(folder / f"{name}.bin", manifest.dtype) for name in names])


def test_shakespeare_by_characters_is_split_as_in_nanogpt(real_data, section):
    source = real_data / "tinyshakespeare" / "input.txt"
    folder = prepare_tokens(section(source, validation_fraction=0.1, validation_split="tail"), progress=False)
    text = source.read_text("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for split, expected in (("train", text[:1_003_854]), ("validation", text[1_003_854:])):
        tokens = stream_of(folder, split)
        assert len(tokens) == len(expected) + 1
        assert tokenizer.decode(tokens[:-1].tolist()) == expected
    assert len(text) - 1_003_854 == 111_540  # the two counts that nanoGPT's page gives
    assert TokenSamples(folder, "train", 256).vocabulary_size == 66


def test_shakespeare_in_gpt2_tokens_has_the_published_counts(real_data, section):
    tokenizer = {"kind": "pretrained", "path": str(real_data / "tokenizer_vocabs" / "gpt2-tokenizer.json")}
    source = real_data / "tinyshakespeare" / "input.txt"
    data = section(source, validation_fraction=0.1, validation_split="tail", tokenizer=tokenizer)
    manifest = read_manifest(prepare_tokens(data, progress=False))
    assert manifest.splits["train"].num_tokens == 301_966 + 1  # nanoGPT's page, and our end of text
    assert manifest.splits["validation"].num_tokens == 36_059 + 1
    assert manifest.end_of_text == 50_256


def test_one_file_trains_and_validates_with_rows_that_are_not_the_same(real_data, section):
    member = f"{real_data}/mr_polarity/sentence_polarity.zip!sentence_polarity/rt-polarity.pos"
    table = {"path": member, "format": "lines", "encoding": "latin-1"}
    train, validation = TableSource(**table, skip_every=10), TableSource(**table, take_every=10)
    folder = prepare_tokens(section(train, validation=(validation,)), progress=False)
    manifest = verify(folder)
    assert {name: split.num_documents for name, split in manifest.splits.items()} == {"train": 4798, "validation": 533}
    assert manifest.sources[0].path == member
    assert prepare_tokens(section(train, validation=(validation,)), progress=False) == folder
    other = TableSource(**(table | {"encoding": "cp1252"}), skip_every=10)
    assert prepare_tokens(section(other, validation=(validation,)), progress=False) != folder
    with pytest.raises(UserError, match=r"data\.validation: holds .*rt-polarity\.pos, which data\.train holds too"):
        prepare_tokens(section(TableSource(**table), validation=(validation,)), progress=False)


def test_every_document_is_found_again_at_its_start(tmp_path, section):
    rows = texts(60)
    data = section(json_lines(tmp_path / "a.jsonl", rows), shard_tokens=1000)
    folder = prepare_tokens(data, progress=False)
    manifest = verify(folder)
    shards = manifest.splits["train"].shards
    assert len(shards) > 10
    assert all(shard.num_tokens == 1000 for shard in shards[:-1])
    starts = np.concatenate([np.fromfile(folder / f"{shard.name}.idx", np.uint64) for shard in shards])
    tokens, tokenizer = stream_of(folder, "train"), AutoTokenizer.from_pretrained(folder)
    ends = [*starts[1:], len(tokens)]
    found = [tokenizer.decode(tokens[int(a) : int(b) - 1].tolist()) for a, b in zip(starts, ends, strict=True)]
    assert found == rows
    for shard, first in zip(shards, range(0, len(tokens), 1000), strict=True):
        inside = [place for place in starts if first <= place < first + shard.num_tokens]
        assert shard.num_documents == len(inside)


def test_a_repeat_finds_the_folder_at_once_and_settings_of_samples_alone_change_nothing(tmp_path, section):
    source = json_lines(tmp_path / "a.jsonl", texts(10))
    folder = prepare_tokens(section(source), progress=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare_tokens(section(source, sequence_length=99, packing="isolate"), progress=False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert prepare_tokens(section(source, shard_tokens=77), progress=False) != folder
    source.unlink()
    assert prepared_folder(section(source)) == folder
    with pytest.raises(UserError, match=r"data.prepared_dir: .* holds no data for these settings"):
        prepared_folder(section(source, text_key="other"))


def test_changed_sources_make_another_folder_and_the_old_one_stays(tmp_path, section):
    source = json_lines(tmp_path / "a.jsonl", texts(10))
    first = prepare_tokens(section(source), progress=False)
    json_lines(source, texts(11))
    second = prepare_tokens(section(source), progress=False)
    assert first != second
    assert read_manifest(first).fingerprint != read_manifest(second).fingerprint
    assert prepared_folder(section(source)) == second


def test_the_manifest_tells_what_was_read_and_what_was_left_out(tmp_path, section):
    first = json_lines(tmp_path / "a.jsonl", ["long enough", "short", "also long enough", "long enough", "", "short"])
    second = json_lines(tmp_path / "b.jsonl", ["one more of them", "also long enough"])
    data = section(first, validation=(str(second),), clean={"min_characters": 8, "deduplicate": True})
    manifest = read_manifest(prepare_tokens(data, progress=False))
    assert manifest.counts == {"read": 8, "too_short": 3, "duplicate": 2}
    assert {split: content.num_documents for split, content in manifest.splits.items()} == {"train": 2, "validation": 1}
    assert manifest.splits["validation"].num_tokens == len("one more of them") + 1
    assert [(source.path, source.size_bytes) for source in manifest.sources] == [
        (str(path), path.stat().st_size) for path in (first, second)
    ]
    assert manifest.sources[0].content_hash != manifest.sources[1].content_hash


def test_whole_documents_are_chosen_for_validation_by_their_text_alone(tmp_path, section):
    rows = list(dict.fromkeys(texts(600)))
    settings = {"validation_fraction": 0.2, "tokenizer": {"vocabulary_size": 300}}

    def chosen(rows, name):
        folder = prepare_tokens(section(json_lines(tmp_path / name, rows), **settings), progress=False)
        tokens, tokenizer = stream_of(folder, "validation"), AutoTokenizer.from_pretrained(folder)
        return set(tokenizer.decode(tokens.tolist()).split("<|endoftext|>")) - {""}

    first = chosen(rows, "a.jsonl")
    assert 0.15 < len(first) / len(rows) < 0.25
    assert chosen(rows[::-1][:300], "b.jsonl") == first & set(rows[::-1][:300])


def test_the_tail_of_each_document_validates_and_no_character_is_lost(tmp_path, section):
    rows = texts(20)
    data = section(json_lines(tmp_path / "a.jsonl", rows), validation_fraction=0.25, validation_split="tail")
    folder = prepare_tokens(data, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [
        tokenizer.decode(stream_of(folder, split).tolist()).split("<|endoftext|>")[:-1]
        for split in ("train", "validation")
    ]
    assert [head + tail for head, tail in zip(*parts, strict=True)] == rows
    assert [len(head) for head in parts[0]] == [int(0.75 * len(row)) for row in rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"clean": {"min_characters": 9999}},
            "data.train: no text is left to train on (documents: 2 read, 2 too_short",
        ),
        ({"validation_fraction": 1e-6}, "data.validation_fraction: is 1e-06, and none of 2 documents fell to it"),
        ({"validation": ("b.jsonl",), "clean": {"min_characters": 4}}, "data.validation: no text is left"),
        ({"test": ("b.jsonl",), "clean": {"min_characters": 4}}, "data.test: no text is left"),
        ({"test": ("a.jsonl",)}, "data.test: holds {folder}/a.jsonl, which data.train holds too"),
        ({"validation": ("a.jsonl",)}, "data.validation: holds {folder}/a.jsonl, which data.train holds too"),
    ],
)
def test_splits_without_text_or_with_the_same_are_refused(tmp_path, monkeypatch, section, settings, message):
    monkeypatch.chdir(tmp_path)
    json_lines(tmp_path / "a.jsonl", ["some text", "more text"])
    json_lines(tmp_path / "b.jsonl", ["abc"])
    with pytest.raises(UserError) as caught:
        prepare_tokens(section("a.jsonl", **settings), progress=False)
    assert str(caught.value).startswith(message.format(folder=tmp_path))
    assert not list(tmp_path.glob("out/*/manifest.json"))


def test_a_bad_line_deep_in_the_sources_is_told_as_such_even_while_a_tokenizer_trains(tmp_path, section):
    source = json_lines(tmp_path / "a.jsonl", texts(300))
    with source.open("a") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match=r"a.jsonl:301: is not JSON"):
        prepare_tokens(section(source, tokenizer={"vocabulary_size": 300}), progress=False)


def test_a_changed_truncated_or_unreadable_part_is_named(tmp_path, section):
    data = section(json_lines(tmp_path / "a.jsonl", texts(30)), shard_tokens=1000)
    folder = prepare_tokens(data, progress=False)
    for name, change, message in (
        ("train/shard_00002.bin", lambda b: b[:700] + bytes([b[700] ^ 1]) + b[701:], "has changed since"),
        ("train/shard_00001.idx", lambda b: b[:-1] + b"\x01", "has changed since"),
        ("train/shard_00001.idx", lambda b: b[:-8], "bytes instead of"),
        ("manifest.json", lambda b: b[:100], "is damaged"),
        ("manifest.json", lambda b: b.replace(b'"version": 1', b'"version": 9'), "is damaged"),
    ):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(change(good))
        with pytest.raises(UserError, match=message) as caught:
            verify(folder)
        assert name in str(caught.value)
        path.write_bytes(good)
    verify(folder)


@pytest.fixture
def mixed(tmp_path, section):
    """Some seven million characters in four files of three kinds, with duplicates; some seconds of work."""
    rows = texts(18_000)
    folder = tmp_path / "mixed"
    folder.mkdir()
    json_lines(folder / "a.jsonl", rows[:5000])
    json_lines(folder / "b.jsonl.gz", rows[4000:10_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": rows[10_000:14_000]}), folder / "c.parquet")
    (folder / "d.txt").write_text("\n\n".join(rows[14_000:]))
    tokenizer = {"vocabulary_size": 290, "train_characters": 20_000}
    settings = {"tokenizer": tokenizer, "clean": {"deduplicate": True}, "validation_fraction": 0.05}
    return lambda out, **more: section(
        folder, prepared_dir=str(tmp_path / out), shard_tokens=150_000, **settings, **more
    )


def journal_of(root):
    found = list(Path(root).glob("*/journal.json"))
    return json.loads(found[0].read_text()) if found else None


def kill_when(data, condition):
    process = start(data)
    while process.poll() is None:
        journal = journal_of(data.prepared_dir)
        if journal and condition(journal):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    result_of(process)
    return process.returncode


def test_a_preparation_killed_again_and_again_ends_as_if_never_disturbed(mixed):
    expected = prepare_tokens(mixed("whole"), progress=False)
    data = mixed("killed")
    kills = 0
    for files in (0, 1, 2, 3):
        code = kill_when(data, lambda journal, files=files: journal["position"]["num_files"] >= files)
        kills += code == -signal.SIGKILL
    assert kills >= 3
    root = Path(data.prepared_dir)
    assert not list(root.glob("*/manifest.json"))
    done = [root / expected.name / f"{shard['name']}.bin" for shard in journal_of(root)["writers"]["train"]["shards"]]
    assert len(done) > 5
    written = {path: path.stat().st_mtime_ns for path in done}
    folder = prepare_tokens(data, progress=False)
    assert content_of(folder) == content_of(expected)
    assert {path: path.stat().st_mtime_ns for path in done} == written  # nothing was made a second time
    assert verify(folder).counts["duplicate"] >= 1000


def test_a_full_disk_is_told_and_leaves_nothing_that_looks_finished(mixed):
    data = mixed("full")
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))\n" + PREPARE
    code, out, error = result_of(start(data, code=limited))
    assert code == 1
    assert out == ""
    assert error.splitlines()[-1].startswith("data.prepared_dir: ")
    assert "cannot be written: " in error
    assert "Traceback" not in error
    assert not list(Path(data.prepared_dir).glob("*/manifest.json"))
    folder = prepare_tokens(data, progress=False)
    assert content_of(folder) == content_of(prepare_tokens(mixed("roomy"), progress=False))


def test_two_preparations_of_the_same_do_not_collide(tmp_path, section):
    data = section(json_lines(tmp_path / "a.jsonl", texts(200)))
    folder = prepare_tokens(data, progress=False)
    (folder / "manifest.json").unlink()
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [start(data), start(data)]
        said = [process.stderr.readline() for process in processes]
        assert not (folder / "manifest.json").exists()
    results = [result_of(process) for process in processes]
    assert all(line.startswith("another process prepares ") for line in said)
    assert [result[:2] for result in results] == [(0, str(folder))] * 2
    verify(folder)


def test_memory_stays_bounded_whatever_the_size_of_the_corpus(tmp_path, section):
    words = ["".join(chr(97 + (i * 7 + j * j) % 26) for j in range(15)) for i in range(300)]
    tokenizer = tmp_path / "tokenizer.json"
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", *words])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}
    tokenizer.write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}))
    line = " ".join(words) + "\n"
    peaks = []
    code = PREPARE + "\nprint(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])"
    for name, repeats in (("small", 200), ("large", 22_000)):
        source = tmp_path / f"{name}.txt"
        with source.open("w") as file:
            file.writelines(line for _ in range(repeats))
        given = {"kind": "pretrained", "path": str(tokenizer)}
        status, out, error = result_of(start(section(source, tokenizer=given, shard_tokens=2**18), code=code))
        assert status == 0, error
        folder, peak_kib = out.splitlines()
        assert read_manifest(Path(folder)).splits["train"].num_tokens >= repeats * 300
        peaks.append(int(peak_kib) / 1024)
    assert source.stat().st_size > 100e6
    assert peaks[1] - peaks[0] < 80


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(tmp_path, section, capfd, monkeypatch):
    monkeypatch.setattr("bigbatch.recipes.core.data.progress.LINE_SECONDS", 0.0)
    prepare_tokens(section(json_lines(tmp_path / "a.jsonl", texts(10))))
    out, error = capfd.readouterr()
    assert out == ""
    assert "tokenizing: 100%, 0.0 M tokens" in error.splitlines()
