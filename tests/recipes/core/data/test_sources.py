import gzip
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bigbatch.recipes.core.config import TableSource
from bigbatch.recipes.core.data import rows
from bigbatch.recipes.core.data.rows import documents, hash_file, read_documents, read_rows
from bigbatch.recipes.core.data.sources import is_local, list_files, local_files, shared_file
from bigbatch.recipes.core.errors import UserError

TEXTS = ["One, two\nthree", 'She said "yes".', "Ünï\u2028cödé", ""]


def texts_of(*paths, text_key="text"):
    return [document.text for document in documents(tuple(map(str, paths)), text_key)]


def refusal(*paths, text_key="text"):
    with pytest.raises(UserError) as caught:
        texts_of(*paths, text_key=text_key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def csv_of(texts):
    return "id,text\n" + "".join(f'{i},"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(texts))


def json_lines_of(texts):
    return "".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_kind_of_file_gives_back_its_texts(tmp_path, ending):
    assert texts_of(write(tmp_path / f"a.txt{ending}", "\ufeff" + TEXTS[2])) == [TEXTS[2]]
    assert texts_of(write(tmp_path / f"a.jsonl{ending}", json_lines_of(TEXTS))) == TEXTS
    assert texts_of(write(tmp_path / f"a.csv{ending}", csv_of(TEXTS))) == TEXTS
    tsv = 'text\tid\n"an open quotation\t1\nmark is text\t2\n'
    assert texts_of(write(tmp_path / f"a.tsv{ending}", tsv)) == ['"an open quotation', "mark is text"]


def test_parquet_gives_back_its_texts_and_a_null_is_an_empty_text(tmp_path):
    table = pyarrow.table({"n": range(5), "text": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts_of(tmp_path / "a.parquet") == [*TEXTS, ""]


def test_real_files_hold_what_other_readers_find(real_data):
    c4 = real_data / "wiki_c4_demo" / "c4_demo.jsonl"
    assert texts_of(c4) == datasets.load_dataset("json", data_files=str(c4), split="train")["text"][:]
    shakespeare = real_data / "tinyshakespeare" / "input.txt"
    assert texts_of(shakespeare) == [shakespeare.read_text("utf-8")]
    german = real_data / "multi30k" / "val.de.gz"
    assert len(gzip.decompress(german.read_bytes()).decode().splitlines()) == 1014  # the set's published size


def test_folders_and_globs_are_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.jsonl", ".cache/x.txt", "a/readme.md"):
        write(tmp_path / name, json_lines_of([name]) if name.endswith("jsonl") else name)
    assert texts_of(tmp_path) == ["a/b/c.jsonl", "a/z.txt", "b.txt"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["a/z.txt", "b.txt"]
    assert texts_of(tmp_path / "b.*", tmp_path / "a" / "z.txt") == ["b.txt", "a/z.txt"]


def test_a_relative_path_is_looked_for_here_and_then_in_the_data_folder(tmp_path, monkeypatch):
    write(tmp_path / "root" / "in_root.txt", "far")
    write(tmp_path / "here" / "in_both.txt", "near")
    write(tmp_path / "root" / "in_both.txt", "far")
    monkeypatch.chdir(tmp_path / "here")
    assert "$BIGBATCH_DATA (not set)" in refusal("in_root.txt")
    monkeypatch.setenv("BIGBATCH_DATA", str(tmp_path / "root"))
    assert texts_of("in_root.txt", "in_both.txt") == ["far", "near"]
    assert texts_of("in_r*.txt") == ["far"]


def test_a_large_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "TEXT_BLOCK_BYTES", 1000)
    text = "".join(f"Zeile {i} – größer\n" for i in range(500))
    cut = texts_of(write(tmp_path / "a.txt", text))
    assert "".join(cut) == text
    assert len(cut) > 5
    assert all(part.endswith("\n") for part in cut)
    endless = "ä€" * 2000
    assert "".join(texts_of(write(tmp_path / "b.txt", endless))) == endless


def test_what_is_missing_or_empty_or_unknown_is_refused_by_its_place_in_the_settings(tmp_path):
    good = write(tmp_path / "good.txt", "x")
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "pdf" / "a.pdf", "x")
    assert refusal(good, tmp_path / "no.txt").startswith("data.train[1]: ")
    assert "empty.txt is empty" in refusal(tmp_path / "empty.txt")
    assert "a.pdf is no .txt, .jsonl" in refusal(tmp_path / "pdf" / "a.pdf")
    assert "holds no .txt, .jsonl" in refusal(tmp_path / "pdf")


def test_text_that_is_not_utf8_is_refused_by_file_and_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "TEXT_BLOCK_BYTES", 64)
    wrong = b"\xef\xbb\xbf" + "größer\n".encode() * 40
    place = len(wrong) + 2
    wrong += b"ab\xffcd\n" + b"more\n" * 30
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "a.csv"):
        content = wrong if ".txt" in name else b"text\n" + wrong if "csv" in name else wrong[place - 2 :]
        expected = {"a.csv": place + 5, "a.jsonl": 2}.get(name, place)
        assert refusal(write(tmp_path / name, content)).endswith(f"the first wrong byte is at offset {expected}")
    torn = "größer ö".encode()[:-1]
    assert refusal(write(tmp_path / "b.txt", torn)).endswith(f"offset {len(torn) - 1}")


def test_bad_rows_are_refused_by_file_and_line(tmp_path):
    assert ":3: is not JSON" in refusal(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"\n'))
    assert ":1: is [1, 2]" in refusal(write(tmp_path / "b.jsonl", "[1, 2]\n"))
    assert ":2: 'text' is 5, not a text" in refusal(write(tmp_path / "c.jsonl", '{"text": null}\n{"text": 5}\n'))
    assert ":3: has 3 fields; the header names 2" in refusal(write(tmp_path / "a.csv", "id,text\n1,a\n2,b,c\n"))
    assert ":2: is not a row" in refusal(write(tmp_path / "b.csv", 'id,text\n1,"never closed\n'))


def test_a_missing_column_is_refused_with_the_columns_there_are(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "body": ["b"]}), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", '{"title": "a", "body": "b"}\n')
    write(tmp_path / "a.csv", "title,body\na,b\n")
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        message = refusal(tmp_path / name)
        assert "no column 'text' (data.text_key); there are: 'title', 'body'" in message
        assert texts_of(tmp_path / name, text_key="body") == ["b"]


def test_damaged_files_are_refused(tmp_path):
    whole = gzip.compress(b"text " * 10_000)
    (tmp_path / "a.txt.gz").write_bytes(whole[:-20])
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip at all")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet at all PAR1")
    for name in ("a.txt.gz", "b.txt.gz", "c.parquet"):
        assert f"{name}: cannot be read: " in refusal(tmp_path / name)


