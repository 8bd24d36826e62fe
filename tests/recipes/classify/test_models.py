"""The classifiers against transformers' own, torch's losses, and themselves laid out in another way."""

import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from bigbatch.recipes.classify import recipe
from bigbatch.recipes.classify.config import ClassifyConfig
from bigbatch.recipes.classify.models import Objective, build_classifier
from bigbatch.recipes.classify.recipe import learning_rate_scales
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import open_folder
from bigbatch.recipes.core.start import find_start

LABELS = ["high", "low", "middle"]
SIZE = 50
SHAPE = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "max_positions": 24, "dropout": 0.0}
OTHERS = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 24},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 30,
        "pad_token_id": 1,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "eos_token_id": 49, "bos_token_id": 49},
}


def config_of(model, **data):
    document = {
        "version": 1,
        "model": model,
        "data": {"train": ["rows.csv"], "sequence_length": 24, **data},
        "batch": {"global_size": 4},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"total_steps": 1},
    }
    return ClassifyConfig.model_validate_json(json.dumps(document))


def facts_of(config, **facts):
    encoder = config.model.encoder.model_dump(mode="json") if getattr(config.model, "encoder", None) else None
    return {"vocabulary_size": SIZE, "labels": LABELS, "encoder": encoder, **facts}


def lay_out(texts, width=None):
    """Lay texts out one a row, or side by side in rows of `width`; as the data do."""
    rows, places = [], []
    for text in texts:
        if width is None or not rows or len(rows[-1]) + len(text) > width:
            rows.append([])
        places.append((len(rows) - 1, len(rows[-1])))
        rows[-1] += text
    length = width or max(map(len, rows))
    tokens, documents = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), len(texts), np.int32)
    for number, (text, (row, first)) in enumerate(zip(texts, places, strict=True)):
        tokens[row, first : first + len(text)] = text
        documents[row, first : first + len(text)] = number
    batch = {
        "tokens": tokens,
        "documents": documents,
        "firsts": np.array([row * length + first for row, first in places]),
        "lengths": np.array([len(text) for text in texts]),
        "examples": np.arange(len(texts)),
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}


@pytest.fixture
def texts():
    generator = np.random.default_rng(1)
    return [generator.integers(2, SIZE - 1, length).tolist() for length in (5, 11, 3, 9, 7)]


@pytest.fixture
def bert_folder(tmp_path):
    """Write transformers' own classifier into a folder."""
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=SIZE,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        id2label=dict(enumerate(LABELS)),
        pad_token_id=None,
    )
    model = transformers.BertForSequenceClassification(settings).eval()
    nn.init.normal_(model.classifier.bias)
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def started(folder, **settings):
    """Build a classifier that starts from a folder, as training would."""
    config = config_of({"backbone": "encoder", "initialize_from": str(folder), **settings})
    start = find_start(str(folder))
    return build_classifier(
        config, facts_of(config, encoder=start.encoder, hugging_face=start.hugging_face), True
    ).eval(), config


def their_logits(model, texts):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([text])).logits for text in texts])


