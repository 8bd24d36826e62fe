"""Packed samples whose documents do not see each other: the same loss and gradient as each document alone."""

import json

import numpy as np
import pytest
import torch

from bigbatch.recipes.bert_pretrain import recipe
from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig
from bigbatch.recipes.core.recipe import Loss
from bigbatch.recipes.core.train import to_device

ROWS = 12
FORMS = [{"norm": norm, "positions": positions} for norm in ("post", "pre") for positions in ("absolute", "rotary")]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: "-".join(form.values()))
def packed(request, make_document, tmp_path_factory):
    """Return a model whose first weights are large, so that what a token sees makes a difference, and a batch."""
    model = {**request.param, "initializer_range": 0.3}
    document = make_document(tmp_path_factory.mktemp("packing"), model=model)
    config = BertPretrainConfig.model_validate_json(json.dumps(document))
    recipe.prepare(config)
    data = recipe.open_data(config)
    torch.manual_seed(0)
    ids = np.arange(ROWS)
    return recipe.build_model(config, data.facts), data.train.batch(ids, np.zeros_like(ids))


def losses_alone(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> list[Loss]:
    """Run each document of each row by itself: its tokens, and those of the targets that stand in it."""
    losses = []
    for tokens, documents, targets, labels in zip(
        batch["tokens"], batch["documents"], batch["targets"], batch["labels"], strict=True
    ):
        for document in np.unique(documents):
            places = np.flatnonzero(documents == document)
            own = np.isin(targets, places) & (labels != -100)
            if not own.any():
                continue
            alone = {
                "tokens": tokens[places][None],
                "targets": targets[own][None] - places[0],
                "labels": labels[own][None],
            }
            losses.append(recipe.loss(model, to_device(alone, torch.device("cpu"))))
    return losses


def test_a_packed_batch_has_the_summed_loss_and_the_gradient_of_its_documents_alone(packed):
    model, batch = packed
    model.zero_grad()
    found = recipe.loss(model, to_device(batch, torch.device("cpu")))
    found.sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = losses_alone(model, batch)
    assert len(alone) > ROWS + 5  # several rows hold more than one
    assert found.num_targets == sum(loss.num_targets for loss in alone) == recipe.count_targets(batch)
    total = torch.stack([loss.sum for loss in alone]).sum()
    assert found.sum.item() == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    for name, parameter in model.named_parameters():
        largest = max(parameter.grad.abs().max().item(), 1e-3)  # a key's bias has no gradient but for rounding
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=2e-5 * largest, msg=name)


def one_document_a_row(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Lay the same documents out one a row, padded to the length of a sample."""
    length, rows = batch["tokens"].shape[1], []
    for tokens, documents, targets, labels in zip(
        batch["tokens"], batch["documents"], batch["targets"], batch["labels"], strict=True
    ):
        for document in np.unique(documents):
            places = np.flatnonzero(documents == document)
            own = np.isin(targets, places) & (labels != -100)
            padding = np.full(length - len(places), 7)
            rows.append(
                {
                    "tokens": np.concatenate([tokens[places], padding]),
                    "documents": (np.arange(length) >= len(places)).astype(np.int32),
                    "targets": np.where(own, targets - places[0], 0),
                    "labels": np.where(own, labels, -100),
                }
            )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def test_packed_rows_have_the_summed_loss_of_one_padded_document_a_row(packed):
    model, batch = packed
    padded = one_document_a_row(batch)
    assert len(padded["tokens"]) > ROWS + 5
    found, expected = (recipe.loss(model, to_device(each, torch.device("cpu"))) for each in (batch, padded))
    assert found.num_targets == expected.num_targets
    assert found.sum.item() == pytest.approx(expected.sum.item(), rel=1e-5)


@torch.no_grad()
def test_without_the_document_numbers_neighbours_would_be_seen(packed):
    model, batch = packed
    apart = recipe.loss(model, to_device(batch, torch.device("cpu"))).sum.item()
    mixed = {name: array for name, array in batch.items() if name not in ("documents", "positions")}
    assert abs(recipe.loss(model, to_device(mixed, torch.device("cpu"))).sum.item() / apart - 1) > 1e-3