def test_hugging_face_folders_are_read_saved_or_raw(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    split = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(4))})
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": split, "test": split.select([1])}).save_to_disk(tmp_path / "two")
    write(tmp_path / "raw" / "train.jsonl", json_lines_of(TEXTS))
    assert texts_of(f"hf:{tmp_path}/one") == TEXTS
    assert texts_of(f"hf:{tmp_path}/two") == TEXTS
    assert texts_of(f"hf:{tmp_path}/two::test") == [TEXTS[1]]
    assert texts_of(f"hf:{tmp_path}/raw") == TEXTS
    assert texts_of(f"hf:{tmp_path}/raw::train[1:3]") == TEXTS[1:3]
    assert "no column 'body'" in refusal(f"hf:{tmp_path}/one", text_key="body")
    assert "cannot be loaded" in refusal(f"hf:{tmp_path}/two::nowhere")


def test_a_hub_data_set_that_is_not_cached_is_refused_in_one_line_without_a_network(tmp_path):
    code = (
        "from bigbatch.recipes.core.data.sources import list_files\n"
        "from bigbatch.recipes.core.errors import UserError\n"
        "try: list_files(('hf:nobody/nothing',))\n"
        "except UserError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("data.train[0]: the data set 'hf:nobody/nothing' cannot be loaded: ")
    assert "without a network" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_every_machine_has_some_megabytes_of_english_and_always_the_same():
    files = list_files(("python:stdlib",))
    found = [document for file in files for document in read_documents(file)]
    characters = sum(len(document.text) for document in found)
    assert 1e6 < characters < 5e6
    assert len(found) > 400
    assert any("An assert statement" in document.text or '"assert" statement' in document.text for document in found)
    argparse = next(document.text for document in found if document.origin.endswith("/argparse.py"))
    assert "Command-line parsing library" in argparse
    assert "def " not in argparse.splitlines()[0]
    assert [file.path for file in files] == [file.path for file in list_files(("python:stdlib",))]
    assert not any("/test/" in file.path for file in files)


def test_documents_say_how_far_their_file_is_read(tmp_path):
    write(tmp_path / "a.jsonl.gz", json_lines_of([random.Random(i).randbytes(32).hex() for i in range(20_000)]))
    fractions = [document.file_fraction for document in documents((str(tmp_path / "a.jsonl.gz"),))]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.6
    assert fractions[-1] == 1.0


def test_a_file_that_changed_since_it_was_listed_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "before")
    (file,) = list_files((str(path),))
    before = hash_file(file)
    path.write_text("after it")
    with pytest.raises(UserError, match="changed while it was read"):
        hash_file(file)
    assert hash_file(list_files((str(path),))[0]) != before


