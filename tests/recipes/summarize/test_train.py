"""Summarization under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/summarize.json anew; say in the change why the losses differ.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.data.sampler import sample_order
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.summarize import recipe
from bigbatch.recipes.summarize.config import SummarizeConfig
from bigbatch.recipes.summarize.rouge import KINDS, Rouge
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict

STEPS, GLOBAL_SIZE, SEED, LEARNING_RATE = 5, 16, 3, 5e-3
STAGES, RANKS = (0, 1, 2, 3), (1, 2)


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("summarize")
    plans = []

    def add(name, document, *its_plans):
        (out / f"{name}.json").write_text(json.dumps(document))
        plans.extend((name, *plan) for plan in its_plans)

    add("plain", make_document(out), *((ranks, stage, None) for ranks in RANKS for stage in STAGES))
    hard = {
        "objective": {"loss": "listwise", "token_dropout": 0.2},
        "model": {"sentence_layers": 1, "freeze_layers": 1, "layer_decay": 0.7, "dropout": 0.1},
    }
    add("resumed", make_document(out, **hard), (2, 3, 2))
    add("resumed_whole", make_document(out, **hard), (2, 3, None))
    learning = make_document(
        out, schedule={"total_steps": 60}, batch={"global_size": 32, "micro_size": 8}, evaluate={"every_steps": 30}
    )
    add("learning", learning, (2, 1, None))
    (out / "plans.json").write_text(json.dumps(plans))
    run_program("train_documents.py", out)
    return out


def rows(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(out: Path, name: str, ranks: int, stage: int) -> list[float]:
    found = rows(out / f"{name}_{ranks}_{stage}", "train")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return [row["loss"] for row in found]


def opened(run_dir: Path) -> tuple[SummarizeConfig, recipe.DataSplits, torch.nn.Module]:
    """Open a run's data and its newest model."""
    config = SummarizeConfig.model_validate_json((run_dir / "run.json").read_text())
    data = recipe.open_data(config)
    model = recipe.build_model(config, data.facts, initialize=False)
    checkpoint.load_weights(run_dir, model)
    return config, data, model.eval()


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    return kept_golden("summarize", lambda: {"encoder": losses(trained, "plain", 1, 0)})["encoder"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"plain_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "plain", ranks, stage) == pytest.approx(golden, rel=1e-4)


def test_transformers_own_model_takes_the_same_steps(trained, golden):
    """Train BertForTokenClassification from the same first weights on the same windows, one at a time."""
    config = SummarizeConfig.model_validate_json((trained / "plain_1_0" / "run.json").read_text())
    data = recipe.open_data(config)
    torch.manual_seed(SEED)
    model = recipe.build_model(config, data.facts)
    export = recipe.hugging_face(config, data.facts)
    theirs = transformers.BertForTokenClassification(transformers.AutoConfig.for_model(**export.config))
    parameters = dict(model.named_parameters())
    pieces = [(piece, parameters[name].detach()) for name, found in export.tensors.items() for piece in found]
    missing = theirs.load_state_dict({piece.name: p[piece.start : piece.stop].clone() for piece, p in pieces}, False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.95))
    found = []
    for step in range(STEPS):
        order = sample_order(SEED, data.train.num_samples, step * GLOBAL_SIZE, GLOBAL_SIZE)
        total = 0.0
        for number in range(GLOBAL_SIZE):
            batch = data.train.batch(order.ids[number : number + 1], order.epochs[number : number + 1])
            length = batch["lengths"][0]
            tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
            logits = theirs(
                input_ids=tensors["tokens"][:, :length], token_type_ids=tensors["segments"][:, :length]
            ).logits[0, :, 0]
            loss = F.binary_cross_entropy_with_logits(logits[tensors["places"][0]], tensors["labels"][0])
            (loss / GLOBAL_SIZE).backward()
            total += loss.item() / GLOBAL_SIZE
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    assert found == pytest.approx(golden, rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


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
    (row,) = [row for row in rows(run_dir, "evaluation") if row["step"] == 60]
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
    (again,) = recipe.predictor(*recipe.open_folder(out))([{"document": " ".join(sentences)}])
    assert again == ours
    assert ours["sentences"] == [{"place": 1, "sentence": sentences[1], "score": pytest.approx(expected, abs=1e-5)}]
    capsys.readouterr()
    assert predict([str(out), " ".join(sentences)]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == sentences[1]
    with pytest.raises(UserError, match="transformers has no class"):
        convert(trained / "resumed_whole_2_3", tmp_path / "other")


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
