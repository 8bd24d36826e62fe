"""Sentences of every source, what stands in them to the character, windows, and what cannot be taken."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.extract.config import EncoderBackboneSection, ExtractConfig, ExtractDataSection
from bigbatch.recipes.extract.data import around, cut_words, open_split, prepare
from bigbatch.recipes.extract.features import pair_features, shape, word_features
from bigbatch.recipes.extract.sentences import BadTagError, entities_of_tags, unmarked, words_of

REAL = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
CONLL = "Ada\tB-person\nLin\tI-person\nleft\tO\n\t\nBern\tB-place\n.\tO\n"
SEMEVAL = (
    '1\t"An <e1>ear</e1> of an <e2>elephant</e2>."\nPart(e1,e2)\nComment: none\n\n2\t"<e1>A</e1> <e2>b</e2>"\nOther\n'
)


def config_of(folder, task, text, form="conll", backbone="words", **changes):
    path = folder / "data.txt"
    path.write_text(text)
    document = {
        "version": 1,
        "model": {"backbone": "words"} if backbone == "words" else {"backbone": "encoder", "encoder": {}},
        "data": {
            "task": task,
            "train": [{"path": str(path), "format": form}],
            "tokenizer": {"kind": "wordpiece" if backbone == "encoder" else "word", "vocabulary_size": 60},
            "sequence_length": 24,
            "prepared_dir": str(folder / "prepared"),
            **changes,
        },
        "batch": {"global_size": 1},
        "optimizer": {"learning_rate": 1.0},
        "schedule": {"total_steps": 1},
    }
    return ExtractConfig.model_validate_json(json.dumps(document))


def opened(config, split="train"):
    return open_split(prepare(config.data), split, config)


def whole(samples):
    ids = np.arange(samples.num_samples)
    return samples.batch(ids, np.zeros_like(ids))


def test_columns_become_words_and_tags(tmp_path, capsys):
    samples = opened(config_of(tmp_path, "entities", CONLL))
    assert samples.examples.table["text"].to_pylist() == ["Ada Lin left", "Bern ."]
    assert samples.facts["labels"] == ["O", "B-person", "I-person", "B-place", "I-place"]
    batch = whole(samples)
    assert batch["labels"].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert batch["word_counts"].tolist() == [3, 2]
    assert bytes(batch["characters"][0, 2][:4].tolist()) == b"left"
    assert "train: 2 sentences, 5 words, 2 entities" in capsys.readouterr().err


def test_marked_texts_become_words_and_places(tmp_path):
    samples = opened(config_of(tmp_path, "relations", SEMEVAL, "semeval"))
    assert samples.examples.table["text"].to_pylist() == ["An ear of an elephant.", "A b"]
    batch = whole(samples)
    assert batch["marks"].tolist() == [[1, 2, 4, 5], [0, 1, 1, 2]]
    assert [samples.facts["labels"][label] for label in batch["labels"]] == ["Part(e1,e2)", "Other"]


def test_spans_of_texts_take_the_words_that_they_touch_and_lists_of_tags_are_read(tmp_path):
    rows = [
        {"text": "Zürich-West grows.", "entities": [{"start": 0, "end": 6, "type": "place"}]},
        {"text": "It does.", "entities": []},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert whole(opened(config_of(tmp_path, "entities", text, "jsonl")))["labels"].tolist() == [
        [1, 0, 0, 0, 0],
        [0] * 5,
    ]
    row = {"tokens": ["New", "Ulm"], "ner": ["I-place", "I-place"]}
    columns = {"tokens_column": "tokens", "tags_column": "ner", "scheme": "iob1"}
    assert whole(opened(config_of(tmp_path, "entities", json.dumps(row), "jsonl", **columns)))["labels"].tolist() == [
        [1, 2]
    ]
    pair = {
        "text": "Ada of Bern",
        "entities": [{"start": 7, "end": 11}, {"start": 0, "end": 3}],
        "relation": "r(e2,e1)",
    }
    text = "".join(json.dumps({**pair, "relation": name}) + "\n" for name in ("r(e2,e1)", "Other"))
    samples = opened(config_of(tmp_path, "relations", text, "jsonl", entities_column="entities"))
    assert whole(samples)["marks"][0].tolist() == [2, 3, 0, 1]


def test_an_encoder_sees_each_word_by_its_first_token_and_markers_around_a_pair(tmp_path):
    samples = opened(config_of(tmp_path, "relations", SEMEVAL, "semeval", "encoder"))
    batch = whole(samples)
    first = batch["firsts"][1]
    spelled = [samples.tokenizer.tokenizer.id_to_token(token) for token in batch["tokens"].flatten()[first:]]
    assert spelled[: spelled.index("[SEP]") + 1] == ["[CLS]", "$", "a", "$", "#", "b", "#", "[SEP]"]
    words = [
        samples.tokenizer.tokenizer.id_to_token(batch["tokens"].flatten()[place]) for place in batch["places"][1][:2]
    ]
    assert words == ["a", "b"]


def test_a_long_sentence_is_read_in_parts_that_leave_no_word_out(tmp_path):
    text = "".join(f"w{number}\t{'B-x' if number == 3 else 'I-x' if number == 4 else 'O'}\n" for number in range(11))
    config = config_of(tmp_path, "entities", text, sequence_length=4)
    batch = whole(opened(config))
    assert batch["begins"].tolist() == [0, 4, 8]
    assert batch["labels"].tolist() == [[0, 0, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["word_counts"].tolist() == [4, 4, 3]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.data())
@settings(max_examples=50)
def test_windows_are_full_and_those_of_a_pair_hold_it(counts, data):
    section = ExtractDataSection(task="entities", train=("x",), sequence_length=18)
    config = ExtractConfig.model_construct(model=EncoderBackboneSection(backbone="encoder"), data=section)
    spans = cut_words(np.array(counts), config)
    assert [begin for begin, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, len(counts))
    for begin, stop in spans:
        assert sum(counts[begin:stop]) <= 16 or stop == begin + 1
        assert stop == len(counts) or sum(counts[begin : stop + 1]) > 16
    first = data.draw(st.integers(0, len(counts) - 1))
    if counts[first] <= 12:
        begin, stop = around(np.array(counts), first, first + 1, config, "x")
        assert begin <= first < stop
        assert sum(counts[begin:stop]) <= 12


BAD_COLUMNS = [
    ("Ada\tB-person\nLin\tx\tI-person\n", 2, "has 3 columns; right is 2, as the first line of the file", "columns"),
    ("Ada\tB-person\n\nBern\n", 3, "has 1 columns; right is 2", "columns"),
    ("Ada\tB-person\nBern\tI-place\n", 2, "has 'I-place' behind 'B-person'; right is B-place", "bad tag"),
    ("Ada\tO\nLin\tI-person\n", 2, "right is B-person; data.scheme 'iob1' takes it", "bad tag"),
    ("Ada\tperson\n", 1, "has the tag 'person'; right is O, B-type or I-type", "bad tag"),
    ("a\tO\n" * 2001, 1, "begins a sentence that has no end after 2000 words; right is a blank line", "no end"),
]


@pytest.mark.parametrize(("text", "line", "message", "kind"), BAD_COLUMNS)
def test_bad_columns_are_told_with_their_line_or_left_out_and_counted(tmp_path, capsys, text, line, message, kind):
    with pytest.raises(UserError) as raised:
        prepare(config_of(tmp_path, "entities", text).data)
    assert str(raised.value).startswith(f"{tmp_path}/data.txt:{line}: ")
    assert message in str(raised.value)
    assert str(raised.value).endswith("data.on_error 'skip' leaves such rows out")
    assert "\n" not in str(raised.value)
    samples = opened(config_of(tmp_path, "entities", f"{text}\n{CONLL}", on_error="skip"))
    assert samples.examples.num_rows == (3 if "\n\n" in text else 2)
    assert f"left out: 1 {kind}" in capsys.readouterr().err


def spans(*places, **more):
    return {"text": "Ada Lin left Bern", "entities": [{"start": a, "end": b, "type": "x"} for a, b in places], **more}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("entities", spans((0, 7), (4, 12)), "has the entities 'Ada Lin' and 'Lin left', which share a word"),
        ("entities", spans((5, 50)), "has an entity at characters 5 to 50 of a text with 17"),
        ("entities", spans((3, 4)), "has the entity ' ', which has no word"),
        ("entities", spans((0, 3)) | {"entities": "Ada"}, "has 'Ada' for entities; right is a list of"),
        ("entities", {"text": 3, "entities": []}, "'text' is 3, not a text"),
        ("entities", {"text": " ", "entities": []}, "has no word"),
        ("relations", {"text": "<e1>Ada</e1> left", "relation": "r"}, "has <e2> 0 times; right is one <e1>...</e1>"),
        ("relations", {"text": "<e1>Ada <e2>left</e1></e2>", "relation": "r"}, "has the markers <e1> <e2> </e1> </e2>"),
        ("relations", {"text": "<e1>Ada</e1> <e2>left</e2>", "relation": ""}, "has no relation; right is a name"),
        ("relations", {"text": "<e1></e1> <e2>left</e2>", "relation": "r"}, "has the entity '', which has no word"),
    ],
)
def test_bad_rows_of_tables_are_told_with_their_line(tmp_path, task, row, message):
    with pytest.raises(UserError, match=r"data.txt:1: ") as raised:
        prepare(config_of(tmp_path, task, json.dumps(row), "jsonl").data)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_type_that_no_training_row_has_is_refused_or_left_out(tmp_path, capsys):
    (tmp_path / "test.conll").write_text("Oslo\tB-city\n\nBern\tB-place\n")
    test = [{"path": str(tmp_path / "test.conll"), "format": "conll"}]
    with pytest.raises(UserError, match=r"test.conll:1: has an entity of the type 'city', which no training row has"):
        prepare(config_of(tmp_path, "entities", CONLL, test=test).data)
    assert opened(config_of(tmp_path, "entities", CONLL, test=test, on_error="skip"), "test").num_samples == 1
    assert "left out: 1 unseen type" in capsys.readouterr().err


def test_tags_mean_what_conlleval_says():
    from seqeval.metrics.sequence_labeling import get_entities

    tags = ["I-x", "I-x", "B-x", "O", "I-y", "I-x", "B-y", "I-y"]
    ours = [(entity.kind, entity.first, entity.stop - 1) for entity in entities_of_tags(tags)]
    assert ours == get_entities(tags)
    with pytest.raises(BadTagError):
        entities_of_tags(tags, "iob2")


def test_markers_are_taken_out_to_the_character():
    assert unmarked("a <e2>bc</e2> d<e1>e</e1>.") == ("a bc de.", [(6, 7), (2, 4)])
    text = "See https://x.org/a?b=1 @ada #one O'Neil 3.5"
    assert [text[slice(*span)] for span in words_of(text)] == [
        *("See", "https://x.org/a?b=1", "@ada", "#one", "O", "'", "Neil", "3", ".", "5")
    ]


def test_features_name_what_stands_around():
    (found,) = [set(features) for features in word_features(["McDonald"])]
    assert {"w McDonald", "p3 mcd", "s2 ld", "h0 XxXx", "-1 <", "1 >"} <= found
    assert shape("USB-3.0b") == "X-9.9x"
    pair = pair_features(["The", "ear", "of", "an", "elephant", "."], (1, 2), (4, 5))
    assert {"b2 of an", "1 ear", "2 elephant", "all of an", "n 2", "l1 the", "r1 ."} <= set(pair)
    turned = pair_features(["The", "ear", "of", "an", "elephant", "."], (4, 5), (1, 2))
    assert set(turned) == {f"t{feature}" for feature in pair}


def test_token_dropout_follows_from_seed_sample_and_epoch(tmp_path):
    config = config_of(tmp_path, "entities", "".join(f"w{number}\tB-x\n" for number in range(20)))
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"token_dropout": 0.5})})
    samples, ids = opened(config), np.array([0])
    unknown = samples.tokenizer.unknown
    found = [samples.batch(ids, np.array([epoch]))["pieces"] for epoch in (0, 0, 1)]
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()
    assert 3 < (found[0] == unknown).sum() < 17


@pytest.mark.parametrize(("source", "task"), [("python:entities", "entities"), ("python:relations", "relations")])
def test_pythons_own_functions_have_entities_and_relations(source, task):
    from bigbatch.recipes.core.data.sources import list_files
    from bigbatch.recipes.extract.sentences import read_sentences

    section = ExtractDataSection(task=task, train=(source,), sequence_length=10, entities_column="entities")
    (file,) = [file for file in list_files([source]) if Path(file.path).name == "tempfile.py"]
    rows = {row.text.split("(")[0]: row for row in read_sentences(section, [file], Counter())}
    row = rows["mkdtemp"]
    words = [row.text[begin:end] for begin, end in row.words]
    named = [("".join(words[entity.first : entity.stop]), entity.kind) for entity in row.entities]
    if task == "entities":
        assert named[:5] == [
            *(("mkdtemp", "function"), ("suffix", "parameter"), ("None", "default")),
            *(("prefix", "parameter"), ("None", "default")),
        ]
    else:
        assert (len(named), row.relation) == (2, "Other")


@pytest.mark.skipif(not (REAL / "wnut17").is_dir(), reason=f"no real data in {REAL}")
def test_wnut17_and_semeval_are_read_whole(tmp_path):
    wnut = config_of(
        tmp_path, "entities", CONLL, train=[{"path": str(REAL / "wnut17/emerging.dev.conll"), "format": "conll"}]
    )
    samples = opened(wnut)
    assert (samples.examples.num_rows, int(samples.examples.lengths("firsts").sum())) == (1009, 836)
    source = {"path": str(REAL / "semeval2010_task8/TEST_FILE_FULL.TXT"), "format": "semeval"}
    pairs = opened(config_of(tmp_path, "relations", "", train=[source], sequence_length=100))
    counts = Counter(pairs.facts["labels"][label] for label in pairs.relations.tolist())
    assert (pairs.examples.num_rows, counts["Other"], counts["Cause-Effect(e2,e1)"]) == (2717, 454, 194)


def test_an_encoder_has_room_for_a_word(tmp_path):
    with pytest.raises(ValueError, match=r"data.sequence_length is 12; an encoder's is 18 or more: a word may have 16"):
        config_of(tmp_path, "entities", CONLL, backbone="encoder", sequence_length=12)