def rows_of(*columns, **table):
    """Return the values of some columns in every row of a source."""
    wanted = {name: f"data.{name}" for name in columns}
    found = [row for file in list_files([TableSource(**table)]) for row in read_rows(file, wanted)]
    return [tuple(row.values[name] for name in columns) for row in found]


def table_refusal(*columns, **table):
    with pytest.raises(UserError) as caught:
        rows_of(*(columns or ("text",)), **table)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_table_without_a_header_and_a_known_ending_is_read_as_its_source_says(tmp_path, real_data):
    plain = str(write(tmp_path / "table", "ham\tsee you\nspam\tWIN\n"))
    assert rows_of("text", "label", path=plain, format="tsv", columns=("label", "text")) == [
        ("see you", "ham"),
        ("WIN", "spam"),
    ]
    compressed = str(write(tmp_path / "table.gz", 'a,"b, c"\n'))
    assert rows_of("y", path=compressed, format="csv", columns=("x", "y")) == [("b, c",)]
    assert ":1: has 2 fields; `columns` names 3" in table_refusal(path=plain, format="tsv", columns=("text", "b", "c"))
    assert "there are: 'ham', 'see you'; `columns` names them" in table_refusal(path=plain, format="tsv")
    sms = str(real_data / "sms_spam" / "SMSSpamCollection")
    found = rows_of("label", "text", path=sms, format="tsv", columns=("label", "text"))
    assert [sum(label == name for label, _ in found) for name in ("ham", "spam")] == [4827, 747]  # as its readme counts


def test_lines_are_rows_and_a_pattern_names_their_columns(tmp_path, real_data):
    plain = str(write(tmp_path / "a.log", "one\r\n\ntwo \u2028 still two"))
    assert rows_of("text", path=plain, format="lines") == [("one",), ("",), ("two \u2028 still two",)]
    wrong = table_refusal(path=plain, format="lines", pattern=r"(?P<text>[a-z]+)")
    assert wrong.startswith(f"{plain}:2: is '', which the pattern")
    assert "no column 'label' (data.label); there are: 'text'" in table_refusal("label", path=plain, format="lines")
    archive = real_data / "trec_qc" / "qc.zip"
    pattern = r"(?P<label>[A-Z]+):(?P<fine>\w+) (?P<text>.*)"
    table = {"path": f"{archive}!qc/train.txt", "format": "lines", "encoding": "latin-1", "pattern": pattern}
    found = rows_of("label", "text", **table)
    with zipfile.ZipFile(archive) as opened:
        lines = opened.read("qc/train.txt").decode("latin-1").split("\n")[:-1]
    assert [f"{label}:{text}" for label, text in found] == [
        line.split(":", 1)[0] + ":" + line.split(" ", 1)[1] for line in lines
    ]
    assert len(found) == 5452  # as published
    assert len({label for label, _ in found}) == 6


