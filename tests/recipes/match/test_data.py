"""From rows to samples: groups, judgements, histories, mined negatives, and rows that are not as they should be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigbatch.launcher.bundle import gather
from bigbatch.launcher.prepared import find_prepared
from bigbatch.launcher.resolve import resolve
from bigbatch.launcher.rules import broken_rules
from bigbatch.recipes.core.data.examples import read_examples
from bigbatch.recipes.core.data.rows import read_rows
from bigbatch.recipes.core.data.sources import list_files
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.match import data, recipe
from bigbatch.recipes.match.config import MatchConfig
from bigbatch.recipes.match.samples import CandidateSamples, PairSamples, TextSamples

EPOCHS = np.zeros(1, np.int64)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def configured(document: dict[str, Any]) -> MatchConfig:
    return MatchConfig.model_validate_json(json.dumps(document))


def prepared(document: dict[str, Any]) -> tuple[MatchConfig, Path]:
    config = configured(document)
    return config, recipe.prepare(config)


def collection(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Return data with five documents and two queries, of which `rows` are judgements."""
    texts = ("red rose", "blue rose", "old oven", "cold kettle", "loud printer")
    documents = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    queries = [{"id": 1, "text": "rose red"}, {"id": 2, "text": "hot kettle"}]
    section = {"documents": [write(folder / "documents.jsonl", documents)], "query_column": "query"}
    section |= {"queries": [write(folder / "queries.jsonl", queries)], **settings}
    return {
        "train": [write(folder / "train.jsonl", rows)],
        "test": [write(folder / "test.jsonl", rows)],
        "validation_fraction": 0.0,
        "collection": section,
        "group_size": 2,
    }


def test_groups_of_an_epoch_are_disjoint_and_other_ones_in_the_next(make_document, tmp_path):
    config, folder = prepared(make_document(tmp_path, data={"group_size": 5, "validation_fraction": 0.1}))
    samples = PairSamples(folder, "train", config, is_training=True)
    assert samples.num_samples == samples.num_pairs // 5
    seen = []
    for epoch in (0, 1):
        batches = [samples.batch(np.array([number]), EPOCHS + epoch) for number in range(samples.num_samples)]
        pairs = [tuple(pair) for batch in batches for pair in zip(batch["lefts"], batch["rights"], strict=True)]
        assert len(set(pairs)) == len(pairs) == 5 * samples.num_samples
        seen.append([frozenset(batch["lefts"].tolist()) for batch in batches])
    assert not set(seen[0]) & set(seen[1])
    both = samples.batch(np.array([3, 1]), np.array([0, 1]))
    apart = [samples.batch(np.array([number]), EPOCHS + epoch) for number, epoch in ((3, 0), (1, 1))]
    assert both["lefts"].tolist() == [number for batch in apart for number in batch["lefts"].tolist()]
    assert both["groups"].tolist() == [0] * 5 + [1] * 5


def test_texts_of_a_batch_are_left_ones_then_right_ones_then_negatives(make_document, tmp_path):
    rows = [{"left": f"left {n}", "right": f"right {n}", "no": [f"no {n}", f"never {n}"]} for n in range(6)]
    own = {"train": [write(tmp_path / "rows.jsonl", rows)], "negatives_column": "no", "validation_fraction": 0.0}
    config, folder = prepared(make_document(tmp_path, data={**own, "packing": False, "group_size": 2}))
    samples = PairSamples(folder, "train", config, is_training=True)
    batch = samples.batch(np.array([0]), EPOCHS)
    assert batch["negatives"].shape == (2, 2)
    numbers = [*batch["lefts"], *batch["rights"], *batch["negatives"].ravel()]
    texts = samples.texts.texts("text", np.array(numbers))
    places = [text.split()[1] for text in texts[:2]]
    assert texts == [f"{side} {place}" for side in ("left", "right") for place in places] + [
        f"{word} {place}" for place in places for word in ("no", "never")
    ]
    for row, text in zip(batch["tokens"], texts, strict=True):
        assert samples.tokenizer.tokenizer.decode(row.tolist()).replace(" ##", "").startswith(text.split()[0][:2])


