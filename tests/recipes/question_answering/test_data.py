"""Questions as prepared: places of answers to the character, windows, bad rows, and the real sets."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.data.examples import read_examples
from bigbatch.recipes.core.data.splits import prepared_splits
from bigbatch.recipes.core.data.tokenizing import Placed
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.question_answering.config import QuestionDataSection
from bigbatch.recipes.question_answering.data import (
    QuestionSamples,
    cut_contexts,
    open_split,
    prepare,
    spans_of,
    token_span,
)

REAL = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
CONTEXT = "Bern is the seat of the government. Zürich is larger."
ROWS = [
    {"question": "Where is the government?", "context": CONTEXT, "answers": [{"start": 0, "end": 4, "text": "Bern"}]},
    {"question": "What is larger?", "context": CONTEXT, "answers": {"text": ["Zürich"], "answer_start": [36]}},
    {"question": "Who is it?", "context": CONTEXT, "answers": []},
]


def section_of(folder, rows=ROWS, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "train": (str(path),),
        "tokenizer": {"kind": "wordpiece", "vocabulary_size": 120},
        "sequence_length": 24,
        "question_tokens": 8,
        "stride_tokens": 5,
        "prepared_dir": str(folder / "prepared"),
    }
    return QuestionDataSection.model_validate_json(json.dumps({**values, **changes}))


def answers_of(samples: QuestionSamples) -> list[tuple[str, str | None]]:
    """Return each window's question, and the text that its targets stand for."""
    batch = samples.batch(np.arange(samples.num_samples), np.zeros(samples.num_samples, int))
    found = []
    for window, row in enumerate(batch["rows"]):
        (question,) = samples.questions.texts("question", np.array([row]))
        context = samples.context_numbers[[row]]
        (text,), (starts,), (ends,) = (
            samples.contexts.texts("text", context),
            samples.contexts.lists("starts", context),
            samples.contexts.lists("ends", context),
        )
        offset = batch["begins"][window] - batch["contexts"][window]
        first, last = batch["starts"][window] + offset, batch["ends"][window] + offset
        found.append((question, text[starts[first] : ends[last]] if batch["starts"][window] else None))
    return found


def test_answers_of_every_form_come_out_of_their_tokens_again(tmp_path, capsys):
    section = section_of(tmp_path, sequence_length=64)
    folder = prepare(section)
    assert prepared_splits(section) == folder
    assert answers_of(open_split(folder, "train", section)) == [
        ("Where is the government?", "Bern"),
        ("What is larger?", "Zürich"),
        ("Who is it?", None),
    ]
    assert "train: 3 questions on 1 contexts, 1 without an answer; 3 windows" in capsys.readouterr().err
    assert read_examples(folder).facts["has_null"]
    assert open_split(folder, "test", section) is None


def test_a_window_has_question_and_context_as_two_segments(tmp_path):
    section = section_of(tmp_path, sequence_length=64, packing=False)
    samples = open_split(prepare(section), "train", section)
    batch = samples.batch(np.array([0]), np.array([0]))
    tokens, segments = batch["tokens"][0], batch["segments"][0]
    names = [samples.tokenizer.tokenizer.id_to_token(token) for token in tokens]
    assert names[0] == "[CLS]"
    assert [place for place, name in enumerate(names) if name == "[SEP]"] == [batch["contexts"][0] - 1, len(names) - 1]
    assert segments.tolist() == [0] * batch["contexts"][0] + [1] * (len(names) - batch["contexts"][0])


