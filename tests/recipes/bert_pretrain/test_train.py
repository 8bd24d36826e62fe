"""BERT pretraining under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/bert_pretrain.json anew; say in the change why the losses are other ones.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from trained_runs import EVERY_PLAN, RANKS, STAGES, STEPS, Plans, first, losses, plain_steps, rows

from bigbatch.recipes.bert_pretrain import recipe
from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.models.encoder import load_encoder
from bigbatch.tools.convert import convert

FORMS = {"bert": {}, "pre_rotary": {"norm": "pre", "positions": "rotary"}}
RESUMED = (("dropout", 1, 1), ("dropout", 2, 3), ("next_sentence", 2, 2))
PAIR_PLANS = ((1, 0), (1, 1), (2, 2), (2, 3))


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("bert")
    plans = Plans(out)
    sample = {"prompts": ["The old [MASK] finds a [MASK]."], "candidates": 2}
    for form, shape in FORMS.items():
        plans.add(form, make_document(out, model=shape, sample=sample), *EVERY_PLAN)
    lamb = make_document(out, optimizer={"name": "lamb", "betas": [0.9, 0.999], "epsilon": 1e-6})
    plans.add("lamb", lamb, (1, 1, None), (2, 2, None))
    order = make_document(out, sample=sample) | {"sentence_task": "sentence_order"}
    plans.add("order", order, *((*plan, None) for plan in PAIR_PLANS))
    dropped = make_document(out, model={"dropout": 0.1}, masking={"whole_words": True})
    documents = {"dropout": dropped, "next_sentence": dropped | {"sentence_task": "next_sentence"}}
    for name, ranks, stage in RESUMED:
        plans.add(name, documents[name], (ranks, stage, 2))
        plans.add(f"{name}_whole", documents[name], (ranks, stage, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept, by form; write them first when asked to."""
    return kept_golden("bert_pretrain", lambda: {form: losses(trained, form, 1, 0) for form in FORMS})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", FORMS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, form, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"{form}_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, form, ranks, stage) == pytest.approx(golden[form], rel=1e-4)


def test_the_golden_losses_are_those_of_a_model_that_learns(golden):
    for form in FORMS:
        assert golden[form][0] - golden[form][-1] > 0.2


def test_lamb_takes_the_same_steps_on_two_ranks(trained):
    alone = losses(trained, "lamb", 1, 1)
    assert losses(trained, "lamb", 2, 2) == pytest.approx(alone, rel=1e-4)
    assert alone[0] - alone[-1] > 0.02


@pytest.mark.parametrize(("name", "ranks", "stage"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained, name, ranks, stage):
    whole = losses(trained, f"{name}_whole", ranks, stage)
    assert losses(trained, name, ranks, stage) == whole
    assert len(set(whole)) == STEPS


@pytest.mark.parametrize(("ranks", "stage"), PAIR_PLANS)
def test_pairs_are_trained_and_judged_alike_under_every_plan(trained, ranks, stage):
    alone = losses(trained, "order", 1, 0)
    assert losses(trained, "order", ranks, stage) == pytest.approx(alone, rel=1e-4)
    assert alone[0] - alone[-1] > 0.2
    judged, found = (rows(trained / f"order_{r}_{s}", "evaluation")[-1] for r, s in ((1, 0), (ranks, stage)))
    for name in ("loss", "perplexity", "masked_loss", "pair_loss", "pair_accuracy"):
        assert found[name] == pytest.approx(judged[name], rel=1e-4), name
    assert found["loss"] == pytest.approx(found["masked_loss"] + found["pair_loss"], rel=0.05)  # rows of like length


def test_the_report_shows_masks_filled_in_alike_under_every_plan(trained):
    texts = [rows(trained / f"bert_{ranks}_{stage}", "text")[-1] for ranks, stage in ((1, 0), (2, 3))]
    (sample,) = texts[0]["samples"]
    assert sample["prompt"] == "The old [MASK] finds a [MASK]."
    assert [len(part.split(", ")) for part in sample["text"].split("; ")] == [2, 2]
    assert texts[0]["samples"] == texts[1]["samples"]


def test_transformers_own_model_takes_the_same_steps(trained, golden):
    """Train BertForMaskedLM from the same first weights on the same masks, each document kept apart by its mask."""
    config, data, model = first(trained / "bert_1_0")
    export = recipe.hugging_face(config, data.facts)
    theirs = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(**export.config))
    parameters = dict(model.named_parameters())
    state = {
        piece.name: parameters[name].detach()[piece.start : piece.stop].clone()
        for name, pieces in export.tensors.items()
        for piece in pieces
    }
    theirs.load_state_dict(state, strict=False)

    def losses_of(order):
        batch = {name: torch.from_numpy(array) for name, array in data.train.batch(*order).items()}
        apart = batch["documents"].unsqueeze(1) == batch["documents"].unsqueeze(2)
        labels = torch.full_like(batch["tokens"], -100)
        counts = batch["labels"] != -100
        labels[counts.nonzero()[:, 0], batch["targets"][counts]] = batch["labels"][counts]
        yield theirs(
            input_ids=batch["tokens"],
            attention_mask=apart.unsqueeze(1),
            position_ids=batch["positions"],
            labels=labels,
        ).loss

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden["bert"], rel=1e-4)


