"""Matching under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/match.json anew; say in the change why the losses differ.
"""

import io
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
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
)

from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.data.examples import Examples
from bigbatch.recipes.core.data.sampler import sample_order
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import open_folder
from bigbatch.recipes.match import recipe
from bigbatch.recipes.match.config import MatchConfig
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict
from bigbatch.tools.search import main as search

GROUPS, SEED, TEMPERATURE = 4, 3, 0.05
FEW = ((1, 0), (2, 3))


@pytest.fixture(scope="module")
def trained(run_program, make_document, make_cross, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("match")
    plans = Plans(out)
    plans.add("bi", make_document(out), *EVERY_PLAN)
    words = {"encoder": None, "backbone": "words", "embedding_size": 32}
    plans.add("words", make_document(out, model=words), *((*plan, None) for plan in FEW))
    plans.add("cross", make_cross(out), *((*plan, None) for plan in FEW))
    hard = {"objective": {"token_dropout": 0.2}, "data": {"mining": {"count": 2}}, "model": {"layer_decay": 0.7}}
    plans.add("resumed", make_document(out, **hard), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, **hard), (2, 3, None))
    longer = {"schedule": {"total_steps": 40}, "evaluate": {"every_steps": 20}}
    plans.add("learned", make_document(out, data={"test_fraction": 0.1, "group_size": 8}, **longer), (2, 1, None))
    shorter = {"schedule": {"total_steps": 20}, "evaluate": {"every_steps": 20}}
    plans.add("learned_scores", make_cross(out, **shorter), (2, 1, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    return kept_golden("match", lambda: {name: losses(trained, name, 1, 0) for name in ("bi", "words", "cross")})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"bi_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "bi", ranks, stage) == pytest.approx(golden["bi"], rel=1e-4)


@pytest.mark.parametrize("plan", FEW)
@pytest.mark.parametrize("name", ["words", "cross"])
def test_the_other_models_do_too(trained, golden, name, plan):
    assert losses(trained, name, *plan) == pytest.approx(golden[name], rel=1e-4)
    assert len(set(golden[name])) == STEPS


def test_a_cross_encoder_that_knows_nothing_gives_even_chances(golden):
    assert golden["cross"][0] == pytest.approx(math.log(2), abs=0.05)


def test_transformers_own_model_takes_the_same_steps(trained, golden):
    """Train BertModel from the same first weights on the same groups, with the loss written out a pair at a time."""
    config, data, model = first(trained / "bi_1_0")
    theirs = as_transformers(config, data, model, partial(transformers.BertModel, add_pooling_layer=False))

    def vector(text):
        mean = theirs(input_ids=torch.from_numpy(text.astype(np.int64))[None]).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    def losses_of(order):
        for sample, epoch in zip(order.ids.tolist(), order.epochs.tolist(), strict=True):
            start = epoch * data.train.num_pairs + sample * 4
            pairs = sample_order(SEED, data.train.num_pairs, start, 4).ids
            sides = [
                [vector(text) for text in data.train.texts.lists("tokens", side[pairs])]
                for side in (data.train.left, data.train.right)
            ]
            cosines = torch.stack([torch.stack([a @ b for b in sides[1]]) for a in sides[0]]) / TEMPERATURE
            both = (torch.log_softmax(cosines, 1).diag() + torch.log_softmax(cosines, 0).diag()) / 2
            yield -both.sum() / (4 * GROUPS)

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden["bi"], rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


def test_figures_of_two_ranks_are_those_of_ranking_each_query_by_predict(trained):
    config, data, model = opened(trained / "learned_2_1")
    texts, pairs = data.validation.texts, data.validation.pairs
    (row,) = [row for row in rows(trained / "learned_2_1", "evaluation") if row["step"] == 40]
    is_right = texts.numbers("is_right").astype(bool)
    sides = [np.flatnonzero(~is_right), np.flatnonzero(is_right)]
    lefts, rights = (texts.texts("text", numbers) for numbers in sides)
    score = recipe.predictor(config, data.facts, model)
    right = set(zip(pairs.numbers("left").tolist(), pairs.numbers("right").tolist(), strict=True))
    ranks = []
    for number, left in zip(sides[0].tolist(), lefts, strict=True):
        scores = [one["score"] for one in score([{"left": left, "right": text} for text in rights])]
        order = sides[1][np.argsort(-np.array(scores), kind="stable")].tolist()
        ranks.append(1 + min(place for place, text in enumerate(order) if (number, text) in right))
    assert row["mrr@10"] == pytest.approx(np.mean([1 / rank if rank <= 10 else 0 for rank in ranks]))
    assert row["recall@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]))
    assert row["mrr@10"] > 0.5  # chance has some 0.12


def test_correlations_are_those_of_the_scores_that_predict_gives(trained):
    config, data, model = opened(trained / "learned_scores_2_1")
    (row,) = [row for row in rows(trained / "learned_scores_2_1", "evaluation") if row["step"] == 20]
    validation = data.validation
    lefts, rights = (validation.texts.texts("text", side) for side in (validation.left, validation.right))
    items = [{"left": left, "right": right} for left, right in zip(lefts, rights, strict=True)]
    found = [one["score"] for one in recipe.predictor(config, data.facts, model)(items)]
    assert all(0 <= score <= 3 for score in found)
    assert row["spearman"] == pytest.approx(stats.spearmanr(found, validation.score).statistic, abs=1e-4)
    assert row["pearson"] == pytest.approx(stats.pearsonr(found, validation.score).statistic, abs=1e-4)


def test_a_converted_bi_encoder_is_a_folder_that_gives_the_same_vectors(trained, tmp_path):
    run_dir, out = trained / "learned_2_1", tmp_path / "converted"
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    texts = ["red rose, garden", "Near the wall there is a knife."]
    ours = recipe.encoder_of(*recipe.open_run(run_dir, ""))(texts)
    again = recipe.encoder_of(*open_folder(recipe, out))(texts)
    assert again == pytest.approx(ours, abs=1e-6)
    model = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text, vector in zip(texts, ours, strict=True):
        with torch.no_grad():
            state = model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0].mean(0)
        assert (state / state.norm()).numpy() == pytest.approx(vector, abs=1e-5)
    types = [module["type"].rpartition(".")[2] for module in json.loads((out / "modules.json").read_text())]
    assert types == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((out / "1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"] is True


def test_a_converted_cross_encoder_scores_as_it_does_here(trained, tmp_path, capsys):
    run_dir, out = trained / "learned_scores_2_1", tmp_path / "converted"
    assert convert(run_dir, out).largest_difference < 1e-5
    pair = ["red rose, garden 3", "The rose at the garden is red."]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(out)(*pair, return_tensors="pt", return_token_type_ids=True)
    with torch.no_grad():
        logit = model(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"]).logits.item()
    scores = []
    for folder in (run_dir, out):
        assert predict([str(folder), *pair]) == 0
        scores.append(json.loads(capsys.readouterr().out)["score"])
    assert scores == pytest.approx([3 / (1 + math.exp(-logit))] * 2, abs=1e-5)


def test_an_earlier_run_mines_negatives_and_searches_its_own_documents(trained, make_document, tmp_path, capsys):
    earlier = trained / "learned_2_1"
    document = make_document(tmp_path, data={"mining": {"count": 2, "by": str(earlier)}})
    config = MatchConfig.model_validate_json(json.dumps(document))
    folder = recipe.prepare(config)
    pairs, texts = Examples(folder, "train"), Examples(folder, "train_texts")
    embed = recipe.encoder_of(*recipe.open_run(earlier, ""))
    rights = np.flatnonzero(texts.numbers("is_right"))
    left, right = (pairs.numbers(side)[0] for side in ("left", "right"))
    cosines = embed(texts.texts("text", rights)) @ embed(texts.texts("text", np.array([left])))[0]
    nearest = [number for number in rights[np.argsort(-cosines)].tolist() if number != right]
    assert pairs.lists("negatives", np.array([0]))[0].tolist() == nearest[:2]
    capsys.readouterr()
    assert search([str(earlier), "red rose, garden", "--by", "model", "--top", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["hits"]) == 2


def test_search_makes_an_index_of_a_file_and_answers_from_it(trained, write_lines, tmp_path, monkeypatch, capsys):
    model, index = str(trained / "words_1_0"), ["--index", str(tmp_path / "index")]
    texts = ("red rose garden", "blue wall garden", "old oven")
    file = write_lines(tmp_path / "documents.jsonl", ({"id": f"d{n}", "text": text} for n, text in enumerate(texts)))
    assert search([model, "--documents", file, *index]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"3 documents in {tmp_path / 'index'}\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("garden wall\nold oven\n"))
    assert search([model, *index, "--top", "1", "--by", "words"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in found] == ["garden wall", "old oven"]
    assert [hit["id"] for line in found for hit in line["hits"]] == ["d1", "d2"]
    assert search([model, "old oven", *index, "--top", "1", "--format", "table"]) == 0
    assert capsys.readouterr().out.split() == ["0.0328", "d2", "old", "oven"]
    with pytest.raises(UserError, match="exists already; leave --documents out, or name another folder"):
        search([model, "--documents", file, *index])
    with pytest.raises(UserError, match="QUERY: is empty"):
        search([model, " ", *index])


def test_lines_of_text_are_numbered_and_an_id_that_comes_twice_is_told(trained, write_lines, tmp_path, capsys):
    model = str(trained / "words_1_0")
    (tmp_path / "documents.txt").write_text("red rose\nold oven\n")
    assert search([model, "old oven", "--documents", str(tmp_path / "documents.txt"), "--top", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == "2"
    twice = write_lines(tmp_path / "twice.jsonl", [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}])
    with pytest.raises(UserError, match=r"twice.jsonl:2: has the id '1', as an earlier one has"):
        search([model, "old oven", "--documents", twice])


def test_a_model_starts_from_a_run_with_its_tokenizer_and_shape(trained, make_document, tmp_path):
    run_dir = trained / "learned_2_1"
    document = make_document(tmp_path, model={"encoder": None, "initialize_from": str(run_dir)})
    document["data"].pop("tokenizer")
    config = MatchConfig.model_validate_json(json.dumps(document))
    recipe.prepare(config)
    facts = recipe.open_data(config).facts
    texts = ["red rose, garden", "Near the wall there is a knife."]
    found = recipe.encoder_of(config, facts, recipe.build_model(config, facts))(texts)
    assert found == pytest.approx(recipe.encoder_of(*recipe.open_run(run_dir, ""))(texts))


def test_a_cross_encoder_cannot_search(trained):
    with pytest.raises(UserError, match="gives texts no vectors of their own; right is a bi-encoder"):
        search([str(trained / "cross_1_0"), "red rose"])


def test_a_bag_of_words_gives_the_same_vectors_from_a_folder_of_its_own(trained, tmp_path):
    assert convert(trained / "words_1_0", tmp_path / "out").largest_difference == 0
    texts = ["red rose, garden", "Near the wall there is a knife."]
    expected = recipe.encoder_of(*recipe.open_run(trained / "words_1_0", ""))(texts)
    assert (recipe.encoder_of(*open_folder(recipe, tmp_path / "out"))(texts) == expected).all()


def test_an_empty_text_is_answered_in_its_place(trained, tmp_path, capsys):
    lines = [{"id": 1, "left": "red rose", "right": " "}, {"id": 2, "left": "red rose", "right": "blue wall"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert predict([str(trained / "words_1_0"), "--file", str(tmp_path / "pairs.jsonl")]) == 0
    empty, good = map(json.loads, capsys.readouterr().out.splitlines())
    assert empty["error"] == "is empty, or no text: there is nothing to match"
    assert (good["id"], good["left"]) == (2, "red rose")
    assert -1 <= good["score"] <= 1