@pytest.mark.parametrize("width", [None, 24])
def test_a_classifier_of_transformers_gives_the_same_logits_here(bert_folder, texts, width):
    folder, theirs = bert_folder
    ours, _ = started(folder, keep_head=True)
    with torch.no_grad():
        found = ours(**lay_out(texts, width))
    assert (found - their_logits(theirs, texts)).abs().max() < 1e-5
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("backbone", ["encoder", "attention"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_packed_texts_have_the_loss_of_padded_ones(texts, backbone, pooling):
    torch.manual_seed(0)
    model = {"backbone": backbone, "encoder": SHAPE, "pooling": pooling}
    if backbone == "attention":
        model = {"backbone": backbone, "embedding_size": 32, "num_layers": int(pooling == "mean")}
    config = config_of(model)
    classifier = build_classifier(config, facts_of(config), True).eval()
    labels = torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        padded, alone = classifier(**lay_out(texts), labels=labels)
        packed, together = classifier(**lay_out(texts, 24), labels=labels)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-5)
    assert (alone - together).abs().max() < 1e-5


def test_the_logits_of_a_text_are_the_mean_over_its_windows(texts):
    torch.manual_seed(0)
    config = config_of({"backbone": "encoder", "encoder": SHAPE})
    classifier = build_classifier(config, facts_of(config), True).eval()
    batch = lay_out(texts)
    with torch.no_grad():
        each = classifier(**batch)
        found = classifier(**{**batch, "examples": torch.tensor([0, 1, 1, 2, 1])})
    expected = torch.stack([each[0], (each[1] + each[2] + each[4]) / 3, each[3]])
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_that_is_not_native_runs_through_transformers(tmp_path, texts, family):
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(
        family, vocab_size=SIZE, id2label=dict(enumerate(LABELS)), **OTHERS[family]
    )
    if settings.pad_token_id is None:
        settings.pad_token_id = settings.eos_token_id
    theirs = transformers.AutoModelForSequenceClassification.from_config(settings).eval()
    theirs.save_pretrained(tmp_path / family)
    ours, _ = started(tmp_path / family, keep_head=True)
    with torch.no_grad():
        found = ours(**lay_out(texts))
    assert (found - their_logits(theirs, texts)).abs().max() < 1e-5
    fresh, _ = started(tmp_path / family)
    with torch.no_grad():
        assert (fresh(**lay_out(texts)) - found).abs().max() > 1e-3  # another head


def test_a_head_for_other_labels_is_not_kept(bert_folder):
    folder, _ = bert_folder
    document = json.loads((folder / "config.json").read_text())
    document["id2label"] = {"0": "high", "1": "low", "2": "medium"}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"model.keep_head: .*other labels .high, low, medium"):
        started(folder, keep_head=True)


def test_the_last_layers_are_drawn_anew_and_the_first_are_not(bert_folder):
    folder, theirs = bert_folder
    model, _ = started(folder, redraw_layers=1)
    outs = [block.attention.out.weight for block in model.backbone.encoder.blocks]
    given = [layer.attention.output.dense.weight for layer in theirs.bert.encoder.layer]
    assert [torch.equal(ours, other) for ours, other in zip(outs, given, strict=True)] == [True, True, False]
    assert not torch.equal(model.backbone.pooler.dense.weight, theirs.bert.pooler.dense.weight)


def test_frozen_layers_are_the_first_ones_with_the_embeddings(bert_folder):
    model, _ = started(bert_folder[0], freeze_layers=2)
    trained = {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad and "blocks" in name}
    assert trained == {"2"}
    assert not any(p.requires_grad for p in model.backbone.encoder.embed.parameters())
    assert model.head.weight.requires_grad


def test_each_layer_learns_more_slowly_than_the_one_above(bert_folder):
    model, config = started(bert_folder[0], layer_decay=0.5)
    scales = learning_rate_scales(config, model)
    assert scales["backbone.encoder.blocks.2.feed_forward.up.weight"] == 0.5
    assert scales["backbone.encoder.blocks.0.feed_forward.up.weight"] == 0.125
    assert scales["backbone.encoder.embed.tokens.weight"] == 0.0625
    assert "head.weight" not in scales
    assert "backbone.pooler.dense.weight" not in scales


def test_the_training_loss_is_torchs_with_weights_and_smoothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    weights = [0.5, 1.0, 2.0]
    objective = Objective(multi_label=False, label_smoothing=0.1, class_weights=weights)
    expected = nn.CrossEntropyLoss(torch.tensor(weights), reduction="sum", label_smoothing=0.1)(logits, labels)
    assert objective.train()(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    plain = nn.CrossEntropyLoss(reduction="sum")(logits, labels)
    assert objective.eval()(logits, labels).item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_loss_of_several_labels_is_transformers_own(bert_folder, texts):
    _, theirs = bert_folder
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).float()
    theirs.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        each = [theirs(input_ids=torch.tensor([text]), labels=labels[i : i + 1]).loss for i, text in enumerate(texts)]
        logits = their_logits(theirs, texts)
    objective = Objective(multi_label=True, label_smoothing=0.0, class_weights=None).train()
    assert objective(logits, labels).item() == pytest.approx(sum(each).item(), rel=1e-5)


def test_a_folder_of_transformers_opens_to_predict_with(bert_folder, texts):
    folder, theirs = bert_folder
    tokens = [f"word{number}" for number in range(SIZE - 4)]
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *tokens])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    config, facts, model = open_folder(recipe, folder)
    assert (facts["labels"], config.data.multi_label, config.data.sequence_length) == (LABELS, False, 24)
    with torch.no_grad():
        assert (model(**lay_out(texts)) - their_logits(theirs, texts)).abs().max() < 1e-5