def test_a_converted_run_fills_in_for_transformers_as_it_does_here(trained, tmp_path):
    out = tmp_path / "converted"
    parity = convert(trained / "bert_2_3", out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    assert not (out / "generation_config.json").exists()
    fill = transformers.pipeline("fill-mask", model=str(out), tokenizer=str(out), top_k=2, device="cpu")
    found = fill("The old [MASK] finds a [MASK].")
    theirs = [[f"{c['token_str']} {c['score']:.0%}" for c in gap] for gap in found]
    (sample,) = rows(trained / "bert_2_3", "text")[-1]["samples"]
    assert [part.split(", ") for part in sample["text"].split("; ")] == theirs


@torch.no_grad()
def test_a_run_with_pairs_converts_to_transformers_pretraining_model_and_back(trained, tmp_path):
    out = tmp_path / "pairs"
    convert(trained / "order_2_3", out)
    theirs, loading = transformers.AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == "BertForPreTraining"
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    document = json.loads((trained / "order_2_3" / "run.json").read_text())
    document["model"]["initialize_from"] = str(out)
    config = BertPretrainConfig.model_validate_json(json.dumps(document))
    data = recipe.open_data(config)
    model = recipe.build_model(config, data.facts).eval()
    batch = {name: torch.from_numpy(array) for name, array in data.train.batch(np.arange(8), np.zeros(8, int)).items()}
    useful = 1 - batch["documents"]
    assert useful.min() == 0
    expected = theirs(input_ids=batch["tokens"], token_type_ids=batch["segments"], attention_mask=useful)
    logits, pairs = model(batch["tokens"], documents=batch["documents"], segments=batch["segments"], with_pairs=True)
    chosen = useful.bool()
    torch.testing.assert_close(logits[chosen], expected.prediction_logits[chosen], rtol=0, atol=1e-5)
    torch.testing.assert_close(pairs, expected.seq_relationship_logits, rtol=0, atol=1e-5)
    assert load_encoder(model.encoder, out, data.facts["vocabulary_size"], model.pooler)


def test_the_second_phase_goes_on_from_the_first_ones_converted_folder(trained, tmp_path):
    out = tmp_path / "first_phase"
    convert(trained / "bert_1_1", out)
    document = json.loads((trained / "bert_1_1" / "run.json").read_text())
    document["model"]["initialize_from"] = str(out)
    document["data"]["tokenizer"] = {"kind": "pretrained", "path": str(out)}
    document["data"]["sequence_length"] = 40
    config = BertPretrainConfig.model_validate_json(json.dumps(document))
    recipe.prepare(config)
    data = recipe.open_data(config)
    model = recipe.build_model(config, data.facts)
    batch = data.train.batch(np.arange(16), np.zeros(16, int))
    assert batch["tokens"].shape == (16, 40)
    with torch.no_grad():
        result = recipe.loss(model, {name: torch.from_numpy(array) for name, array in batch.items()})
    first = losses(trained, "bert", 1, 1)
    assert result.sum.item() / result.num_targets < first[0] - 0.2  # what phase 1 learned is there
