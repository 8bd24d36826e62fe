"""Rows of two segments: where they come from, that they are a pure function, and that their tasks can be learned."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from tokenizers import Tokenizer

from bigbatch.recipes.bert_pretrain import contestants, recipe
from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.encoder import hugging_face_state
from bigbatch.recipes.core.train import Run, to_device

CPU = torch.device("cpu")
TASKS = ("next_sentence", "sentence_order")
NUM_DOCUMENTS = 60


def numbered_documents():
    """Return documents of 1 to 40 sentences; each names its document and the sentence's number."""
    return [
        " ".join(f"D{document} s{number} goes on." for number in range(1 + document * document % 41))
        for document in range(NUM_DOCUMENTS)
    ]


def config_of(folder, task, texts=None, **changes):
    folder.mkdir(exist_ok=True)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or numbered_documents()))
    document = {
        "version": 1,
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "max_positions": 64, "dropout": 0.0},
        "data": {
            "train": [str(text)],
            "tokenizer": {"kind": "wordpiece", "vocabulary_size": 160},
            "sequence_length": 48,
            "packing": "isolate",
            "prepared_dir": str(folder / "prepared"),
        },
        "sentence_task": task,
        "batch": {"global_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"total_steps": 5},
        "seed": 3,
    }
    for section, settings in changes.items():
        document[section] = {**document.get(section, {}), **settings}
    return BertPretrainConfig.model_validate_json(json.dumps(document))


def opened(config):
    recipe.prepare(config)
    return recipe.open_data(config)


@pytest.fixture(scope="module", params=TASKS)
def pairs(request, tmp_path_factory):
    """Return the task, its samples, and the tokenizer."""
    data = opened(config_of(tmp_path_factory.mktemp("pairs"), request.param))
    return request.param, data.train, Tokenizer.from_file(f"{data.facts['tokenizer']}/tokenizer.json")


def batch_of(samples, epoch=0):
    ids = np.arange(samples.num_samples)
    return samples.batch(ids, np.full_like(ids, epoch))


def unmasked(batch):
    """Put the masked tokens back."""
    tokens = batch["tokens"].copy()
    for row, targets, labels in zip(tokens, batch["targets"], batch["labels"], strict=True):
        row[targets[labels != -100]] = labels[labels != -100]
    return tokens


def parts_of(batch):
    """Return each row's two segments as tokens, without the special ones around them."""
    rows = zip(unmasked(batch), batch["segments"], batch["documents"], strict=True)
    return [(row[(s == 0) & (d == 0)][1:-1], row[(s == 1) & (d == 0)][:-1]) for row, s, d in rows]


def segments_of(batch, tokenizer):
    """Return each row's two segments as texts, and its label."""
    texts = [[tokenizer.decode(part).replace(" .", ".") for part in parts] for parts in parts_of(batch)]
    return [(*parts, int(label)) for parts, label in zip(texts, batch["pair_labels"], strict=True)]


def documents_in(text):
    return {int(word[1:]) for word in text.split() if word[0] == "d" and word[1:].isdigit()}


def sentences_in(text):
    return [int(word[1:]) for word in text.split() if word[0] == "s" and word[1:].isdigit()]


