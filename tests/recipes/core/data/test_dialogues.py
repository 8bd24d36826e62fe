"""Dialogues in documents, and those about Python's own functions."""

import gzip
import json
import re

import pytest

from bigbatch.recipes.core.config import TableSource
from bigbatch.recipes.core.data.rows import read_rows
from bigbatch.recipes.core.data.sources import list_files
from bigbatch.recipes.core.data.stdlib_text import stdlib_dialogues, stdlib_files
from bigbatch.recipes.core.errors import UserError

TURNS = [
    {"speaker": "USER", "utterance": "A table, please.", "frames": []},
    {"speaker": "SYSTEM", "utterance": "For how many?", "frames": []},
]


def rows_of(path, columns=("id", "messages")):
    (file,) = list_files([TableSource(path=str(path), format="sgd")])
    return list(read_rows(file, dict.fromkeys(columns, "data.messages_column")))


def test_a_schema_guided_dialogue_is_read_as_messages(tmp_path):
    path = tmp_path / "dialogues_001.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"dialogue_id": "1_0", "services": ["R"], "turns": TURNS}]).encode()))
    (row,) = rows_of(path)
    assert row.values["id"] == "1_0"
    assert row.values["messages"] == [
        {"role": "user", "content": "A table, please."},
        {"role": "assistant", "content": "For how many?"},
    ]
    assert row.origin == f"{path}:[0]"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"turns": []}, "x.json: right is a list of dialogues"),
        ([{"dialogue_id": "1"}], r"x.json:\[0\]: has no list 'turns'"),
        ([{"turns": [{"speaker": "BOT", "utterance": "x"}]}], r"turns\[0\]: has the speaker 'BOT'; right is USER or"),
        ([{"turns": [{"speaker": "USER"}]}], r"x.json:\[0\].turns\[0\]: has no text 'utterance'"),
    ],
)
def test_what_is_no_dialogue_is_told_with_its_json_path(tmp_path, document, message):
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / "x.json")


def test_replies_about_pythons_library_say_what_the_signature_does():
    path = next(path for path in stdlib_files() if path.name == "textwrap.py")
    dialogues = {row["messages"][0]["content"]: row["messages"] for row in stdlib_dialogues(path)}
    messages = dialogues["What does indent(text, prefix, predicate=None) do?"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[1]["content"].startswith("Adds 'prefix' to the beginning")
    assert messages[3]["content"] == "It takes text, prefix, predicate."
    assert messages[5]["content"] == "The default of predicate is None."
    assert all(re.fullmatch(r"What does .+\) do\?", first) for first in dialogues)
