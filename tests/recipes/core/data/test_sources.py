import gzip
import json
import random
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bigbatch.recipes.core.data import sources
from bigbatch.recipes.core.data.sources import documents, hash_file, list_files, read_documents
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
    monkeypatch.setattr(sources, "TEXT_BLOCK_BYTES", 1000)
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
    monkeypatch.setattr(sources, "TEXT_BLOCK_BYTES", 64)
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
