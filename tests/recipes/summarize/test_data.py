"""Documents as prepared: sentences, references, windows, labels, bad rows, and the real set."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.recipes.core.config import TableSource
from bigbatch.recipes.core.data.examples import read_examples
from bigbatch.recipes.core.data.rows import read_rows
from bigbatch.recipes.core.data.sources import list_files
from bigbatch.recipes.core.data.splits import prepared_splits, tell_prepared
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.summarize.config import DocumentDataSection
from bigbatch.recipes.summarize.data import prepare, references_of, sentences_of
from bigbatch.recipes.summarize.pairs import PairSamples
from bigbatch.recipes.summarize.rouge import KINDS, Rouge
from bigbatch.recipes.summarize.windows import DocumentSamples, cut_document

REAL = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
ROWS = [
    {"document": "It rained. The river rose by two metres! Was it  high?", "summary": "the river rose by two metres"},
    {"document": ["A long day", "in Bern.", " "], "summary": ["a day in Bern", ""]},
]


def section_of(folder, rows=ROWS, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "train": (str(path),),
        "tokenizer": {"kind": "wordpiece", "vocabulary_size": 120},
        "sequence_length": 24,
        "prepared_dir": str(folder / "prepared"),
    }
    return DocumentDataSection.model_validate_json(json.dumps({**values, **changes}))


def test_a_document_is_cut_where_sentences_end_or_taken_as_its_list_has_it():
    assert sentences_of("It is. Is\nit?  Yes\n\nNo e.g. this") == ["It is.", "Is it?", "Yes", "No e.g.", "this"]
    assert sentences_of(["It is. Is\nit?", "", "\t"]) == ["It is. Is it?"]
    assert sentences_of("half \ud800.") == ["half \ufffd."]
    for wrong in (None, 3, ["a", 3]):
        with pytest.raises(ValueError, match="right is a text or a list of sentences"):
            sentences_of(wrong)


def test_a_summary_is_one_text_several_references_or_the_sentences_of_one():
    assert references_of("It is. So it is.", are_sentences=False) == ["It is.\nSo it is."]
    assert references_of(["It is.", " ", "So."], are_sentences=False) == ["It is.", "So."]
    assert references_of(["It is.", " ", "So."], are_sentences=True) == ["It is.\nSo."]
    for are_sentences in (False, True):
        assert references_of([["It is.", "So."], ["Yes."]], are_sentences) == ["It is.\nSo.", "Yes."]


def test_windows_hold_the_tokens_of_their_sentences_and_what_is_right(tmp_path):
    data = section_of(tmp_path)
    samples = DocumentSamples(prepare(data), "train", data)
    assert prepared_splits(data) == next(path for path in (tmp_path / "prepared").iterdir() if path.is_dir())
    batch = samples.batch(np.array([0, 1]), np.array([0, 0]))
    tokenizer = samples.tokenizer.tokenizer
    assert (batch["places"] >= 0).sum(1).tolist() == [3, 2]
    texts, flat, kinds = [], batch["tokens"].ravel(), batch["segments"].ravel()
    for places in batch["places"]:
        for number, place in enumerate(places[places >= 0]):
            assert flat[place] == samples.tokenizer.begin_of_text
            end = place + np.flatnonzero(flat[place:] == samples.tokenizer.end_of_text)[0]
            assert set(kinds[place : end + 1]) == {number % 2}
            texts.append(tokenizer.decode(flat[place : end + 1].tolist()))
    assert texts == ["it rained.", "the river rose by two metres!", "was it high?", "a long day", "in bern."]
    assert batch["labels"].tolist() == [[0, 1, 0], [1, 1, 0]]
    assert batch["worths"][0].argmax() == 1
    assert samples.documents.texts("references", np.array([1])) == ["a day in Bern"]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 9), st.integers(3, 40))
def test_every_sentence_stands_in_one_window_and_windows_are_as_full_as_they_can_be(lengths, most, sequence_length):
    source = TableSource(path="x")
    data = DocumentDataSection(train=(source,), sequence_length=sequence_length, window_sentences=most)
    windows = cut_document(np.array(lengths), data)
    assert [place for begin, end in windows for place in range(begin, end)] == list(range(len(lengths)))
    needed = [min(length + 2, sequence_length) for length in lengths]
    for begin, end in windows:
        assert sum(needed[begin:end]) <= sequence_length
        assert 0 < end - begin <= most
        if end < len(lengths):
            assert sum(needed[begin : end + 1]) > sequence_length or end - begin == most


def test_a_sentence_longer_than_a_window_is_cut_and_token_dropout_leaves_special_tokens(tmp_path):
    data = section_of(tmp_path, sequence_length=8)
    folder = prepare(data)
    assert "sentences are longer, and cut" in DocumentSamples(folder, "train", data).described()
    samples = DocumentSamples(folder, "train", data, token_dropout=0.9, seed=1)
    ids = np.arange(samples.num_samples)
    batch = samples.batch(ids, ids * 0)
    assert batch["lengths"].max() == 8
    plain = DocumentSamples(folder, "train", data).batch(ids, ids * 0)
    changed = batch["tokens"] != plain["tokens"]
    assert set(batch["tokens"][changed]) == {samples.tokenizer.unknown}
    assert np.array_equal(samples.batch(ids, ids * 0)["tokens"], batch["tokens"])
    assert not np.array_equal(samples.batch(ids, ids * 0 + 1)["tokens"], batch["tokens"])
    special = (plain["tokens"] == samples.tokenizer.begin_of_text) | (plain["tokens"] == samples.tokenizer.end_of_text)
    assert not (changed & special).any()
    assert samples.fingerprint != DocumentSamples(folder, "train", data).fingerprint


BAD = {
    "without a sentence": ({"document": " \n", "summary": "x"}, "'document' has no sentence"),
    "without a summary": ({"document": "It is.", "summary": ["", "?!"]}, "'summary' has no summary with a word"),
    "of no right type": ({"document": {"text": "x"}, "summary": "x"}, "right is a text or a list of sentences"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_cannot_be_taken_is_told_by_its_line_or_counted(tmp_path, capsys, kind):
    row, message = BAD[kind]
    with pytest.raises(UserError) as error:
        prepare(section_of(tmp_path, [*ROWS, row]))
    assert error.value.where == f"{tmp_path / 'rows.jsonl'}:3"
    assert message in error.value.message
    assert "data.on_error 'skip' leaves such rows out" in error.value.message
    data = section_of(tmp_path, [*ROWS, row], on_error="skip")
    folder = prepare(data)
    assert read_examples(folder).splits["train"].num_rows == 2
    tell_prepared(folder, data, (), "documents that stand")
    assert f"left out: 1 {kind}" in capsys.readouterr().err


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match="no document is left to train on"):
        prepare(section_of(tmp_path, [BAD["without a sentence"][0]], on_error="skip"))


def test_pairs_are_a_document_cut_at_its_end_and_in_each_epoch_the_next_summary(tmp_path):
    rows = [*ROWS, {"document": "It is. " * 9, "summary": ["one here", "two of them there", "three"]}]
    data = section_of(tmp_path, rows, sequence_length=20, summary_tokens=5)
    folder = prepare(data)
    samples = PairSamples(folder, "train", data, begin_of_target=7)
    decode, end = samples.tokenizer.tokenizer.decode, samples.tokenizer.end_of_text
    said = []
    for epoch in range(4):
        batch = samples.batch(np.array([2, 1]), np.array([epoch, epoch]))
        for pair, (source, target) in enumerate(((rows[2], 20), (rows[1], None))):
            tokens = batch["tokens"][batch["documents"] == pair]
            assert tokens[0] == samples.tokenizer.begin_of_text
            assert tokens[-1] == end
            text = " ".join(sentences_of(source["document"])).lower()
            assert text.startswith(decode(tokens.tolist()))
            assert len(tokens) == target or decode(tokens.tolist()) == text
            of_pair = batch["target_documents"] == pair
            labels, written = batch["labels"][of_pair], batch["written"][of_pair]
            assert written.tolist() == [7, *labels[:-1]]
            assert labels[-1] == end
            assert len(labels) <= 5
        said.append(decode(batch["labels"][batch["target_documents"] == 0].tolist()))
    assert said == ["one here", "two of them", "three", "one here"]
    assert (batch["labels"] == -100).sum() == (batch["target_documents"] < 0).sum()
    assert "1 are cut at 20" in samples.described()
    dropping = PairSamples(folder, "train", data, 7, token_dropout=0.9, seed=1)
    changed = dropping.batch(np.arange(3), np.zeros(3, np.int64))
    plain = samples.batch(np.arange(3), np.zeros(3, np.int64))
    assert set(changed["tokens"][changed["tokens"] != plain["tokens"]]) == {samples.tokenizer.unknown}
    assert np.array_equal(changed["labels"], plain["labels"])
    assert dropping.fingerprint != samples.fingerprint


def test_docstrings_are_documents_whose_first_sentence_is_the_summary():
    files = list_files(["python:summaries"])
    (file,) = [file for file in files if file.path.endswith("/textwrap.py")]
    rows = [row.values for row in read_rows(file, {"document": "", "summary": ""})]
    assert rows
    assert all(row["summary"] in row["document"] and 3 <= len(row["document"]) <= 12 for row in rows)


@pytest.mark.skipif(not (REAL / "scitldr_a").is_dir(), reason=f"there is no {REAL / 'scitldr_a'}")
def test_first_and_last_sentences_of_scitldr_have_the_figures_that_are_known():
    rouge, first, last = Rouge(), [], []
    (file,) = list_files([str(REAL / "scitldr_a" / "test.jsonl")])
    for row in read_rows(file, {"source": "", "target": ""}):
        sentences = sentences_of(row.values["source"])
        references = references_of(row.values["target"], are_sentences=False)
        first.append(rouge.score(sentences[0], references))
        last.append(rouge.score(sentences[-1], references))
    assert len(first) == 618
    for found, known in ((first, (31.3, 12.3, 25.0)), (last, (24.6, 5.9, 18.5))):
        assert (100 * np.mean(found, 0)[:3]).round(1).tolist() == list(known)
    assert KINDS[:3] == ("rouge1", "rouge2", "rougeL")
