"""Extraction under every plan: against the golden losses, transformers' own models, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/extract.json anew; say in the change why the losses differ.
"""

import json

import numpy as np
import pytest
import rdflib
import torch
import transformers
from seqeval.metrics import f1_score
from trained_runs import STEPS, Plans, losses, opened, rows

from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import open_folder
from bigbatch.recipes.extract import recipe
from bigbatch.recipes.extract.config import EncoderBackboneSection
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict
from bigbatch.tools.triples import main as triples

KINDS = [(task, backbone) for task in ("entities", "relations") for backbone in ("words", "encoder")]
PLANS = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)]
MARKED = "In 1800 <e1>Bern</e1> is the birthplace of <e2>Ada</e2> again."


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("extract")
    plans = Plans(out)
    for task, backbone in KINDS:
        # Every plan of one, and of the others the two that are farthest apart.
        its_plans = PLANS if (task, backbone) == ("entities", "words") else [(1, 0), (2, 3)]
        plans.add(f"{task}_{backbone}", make_document(out, task, backbone), *((*plan, None) for plan in its_plans))
    hard = {"objective": {"token_dropout": 0.2}, "model": {"dropout": 0.3, "feature_dropout": 0.2}}
    for name, stop in (("resumed", 2), ("resumed_whole", None)):
        plans.add(name, make_document(out, "entities", **hard), (2, 3, stop))
    long = {"schedule": {"total_steps": 40}, "batch": {"global_size": 32, "micro_size": 8}}
    fast = {"optimizer": {"learning_rate": 2e-2}}
    for task, backbone in KINDS:
        changes = long | (fast if backbone == "words" else {})
        if (task, backbone) == ("relations", "encoder"):  # is converted, whatever it has learned
            changes = {"schedule": {"total_steps": 5}}
        plans.add(f"learned_{task}_{backbone}", make_document(out, task, backbone, **changes), (2, 1, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    names = [f"{task}_{backbone}" for task, backbone in KINDS]
    return kept_golden("extract", lambda: {name: losses(trained, name, 1, 0) for name in names})


@pytest.mark.parametrize(("ranks", "stage"), PLANS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    name = "entities_words"
    manifest = Reader(checkpoint_dir(trained / f"{name}_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, name, ranks, stage) == pytest.approx(golden[name], rel=1e-4)


@pytest.mark.parametrize(("task", "backbone"), KINDS)
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_every_model_gives_the_golden_losses_alone_and_divided(trained, golden, task, backbone, ranks, stage):
    name = f"{task}_{backbone}"
    assert losses(trained, name, ranks, stage) == pytest.approx(golden[name], rel=1e-4)
    assert len(set(golden[name])) == STEPS


def test_models_that_know_nothing_have_the_loss_of_equal_chances(golden):
    assert golden["entities_encoder"][0] == pytest.approx(np.log(5), abs=0.1)  # O, and two tags of two types
    assert golden["relations_encoder"][0] == pytest.approx(np.log(3), abs=0.05)
    assert golden["relations_words"][0] == pytest.approx(np.log(3), abs=0.05)
    assert golden["entities_words"][0] == pytest.approx(np.log(4), abs=0.4)  # some paths are impossible


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


@pytest.mark.parametrize("backbone", ["words", "encoder"])
def test_entity_figures_of_two_ranks_are_those_of_predicting_each_sentence_once(trained, backbone):
    """Sentences of nine words are read in two windows of six; predict sees texts, one at a time."""
    run_dir = trained / f"learned_entities_{backbone}_2_1"
    config, data, model = opened(run_dir)
    samples = data.validation
    assert (samples.num_samples > samples.examples.num_rows) == (backbone == "words")
    labels = data.facts["labels"]
    texts = samples.examples.table["text"].to_pylist()
    gold = [[labels[tag] for tag in tags] for tags in samples.examples.table["tags"].to_pylist()]
    given = []
    for text, starts, answer in zip(
        texts,
        samples.examples.table["starts"].to_pylist(),
        recipe.predictor(config, data.facts, model)(texts),
        strict=True,
    ):
        tags = ["O"] * len(starts)
        for entity in answer["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
            inside = [place for place, start in enumerate(starts) if entity["start"] <= start < entity["end"]]
            for place in inside:
                tags[place] = f"{'B' if place == inside[0] else 'I'}-{entity['type']}"
        given.append(tags)
    (row,) = [row for row in rows(run_dir, "evaluation") if row["step"] == 40]
    assert row["f1"] == pytest.approx(f1_score(gold, given))
    assert row["f1"] > 0.8
    assert {"f1/person", "f1/place", "precision", "recall"} <= row.keys()


def test_relations_are_learned_with_their_direction_and_predicted_of_marked_texts(trained):
    run_dir = trained / "learned_relations_words_2_1"
    config, data, model = opened(run_dir)
    (row,) = [row for row in rows(run_dir, "evaluation") if row["step"] == 40]
    assert row["relation_f1"] > 0.9
    assert {"f1/Birth", "f1/Home", "accuracy"} <= row.keys()
    (answer,) = recipe.predictor(config, data.facts, model)([MARKED])
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    assert (answer["label"], answer["relation"]) == ("Birth(e2,e1)", {"name": "Birth", "subject": "e2"})
    with pytest.raises(UserError, match=r"has <e2> 0 times; right is one <e1>"):
        recipe.predictor(config, data.facts, model)(["<e1>Bern</e1> is large."])


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [("entities", "AutoModelForTokenClassification"), ("relations", "AutoModelForSequenceClassification")],
)
def test_a_converted_run_answers_as_it_does_here(trained, tmp_path, capsys, task, auto_class):
    run_dir, out = trained / f"learned_{task}_encoder_2_1", tmp_path / "converted"
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    theirs = getattr(transformers, auto_class).from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    config, data, model = opened(run_dir)
    text = MARKED if task == "relations" else "In 1800 Bern is the birthplace of Ada again."
    (ours,) = recipe.predictor(config, data.facts, model)([text])
    words = "In 1800 $ Bern $ is the birthplace of # Ada # again ." if task == "relations" else text
    with torch.no_grad():
        logits = theirs(**tokenizer(words, return_tensors="pt")).logits[0]
    if task == "relations":
        chances = logits.softmax(-1).tolist()
        assert chances == pytest.approx(list(ours["probabilities"].values()), abs=1e-5)
    else:
        tags = [theirs.config.id2label[tag] for tag in logits.argmax(-1).tolist()[1:-1]]
        assert sum(tag.startswith("B-") for tag in tags) >= len(ours["entities"]) > 0
    (again,) = recipe.predictor(*open_folder(recipe, out))([text])
    assert again.keys() == ours.keys()
    assert again.get("entities") == ours.get("entities")
    capsys.readouterr()
    assert predict([str(out), text]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line.get("label") == ours.get("label")
    assert line.get("entities") == ours.get("entities")


@pytest.mark.parametrize("task", ["entities", "relations"])
def test_what_transformers_has_no_class_for_answers_the_same_from_a_folder_of_its_own(trained, tmp_path, task):
    run_dir = trained / f"learned_{task}_words_2_1"
    assert convert(run_dir, tmp_path / "out").largest_difference == 0
    config, data, model = opened(run_dir)
    texts = [MARKED] if task == "relations" else ["In 1800 Bern is the birthplace of Ada again."]
    expected = recipe.predictor(config, data.facts, model)(texts)
    assert recipe.predictor(*open_folder(recipe, tmp_path / "out"))(texts) == expected


def test_an_entity_and_a_relation_model_together_give_triples(trained, capsys):
    models = [str(trained / f"learned_{task}_words_2_1") for task in ("entities", "relations")]
    known = [json.loads(line) for line in (trained / "sentences.jsonl").read_text().splitlines()[:30]]
    right = set()
    for row in known:
        person, place = (row["text"][entity["start"] : entity["end"]] for entity in row["entities"])
        if row["relation"] != "Other":
            right.add((row["text"], person, row["relation"].split("(")[0], place))
    texts = [*(row["text"] for row in known), "\ud800"]
    assert triples([*models, *texts, "--least", "0"]) == 0
    shown = capsys.readouterr()
    *lines, bad = map(json.loads, shown.out.splitlines())
    found = {
        (line["text"], triple["subject"]["text"], triple["relation"], triple["object"]["text"])
        for line in lines
        for triple in line["triples"]
    }
    assert [line["text"] for line in lines] == texts[:-1]
    assert len(found & right) > 0.9 * max(len(found), len(right))
    assert bad["error"].startswith("is not Unicode")
    assert f"{len(found)} triples, 1 not taken" in shown.err
    assert triples([*models, *texts, "--least", "0", "--format", "ntriples"]) == 0
    graph = rdflib.Graph().parse(data=capsys.readouterr().out, format="nt")
    relations = {
        (str(graph.value(subject, rdflib.RDFS.label)), relation, str(graph.value(other, rdflib.RDFS.label)))
        for relation in ("Home", "Birth")
        for subject, other in graph.subject_objects(rdflib.URIRef(f"http://example.org/{relation}"))
    }
    assert relations == {triple[1:] for triple in found}


def test_a_model_starts_from_a_run_or_its_folder_and_keeps_a_head_for_the_same_labels_alone(trained, tmp_path):
    run_dir, folder = trained / "learned_entities_encoder_2_1", tmp_path / "folder"
    convert(run_dir, folder)
    config, data, model = opened(run_dir)
    theirs, known = dict(model.named_parameters()), data.facts["vocabulary_size"]
    for start in (run_dir, folder):
        section = EncoderBackboneSection(backbone="encoder", initialize_from=str(start), keep_head=True)
        changed = config.model_copy(update={"model": section})
        for name, parameter in recipe.build_model(changed, data.facts).named_parameters():
            rows = slice(known) if "tokens" in name else slice(None)  # others are no tokens, and a folder has none
            assert torch.equal(parameter[rows], theirs[name][rows]), name
        drawn = changed.model_copy(update={"model": section.model_copy(update={"keep_head": False})})
        assert not torch.equal(recipe.build_model(drawn, data.facts).head.weight, theirs["head.weight"])
        others = {**data.facts, "labels": ["O", "B-city", "I-city", "B-x", "I-x"]}
        with pytest.raises(UserError, match=r"model.keep_head: the head in .* is for other labels \(O, B-person"):
            recipe.build_model(changed, others)
    prepared = recipe.prepare(changed)
    assert (prepared / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