def test_a_dropped_token_is_never_a_special_one_and_depends_on_the_epoch_alone(make_document, tmp_path):
    config, folder = prepared(make_document(tmp_path, objective={"token_dropout": 0.5}, data={"packing": False}))
    samples = PairSamples(folder, "train", config, is_training=True)
    batches = [samples.batch(np.array([2]), EPOCHS + epoch) for epoch in (0, 0)]
    assert np.array_equal(batches[0]["tokens"], batches[1]["tokens"])
    tokens, lengths = batches[0]["tokens"], batches[0]["lengths"]
    assert set(tokens[:, 0].tolist()) == {samples.tokenizer.begin_of_text}
    assert {row[length - 1] for row, length in zip(tokens, lengths, strict=True)} == {samples.tokenizer.end_of_text}
    inner = sum(lengths) - 2 * len(lengths)
    assert 0.2 < (tokens == samples.tokenizer.unknown).sum() / inner < 0.8


def test_judgements_name_texts_and_grades_say_which_are_relevant(make_document, tmp_path):
    rows = [
        {"query": 1, "document": "d0", "grade": "best"},
        {"query": "1", "document": "d1", "grade": "good"},
        {"query": 1, "document": "d2", "grade": "bad"},
        {"query": 2, "document": "d3", "grade": "good"},
    ]
    grades = {"grade_column": "grade", "grades": {"best": 3.0, "good": 1.0, "bad": 0.0}}
    config, folder = prepared(make_document(tmp_path, data=collection(tmp_path, rows, **grades)))
    samples = TextSamples(folder, "test", config)
    names = samples.texts.texts("id", np.arange(samples.num_samples))
    assert names == ["", "", "d0", "d1", "d2", "d3", "d4"]  # two queries, then all documents
    assert data.read_grades(samples.pairs) == {0: {2: 3.0, 3: 1.0}, 1: {5: 1.0}}
    found = data.read_found(folder, "test")
    assert [found[query][0].documents.tolist() for query in (0, 1)] == [[2, 3], [5]]
    assert read_examples(folder).facts["counts"]["not_relevant"] == 2  # in train and test
    assert PairSamples(folder, "train", config).num_pairs == 3


