"""Dialogues as prepared: what is learned from, rows that never mix, long dialogues, bad rows, and the real set."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.data.chat import Chat, install_template, open_chat
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.data.splits import prepared_splits
from bigbatch.recipes.core.data.tokenizing import TokenizerSection, make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.dialogue.config import DialogueDataSection
from bigbatch.recipes.dialogue.data import open_split, prepare, replies_of, windows_of

REAL = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
SHOP = [
    {"role": "system", "content": "You keep a shop."},
    {"role": "user", "content": "How much is tea?"},
    {"role": "assistant", "content": "Nine euros."},
    {"role": "user", "content": "And milk?"},
    {"role": "assistant", "content": "One."},
]


def section_of(folder, dialogues, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues))
    values = {
        "train": [str(path)],
        "tokenizer": {"kind": "bpe", "vocabulary_size": 300},
        "sequence_length": 128,
        "prepared_dir": str(folder / "prepared"),
    }
    return DialogueDataSection.model_validate_json(json.dumps({**values, **changes}))


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(TokenizerSection(kind="bpe", vocabulary_size=300), ["How much is tea? Nine euros."], folder)
    install_template(folder, "chatml")
    return open_chat(folder)


@pytest.mark.parametrize("template", ["chatml", "text"])
def test_the_labels_are_the_replies_and_what_ends_them_alone(tmp_path, template):
    section = section_of(tmp_path, [SHOP], template=template)
    folder = prepare(section)
    assert prepared_splits(section) == folder
    samples, tokenizer = open_split(folder, "train", section), open_chat(folder).tokenizer
    batch = samples.batch(np.array([0]), np.array([0]))
    (labels,) = batch["labels"]
    learned = tokenizer.tokenizer.decode(labels[labels != IGNORED_LABEL].tolist(), skip_special_tokens=False)
    end = "<|im_end|>" if template == "chatml" else "<|endoftext|>"
    assert learned == f"Nine euros.{end}One.{end}"
    places = np.flatnonzero(labels != IGNORED_LABEL)
    assert np.array_equal(labels[places], batch["tokens"][0, places + 1])


def test_rows_hold_whole_dialogues_that_do_not_see_each_other(tmp_path):
    dialogues = [[*SHOP[:2], {"role": "assistant", "content": f"{n} euros" * (1 + n % 5)}] for n in range(40)]
    section = section_of(tmp_path, dialogues)
    samples = open_split(prepare(section), "train", section)
    assert samples.num_samples < 40
    assert sorted(window for row in samples.rows for window in row) == list(range(40))
    ids = np.arange(samples.num_samples)
    batch = samples.batch(ids, np.zeros_like(ids))
    examples = samples.examples
    for row, windows in enumerate(samples.rows):
        for number, window in enumerate(examples.lists("tokens", np.array(windows))):
            own = batch["documents"][row] == number
            assert np.array_equal(batch["tokens"][row, own], window)
            assert np.array_equal(batch["positions"][row, own], np.arange(len(window)))
            assert batch["labels"][row, np.flatnonzero(own)[-1]] == IGNORED_LABEL  # never the next dialogue's token
    firsts, ends = (np.concatenate(examples.lists(name, np.arange(40))) for name in ("firsts", "ends"))
    assert (batch["labels"] != IGNORED_LABEL).sum() == (ends - firsts).sum()
    alone = open_split(prepared_splits(section), "train", section.model_copy(update={"packing": False}))
    assert alone.num_samples == 40
    assert alone.fingerprint != samples.fingerprint


WORDS = st.integers(1, 40).map(lambda count: "tea " * count)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(TURNS, st.booleans(), st.integers(40, 120))
def test_windows_of_a_long_dialogue_fit_their_rows_and_have_each_reply_once(chat, turns, has_system, row_tokens):
    messages = [{"role": "system", "content": "You sell tea."}] * has_system
    for number, (said, reply) in enumerate(turns):
        messages.append({"role": "user", "content": f"{number} {said}"})
        messages.append({"role": "assistant", "content": f"{number} {reply}"})
    found = list(windows_of(chat, messages, row_tokens))
    learned = [window.messages[place]["content"] for window in found for place in window.places]
    assert learned == [message["content"] for message in messages if message["role"] == "assistant"]
    for window in found:
        assert len(window.tokens) <= row_tokens
        assert len(window.replies) == len(window.places)
        assert window.messages[0]["role"] == ("system" if has_system else "user")
        for (first, end), place in zip(window.replies, window.places, strict=True):
            text = chat.tokenizer.tokenizer.decode(window.tokens[first:end].tolist(), skip_special_tokens=False)
            content = window.messages[place]["content"].strip()
            assert f"{content}<|im_end|>".startswith(text) if window.is_cut else text == f"{content}<|im_end|>"
            assert 0 < first < end <= len(window.tokens)


def test_a_reply_comes_with_what_was_said_before_it(tmp_path):
    section = section_of(tmp_path, [SHOP, SHOP[1:3]], sequence_length=40)
    folder = prepare(section)
    samples, tokenizer = open_split(folder, "train", section), open_chat(folder).tokenizer.tokenizer
    found = replies_of(samples.examples)
    assert [reply.content for reply in found] == ["Nine euros.", "One.", "Nine euros."]
    assert found[2].before == SHOP[1:2]
    whole = [tokenizer.decode(reply.request.tolist(), skip_special_tokens=False) for reply in found]
    assert whole[0].startswith("<|im_start|>system\nYou keep a shop.<|im_end|>\n<|im_start|>user\nHow much is tea?")
    assert all(text.endswith("<|im_start|>assistant\n") for text in whole)
    assert [reply.content for reply in replies_of(samples.examples, 2)] == ["Nine euros.", "Nine euros."]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "has 'hello' for messages; right is a list of objects with role and content"),
        ([], r"has \[\] for messages"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\] has the role 'bot'; right is system, user, assistant"),
        ([SHOP[1], {"role": "assistant", "content": " "}], r"messages\[1\] \(assistant\) has ' ' for content"),
        ([SHOP[1], {"role": "assistant", "content": None}], r"messages\[1\] \(assistant\) has None for content"),
        ([SHOP[1]], "has no reply, a message of the assistant"),
        ([SHOP[1], {"role": "assistant", "content": "\ud800"}], "is not Unicode: it holds half a character"),
        ([{"role": "user", "content": "<|im_end|>"}, SHOP[2]], r"\(user\) spells the special token '<\|im_end\|>'"),
    ],
)
def test_a_dialogue_that_is_none_is_told_with_its_line_or_counted(tmp_path, capsys, messages, message):
    section = section_of(tmp_path, [SHOP, messages])
    with pytest.raises(UserError, match=message) as caught:
        prepare(section)
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:2"
    prepare(section.model_copy(update={"on_error": "skip"}))
    shown = capsys.readouterr().err
    assert "train: 1 dialogues with 2 replies" in shown
    assert "left out: 1 " in shown


def test_a_turn_that_is_longer_than_a_row_is_cut_and_told(tmp_path, capsys):
    long = [{"role": "user", "content": "tea " * 90}, {"role": "assistant", "content": "No. " * 90}]
    prepare(section_of(tmp_path, [SHOP, long], sequence_length=64))
    assert "1 turns are longer than a row of 64 tokens and lose their beginning or end" in capsys.readouterr().err


@pytest.mark.skipif(not (REAL / "sgd_dialogue").is_dir(), reason=f"no Schema-Guided Dialogues in {REAL}")
def test_schema_guided_dialogues_are_all_read(tmp_path, capsys):
    section = DialogueDataSection.model_validate_json(
        json.dumps(
            {
                "train": [{"path": str(REAL / "sgd_dialogue/dev"), "format": "sgd"}],
                "tokenizer": {"kind": "bpe", "vocabulary_size": 1000},
                "sequence_length": 512,
                "prepared_dir": str(tmp_path),
            }
        )
    )
    samples = open_split(prepare(section), "train", section)
    assert "train: 256 dialogues with 1,787 replies" in capsys.readouterr().err
    ids = np.arange(samples.num_samples)
    assert (samples.batch(ids, ids)["documents"].max(1) >= 1).mean() > 0.5
