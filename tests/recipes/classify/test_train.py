"""Classification under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/classify.json anew; say in the change why the losses are other ones.
"""

import math

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score
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

from bigbatch.recipes.classify import recipe
from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.recipe import open_folder
from bigbatch.tools.convert import convert

GLOBAL_SIZE, SEED = 16, 3
BACKBONES = ("encoder", "attention", "rnn")


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("classify")
    plans = Plans(out)
    for backbone in BACKBONES:
        plans.add(backbone, make_document(out, backbone), *EVERY_PLAN)
    padded = make_document(out, data={"packing": False})
    plans.add("padded", padded, (1, 1, None))
    hard = {
        "objective": {"token_dropout": 0.2, "label_smoothing": 0.1, "class_weights": "balanced"},
        "model": {"freeze_layers": 1, "layer_decay": 0.7, "head_dropout": 0.1},
    }
    plans.add("resumed", make_document(out, **hard), (1, 1, 2), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, **hard), (1, 1, None), (2, 3, None))
    stopping = make_document(
        out,
        "attention",
        optimizer={"learning_rate": 2e-2},
        schedule={"total_steps": 80},
        evaluate={"every_steps": 8, "best_by": "f1_macro", "patience": 2},
        checkpoint={"every_steps": 100, "keep": 1},
    )
    plans.add("stopping", stopping, (2, 1, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept, by backbone; write them first when asked to."""
    return kept_golden("classify", lambda: {backbone: losses(trained, backbone, 1, 0) for backbone in BACKBONES})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, backbone, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"{backbone}_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, backbone, ranks, stage) == pytest.approx(golden[backbone], rel=1e-4)


def test_a_model_that_knows_nothing_has_the_loss_of_three_equal_chances(golden):
    for backbone in BACKBONES:
        assert golden[backbone][0] == pytest.approx(math.log(3), abs=0.01)
        assert len(set(golden[backbone])) == STEPS


def test_padded_texts_train_as_packed_ones_do(trained):
    assert losses(trained, "padded", 1, 1) == pytest.approx(losses(trained, "encoder", 1, 1), rel=1e-5)


def test_transformers_own_model_takes_the_same_steps(trained, golden):
    """Train BertForSequenceClassification from the same first weights on the same texts, one at a time."""
    config, data, model = first(trained / "encoder_1_0")
    build = transformers.AutoModelForSequenceClassification.from_config
    theirs = as_transformers(config, data, model, build)

    def losses_of(order):
        for batch in single_samples(data, order):
            text = batch["tokens"][:, : batch["lengths"][0]]
            yield theirs(input_ids=text, labels=batch["labels"]).loss / GLOBAL_SIZE

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden["encoder"], rel=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained, ranks, stage):
    whole = losses(trained, "resumed_whole", ranks, stage)
    assert losses(trained, "resumed", ranks, stage) == whole
    assert len(set(whole)) == STEPS


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_frozen_weights_stay_and_are_in_the_checkpoint(trained, ranks, stage):
    run_dir = trained / f"resumed_whole_{ranks}_{stage}"
    config, data, model = opened(run_dir)
    torch.manual_seed(SEED)
    first = dict(recipe.build_model(config, data.facts).named_parameters())
    for name, parameter in model.named_parameters():
        stays = ".embed." in name or ".blocks.0." in name
        assert torch.equal(parameter, first[name]) == stays, name


def test_early_stopping_ends_the_run_and_the_best_checkpoint_stays(trained):
    run_dir = trained / "stopping_2_1"
    found = {row["step"]: row["f1_macro"] for row in rows(run_dir, "evaluation")}
    last, best = max(found), max(found, key=lambda step: found[step])  # of equal ones the first
    assert last < 80
    assert last - best == 2 * 8
    ended = [row for row in rows(run_dir, "event") if row["event"] == "ended"]
    assert f"best at step {best} " in ended[0]["message"]
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step_*")) == sorted(
        {f"step_{best:08d}", f"step_{last:08d}"}
    )
    assert checkpoint.best(run_dir).manifest["step"] == best
    assert checkpoint.newest(run_dir).manifest["step"] == last


def test_figures_of_two_ranks_are_scikit_learns_of_all_texts_once(trained):
    """The validation split does not divide by two ranks' batches; the figures are those of the model on all of it."""
    run_dir = trained / "stopping_2_1"
    _, data, model = opened(run_dir)
    samples = data.validation
    assert samples.num_samples % (2 * 4) != 0
    with torch.no_grad():
        batch = samples.batch(np.arange(samples.num_samples), np.zeros(samples.num_samples, int))
        found = recipe.outputs(model, {name: torch.from_numpy(array) for name, array in batch.items()}).arrays
    predicted, right = found["probabilities"].argmax(-1).numpy(), batch["labels"]
    best = checkpoint.best(run_dir).manifest["step"]
    (row,) = [row for row in rows(run_dir, "evaluation") if row["step"] == best]
    assert row["accuracy"] == pytest.approx(accuracy_score(right, predicted))
    assert row["f1_macro"] == pytest.approx(f1_score(right, predicted, average="macro"))
    assert row["f1/garden"] == pytest.approx(f1_score(right, predicted, average=None)[0])
    assert row["f1_macro"] > 0.5  # chance is a third


def test_a_converted_run_classifies_for_transformers_as_it_does_here(trained, tmp_path):
    run_dir, out = trained / "encoder_2_3", tmp_path / "converted"
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    texts = ["the old rose near the hedge", "two kettle behind butter the", "a quiet desk finds the green report"]
    pipeline = transformers.pipeline("text-classification", model=str(out), tokenizer=str(out), device="cpu")
    theirs = pipeline(texts)
    config, data, model = opened(run_dir)
    ours = recipe.predictor(config, data.facts, model)(texts)
    assert [answer["label"] for answer in ours] == [answer["label"] for answer in theirs]
    for answer, other in zip(ours, theirs, strict=True):
        assert answer["probability"] == pytest.approx(other["score"], abs=1e-5)
    again = recipe.predictor(*open_folder(recipe, out))(texts)
    for answer, other in zip(again, ours, strict=True):
        assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
