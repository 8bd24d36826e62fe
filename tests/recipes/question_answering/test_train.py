"""Question answering under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/question_answering.json anew; say in the change why the losses differ.
"""

import json
import math
import os

import numpy as np
import pytest
import torch
import transformers
from trained_runs import (
    EVERY_PLAN,
    RANKS,
    STAGES,
    STEPS,
    Plans,
    as_transformers,
    first,
    losses,
    opened,
    plain_steps,
    rows,
    single_samples,
)

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.data.sampler import sample_order
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import open_folder
from bigbatch.recipes.question_answering import recipe
from bigbatch.recipes.question_answering.scores import word_f1
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict

GLOBAL_SIZE, SEED = 16, 3


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("question_answering")
    plans = Plans(out)
    plans.add("plain", make_document(out), *EVERY_PLAN)
    hard = {"objective": {"token_dropout": 0.2}, "model": {"freeze_layers": 1, "layer_decay": 0.7, "dropout": 0.1}}
    plans.add("resumed", make_document(out, **hard), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, **hard), (2, 3, None))
    learning = make_document(
        out, schedule={"total_steps": 60}, batch={"global_size": 32, "micro_size": 8}, evaluate={"every_steps": 30}
    )
    plans.add("learning", learning, (2, 1, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    return kept_golden("question_answering", lambda: {"encoder": losses(trained, "plain", 1, 0)})["encoder"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"plain_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "plain", ranks, stage) == pytest.approx(golden, rel=1e-4)


def test_a_model_that_knows_nothing_has_the_loss_of_equal_chances_for_all_tokens(trained, golden):
    data = opened(trained / "plain_1_0")[1]
    order = sample_order(SEED, data.train.num_samples, 0, GLOBAL_SIZE)
    lengths = data.train.batch(order.ids, order.epochs)["lengths"]
    assert golden[0] == pytest.approx(np.log(lengths).mean(), abs=0.02)
    assert len(set(golden)) == STEPS


def test_transformers_own_model_takes_the_same_steps(trained, golden):
    """Train BertForQuestionAnswering from the same first weights on the same windows, one at a time."""
    config, data, model = first(trained / "plain_1_0")
    theirs = as_transformers(config, data, model, transformers.BertForQuestionAnswering)

    def losses_of(order):
        for batch in single_samples(data, order):
            length = batch["lengths"][0]
            loss = theirs(
                input_ids=batch["tokens"][:, :length],
                token_type_ids=batch["segments"][:, :length],
                start_positions=batch["starts"],
                end_positions=batch["ends"],
            ).loss
            yield loss / GLOBAL_SIZE

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden, rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


def test_figures_of_two_ranks_are_those_of_predicting_each_question_once(trained):
    """A question has windows in several batches and on both ranks; predict sees whole questions, one at a time."""
    run_dir = trained / "learning_2_1"
    config, data, model = opened(run_dir)
    samples = data.validation
    assert samples.num_samples > samples.questions.num_rows  # several windows
    assert samples.num_samples % (2 * 8) != 0  # and ranks that have not equally many
    facts = checkpoint.newest(run_dir).manifest["facts"]
    (row,) = [row for row in rows(run_dir, "evaluation") if row["step"] == 60]
    assert facts["null_threshold"] == row["null_threshold"]
    answers = recipe.predictor(config, facts, model)
    contexts, questions = samples.contexts, samples.questions
    total, exact, nulls = 0.0, 0, 0
    for number in range(questions.num_rows):
        ids = np.array([number])
        (text,) = contexts.texts("text", samples.context_numbers[ids])
        (answer,) = answers([{"question": questions.texts("question", ids)[0], "context": text}])
        starts, ends = (questions.lists(f"answer_{side}", ids)[0].tolist() for side in ("starts", "ends"))
        spans = list(zip(starts, ends, strict=True))
        total += word_f1(answer["answer"], [text[slice(*span)] for span in spans])
        exact += answer["start"] is not None and (answer["start"], answer["end"]) in spans
        nulls += answer["start"] is None
        if answer["start"] is not None:
            assert text[answer["start"] : answer["end"]] == answer["answer"]
    count = questions.num_rows
    assert row["num_questions"] == count
    assert row["f1"] == pytest.approx(total / count)
    given, there = count - nulls, int((questions.lengths("answer_starts") > 0).sum())
    assert row["span_f1"] == pytest.approx(2 * exact / (given + there))
    assert row["f1"] > 0.36  # a third of the questions has no answer, and that alone is soon learned


def test_a_converted_run_answers_as_it_does_here(trained, tmp_path, capsys):
    run_dir, out = trained / "learning_2_1", tmp_path / "converted"
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    question, context = "How is the rose?", "The rose is dark green in the garden."
    inputs = tokenizer(question, context, return_tensors="pt", return_token_type_ids=True)
    with torch.no_grad():
        output = theirs(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
    begin = inputs["input_ids"][0].tolist().index(tokenizer.sep_token_id) + 1
    pairs = output.start_logits[0, begin:-1, None] + output.end_logits[0, None, begin:-1]
    best = pairs.triu().max().item()
    null = (output.start_logits[0, 0] + output.end_logits[0, 0]).item()
    config, _, model = opened(run_dir)
    facts = checkpoint.newest(run_dir).manifest["facts"]
    item = {"question": question, "context": context}
    (ours,) = recipe.predictor(config, facts, model)([item])
    assert ours["null_score"] == pytest.approx(null - best, abs=1e-4)
    (again,) = recipe.predictor(*open_folder(recipe, out))([item])
    assert again["null_score"] == pytest.approx(ours["null_score"], abs=1e-5)
    assert (again["start"], again["end"]) == (ours["start"], ours["end"])
    assert recipe.describe_folder(out)[1]["null_threshold"] == facts["null_threshold"]
    capsys.readouterr()
    assert predict([str(out), question, context, "--top", "2"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert list(line) == ["question", "answer", "start", "end", "probability", "null_score", "candidates"]
    assert len(line["candidates"]) == 2
    assert (line["start"], line["end"]) == (ours["start"], ours["end"])


def test_a_squad_document_and_lines_of_objects_are_answered_in_their_order(trained, tmp_path, capsys):
    run_dir = trained / "learning_2_1"
    assert predict([str(run_dir), "--file", str(trained / "questions.json"), "--format", "jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in found] == [f"{number}/{place}" for number in range(60) for place in range(3)]
    assert "context" not in found[0]
    item = {"question": "How is the rose?", "context": "The rose is red."}
    (tmp_path / "own.jsonl").write_text(json.dumps(item))
    predict([str(run_dir), "--file", str(tmp_path / "own.jsonl"), "--format", "table"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("How is the rose?")
    assert "%" in line


def test_lines_that_are_no_questions_are_answered_in_their_place(trained, monkeypatch, capsys):
    reader, writer = os.pipe()
    stdin = os.fdopen(reader)
    monkeypatch.setattr("sys.stdin", stdin)
    lines = ['{"question": "How is it?", "context": "It is red."}', "How?", '{"question": "How?"}']
    lines += ['{"id": 7, "question": "How?", "context": " "}', '{"question": "How?", "context": "\\ud800"}']
    os.write(writer, "\n".join(lines).encode())
    os.close(writer)
    assert predict([str(trained / "learning_2_1"), "-"]) == 0
    stdin.close()
    shown = capsys.readouterr()
    good, text, incomplete, empty, half = map(json.loads, shown.out.splitlines())
    assert "error" not in good
    assert text["error"].startswith("is not JSON: ")
    assert incomplete["error"] == "has no 'context'"
    assert (empty["id"], empty["error"]) == (7, "is empty, or no text: there is nothing to answer")
    assert half["error"] == "is not Unicode: it holds half a character"
    assert "4 of them could not be taken" in shown.err
    with pytest.raises(UserError, match="TEXT: found 1; right is question and context, in turns"):
        predict([str(trained / "learning_2_1"), "How is it?"])


def test_probabilities_of_candidates_and_of_no_answer_add_up_to_one(trained):
    config, data, model = opened(trained / "learning_2_1")
    (found,) = recipe.predictor(config, data.facts, model)([{"question": "How is it?", "context": "It is red."}])
    chances = [one["probability"] for one in found["candidates"]]
    assert chances == sorted(chances, reverse=True)
    null = math.exp(found["null_score"]) * chances[0]  # the scores' difference, as a ratio
    assert sum(chances) + null == pytest.approx(1.0)
    assert {one["answer"] for one in found["candidates"]} >= {"red", "It is red"}