def test_every_token_of_a_long_context_is_in_a_window_and_an_answer_is_found_where_it_is_whole(tmp_path):
    context = " ".join(f"w{number}" for number in range(40)) + " the end"
    start = context.index("w20")
    rows = [{"question": "What?", "context": context, "answers": [{"text": "w20 w21", "answer_start": start}]}]
    section = section_of(tmp_path, rows)
    samples = open_split(prepare(section), "train", section)
    (length,), (question,) = samples.contexts.lengths("tokens"), samples.questions.lengths("tokens")
    room = 24 - 3 - question
    assert samples.begins.tolist() == list(range(0, length - room + 5, 5))
    found = [text for _, text in answers_of(samples)]
    assert set(found) == {None, "w20 w21"}
    first, last = samples.targets[0]
    inside = (samples.begins <= first) & (last < np.minimum(samples.begins + room, length))
    assert [text is not None for text in found] == inside.tolist()


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 200)), min_size=1, max_size=5), st.integers(1, 40))
def test_windows_leave_no_token_out_and_none_is_superfluous(lengths, stride):
    section = QuestionDataSection(train=("x",), sequence_length=24, question_tokens=8, stride_tokens=stride)
    questions, contexts = (np.array(found) for found in zip(*lengths, strict=True))
    rows, begins = cut_contexts(questions, contexts, section)
    for number, (question, context) in enumerate(lengths):
        room = 24 - 3 - min(question, 8)
        own = begins[rows == number]
        assert set(np.diff(own)) <= {min(room, stride)}
        assert own[0] == 0
        assert own[-1] + room >= context
        assert len(own) == 1 or own[-2] + room < context


def test_training_windows_without_an_answer_are_left_out_as_asked_and_those_with_one_never(tmp_path):
    rows = [{**ROWS[number % 3], "context": f"{CONTEXT} {number}"} for number in range(300)]
    whole = section_of(tmp_path, rows, sequence_length=64)
    some = section_of(tmp_path, rows, sequence_length=64, null_windows_kept=0.3)
    folder = prepare(whole)
    assert prepare(some) == folder
    kept = open_split(folder, "train", some)
    counts = [sum(text is None for _, text in answers_of(open_split(folder, "train", s))) for s in (whole, some)]
    assert kept.num_samples - counts[1] == 200
    assert counts[0] == 100
    assert 15 < counts[1] < 45


def test_a_context_and_its_questions_go_into_one_split(tmp_path):
    rows = [{**row, "context": f"{CONTEXT} {number}"} for number in range(20) for row in ROWS]
    section = section_of(tmp_path, rows, validation_fraction=0.2, test_fraction=0.1)
    folder = prepare(section)
    splits = [open_split(folder, name, section) for name in ("train", "validation", "test")]
    assert [split.questions.num_rows for split in splits] == [42, 12, 6]
    texts = [set(split.contexts.table["text"].to_pylist()) for split in splits]
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & texts[2]
    assert len({split.fingerprint for split in splits}) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"text": "Basel", "answer_start": 0}, "has the answer 'Basel' at 0, where 'Bern ' stands; it stands nowhere"),
        ({"text": "Zürich", "answer_start": 35}, "where ' Züric' stands; it stands at 36"),
        ({"start": 50, "end": 99}, f"has an answer at characters 50 to 99 of a context with {len(CONTEXT)}"),
        ({"start": 4, "end": 4}, "has an answer at characters 4 to 4"),
        ({"text": "Bern"}, "has the answer {'text': 'Bern'}; right is text and answer_start, or start and end"),
        ({"start": True, "end": 4}, "right is text and answer_start, or start and end"),
        ({"start": 4, "end": 5}, "has the answer ' ', of which the tokenizer sees nothing"),
    ],
)
def test_an_answer_that_does_not_stand_where_it_says_is_told_with_its_line_or_left_out(
    tmp_path, capsys, answer, message
):
    rows = [*ROWS, {**ROWS[0], "answers": [answer]}]
    with pytest.raises(UserError) as raised:
        prepare(section_of(tmp_path, rows))
    assert str(raised.value).startswith(f"{tmp_path}/rows.jsonl:4: ")
    assert message in str(raised.value)
    assert str(raised.value).endswith("data.on_error 'skip' leaves such rows out")
    assert "\n" not in str(raised.value)
    section = section_of(tmp_path, rows, on_error="skip")
    assert open_split(prepare(section), "train", section).questions.num_rows == 3
    assert "left out: 1 bad answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROWS[0], "question": " "}, "has an empty question; data.on_error 'skip' leaves such rows out"),
        ({**ROWS[2], "context": "\u200b"}, "has an empty context; data.on_error"),
        ({**ROWS[0], "answers": "Bern"}, "has 'Bern' for answers; right is a list of objects"),
        ({**ROWS[0], "question": 3}, "'question' is 3, not a text"),
        ({"question": "Who?", "context": CONTEXT}, "has no column 'answers' (data.answers_column); there are: "),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path, row, message):
    with pytest.raises(UserError, match=r"rows.jsonl:4: ") as raised:
        prepare(section_of(tmp_path, [*ROWS, row]))
    assert message in str(raised.value)


