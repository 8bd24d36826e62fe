"""Summarization under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/summarize.json anew; say in the change why the losses differ.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from pydantic import ValidationError
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

from bigbatch.launcher.predict import count_parameters
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.data.sampler import sample_order
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.seq2seq import hugging_face_state
from bigbatch.recipes.core.recipe import open_folder
from bigbatch.recipes.summarize import recipe
from bigbatch.recipes.summarize.config import SummarizeConfig
from bigbatch.recipes.summarize.rouge import KINDS, Rouge
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict

GLOBAL_SIZE, SEED = 16, 3


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("summarize")
    plans = Plans(out)
    plans.add("plain", make_document(out), *EVERY_PLAN)
    hard = {
        "objective": {"loss": "listwise", "token_dropout": 0.2},
        "model": {"sentence_layers": 1, "freeze_layers": 1, "layer_decay": 0.7, "dropout": 0.1},
    }
    plans.add("resumed", make_document(out, **hard), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, **hard), (2, 3, None))
    learning = make_document(
        out, schedule={"total_steps": 40}, batch={"global_size": 32, "micro_size": 8}, evaluate={"every_steps": 40}
    )
    plans.add("learning", learning, (2, 1, None))
    shape = {"family": "mbart", "num_encoder_layers": 1, "num_decoder_layers": 1, "hidden_size": 32, "num_heads": 4}
    shape |= {"max_positions": 64, "dropout": 0.0}
    write = {"backbone": "seq2seq", "shape": shape}
    document = make_document(out, search={"max_new_tokens": 16, "num_beams": 2})
    del document["summary"], document["data"]["oracle_sentences"]
    document["data"] |= {"sequence_length": 64, "summary_tokens": 12}
    plans.add("write", document | {"model": write}, (1, 0, None), (2, 2, None), (2, 3, None))
    objective = {"token_dropout": 0.2, "label_smoothing": 0.1}
    hard = document | {"model": write | {"dropout": 0.1}, "objective": objective}
    plans.add("write_resumed", hard, (2, 1, 2))
    plans.add("write_whole", hard, (2, 1, None))
    learning = {"model": write, "schedule": {"name": "constant", "total_steps": 80}, "evaluate": {"every_steps": 80}}
    plans.add("write_learning", document | learning, (1, 1, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    measured = {"encoder": "plain", "seq2seq": "write"}
    return kept_golden("summarize", lambda: {kind: losses(trained, name, 1, 0) for kind, name in measured.items()})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"plain_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "plain", ranks, stage) == pytest.approx(golden["encoder"], rel=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_five_steps_of_a_writer_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    assert losses(trained, "write", ranks, stage) == pytest.approx(golden["seq2seq"], rel=1e-4)


def test_transformers_own_model_takes_the_same_steps(trained, golden):
    """Train BertForTokenClassification from the same first weights on the same windows, one at a time."""
    config, data, model = first(trained / "plain_1_0")
    theirs = as_transformers(config, data, model, transformers.BertForTokenClassification)

    def losses_of(order):
        for batch in single_samples(data, order):
            length = batch["lengths"][0]
            inputs = {"input_ids": batch["tokens"][:, :length], "token_type_ids": batch["segments"][:, :length]}
            logits = theirs(**inputs).logits[0, :, 0][batch["places"][0]]
            yield F.binary_cross_entropy_with_logits(logits, batch["labels"][0]) / GLOBAL_SIZE

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden["encoder"], rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    for resumed, whole, stage in (("resumed", "resumed_whole", 3), ("write_resumed", "write_whole", 1)):
        expected = losses(trained, whole, 2, stage)
        assert losses(trained, resumed, 2, stage) == expected
        assert len(set(expected)) == STEPS


def test_the_first_listwise_loss_is_the_cross_entropy_of_equal_shares_with_the_softmax_of_rouge(trained):
    config = SummarizeConfig.model_validate_json((trained / "resumed_2_3" / "run.json").read_text())
    data = recipe.open_data(config)
    batch = data.train.batch(np.arange(8), np.zeros(8, np.int64))
    model = recipe.build_model(config, data.facts).eval()
    with torch.no_grad():
        model.head.weight.zero_()  # of equal scores
        found = recipe.loss(model, {name: torch.from_numpy(array) for name, array in batch.items()})
    counts = (batch["places"] >= 0).sum(1)
    assert len(set(counts)) > 1
    assert found.num_targets == 8
    assert found.sum.item() == pytest.approx(np.log(counts).sum())


def test_sentences_of_a_window_see_each_other_and_not_what_lies_beyond(trained):
    config = SummarizeConfig.model_validate_json((trained / "resumed_2_3" / "run.json").read_text())
    data = recipe.open_data(config)
    model = recipe.build_model(config, data.facts).eval()
    together = data.train.batch(np.arange(8), np.zeros(8, np.int64))
    with torch.no_grad():
        found = recipe.outputs(model, {name: torch.from_numpy(array) for name, array in together.items()}).arrays
        for number in range(8):
            alone = data.train.batch(np.array([number]), np.zeros(1, np.int64))
            one = recipe.outputs(model, {name: torch.from_numpy(array) for name, array in alone.items()}).arrays
            assert torch.allclose(one["scores"][0], found["scores"][number], atol=1e-5)
    assert found["scores"].shape == (8, config.data.window_sentences)


def test_figures_of_two_ranks_are_those_of_predicting_each_document_once(trained):
    """A longer document has windows in several batches and on both ranks; predict sees whole documents."""
    run_dir = trained / "learning_2_1"
    config, data, model = opened(run_dir)
    samples = data.validation
    assert samples.num_samples > samples.documents.num_rows  # several windows
    assert samples.num_samples % (2 * 8) != 0  # and ranks that have not equally many
    (row,) = [row for row in rows(run_dir, "evaluation") if row["step"] == 40]
    numbers = np.arange(samples.documents.num_rows)
    texts = [text.split("\n") for text in samples.documents.texts("text", numbers)]
    references = [text.split("\n\n") for text in samples.documents.texts("references", numbers)]
    answers = recipe.predictor(config, data.facts, model)([{"document": text} for text in texts])
    rouge = Rouge()
    found = [rouge.score(answer["summary"], right) for answer, right in zip(answers, references, strict=True)]
    assert [row[kind] for kind in KINDS] == pytest.approx(np.mean(found, 0).tolist())
    assert row["rouge1"] > 0.6  # a sentence of chance has .3
    for text, answer in zip(texts, answers, strict=True):
        (chosen,) = answer["sentences"]
        assert text[chosen["place"]] == chosen["sentence"] == answer["summary"]


def test_thorough_figures_tell_baselines_the_oracle_and_intervals(trained):
    config, data, model = opened(trained / "learning_2_1")
    samples = data.validation
    batch = samples.batch(np.arange(samples.num_samples), np.zeros(samples.num_samples, np.int64))
    with torch.no_grad():
        arrays = recipe.outputs(model, {name: torch.from_numpy(array) for name, array in batch.items()}).arrays
    found = recipe.figures(config, data.facts, {name: array.numpy() for name, array in arrays.items()}, thorough=True)
    assert found["num_documents"] == samples.documents.num_rows
    rouge, numbers = Rouge(), np.arange(samples.documents.num_rows)
    texts = [text.split("\n") for text in samples.documents.texts("text", numbers)]
    references = [text.split("\n\n") for text in samples.documents.texts("references", numbers)]
    pairs = list(zip(texts, references, strict=True))
    assert found["lead_rouge2"] == pytest.approx(np.mean([rouge.score(text[0], right)[1] for text, right in pairs]))
    best = [max(rouge.score(sentence, right)[:2].mean() for sentence in text) for text, right in pairs]
    assert (found["oracle_rouge1"] + found["oracle_rouge2"]) / 2 == pytest.approx(np.mean(best), abs=0.02)
    assert found["oracle_rouge1"] >= found["rouge1"] > max(found["lead_rouge1"], found["textrank_rouge1"])
    low, high = found["details"]["intervals"]["rouge1"]
    assert low < found["rouge1"] < high


def test_a_converted_run_summarizes_as_it_does_here(trained, tmp_path, capsys):
    run_dir, out = trained / "learning_2_1", tmp_path / "converted"
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    sentences = ["The rose is red at home.", "In all, we found that a desk stands near a wall."]
    tokens = [tokenizer(sentence)["input_ids"] for sentence in sentences]
    kinds = [number for number, found in enumerate(tokens) for _ in found]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([[*tokens[0], *tokens[1]]]), token_type_ids=torch.tensor([kinds])).logits
    expected = logits[0, len(tokens[0]), 0].sigmoid().item()
    config, data, model = opened(run_dir)
    (ours,) = recipe.predictor(config, data.facts, model)([{"document": sentences}])
    (again,) = recipe.predictor(*open_folder(recipe, out))([{"document": " ".join(sentences)}])
    assert again == ours
    assert ours["sentences"] == [{"place": 1, "sentence": sentences[1], "score": pytest.approx(expected, abs=1e-5)}]
    capsys.readouterr()
    assert predict([str(out), " ".join(sentences)]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == sentences[1]


def test_a_model_with_layers_over_sentences_chooses_the_same_from_a_folder_of_its_own(trained, tmp_path):
    run_dir = trained / "resumed_whole_2_3"
    assert convert(run_dir, tmp_path / "out").largest_difference == 0
    config, data, model = opened(run_dir)
    document = [{"document": ["It is cold here.", "We found that a knife stands at home.", "It is cold."]}]
    expected = recipe.predictor(config, data.facts, model)(document)
    assert recipe.predictor(*open_folder(recipe, tmp_path / "out"))(document) == expected


def test_files_of_documents_are_summarized_in_their_order(trained, tmp_path, capsys):
    run_dir = str(trained / "learning_2_1")
    assert predict([run_dir, "--file", str(trained / "documents.jsonl"), "--format", "jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in found] == list(range(120))
    assert list(found[0]) == ["id", "document", "summary", "sentences"]
    (tmp_path / "own.jsonl").write_text('{"body": ["It is red.", "It is not."]}\n{"body": []}\n')
    predict([run_dir, "--file", str(tmp_path / "own.jsonl"), "--text-column", "body", "--format", "jsonl"])
    shown = capsys.readouterr()
    good, empty = map(json.loads, shown.out.splitlines())
    assert good["summary"] in ("It is red.", "It is not.")
    assert empty["error"] == "has no sentence: there is nothing to summarize"
    (tmp_path / "own.txt").write_text("It is red. It is not.\n")
    predict([run_dir, "--file", str(tmp_path / "own.txt"), "--format", "table"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("It is ")


def test_the_first_loss_of_a_writer_is_that_of_transformers_own_model_on_each_pair_by_itself(trained, golden):
    config = SummarizeConfig.model_validate_json((trained / "write_1_0" / "run.json").read_text())
    data = recipe.open_data(config)
    torch.manual_seed(SEED)
    model = recipe.build_model(config, data.facts)
    export = recipe.hugging_face(config, data.facts)
    theirs = transformers.MBartForConditionalGeneration(transformers.AutoConfig.for_model(**export.config))
    theirs.load_state_dict(hugging_face_state(model), strict=False)
    order = sample_order(SEED, data.train.num_samples, 0, GLOBAL_SIZE)
    total, count = 0.0, 0
    for number in range(GLOBAL_SIZE):
        batch = data.train.batch(order.ids[number : number + 1], order.epochs[number : number + 1])
        tokens, written, labels = (torch.from_numpy(batch[name]) for name in ("tokens", "written", "labels"))
        logits = theirs(input_ids=tokens, decoder_input_ids=written).logits[0]
        total += F.cross_entropy(logits, labels[0], reduction="sum").item()
        count += labels.numel()
    assert total / count == pytest.approx(golden["seq2seq"][0], rel=1e-5)


def test_figures_of_a_writer_are_those_of_its_predictions_and_transformers_writes_the_same(trained, tmp_path, capsys):
    run_dir, out = trained / "write_learning_1_1", tmp_path / "converted"
    config, data, model = opened(run_dir)
    samples = data.validation
    numbers = np.arange(samples.num_samples)
    texts = [text.split("\n") for text in samples.documents.texts("text", numbers)]
    references = [text.split("\n\n") for text in samples.documents.texts("references", numbers)]
    found = recipe.generated_figures(config, data.facts, model, samples)
    answers = recipe.predictor(config, data.facts, model)([{"document": text} for text in texts])
    rouge = Rouge()
    each = [rouge.score(answer["summary"], right) for answer, right in zip(answers, references, strict=True)]
    assert [found[kind] for kind in KINDS] == pytest.approx(np.mean(each, 0).tolist())
    assert found["rouge1"] > found["lead_rouge1"] + 0.2
    assert [row["loss"] for row in rows(run_dir, "evaluation")][-1] < 1.5
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    again = recipe.predictor(*open_folder(recipe, out))
    for text, ours in zip(texts[:4], answers, strict=False):
        inputs = tokenizer(" ".join(text), return_tensors="pt", return_token_type_ids=False)
        (tokens,) = theirs.generate(**inputs)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == ours["summary"]
        assert again([{"document": text}]) == [ours]
    capsys.readouterr()
    assert predict([str(out), " ".join(texts[0])]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == answers[0]["summary"]


def test_settings_that_a_backbone_has_no_use_for_are_refused(make_document, tmp_path):
    document = make_document(tmp_path)
    for section, settings in (("search", {"num_beams": 2}), ("objective", {"label_smoothing": 0.1})):
        with pytest.raises(ValidationError, match=f"{section}.* has no effect on model.backbone 'encoder'"):
            SummarizeConfig.model_validate_json(json.dumps({**document, section: settings}))
    writer = {"backbone": "seq2seq", "initialize_from": "x"}
    with pytest.raises(ValidationError, match="summary has no effect on model\\.backbone 'seq2seq'"):
        SummarizeConfig.model_validate_json(json.dumps({**document, "model": writer}))
    with pytest.raises(ValidationError, match="has both of shape and initialize_from"):
        SummarizeConfig.model_validate_json(json.dumps({**document, "model": {**writer, "shape": {}}}))


@pytest.mark.parametrize("name", ["learning_2_1", "write_learning_1_1"])
def test_a_run_and_its_folder_are_started_from_with_tokenizer_and_shape(trained, tmp_path, name):
    config, data, model = opened(trained / name)
    expected = dict(model.named_parameters())
    convert(trained / name, tmp_path / "converted")
    for source in (trained / name, tmp_path / "converted"):
        document = json.loads((trained / name / "run.json").read_text())
        document["model"] = {"backbone": config.model.backbone, "initialize_from": str(source)}
        document["data"].pop("tokenizer")
        started = SummarizeConfig.model_validate_json(json.dumps(document))
        recipe.prepare(started)
        opening = recipe.open_data(started)
        assert opening.facts["vocabulary_size"] == data.facts["vocabulary_size"]
        ids = np.arange(3)
        assert np.array_equal(opening.train.batch(ids, ids)["tokens"], data.train.batch(ids, ids)["tokens"])
        found = dict(recipe.build_model(started, opening.facts).named_parameters())
        own = [other for other in expected if not other.startswith("head.") or config.model.backbone == "seq2seq"]
        size = data.facts["vocabulary_size"]  # a folder has no more rows, the model's tables have
        assert all(torch.equal(found[other][:size], expected[other][:size]) for other in own)


def test_a_model_of_the_other_kind_is_no_start(trained):
    document = json.loads((trained / "write_1_0" / "run.json").read_text())
    document["data"].pop("tokenizer")
    document["model"] = {"backbone": "seq2seq", "initialize_from": str(trained / "plain_1_0")}
    with pytest.raises(UserError, match="which has no encoder-decoder"):
        recipe.prepare(SummarizeConfig.model_validate_json(json.dumps(document)))


@pytest.mark.parametrize("name", ["plain_1_0", "resumed_2_3", "write_1_0"])
def test_check_counts_the_parameters_that_the_model_has(trained, name):
    config, data, model = opened(trained / name)
    found = count_parameters(config.model, data.facts["vocabulary_size"], config.num_outputs)
    assert found == sum(parameter.numel() for parameter in model.parameters())
