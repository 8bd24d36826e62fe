"""Questions in JSON documents and in Python's own library, row by row."""

import gzip
import json
from pathlib import Path

import pytest

from bigbatch.recipes.core.config import TableSource
from bigbatch.recipes.core.data.rows import read_rows
from bigbatch.recipes.core.data.sources import list_files
from bigbatch.recipes.core.data.stdlib_text import stdlib_files, stdlib_questions
from bigbatch.recipes.core.errors import UserError

COLUMNS = dict.fromkeys(("id", "question", "context", "answers"), "data")
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Bern",
            "paragraphs": [
                {
                    "context": "Bern is a town.",
                    "qas": [
                        {"id": "a", "question": "Which?", "answers": [{"text": "Bern", "answer_start": 0}]},
                        {"id": "b", "question": "Who?", "is_impossible": True, "answers": []},
                    ],
                }
            ],
        }
    ],
}
SLOTS = [
    {
        "userInput": {"text": "six, at noon"},
        "context": {"requestedSlots": ["party_size"]},
        "labels": [
            {"slot": "party_size", "valueSpan": {"endIndex": 3}},
            {"slot": "time", "valueSpan": {"startIndex": 8, "endIndex": 12}},
        ],
    },
    {"userInput": {"text": "hello"}},
]


def rows_of(path, **settings):
    (file,) = list_files([TableSource(path=str(path), **settings)])
    return list(read_rows(file, COLUMNS))


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_a_squad_document_is_a_question_a_row_with_its_json_path(tmp_path, name):
    content = json.dumps(SQUAD).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    first, second = rows_of(tmp_path / name)
    assert first.values == {
        "id": "a",
        "question": "Which?",
        "context": "Bern is a town.",
        "answers": [{"text": "Bern", "answer_start": 0}],
    }
    assert first.origin == f"{tmp_path / name}:data[0].paragraphs[0].qas[0]"
    assert (second.values["id"], second.values["answers"]) == ("b", [])


def test_a_document_in_a_folder_is_not_taken_for_data(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "question": "q", "context": "c", "answers": []}')
    assert [Path(file.path).name for file in list_files([str(tmp_path)])] == ["rows.jsonl"]


def test_each_slot_is_asked_of_each_utterance(tmp_path):
    (tmp_path / "slots.json").write_text(json.dumps(SLOTS))
    found = [
        (row.values["question"], row.values["answers"]) for row in rows_of(tmp_path / "slots.json", format="slots")
    ]
    assert found == [
        ("requested party size", [{"start": 0, "end": 3}]),
        ("time", [{"start": 8, "end": 12}]),
        ("party size", []),
        ("time", []),
    ]


def broken(*path_and_value):
    """Return the document with one value replaced, or left out where it is None."""
    document = json.loads(json.dumps(SQUAD))
    *path, last, value = path_and_value
    holder = document
    for key in path:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return document


PARAGRAPH = ("data", 0, "paragraphs", 0)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "x.json: has no list 'data'; right is an object with a list 'data'"),
        (broken("data", 0, 3), "x.json:data[0]: is no object"),
        (broken(*PARAGRAPH, "qas", None), "x.json:data[0].paragraphs[0]: has no list 'qas'"),
        (broken(*PARAGRAPH, "context", None), "x.json:data[0].paragraphs[0]: has no text 'context'"),
        (broken(*PARAGRAPH, "qas", 1, "question", 3), "x.json:data[0].paragraphs[0].qas[1]: has no text 'question'"),
        (
            broken(*PARAGRAPH, "qas", 1, "answers", [{"text": "a", "answer_start": 8}]),
            "x.json:data[0].paragraphs[0].qas[1]: is_impossible, but has 1 answers",
        ),
    ],
)
def test_a_document_of_another_form_is_refused_at_its_json_path(tmp_path, document, message):
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as raised:
        rows_of(tmp_path / "x.json")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2}\n', "x.json:2: is not JSON: Extra data: .*; `format` jsonl reads an object a line"),
        (b'{"data": [', "x.json:1: is not JSON"),
        (b'{"data": "\xff"}', "x.json: is not UTF-8: the first wrong byte is at offset 10"),
    ],
)
def test_a_document_that_is_no_json_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / "x.json")


def test_answers_on_pythons_library_stand_where_they_are_said_to():
    path = next(path for path in stdlib_files() if path.name == "textwrap.py")
    rows = list(stdlib_questions(path))
    by_question = {(row["question"], row["context"].split("(")[0]): row for row in rows}
    assert len(by_question) == len(rows) > 10
    kinds = {row["kind"] for row in rows}
    assert kinds == {"default", "behind", "return"}
    for row in rows:
        texts = [row["context"][answer["start"] : answer["end"]] for answer in row["answers"]]
        signature = row["context"].split("\n")[0].partition("(")[2].removesuffix(")")
        defaults = dict(f"{parameter}=".split("=")[:2] for parameter in signature.split(", "))
        name = row["question"].rstrip("?").split()[-1]
        if row["kind"] == "default":
            assert texts == ([defaults[name]] if defaults[name] else [])
        elif row["kind"] == "behind":
            names = list(defaults)
            assert texts == names[names.index(name) + 1 :][:1]
    returned = by_question["What does fill return?", "fill"]
    (answer,) = returned["answers"]
    assert returned["context"][answer["start"] : answer["end"]] == "a new string"
