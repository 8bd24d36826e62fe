"""Labeled texts: what is kept, where it goes, how it is laid out, and one line for what is wrong."""

import csv
import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bigbatch.recipes.classify.config import LabeledDataSection
from bigbatch.recipes.classify.data import LabeledRow, collate, open_split, prepare
from bigbatch.recipes.core.data.examples import read_examples
from bigbatch.recipes.core.data.splits import assign_splits, prepared_splits
from bigbatch.recipes.core.data.tokenizing import encode_documents, load_tokenizer
from bigbatch.recipes.core.errors import UserError

WORDS = ("apple", "bread", "chair", "desk", "engine", "flower", "garden", "house", "island", "jacket", "kettle", "lamp")
ROWS = [
    {"text": f"{WORDS[n % 12]} {WORDS[n * 5 % 11]} {' '.join(WORDS[: n % 7])} {n}", "label": "xyyz"[n % 4]}
    for n in range(80)
]


@pytest.fixture(scope="module")
def real_data():
    folder = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"NO REAL DATA: {folder} does not exist; set BIGBATCH_TEST_DATA")
    return folder


@pytest.fixture
def section(tmp_path):
    """Make settings; rows given as lists are written to files first."""

    def make(train=ROWS, **changes):
        document = {
            "train": train,
            "tokenizer": {"kind": "wordpiece", "vocabulary_size": 120},
            "sequence_length": 16,
            "prepared_dir": str(tmp_path / "prepared"),
            **changes,
        }
        for split in ("train", "validation", "test"):
            sources = document.get(split)
            if sources and isinstance(sources[0], dict) and "path" not in sources[0]:
                path = tmp_path / f"{split}.jsonl"
                content = "".join(json.dumps(row) + "\n" for row in sources)
                if not path.exists() or path.read_text() != content:  # another time would be another content
                    path.write_text(content)
                document[split] = [str(path)]
        return LabeledDataSection.model_validate_json(json.dumps(document))

    return make


def rows_of(folder, split, data):
    samples = open_split(folder, split, data, packing=True)
    return samples.texts(np.arange(samples.num_samples)) if samples else []


