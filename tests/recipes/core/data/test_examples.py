"""Prepared folders of examples: whole or not there, read as they were written, and damage told by name."""

import fcntl
import threading

import numpy as np
import pyarrow
import pytest

from bigbatch.recipes.core.data.examples import (
    Built,
    Examples,
    Request,
    latest_examples,
    prepare_examples,
    read_examples,
    write_split,
)
from bigbatch.recipes.core.data.sources import list_files
from bigbatch.recipes.core.errors import UserError

SCHEMA = pyarrow.schema(
    [
        ("text", pyarrow.string()),
        ("tokens", pyarrow.list_(pyarrow.uint32())),
        ("label", pyarrow.int32()),
        ("origin", pyarrow.string()),
    ]
)
ROWS = [(f"text {n}", list(range(n % 5)), n % 3) for n in range(25)]


def batches(rows, origin, rows_at_once=10):
    for start in range(0, len(rows), rows_at_once):
        texts, tokens, labels = zip(*rows[start : start + rows_at_once], strict=True)
        origins = [f"{origin}:{start + place}" for place in range(len(texts))]
        arrays = [pyarrow.array(c, f.type) for c, f in zip((texts, tokens, labels, origins), SCHEMA, strict=True)]
        yield pyarrow.record_batch(arrays, schema=SCHEMA)


@pytest.fixture
def make(tmp_path):
    """Prepare ROWS as the split `train` from a source in some folder."""

    def prepare(place="a", rows=ROWS, content="raw", **settings):
        source = tmp_path / place / "raw.txt"
        source.parent.mkdir(exist_ok=True)
        if not source.exists() or source.read_text() != content:
            source.write_text(content)
        request = Request(settings, {"train": list_files([str(source)])})

        def build(folder):
            (folder / "tokenizer.json").write_text("{}")
            split = write_split(folder, "train", SCHEMA, batches(rows, source))
            return Built({"train": split}, {"rows": len(rows)})

        return prepare_examples(tmp_path / "prepared", request, build)

    return prepare


def test_rows_are_read_as_they_were_written(make):
    examples = Examples(make(), "train")
    assert (examples.num_rows, examples.facts) == (25, {"rows": 25})
    ids = np.array([24, 0, 9, 10, 10, 19])
    assert examples.texts("text", ids) == [ROWS[i][0] for i in ids]
    assert [found.tolist() for found in examples.lists("tokens", ids)] == [ROWS[i][1] for i in ids]
    assert examples.lengths("tokens").tolist() == [len(tokens) for _, tokens, _ in ROWS]
    assert examples.numbers("label").tolist() == [label for _, _, label in ROWS]


def test_the_lists_of_a_row_are_views_of_the_mapped_file(make):
    examples = Examples(make(), "train")
    (found,) = examples.lists("tokens", np.array([4]))
    assert not found.flags.owndata
    assert not found.flags.writeable


def test_the_fingerprint_follows_the_rows_and_not_where_they_come_from(make):
    first, second = make("a"), make("b")
    assert first != second
    assert Examples(first, "train").fingerprint == Examples(second, "train").fingerprint
    assert Examples(first, "train").texts("origin", np.array([0])) != Examples(second, "train").texts("origin", [0])
    other = make("a", rows=[*ROWS[:-1], ("text 24", [1], 0)], version=2)
    assert Examples(other, "train").fingerprint != Examples(first, "train").fingerprint


def test_a_folder_is_made_once_for_the_same_settings_and_sources(make, tmp_path):
    folder = make(size=1)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make(size=1, rows=[]) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    changed = make(size=1, content="other")
    assert changed not in (folder, make(size=2))
    assert latest_examples(tmp_path / "prepared", {"size": 1}) == changed
    assert read_examples(folder).sources[0].path == str(tmp_path / "a" / "raw.txt")
    with pytest.raises(UserError, match=r"data.prepared_dir: .* holds no data for these settings"):
        latest_examples(tmp_path / "prepared", {"size": 3})


def test_a_failed_preparation_leaves_no_folder_and_the_next_begins_anew(tmp_path):
    request = Request({}, {})

    def fail(folder):
        (folder / "half.arrow").write_text("half")
        raise UserError("rows:3", "is wrong")

    with pytest.raises(UserError, match="is wrong"):
        prepare_examples(tmp_path, request, fail)
    assert [path.name for path in tmp_path.iterdir()] == [f"{request.content_id}.lock"]
    (tmp_path / f"{request.content_id}.building").mkdir()  # of a process that was killed
    (tmp_path / f"{request.content_id}.building" / "half.arrow").touch()
    folder = prepare_examples(tmp_path, request, lambda stage: Built({}, {"files": [p.name for p in stage.iterdir()]}))
    assert read_examples(folder).facts == {"files": []}


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    source = tmp_path / "raw.txt"
    source.write_text("before")
    request = Request({}, {"train": list_files([str(source)])})

    def build(folder):
        source.write_text("after it")
        return Built({}, {})

    with pytest.raises(UserError, match=r"raw.txt: changed while it was read"):
        prepare_examples(tmp_path / "prepared", request, build)


def test_one_process_waits_for_another_that_prepares_the_same(tmp_path, capfd):
    request = Request({}, {})
    built = []

    def prepare():
        return prepare_examples(tmp_path, request, lambda stage: built.append(stage) or Built({}, {}))

    with (tmp_path / f"{request.content_id}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threads = [threading.Thread(target=prepare) for _ in range(2)]
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert not built
    for thread in threads:
        thread.join(10)
    assert len(built) == 1
    assert "another process prepares" in capfd.readouterr().err


def test_a_damaged_or_missing_file_is_told_by_name(make):
    folder = make()
    for name, change, message in (
        ("train.arrow", lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:], "has changed since it was written"),
        ("train.arrow", lambda b: b[:-8], "bytes instead of"),
        ("tokenizer.json", lambda b: b"[]", "has changed since it was written"),
        ("manifest.json", lambda b: b[:100], "is damaged"),
    ):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(change(good))
        for attempt in (lambda: Examples(folder, "train"), make):
            with pytest.raises(UserError, match=message) as caught:
                attempt()
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
        path.write_bytes(good)
    (folder / "train.arrow").unlink()
    with pytest.raises(UserError, match=r"train.arrow: is missing; remove"):
        Examples(folder, "train")


def test_of_a_large_folder_the_sizes_alone_are_compared(make, monkeypatch):
    folder = make()
    monkeypatch.setattr("bigbatch.recipes.core.data.examples.VERIFIED_BYTES", 10)
    path = folder / "train.arrow"
    good = path.read_bytes()
    place = good.index(b"text 7")
    path.write_bytes(good[:place] + b"TEXT 7" + good[place + 6 :])
    assert Examples(folder, "train").texts("text", np.array([7])) == ["TEXT 7"]
    path.write_bytes(good + b"x")
    with pytest.raises(UserError, match="bytes instead of"):
        Examples(folder, "train")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.prepared_dir: .*file.* cannot be written"):
        prepare_examples(tmp_path / "file" / "prepared", Request({}, {}), lambda stage: Built({}, {}))