def test_without_a_change_the_rows_are_the_stream_each_token_once(pairs):
    task, samples, tokenizer = pairs
    ids = np.arange(samples.samples.num_samples)
    stream = samples.samples.batch(ids, np.zeros_like(ids))["tokens"].ravel()
    stream = stream[~np.isin(stream, [tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")])]
    batch, whole = batch_of(samples), b""
    for (first, second), label in zip(parts_of(batch), batch["pair_labels"], strict=True):
        if task == "sentence_order":
            whole += np.concatenate((second, first) if label else (first, second)).tobytes()
        elif label == 0:
            assert np.concatenate((first, second)).tobytes() in stream.tobytes()
    if task == "sentence_order":
        assert whole == stream.tobytes()


def test_a_row_is_two_segments_between_class_and_separators(pairs):
    _, samples, tokenizer = pairs
    batch, (begin, end) = batch_of(samples), (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    rows = zip(unmasked(batch), parts_of(batch), batch["segments"], batch["documents"], strict=True)
    for row, (first, second), segments, documents in rows:
        assert len(first) > 0 < len(second)
        ours = [begin, *first, end, *second, end]
        assert row.tolist() == ours + [end] * (48 - len(ours))
        assert segments.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (48 - len(ours))
        assert documents.tolist() == [0] * len(ours) + [1] * (48 - len(ours))
        assert begin not in row[1:]


def test_segments_begin_and_end_with_sentences_where_there_are_some(pairs):
    _, samples, tokenizer = pairs
    found = segments_of(batch_of(samples), tokenizer)
    long = [(first, second) for first, second, _ in found if len(sentences_in(f"{first} {second}")) > 2]
    assert len(long) > 50
    assert np.mean([first.endswith(".") and second.startswith("d") for first, second in long]) == 1
    assert np.mean([first.startswith("d") and second.endswith(".") for first, second in long]) > 0.95


def test_about_half_of_the_pairs_are_true_and_the_others_are_what_the_task_says(pairs):
    task, samples, tokenizer = pairs
    found = [pair for epoch in range(8) for pair in segments_of(batch_of(samples, epoch), tokenizer)]
    share = np.mean([label for *_, label in found])
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(found)))
    for first, second, label in found:
        before, after = sentences_in(first), sentences_in(second)
        if label and task == "next_sentence":
            assert not documents_in(first) & documents_in(second)
        elif before and after:
            assert documents_in(first) == documents_in(second)
            assert (before[-1] > after[0]) == bool(label)


def test_a_random_segment_is_no_longer_than_the_true_one_and_nearly_as_long(tmp_path):
    samples = opened(config_of(tmp_path, "next_sentence")).train
    batch = batch_of(samples)
    lengths = (batch["documents"] == 0).sum(1)
    assert lengths.max() <= 48
    true, other = lengths[batch["pair_labels"] == 0], lengths[batch["pair_labels"] == 1]
    assert 0.75 * true.mean() < other.mean() < true.mean() + 1


def test_every_other_documents_sample_is_as_likely(tmp_path):
    samples = opened(config_of(tmp_path, "next_sentence")).train
    words = np.random.default_rng(0).integers(0, 2**63, 40_000).astype(np.uint64)
    drawn = samples._of_other_documents(np.full(40_000, 30), words)
    documents = np.searchsorted(samples.first_samples, np.arange(samples.num_samples), side="right")
    others = np.flatnonzero(documents != documents[30])
    assert set(drawn) == set(others)
    assert np.bincount(drawn)[others] / 40_000 == pytest.approx(1 / len(others), rel=0.4)


def test_a_pair_is_the_same_in_any_company_and_another_in_the_next_epoch(pairs):
    _, samples, _ = pairs
    whole, picked = batch_of(samples), np.array([40, 3, 17])
    alone = samples.batch(picked, np.zeros_like(picked))
    for name in ("tokens", "segments", "documents", "pair_labels"):
        assert (alone[name] == whole[name][picked]).all()
    later = batch_of(samples, epoch=1)
    assert (later["pair_labels"] != whole["pair_labels"]).mean() == pytest.approx(0.5, abs=0.2)
    assert (later["segments"] != whole["segments"]).any(1).mean() > 0.5


def test_no_special_token_and_no_padding_is_a_target(pairs):
    _, samples, _ = pairs
    batch = batch_of(samples)
    counts = batch["labels"] != -100
    rows = np.nonzero(counts)[0]
    assert (batch["labels"][counts] > 4).all()
    assert (batch["documents"][rows, batch["targets"][counts]] == 0).all()
    ordinary = (batch["documents"] == 0).sum(1) - 3
    assert (counts.sum(1) == np.rint(0.15 * ordinary).clip(1)).all()


def test_the_fingerprint_follows_the_task_and_the_seed(tmp_path):
    found = set()
    for task in ("none", *TASKS):
        for seed in (3, 4):
            config = config_of(tmp_path, task).model_copy(update={"seed": seed})
            found.add(opened(config).train.fingerprint)
    assert len(found) == 6


# ------------------------------------------------------------------------------------ the loss


@pytest.fixture(scope="module")
def batch_and_model(tmp_path_factory):
    """Return a model whose first weights are large, a padded batch, and transformers' BertForPreTraining."""
    config = config_of(tmp_path_factory.mktemp("loss"), "next_sentence", model={"initializer_range": 0.3})
    data = opened(config)
    torch.manual_seed(0)
    model = recipe.build_model(config, data.facts).eval()
    export = recipe.hugging_face(config, data.facts)
    assert export.config["architectures"] == ["BertForPreTraining"]
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**export.config)).eval()
    missing, unexpected = theirs.load_state_dict(hugging_face_state(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    ids = np.arange(16) * 3
    return to_device(data.train.batch(ids, np.zeros_like(ids)), CPU), model, theirs


def test_the_loss_is_the_masked_one_plus_each_pairs_as_often_as_its_row_has_targets(batch_and_model):
    batch, model, theirs = batch_and_model
    assert 0 < (batch["documents"] == 1).float().mean() < 0.9
    counted = batch["labels"] != -100
    labels = torch.full_like(batch["tokens"], -100)
    labels[counted.nonzero()[:, 0], batch["targets"][counted]] = batch["labels"][counted]
    found = theirs(
        input_ids=batch["tokens"],
        attention_mask=1 - batch["documents"],
        token_type_ids=batch["segments"],
    )
    cross_entropy = torch.nn.functional.cross_entropy
    masked = cross_entropy(found.prediction_logits.flatten(0, 1), labels.flatten(), reduction="sum")
    pairs = cross_entropy(found.seq_relationship_logits, batch["pair_labels"], reduction="none")
    expected = masked + (counted.sum(1) * pairs).sum()
    loss = recipe.loss(model, batch)
    assert loss.num_targets == counted.sum() == recipe.count_targets({"labels": batch["labels"].numpy()})
    torch.testing.assert_close(loss.sum, expected, rtol=1e-5, atol=0)


def test_rows_with_equally_many_targets_have_berts_own_loss(batch_and_model):
    batch, model, theirs = batch_and_model
    counted = (batch["labels"] != -100).sum(1)
    rows = (counted == counted.mode().values).nonzero().flatten()
    assert len(rows) > 3
    batch = {name: array[rows] for name, array in batch.items()}
    kept = batch["labels"] != -100
    labels = torch.full_like(batch["tokens"], -100)
    labels[kept.nonzero()[:, 0], batch["targets"][kept]] = batch["labels"][kept]
    expected = theirs(
        input_ids=batch["tokens"],
        attention_mask=1 - batch["documents"],
        token_type_ids=batch["segments"],
        labels=labels,
        next_sentence_label=batch["pair_labels"],
    ).loss
    loss = recipe.loss(model, batch)
    torch.testing.assert_close(loss.sum / loss.num_targets, expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_figures_tell_the_two_tasks_apart(batch_and_model):
    batch, model, _ = batch_and_model
    loss, arrays = recipe.outputs(model, batch)
    parts = [
        recipe.outputs(model, {name: array[rows] for name, array in batch.items()}) for rows in (slice(5), slice(5, 16))
    ]
    arrays = {name: torch.cat([part.arrays[name] for part in parts]).numpy() for name in arrays}
    figures = recipe.figures(None, {}, arrays, False)
    weighted = (arrays["num_targets"] * arrays["pair_loss"]).sum() / loss.num_targets
    assert figures["masked_loss"] + weighted == pytest.approx(loss.sum.item() / loss.num_targets, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["masked_loss"]))
    _, logits = model(batch["tokens"], documents=batch["documents"], segments=batch["segments"], with_pairs=True)
    right = (logits.argmax(1) == batch["pair_labels"]).float().mean()
    assert figures["pair_accuracy"] == pytest.approx(right.item())


def test_a_tiny_model_learns_the_order_of_sentences(tmp_path):
    random = np.random.default_rng(1)
    scenes = ["morning he wakes up", "noon he has his meal", "evening he comes home", "night he goes to bed"]
    names = ["anna", "bert", "cora", "dan"]
    texts = [
        " ".join(f"{names[random.integers(4)]} {scene}." for scene in scenes[: random.integers(2, 5)])
        for _ in range(400)
    ]
    changes = {"data": {"validation_fraction": 0.2, "sequence_length": 40}, "model": {"initializer_range": 0.1}}
    config = config_of(tmp_path, "sentence_order", texts, **changes)
    data = opened(config)
    torch.manual_seed(0)
    model = recipe.build_model(config, data.facts)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(80):
        epochs, ids = np.divmod(np.arange(32) + 32 * step, data.train.num_samples)
        loss = recipe.loss(model, to_device(data.train.batch(ids, epochs), CPU))
        (loss.sum / loss.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = recipe.outputs(model, to_device(batch_of(data.validation), CPU))
    figures = recipe.figures(config, data.facts, {name: rows.numpy() for name, rows in found.arrays.items()}, False)
    assert figures.keys() == {"perplexity", *recipe.figure_names(config, data.facts)}
    assert figures["pair_loss"] < 0.15  # chance is ln 2 = 0.69
    assert figures["pair_accuracy"] > 0.95


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"packing": "concatenate"}}, "data.packing 'concatenate' has to be 'isolate'"),
        ({"data": {"unit": "sentence"}}, "data.unit 'sentence' leaves nothing to cut"),
        ({"data": {"sequence_length": 7}}, "needs data.sequence_length 8 or more, not 7"),
        ({"model": {"num_segments": 1}}, "needs model.num_segments 2 or more, not 1"),
    ],
)
def test_settings_that_contradict_pairs_are_refused_by_the_tasks_path(changes, message, tmp_path):
    with pytest.raises(ValidationError) as error:
        config_of(tmp_path, "next_sentence", **changes)
    (detail,) = error.value.errors()
    assert detail["loc"] == ("sentence_task",)
    assert message in detail["msg"]
    config_of(tmp_path, "none", **changes)


def test_the_shortest_rows_hold_two_segments(tmp_path):
    data = opened(config_of(tmp_path, "sentence_order", data={"sequence_length": 8}))
    batch = batch_of(data.train)
    assert batch["tokens"].shape == (data.train.num_samples, 8)
    for segment in (0, 1):
        assert ((batch["segments"] == segment) & (batch["documents"] == 0)).sum(1).min() >= 2


def test_one_document_has_no_other_to_draw_from(tmp_path):
    config = config_of(tmp_path, "next_sentence", numbered_documents()[30:31])
    with pytest.raises(UserError, match=r"data\.train: has 1 documents to cut; next_sentence needs 2 or more"):
        opened(config)


def test_the_benchmark_refuses_a_second_task(tmp_path):
    run = Run(tmp_path, config_of(tmp_path, "next_sentence"), {}, "", recipe)
    with pytest.raises(UserError, match=r"sentence_task: is 'next_sentence'; run_mlm has none"):
        contestants.contestants(run, None)