def refusal(data):
    with pytest.raises(UserError) as caught:
        prepare(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def row(text, label="x"):
    return {"text": text, "label": label}


def test_what_is_prepared_is_the_rows_their_labels_and_their_tokens(section):
    data = section(validation=[row("bread and butter", "y")])
    folder = prepare(data)
    assert prepared_splits(data) == folder
    samples = open_split(folder, "train", data, packing=True)
    ids = np.arange(len(ROWS))
    assert samples.texts(ids) == [row["text"] for row in ROWS]
    assert [samples.labels[target] for target in samples.targets] == [row["label"] for row in ROWS]
    assert samples.labels == ["x", "y", "z"]
    assert samples.class_counts.tolist() == [20, 40, 20]
    tokens = encode_documents(load_tokenizer(folder), samples.texts(ids))
    assert [found.tolist() for found in samples.examples.lists("tokens", ids)] == [found.tolist() for found in tokens]
    assert open_split(folder, "test", data, packing=True) is None
    assert rows_of(folder, "validation", data) == ["bread and butter"]


def test_a_tokenizer_knows_the_training_texts_alone_or_is_the_one_given(section, tmp_path):
    data = section(validation=[row("quixotic", "y")], tokenizer={"kind": "character"})
    folder = prepare(data)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenizer.token_to_id("q") is None
    (tokens,) = open_split(folder, "validation", data, packing=True).examples.lists("tokens", np.array([0]))
    assert tokens[0] == tokenizer.unknown
    other = prepare(section(sequence_length=9), folder)
    assert (other / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert prepared_splits(section(), folder) == other
    assert prepare(section()) != other


def test_settings_of_rows_alone_make_no_new_folder(section):
    folder = prepare(section())
    assert prepare(section(sequence_length=30, packing=False, on_long_text="window")) == folder
    assert prepare(section(split_seed=1)) != folder


LABELS = st.sampled_from("abc")


@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=4),
    shares=st.tuples(st.floats(0, 0.4), st.floats(0.01, 0.5)),
    seed=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_each_label_gives_its_rounded_share_to_each_split_whatever_the_order(counts, shares, seed, order):
    rows = [LabeledRow(f"{label} {n}", (str(label),), "") for label, count in enumerate(counts) for n in range(count)]
    named = {"test": shares[0], "validation": shares[1]}
    splits = assign_splits(rows, named, seed)
    for label, count in enumerate(counts):
        found = Counter(split for split, row in zip(splits, rows, strict=True) if row.labels == (str(label),))
        test = min(round(shares[0] * count), count - 1)
        assert found["test"] == test
        assert found["validation"] == min(round(shares[1] * count), count - 1 - test)
    mixed = list(range(len(rows)))
    order.shuffle(mixed)
    assert assign_splits([rows[n] for n in mixed], named, seed) == [splits[n] for n in mixed]


@given(
    texts=st.lists(st.tuples(st.sampled_from(["A b", "a  B", "c", "d", "e", "f", "g"]), LABELS), min_size=1),
    share=st.floats(0.05, 0.9),
    multi_label=st.booleans(),
)
def test_a_text_is_in_one_split_and_every_label_trains_however_rows_repeat(texts, share, multi_label):
    rows = [LabeledRow(text, (label,), "") for text, label in texts]
    splits = assign_splits(rows, {"validation": share}, 0, multi_label)
    for text in ("a b", "c", "d", "e", "f", "g"):
        found = zip(splits, rows, strict=True)
        assert len({split for split, row in found if " ".join(row.text.lower().split()) == text}) <= 1
    training = [row for split, row in zip(splits, rows, strict=True) if split == "train"]
    assert {row.labels for row in training} == {row.labels for row in rows}


def test_sets_of_labels_are_split_alike_and_rare_ones_together():
    common = [LabeledRow(f"common {n}", ("a", "b"), "") for n in range(40)]
    plain = [LabeledRow(f"plain {n}", (), "") for n in range(20)]
    rare = [LabeledRow(f"rare {n}", tuple(sorted({f"l{n}", "a", f"m{n % 2}"})), "") for n in range(20)]
    splits = assign_splits(common + plain + rare, {"validation": 0.1}, 0, multi_label=True)
    assert splits[:40].count("validation") == 4
    assert splits[40:60].count("validation") == 2
    assert splits[60:].count("validation") == 0  # each is the only one of a label
    rare = [LabeledRow(f"rare {n}", tuple(f"l{bit}" for bit in range(5) if n >> bit & 1), "") for n in range(1, 31)]
    splits = assign_splits(rare, {"validation": 0.1}, 0, multi_label=True)
    assert splits.count("validation") == 3


def test_another_seed_cuts_other_rows_and_the_folder_holds_what_was_cut(section):
    found = []
    for seed in (0, 1):
        data = section(validation_fraction=0.25, test_fraction=0.1, split_seed=seed)
        folder = prepare(data)
        parts = [rows_of(folder, split, data) for split in ("train", "validation", "test")]
        assert [len(part) for part in parts] == [52, 20, 8]
        assert sorted(sum(parts[1:], parts[0])) == sorted(row["text"] for row in ROWS)
        facts = read_examples(folder).facts
        assert facts["class_counts"] == {"train": [13, 26, 13], "validation": [5, 10, 5], "test": [2, 4, 2]}
        found.append(parts[1])
    assert set(found[0]) != set(found[1])


def test_repeated_texts_are_left_out_before_the_split_and_those_of_two_labels_counted(section, capfd):
    repeated = [row(ROWS[0]["text"], "x"), row(ROWS[1]["text"], "z"), row(ROWS[1]["text"].upper(), "y")]
    data = section(ROWS + repeated, clean={"deduplicate": True}, validation_fraction=0.2)
    facts = read_examples(prepare(data)).facts
    assert facts["counts"] == {"read": 83, "duplicate": 1, "duplicate_with_another_label": 1}
    assert "left out: 1 duplicate, 1 duplicate with another label\n" in capfd.readouterr().err
    assert sum(map(sum, facts["class_counts"].values())) == 81


def test_empty_texts_are_an_error_or_left_out_and_short_ones_left_out(section):
    rows = [*ROWS, row(" \u0007 \n"), row("ab"), {"text": None, "label": "x"}]
    message = refusal(section(rows))
    assert message.endswith("data.on_error 'skip' leaves such rows out")
    assert "train.jsonl:81: has an empty text" in message
    data = section(rows, on_error="skip", clean={"min_characters": 3})
    assert read_examples(prepare(data)).facts["counts"] == {"read": 83, "empty": 2, "too_short": 1}


def test_several_columns_make_one_text(section):
    rows = [{"title": row["text"], "body": "more", "label": row["label"]} for row in ROWS] + [
        {"title": None, "body": "alone", "label": "x"}
    ]
    data = section(rows, text_columns=["title", "body"])
    texts = rows_of(prepare(data), "train", data)
    assert texts[0] == f"{ROWS[0]['text']} more"
    assert texts[-1] == "alone"


def test_numbers_and_truth_values_are_labels_by_their_names(section):
    data = section([row("a", 1), row("b", True), row("c", " true "), row("d", 0), row("e", "1")])
    samples = open_split(prepare(data), "train", data, packing=True)
    assert samples.labels == ["0", "1", "true"]
    assert samples.class_counts.tolist() == [1, 2, 2]


def test_rows_with_any_number_of_labels_become_rows_of_zeros_and_ones(section):
    rows = [row("one", ["b", "a"]), row("two", "a; c ;a"), row("three", []), row("four", None), row("five", "b")]
    data = section(rows, multi_label=True, label_separator=";")
    samples = open_split(prepare(data), "train", data, packing=True)
    assert samples.labels == ["a", "b", "c"]
    assert samples.targets.tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    batch = samples.batch(np.array([1, 4]), np.zeros(2, int))
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert batch["labels"].dtype == np.float32
    assert samples.class_counts.tolist() == [2, 2, 1]


def test_the_order_of_given_labels_is_the_order_of_the_outputs(section):
    data = section(labels=["z", "x", "y"])
    samples = open_split(prepare(data), "train", data, packing=True)
    assert [samples.labels[target] for target in samples.targets] == [row["label"] for row in ROWS]
    assert samples.labels == ["z", "x", "y"]


RIGHT = "a text, a whole number, true or false would be right"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": [row("a"), row("b")]}, "data.train: all 2 rows have the same label, 'x': there is nothing to learn"),
        (
            {"train": [row("a", []), row("b", "")], "multi_label": True},
            "data.train: all 2 rows have no label: there is nothing to learn",
        ),
        (
            {"label_column": "kind"},
            "{folder}/train.jsonl:1: has no column 'kind' (data.label_column); there are: 'text', 'label'",
        ),
        (
            {"text_columns": ["text", "title"]},
            "{folder}/train.jsonl:1: has no column 'title' (data.text_columns[1]); there are: 'text', 'label'",
        ),
        ({"train": [*ROWS, row("a", " ")]}, "{folder}/train.jsonl:81: has no label in column 'label'"),
        (
            {"train": [*ROWS, row("a", 1.5)]},
            "{folder}/train.jsonl:81: 'label' is 1.5, not a label: " + RIGHT,
        ),
        (
            {"train": [*ROWS, row("a", ["x"])]},
            "{folder}/train.jsonl:81: 'label' is ['x'], not a label: " + RIGHT + "; data.multi_label takes lists",
        ),
        (
            {"validation": [row("a", "x"), row("b", "w")]},
            "{folder}/validation.jsonl:2: has the label 'w', which no training row has; there are: 'x', 'y', 'z'; "
            "data.on_error 'skip' leaves such rows out",
        ),
        ({"labels": ["x", "y"]}, "{folder}/train.jsonl:4: has the label 'z', which is not in data.labels"),
        (
            {"labels": ["x", "y", "z", "w"]},
            "data.labels: holds 'w', which no training row has; there are: 'x', 'y', 'z'",
        ),
        ({"labels": ["x", "y", "z", "x"]}, "data.labels: holds 'x' twice"),
        (
            {"validation": [row("a")], "validation_fraction": 0.1},
            "data.validation_fraction: is 0.1, without effect beside data.validation; remove one",
        ),
        (
            {"validation_fraction": 0.5, "test_fraction": 0.5},
            "data.test_fraction: and data.validation_fraction are 1: nothing is left to train on",
        ),
        (
            {"validation_fraction": 0.001},
            "data.validation_fraction: is 0.001: too little for a row of 80",
        ),
        (
            {"validation": [row("a", "w")], "on_error": "skip"},
            "data.validation: no row is left (81 read, 1 unseen label)",
        ),
        (
            {"test": [row("a"), row(ROWS[2]["text"].upper())], "on_leak": "fail"},
            "data.test: 1 of its texts stand in an earlier split too, such as {folder}/test.jsonl:2 in "
            "{folder}/train.jsonl:3; data.on_leak 'drop' leaves them out",
        ),
        ({"clean": {"min_characters": 999}}, "data.train: no row is left to train on (80 read, 80 too short)"),
        (
            {"on_long_text": "refuse", "sequence_length": 20, "tokenizer": {"kind": "character"}},
            "{folder}/train.jsonl:2: has 21 tokens, and data.sequence_length is 20; "
            "data.on_long_text 'truncate' or 'window' takes longer texts",
        ),
        ({"test": ["train.jsonl"]}, "data.test: holds {folder}/train.jsonl, which data.train holds too"),
    ],
)
def test_bad_settings_and_rows_are_one_line_each(section, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    assert refusal(section(**changes)) == message.format(folder=tmp_path)
    assert not list(tmp_path.glob("prepared/*.building"))


def test_rows_of_unseen_labels_and_leaked_texts_are_left_out_on_demand(section, capfd):
    changes = {
        "validation": [row(ROWS[0]["text"].upper(), "x"), row("new", "y"), row("newer", "w")],
        "test": [row("NEW", "y"), row("newest", "y")],
        "on_error": "skip",
    }
    kept = section(**changes)
    facts = read_examples(prepare(kept)).facts
    assert facts["leaks"] == {"train": 0, "validation": 1, "test": 1}
    assert facts["counts"] == {"read": 85, "unseen_label": 1}
    said = capfd.readouterr().err
    assert "texts that stand in an earlier split too: 1 validation, 1 test; kept (data.on_leak)\n" in said
    dropped = section(**changes, on_leak="drop")
    folder = prepare(dropped)
    assert rows_of(folder, "validation", dropped) == ["new"]
    assert rows_of(folder, "test", dropped) == ["newest"]


@pytest.fixture
def samples(section):
    """Open the training split of ROWS under some settings."""

    def make(packing=True, token_dropout=0.0, seed=0, **changes):
        data = section(**changes)
        return open_split(prepare(data), "train", data, packing, token_dropout, seed)

    return make


def texts_in(batch, number):
    """Return the windows of a text, as lists of tokens."""
    flat = batch["tokens"].reshape(-1)
    mine = np.flatnonzero(batch["examples"] == number)
    return [flat[batch["firsts"][w] :][: batch["lengths"][w]].tolist() for w in mine]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("on_long_text", ["truncate", "window"])
def test_a_batch_holds_its_texts_cut_as_told(samples, packing, on_long_text):
    opened = samples(packing, on_long_text=on_long_text, sequence_length=10)
    ids = np.array([3, 61, 7, 7, 0])
    batch = opened.batch(ids, np.zeros(5, int))
    assert batch["tokens"].shape[1] == (10 if packing else batch["lengths"].max())
    assert len(batch["tokens"]) < 5 or not packing or on_long_text == "window"
    assert batch["labels"].tolist() == opened.targets[ids].tolist()
    whole = [found.tolist() for found in opened.examples.lists("tokens", ids)]
    for number, text in enumerate(whole):
        windows = texts_in(batch, number)
        assert windows[0] == (text if len(text) <= 10 else [*text[:9], text[-1]])
        assert len(windows) == 1 or on_long_text == "window"
        covered = windows[0][:-1] + [token for window in windows[1:] for token in window[1 + 4 : -1]]
        assert covered == (text[:-1] if on_long_text == "window" else windows[0][:-1])


def test_a_text_is_the_same_whatever_its_companions_and_the_rank(samples):
    opened = samples(token_dropout=0.3, seed=9, on_long_text="window", sequence_length=8)
    ids, epochs = np.arange(40), np.full(40, 2)
    whole = opened.batch(ids, epochs)
    for ranks in (2, 5):
        for rank in range(ranks):
            part = opened.batch(ids[rank::ranks], epochs[rank::ranks])
            for number, sample in enumerate(ids[rank::ranks]):
                assert texts_in(part, number) == texts_in(whole, sample)


def test_dropped_tokens_become_unknown_anew_in_every_epoch_and_special_ones_never(samples):
    plain, opened = samples(sequence_length=40), samples(token_dropout=0.25, sequence_length=40)
    ids = np.arange(len(ROWS))
    before, unknown = plain.batch(ids, np.zeros(80, int)), opened.tokenizer.unknown
    changed = []
    for epoch in (0, 0, 1):
        after = opened.batch(ids, np.full(80, epoch))
        for name in ("documents", "firsts", "lengths", "examples", "labels"):
            assert (after[name] == before[name]).all()
        differs = after["tokens"] != before["tokens"]
        assert (after["tokens"][differs] == unknown).all()
        ends = np.concatenate([before["firsts"], before["firsts"] + before["lengths"] - 1])
        assert not differs.reshape(-1)[ends].any()
        changed.append(differs)
    ordinary = before["lengths"].sum() - 2 * 80
    assert abs(changed[0].sum() / ordinary - 0.25) < 4 * np.sqrt(0.25 * 0.75 / ordinary)
    assert (changed[0] == changed[1]).all()
    assert (changed[0] != changed[2]).any()
    with pytest.raises(UserError, match=r"objective.token_dropout: is 0.1, and the tokenizer has no token for unknown"):
        samples(token_dropout=0.1, tokenizer={"kind": "bpe", "vocabulary_size": 300})


def test_the_fingerprint_follows_whatever_changes_a_sample(samples):
    plain = samples()
    assert samples().fingerprint == plain.fingerprint == samples(seed=5).fingerprint
    others = [
        samples(packing=False),
        samples(sequence_length=12),
        samples(on_long_text="window"),
        samples(token_dropout=0.1),
        samples(token_dropout=0.1, seed=1),
        samples(labels=["z", "y", "x"]),
        samples(train=ROWS[1:]),
        samples(tokenizer={"kind": "character"}),
    ]
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 9


def test_new_texts_are_laid_out_like_those_of_a_split(samples):
    opened = samples(sequence_length=9, on_long_text="window")
    ids = np.arange(12)
    tokens = encode_documents(opened.tokenizer, opened.texts(ids))
    batch = opened.batch(ids, np.zeros(12, int))
    found = collate(tokens, opened.data, True, opened.tokenizer)
    assert set(batch) == {*found, "labels"}
    for name, array in found.items():
        assert (array == batch[name]).all()
        assert array.dtype == batch[name].dtype
    refusing = opened.data.model_copy(update={"on_long_text": "refuse"})
    with pytest.raises(UserError, match=r"text: has \d+ tokens, and data.sequence_length is 9"):
        collate(tokens, refusing, True, opened.tokenizer)
    short = opened.data.model_copy(update={"sequence_length": 2})
    with pytest.raises(UserError, match=r"data.sequence_length: is 2; a token between the special ones makes 3"):
        collate(tokens, short, True, opened.tokenizer)


def test_the_mean_length_counts_what_a_model_sees(samples):
    lengths = [len(text) for text in samples().examples.lists("tokens", np.arange(80))]
    assert samples(sequence_length=10).mean_tokens == pytest.approx(np.mean([min(n, 10) for n in lengths]))
    assert samples(sequence_length=10, on_long_text="window").mean_tokens == pytest.approx(np.mean(lengths))


QUESTION = r"(?P<label>[A-Z]+):(?P<fine>\w+) (?P<text>.*)"


def test_the_spam_set_keeps_its_distinct_messages(section, real_data):
    path = real_data / "sms_spam" / "SMSSpamCollection"
    source = {"path": str(path), "format": "tsv", "columns": ["label", "text"]}
    data = section([source], clean={"deduplicate": True}, validation_fraction=0.1, test_fraction=0.2)
    folder = prepare(data)
    texts = {line.split("\t", 1)[1] for line in path.read_text("utf-8").split("\n")[:-1]}
    kept = [text for split in ("train", "validation", "test") for text in rows_of(folder, split, data)]
    assert len(kept) == len(texts) == len(set(kept))
    assert len(texts) == 5171
    counts = read_examples(folder).facts["class_counts"]
    for place in (0, 1):
        total = sum(found[place] for found in counts.values())
        assert counts["test"][place] == round(0.2 * total)
        assert counts["validation"][place] == round(0.1 * total)


def test_texts_of_the_news_test_set_that_train_too_are_counted(section, real_data):
    def source(name):
        return [{"path": str(real_data / "ag_news" / name), "format": "tsv", "columns": ["text", "label"]}]

    def folded(name):
        lines = (real_data / "ag_news" / name).read_text("utf-8").split("\n")[:-1]
        return [" ".join(line.rsplit("\t", 1)[0].casefold().split()) for line in lines]

    data = section(source("alps_dev.tsv"), test=source("alps_test.tsv"))
    facts = read_examples(prepare(data)).facts
    train = set(folded("alps_dev.tsv"))
    assert facts["leaks"]["test"] == sum(text in train for text in folded("alps_test.tsv")) >= 8
    assert facts["labels"] == ["Business", "Sci/Tech", "Sports", "World"]
    assert facts["class_counts"]["test"] == [1900] * 4


def test_sentences_of_one_class_a_file_are_read_from_an_archive(section, real_data):
    archive = real_data / "mr_polarity" / "sentence_polarity.zip"

    def sources(**rows):
        return [
            {
                "path": f"{archive}!sentence_polarity/rt-polarity.{ending}",
                "format": "lines",
                "encoding": "latin-1",
                "constants": {"label": label},
                **rows,
            }
            for ending, label in (("pos", "positive"), ("neg", "negative"))
        ]

    data = section(sources(skip_every=10), test=sources(take_every=10))
    folder = prepare(data)
    assert read_examples(folder).facts["class_counts"] == {"train": [4798, 4798], "test": [533, 533]}
    with zipfile.ZipFile(archive) as opened:
        lines = opened.read("sentence_polarity/rt-polarity.neg").decode("latin-1").split("\n")
    assert rows_of(folder, "test", data)[533:535] == [lines[9], lines[19]]


def test_questions_and_intents_have_the_published_numbers(section, real_data):
    def questions(name):
        member = f"{real_data}/trec_qc/qc.zip!qc/{name}.txt"
        return [{"path": member, "format": "lines", "encoding": "latin-1", "pattern": QUESTION}]

    facts = read_examples(prepare(section(questions("train"), test=questions("test")))).facts
    assert {split: sum(counts) for split, counts in facts["class_counts"].items()} == {"train": 5452, "test": 500}
    assert facts["labels"] == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    intents = [str(real_data / "banking77" / f"{name}.csv") for name in ("train", "test")]
    data = section(intents[:1], test=intents[1:], label_column="category")
    folder = prepare(data)
    samples = open_split(folder, "train", data, packing=True)
    with (real_data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [samples.labels[target] for target in samples.targets] == [row["category"] for row in rows]
    assert (samples.num_samples, len(samples.labels)) == (10_003, 77)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 120