def test_a_file_in_an_archive_reads_like_the_file_itself(tmp_path):
    names = ("a/rows.jsonl", "a/rows.csv", "text.txt")
    contents = (json_lines_of(TEXTS), csv_of(TEXTS), "plain")
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in zip(names, contents, strict=True):
            archive.writestr(name, content)
        archive.writestr("packed.jsonl.gz", gzip.compress(json_lines_of(TEXTS).encode()))
        archive.writestr("a.parquet", b"PAR1")
    for name, content in zip(names, contents, strict=True):
        inside = list_files((f"{tmp_path}/all.zip!{name}",))[0]
        outside = list_files((str(write(tmp_path / name, content)),))[0]
        assert [document.text for document in read_documents(inside)] == [d.text for d in read_documents(outside)]
        assert inside.size_bytes == outside.size_bytes
        assert list(read_documents(inside))[-1].file_fraction == 1.0
        assert hash_file(inside) == hash_file(inside)
    assert texts_of(tmp_path / "all.zip!packed.jsonl.gz") == TEXTS
    assert local_files(f"{tmp_path}/all.zip!text.txt") == [tmp_path / "all.zip"]
    assert "holds no 'text.txd'; nearest: text.txt" in table_refusal(path=f"{tmp_path}/all.zip!text.txd", format="txt")
    assert "a.parquet is no .txt, .jsonl" in refusal(tmp_path / "all.zip!a.parquet")
    assert "unpack it" in refusal(tmp_path / "all.zip!a.parquet")
    assert "cannot be read: " in refusal(write(tmp_path / "no.zip", "none").with_name("no.zip!a.txt"))
    assert f"'{tmp_path}/none.zip!a.txt' is no file" in refusal(tmp_path / "none.zip!a.txt")
    damaged = bytearray((tmp_path / "all.zip").read_bytes())
    damaged[50] ^= 255
    (tmp_path / "all.zip").write_bytes(damaged)
    assert "rows.jsonl: cannot be read: " in refusal(tmp_path / "all.zip!a/rows.jsonl")


def test_other_encodings_are_read_and_a_wrong_byte_is_told_with_the_encoding(tmp_path):
    for encoding in ("latin-1", "cp1252", "utf-8-sig", "shift_jis"):
        expected = "日本ソ\n語\n" if encoding == "shift_jis" else "größer\nkleiner\n"
        content = expected.encode(encoding)
        path = str(write(tmp_path / f"{encoding}.txt", content))
        assert rows_of("text", path=path, encoding=encoding) == [(expected,)]
        lines = [(line,) for line in expected.splitlines()]
        assert rows_of("text", path=path, encoding=encoding, format="lines") == lines
        header = "text\n".encode(encoding) + content.removeprefix(b"\xef\xbb\xbf")
        rows = rows_of("text", path=str(write(tmp_path / "a.csv", header)), encoding=encoding)
        assert rows == lines
    path = str(write(tmp_path / "a.txt", b"ab\x81"))
    assert table_refusal(path=path, encoding="cp1252").endswith("is not CP1252: the first wrong byte is at offset 2")


def test_constants_are_further_columns(tmp_path):
    path = str(write(tmp_path / "a.jsonl", json_lines_of(TEXTS)))
    assert rows_of("label", "id", path=path, constants={"label": "good"}) == [("good", i) for i in range(4)]
    text = str(write(tmp_path / "a.txt", "whole"))
    assert rows_of("text", "label", path=text, constants={"label": "good"}) == [("whole", "good")]