def test_a_collection_counts_among_the_sources_and_comes_along_in_a_bundle(make_document, tmp_path, monkeypatch):
    document = make_document(tmp_path, data=collection(tmp_path, [{"query": 1, "document": "d0"}] * 2))
    config, _ = prepared(document)
    (tmp_path / "run.json").write_text(json.dumps(document))
    (tmp_path / "bundle").mkdir()
    led = gather(resolve(str(tmp_path / "run.json"), []), tmp_path / "bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    moved = configured(led)
    assert [Path(name).name for name in moved.data.collection.documents] == ["documents.jsonl"]
    assert recipe.open_data(moved).train.num_pairs == 2
    assert find_prepared(config.data).stale == ""
    (tmp_path / "queries.jsonl").write_text('{"id": 1, "text": "other"}\n{"id": 2, "text": "x"}\n')
    assert find_prepared(config.data).stale == f"{tmp_path / 'queries.jsonl'} is not what it was"


def test_a_history_is_read_newest_first_and_is_no_candidate(make_document, tmp_path):
    rows = [{"query": ["d0", "d2"], "document": "d3"}, {"query": ["d4", "d1"], "document": "d0"}]
    own = collection(tmp_path, rows)
    own["collection"].pop("queries")
    config, folder = prepared(make_document(tmp_path, data=own))
    samples = TextSamples(folder, "test", config)
    assert samples.texts.texts("text", np.array([0])) == ["old oven\nred rose"]
    begin = 2
    _, excluded = data.read_found(folder, "test")[0]
    assert sorted(excluded.tolist()) == [begin, begin + 2]
    vectors = np.eye(7, 4, dtype=np.float32)
    vectors[0] = vectors[begin]  # nearest is what the user has had
    arrays = {"vectors": vectors, "splits": np.full(7, 2), "rows": np.arange(7)}
    figures = recipe.figures(config, {"tokenizer": str(folder)}, arrays, thorough=True)
    assert figures["recall@10"] == 1
    assert figures["mrr@10"] > 0.4


def test_a_cross_encoder_orders_the_best_that_bm25_finds(make_cross, tmp_path):
    rows = [{"query": 1, "document": "d1"}, {"query": 2, "document": "d3"}]
    own = {**collection(tmp_path, rows), "score_column": None, "score_range": [0.0, 1.0], "rerank": 1}
    config, folder = prepared(make_cross(tmp_path, data=own))
    samples = CandidateSamples(folder, "test", config)
    assert samples.num_samples == 2
    batch = samples.batch(np.arange(2), np.zeros(2, np.int64))
    assert batch["targets"].tolist() == [0.0, 1.0]  # of the first query d0 is nearest
    train = PairSamples(folder, "train", config, is_training=True).batch(np.array([0]), EPOCHS)
    assert train["targets"].tolist() == [1.0, 1.0, 0.0, 0.0]  # each left text with its own right one and the other's


@pytest.mark.parametrize("by_model", [False, True])
def test_mined_negatives_are_near_and_never_right(make_document, tmp_path, by_model):
    rights = ["red rose", "red rose bush", "blue wall", "cold river", "old hill", "loud road"]
    rows = [{"left": text, "right": text} for text in rights]
    rows.append({"left": "red rose", "right": "red rose bush"})
    own = {"train": [write(tmp_path / "rows.jsonl", rows)], "validation_fraction": 0.0, "mining": {"count": 2}}
    document = make_document(tmp_path, data=own)
    config = configured(document)

    def by_letters(texts: list[str]) -> np.ndarray:
        return np.array([[text.count(letter) for letter in "abdehlorsuw"] for text in texts], float)

    miner = (by_letters, "letters") if by_model else None
    folder = data.prepare(config.data, None, miner)
    samples = PairSamples(folder, "train", config)
    batch = samples.batch(np.arange(samples.num_pairs), np.zeros(samples.num_pairs, np.int64))
    texts = [samples.texts.texts("text", numbers) for numbers in (batch["lefts"], batch["rights"])]
    mined = [samples.texts.texts("text", numbers) for numbers in batch["negatives"]]
    own_right: dict[str, set[str]] = {}
    for left, right in zip(*texts, strict=True):
        own_right.setdefault(left, set()).add(right)
    assert all(
        len(set(found)) == 2 and not set(found) & own_right[left] for left, found in zip(texts[0], mined, strict=True)
    )
    assert mined[texts[0].index("red rose bush")][0] == "red rose"


def test_cranfields_form_is_read_field_by_field(tmp_path):
    (tmp_path / "texts.smart").write_text(
        ".I 7\n.T\nwings\nand tails .\n.A\n.W\n they bend .\n.I 9\n.T\n.A\nada\n.W\nx\n"
    )
    source = {"path": str(tmp_path / "texts.smart"), "format": "smart"}
    config = MatchConfig.model_fields["data"].annotation.model_validate_json(
        json.dumps({"train": [source], "sequence_length": 8, "group_size": 2})
    )
    (file,) = list_files(config.train)
    found = [row.values for row in read_rows(file, dict.fromkeys(("I", "number", "T", "W"), ""))]
    assert found[0] == {"I": "7", "number": "1", "T": "wings\nand tails .", "W": "they bend ."}
    assert found[1] == {"I": "9", "number": "2", "T": "", "W": "x"}
    (tmp_path / "texts.smart").write_text("wings\n")
    with pytest.raises(UserError, match=r"texts.smart:1: is 'wings'; right is .I and an id"):
        list(read_rows(list_files(config.train)[0], {"T": ""}))


BAD_ROWS = [
    ({"left": " ", "right": "rose"}, {}, "empty", "has an empty left text"),
    (
        {"left": "a", "right": "b", "score": 7},
        {"score_column": "score"},
        "wrong_score",
        "right is a number from 0 to 1",
    ),
    ({"left": "a", "right": "b", "score": "nan"}, {"score_column": "score"}, "wrong_score", "has the score 'nan'"),
    (
        {"left": "a", "right": "b", "no": []},
        {"negatives_column": "no"},
        "wrong_negatives",
        "has 0 negatives, an earlier",
    ),
    (
        {"left": "a", "right": "b", "no": [3]},
        {"negatives_column": "no"},
        "wrong_negatives",
        "right is a text or a list",
    ),
]


@pytest.mark.parametrize(("bad", "settings", "kind", "message"), BAD_ROWS)
def test_a_bad_row_is_told_with_its_line_or_counted(make_document, tmp_path, capsys, bad, settings, kind, message):
    good = [{"left": f"left {n}", "right": f"right {n}", "score": 0.5, "no": ["no"]} for n in range(8)]
    own = {"train": [write(tmp_path / "rows.jsonl", [*good, bad])], "validation_fraction": 0.0, **settings}
    losses = {"objective": {"loss": "cosine"}} if "score_column" in settings else {}
    with pytest.raises(UserError) as caught:
        prepared(make_document(tmp_path, data=own, **losses))
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:9"
    assert message in caught.value.message
    _, folder = prepared(make_document(tmp_path, data={**own, "on_error": "skip"}, **losses))
    assert read_examples(folder).facts["counts"] == {"read": 9, kind: 1}
    assert f"left out: 1 {kind.replace('_', ' ')}" in capsys.readouterr().err


def test_ids_that_are_unknown_or_given_twice_are_told(make_document, tmp_path):
    own = collection(tmp_path, [{"query": 1, "document": "d0"}, {"query": 2, "document": "d9"}])
    with pytest.raises(
        UserError, match=r"train.jsonl:2: names the document 'd9', which data.collection.documents lacks"
    ):
        prepared(make_document(tmp_path, data=own))
    with (tmp_path / "documents.jsonl").open("a") as file:
        file.write('{"id": "d0", "text": "again"}\n')
    with pytest.raises(UserError, match=r"documents.jsonl:6: has the id 'd0', as an earlier one has"):
        prepared(make_document(tmp_path, data=own))


WRONG = [
    ({"model": {"kind": "cross"}}, "right for model.kind 'cross' is binary"),
    ({"objective": {"loss": "cosine"}}, "needs data.score_column"),
    ({"data": {"score_column": "score"}}, "takes pairs without scores"),
    ({"data": {"group_size": 1}}, "right is a data.group_size above 1"),
    ({"data": {"score_range": [1.0, 1.0]}}, "right is the lowest, then the highest"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_settings_that_contradict_each_other_are_refused(make_document, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        configured(make_document(tmp_path, **changes))


WITHOUT_EFFECT = [
    ("search.bm25_weight", {"search": {"bm25_weight": 0.9}}),
    ("data.rerank", {"data": {"rerank": 7}}),
    ("objective.popularity", {"objective": {"loss": "ranking", "popularity": True}, "data": {"score_column": "score"}}),
    ("model.embedding_size", {"model": {"embedding_size": 7}}),
    ("model.pooling", {"model": {"encoder": None, "backbone": "words", "pooling": "first"}}),
]


@pytest.mark.parametrize(("path", "changes"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(make_document, tmp_path, path, changes):
    assert [problem.where for problem in broken_rules(configured(make_document(tmp_path, **changes)))] == [path]


def test_a_group_larger_than_the_data_is_refused(make_document, tmp_path):
    config, folder = prepared(make_document(tmp_path, data={"validation_fraction": 0.5}))
    larger = config.model_copy(update={"data": config.data.model_copy(update={"group_size": 1000})})
    with pytest.raises(UserError, match=r"data.group_size: is 1000; right is \d+, all pairs, or less"):
        PairSamples(folder, "train", larger, is_training=True)


def test_what_python_itself_offers_are_functions_modules_and_imports():
    found = {}
    for name, columns in (
        ("functions", ("summary", "function")),
        ("modules", ("id", "text")),
        ("imports", ("history", "item")),
    ):
        files = [
            file for file in list_files([f"python:{name}"]) if Path(file.path).name in ("textwrap.py", "shutil.py")
        ]
        found[name] = [row.values for file in files for row in read_rows(file, dict.fromkeys(columns, ""))]
    assert any(row["function"].startswith("textwrap.dedent(text)") for row in found["functions"])
    assert [row["id"] for row in found["modules"]] == ["shutil", "textwrap"]
    assert {"os", "fnmatch", "stat"} <= {row["item"] for row in found["imports"]}
    assert all(row["item"] not in row["history"] for row in found["imports"])