def test_half_of_a_surrogate_pair_is_another_character_at_the_same_place(tmp_path):
    rows = [{"question": "Who \udc00?", "context": "\ud800 Bern", "answers": [{"text": "Bern", "answer_start": 2}]}]
    section = section_of(tmp_path, rows)
    assert answers_of(open_split(prepare(section), "train", section)) == [("Who \ufffd?", "Bern")]


def test_a_tokenizer_without_a_first_token_and_no_room_for_a_context_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.tokenizer: has no token that begins a text"):
        prepare(section_of(tmp_path, tokenizer={"kind": "bpe", "vocabulary_size": 300}))
    with pytest.raises(ValueError, match="leave no room for a context in sequence_length 11"):
        section_of(tmp_path, sequence_length=11)


@given(st.data())
@settings(max_examples=50)
def test_a_span_takes_exactly_the_tokens_that_it_touches(data):
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=8))
    ends = np.cumsum([gap + size for gap, size in lengths])
    starts = ends - np.array([size for _, size in lengths])
    start = data.draw(st.integers(0, int(ends[-1]) - 1))
    end = data.draw(st.integers(start + 1, int(ends[-1])))
    touched = [number for number, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < end and b > start]
    found = token_span(Placed(np.zeros(len(ends), np.uint32), starts, ends), start, end)
    assert found == ((touched[0], touched[-1]) if touched else (-1, -1))


def test_several_answers_are_kept_and_nothing_is_an_answer_too():
    assert spans_of({"text": ["Bern", "Bern is"], "answer_start": [0, 0]}, CONTEXT) == ((0, 4), (0, 7))
    assert spans_of({"text": [], "answer_start": []}, CONTEXT) == spans_of(None, CONTEXT) == ()


@pytest.mark.skipif(not (REAL / "xquad").is_dir(), reason=f"no real data in {REAL}")
def test_every_answer_of_xquad_stands_in_its_window(tmp_path):
    document = json.loads((REAL / "xquad/xquad.en.json").read_text())
    (tmp_path / "xquad.json.gz").write_bytes(gzip.compress(json.dumps(document).encode()))
    changes = {
        "train": (str(tmp_path / "xquad.json.gz"),),
        "tokenizer": {"kind": "wordpiece", "vocabulary_size": 8000},
        "sequence_length": 384,
        "question_tokens": 64,
        "stride_tokens": 128,
        "group_column": "title",
    }
    section = section_of(tmp_path, **changes)
    folder = prepare(section)
    samples = open_split(folder, "train", section)
    assert (samples.questions.num_rows, samples.contexts.num_rows) == (1190, 240)
    golds = [
        answer["text"]
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for item in paragraph["qas"]
        for answer in item["answers"]
    ]
    firsts = samples.rows[samples.begins == 0]
    found = [text for (_, text), row in zip(answers_of(samples), samples.rows, strict=True) if text is not None]
    assert len(firsts) == 1190
    exact = sum(text in golds for text in found)
    assert exact / len(found) > 0.98  # the others begin or end inside a token, 19th in 19th-century or $ before a sum
    facts = read_examples(folder).facts
    assert not facts["has_null"]
    assert facts["groups"] == []  # 48 titles are too many


@pytest.mark.skipif(not (REAL / "restaurant8k").is_dir(), reason=f"no real data in {REAL}")
def test_each_slot_of_restaurant8k_is_asked_of_each_utterance(tmp_path):
    section = section_of(tmp_path, train=({"path": str(REAL / "restaurant8k/test.json"), "format": "slots"},))
    section = section.model_copy(update={"group_column": "slot"})
    folder = prepare(section)
    facts = read_examples(folder).facts
    assert facts["groups"] == ["date", "first_name", "last_name", "people", "time"]
    assert facts["answered"]["train"] == 983 + 853 + 802 + 426 + 413
    samples = open_split(folder, "train", section)
    assert samples.questions.num_rows == 5 * 3731
    questions = set(samples.questions.table["question"].to_pylist())
    assert questions == {f"{how}{slot.replace('_', ' ')}" for slot in facts["groups"] for how in ("", "requested ")}