def test_rows_taken_and_rows_skipped_make_up_the_file(tmp_path, real_data):
    path = str(write(tmp_path / "a.txt", "".join(f"{n}\n" for n in range(1, 26))))
    taken = [int(text) for (text,) in rows_of("text", path=path, format="lines", take_every=10)]
    left = [int(text) for (text,) in rows_of("text", path=path, format="lines", skip_every=10)]
    assert taken == [10, 20]
    assert sorted(taken + left) == list(range(1, 26))
    both = rows_of("text", path=path, format="lines", take_every=4, skip_every=8)
    assert both == [("4",), ("12",), ("20",)]
    member = f"{real_data}/mr_polarity/sentence_polarity.zip!sentence_polarity/rt-polarity.pos"
    table = {"path": member, "format": "lines", "encoding": "latin-1"}
    assert [len(rows_of("text", **table, **{key: 10})) for key in ("take_every", "skip_every")] == [533, 4798]


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ({}, {}, True),
        ({"take_every": 10}, {"skip_every": 10}, False),
        ({"take_every": 10}, {"skip_every": 5}, False),
        ({"take_every": 10}, {"skip_every": 3}, True),
        ({"take_every": 10}, {"take_every": 3}, True),
        ({"take_every": 2, "skip_every": 4}, {"take_every": 4}, False),
        ({"skip_every": 2}, {"skip_every": 3}, True),
    ],
)
def test_two_lists_may_hold_a_file_when_they_take_different_rows(tmp_path, first, second, shared):
    path = write(tmp_path / "a.txt", "".join(f"{n}\n" for n in range(1, 61)))
    tables = [TableSource(path=str(path), format="lines", **options) for options in (first, second)]
    lists = [list_files([table]) for table in tables]
    common = set.intersection(*({row.origin for row in read_rows(files[0], {"text": ""})} for files in lists))
    assert bool(common) == shared
    assert (shared_file(*lists) == str(path)) == shared


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.jsonl", {"columns": ("a",)}, "data.train[0].columns: has no effect on format 'jsonl'; remove it"),
        ("a.csv", {"pattern": "(?P<text>.*)"}, "data.train[0].pattern: has no effect on format 'csv'"),
        ("a.txt", {"take_every": 2}, "data.train[0].take_every: has no effect on format 'txt'"),
        ("a.parquet", {"encoding": "latin-1"}, "data.train[0].encoding: has no effect on format 'parquet'"),
        ("a.csv", {"encoding": "latin-x"}, "data.train[0].encoding: 'latin-x' is no encoding that Python knows"),
        ("a.csv", {"encoding": "hex"}, "data.train[0].encoding: 'hex' is no encoding that Python knows"),
        ("a.csv", {"encoding": "utf-16"}, "data.train[0].encoding: 'utf-16' has line ends of several bytes"),
        ("a.txt", {"format": "lines", "pattern": "("}, "data.train[0].pattern: '(' is no regular expression: "),
        ("a.txt", {"format": "lines", "pattern": ".*"}, "data.train[0].pattern: '.*' names no column"),
        ("a.csv", {"take_every": 9, "skip_every": 3}, "data.train[0].skip_every: is 3: it leaves out all"),
    ],
)
def test_options_without_effect_or_sense_are_refused_by_their_place(tmp_path, name, options, message):
    path = write(tmp_path / name, "text\n")
    assert table_refusal(path=str(path), **options).startswith(message)


def test_numbers_of_a_data_sets_own_classes_become_their_names(tmp_path):
    one, many = datasets.ClassLabel(names=["bad", "good"]), datasets.List(datasets.ClassLabel(names=["a", "b"]))
    features = datasets.Features({"text": datasets.Value("string"), "one": one, "many": many})
    content = {"text": ["x", "y", "z"], "one": [1, 0, -1], "many": [[0, 1], [], None]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "set")
    found = rows_of("one", "many", path=f"hf:{tmp_path}/set")
    assert found[:2] == [("good", ["a", "b"]), ("bad", [])]
    assert found[2][0] is None
    assert not found[2][1]


def test_finding_files_needs_the_base_install_alone(tmp_path):
    path = write(tmp_path / "a.zip", "x")
    code = (
        "import sys\n"
        "for name in ('pyarrow', 'xxhash', 'numpy', 'torch', 'datasets', 'tokenizers'): sys.modules[name] = None\n"
        "from bigbatch.recipes.core.data.sources import local_files\n"
        f"print(local_files({str(path) + '!x'!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == f"{[path]!r}\n"
    assert [is_local(source) for source in ("hf:a", "python:stdlib", TableSource(path="a"))] == [False, False, True]
    assert local_files("hf:a") == []
    assert local_files(str(tmp_path)) == []
    write(tmp_path / "b.any", "x")
    assert local_files(TableSource(path=str(tmp_path), format="lines")) == [path, tmp_path / "b.any"]
    assert local_files(str(tmp_path / "none*")) == []
    assert local_files(str(tmp_path / "*.any")) == [Path(tmp_path / "b.any")]


def test_docstrings_come_with_what_they_describe():
    (file,) = [file for file in list_files(("python:docstrings",)) if file.path.endswith("/graphlib.py")]
    rows = [row.values for row in read_rows(file, {"text": "data.text_columns[0]", "kind": "data.label_column"})]
    texts = {row["text"].splitlines()[0]: row["kind"] for row in rows}
    assert texts["Provides functionality to topologically sort a graph of hashable nodes"] == "class"
    assert texts["Mark the graph as finished and check for cycles in the graph."] == "function"
    assert sum(row["kind"] == "class" for row in rows) == 2
