"""Packed samples of real text whose documents do not see each other."""

import json
import pydoc_data.topics
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bigbatch.recipes.core.recipe import Loss, Samples
from bigbatch.recipes.core.train import to_device
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig

SEQUENCE_LENGTH, NUM_SAMPLES = 96, 24
MODELS = {"gpt2": {"family": "gpt2"}, "llama": {"family": "llama", "num_key_value_heads": 2}}


class Packed(NamedTuple):
    """A model, the packed samples, and of each sample its documents alone as (tokens, labels)."""

    model: torch.nn.Module
    samples: Samples
    pieces: list[list[tuple[list[int], list[int]]]]


def paragraphs() -> list[str]:
    """Return pieces of the language reference: some shorter than a sample, some longer."""
    texts = pydoc_data.topics.topics["compound"].split("\n\n")
    return [" ".join(text.split()) for text in texts if text.strip()]


def document(family: str, text: str, prepared: str) -> dict[str, Any]:
    data = {"train": [text], "prepared_dir": prepared, "sequence_length": SEQUENCE_LENGTH, "packing": "isolate"}
    # Large first weights: what a token sees makes a difference.
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 96, "initializer_range": 0.3}
    return {
        "version": 1,
        "recipe": "gpt",
        "model": MODELS[family] | shape,
        "data": data | {"tokenizer": {"kind": "bpe", "vocabulary_size": 400}},
        "batch": {"global_size": 8},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"total_steps": 1},
        "sample": {"prompts": []},
    }


def own_pieces(tokenizer: Tokenizer, end_of_text: int) -> list[list[tuple[list[int], list[int]]]]:
    """Cut each document alone where samples end."""
    begin, pieces = 0, []
    for text in paragraphs():
        tokens = [*tokenizer.encode(text).ids, end_of_text]
        labels = [*tokens[1:], -100]  # what ends a text has nothing to predict
        while tokens:
            sample_id, offset = divmod(begin, SEQUENCE_LENGTH)
            room = SEQUENCE_LENGTH - offset
            if sample_id == len(pieces):
                pieces.append([])
            pieces[sample_id].append((tokens[:room], labels[:room]))
            begin += len(tokens[:room])
            tokens, labels = tokens[room:], labels[room:]
    return pieces


@pytest.fixture(scope="module", params=MODELS)
def packed(request, write_documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    text = write_documents(folder / "text.jsonl", paragraphs())
    content = document(request.param, str(text), str(folder / "prepared"))
    config = GptConfig.model_validate_json(json.dumps(content))
    recipe.prepare(config)
    data = recipe.open_data(config)
    torch.manual_seed(0)
    model = recipe.build_model(config, data.facts)
    tokenizer = Tokenizer.from_file(f"{data.facts['tokenizer']}/tokenizer.json")
    return Packed(model, data.train, own_pieces(tokenizer, data.facts["end_of_text"]))


def batch_of(packed: Packed, *sample_ids: int) -> dict[str, torch.Tensor]:
    ids = np.array(sample_ids)
    return to_device(packed.samples.batch(ids, np.zeros_like(ids)), torch.device("cpu"))


def loss_alone(packed: Packed, tokens: list[int], labels: list[int]) -> Loss:
    return recipe.loss(packed.model, {"tokens": torch.tensor([tokens]), "labels": torch.tensor([labels])})


@torch.no_grad()
def test_a_packed_sample_has_the_summed_loss_of_its_documents_alone(packed):
    several, torn = 0, 0
    for sample_id in range(NUM_SAMPLES):
        found = recipe.loss(packed.model, batch_of(packed, sample_id))
        alone = [loss_alone(packed, *piece) for piece in packed.pieces[sample_id]]
        assert found.num_targets == sum(loss.num_targets for loss in alone)
        assert found.sum.item() == pytest.approx(sum(loss.sum.item() for loss in alone), rel=1e-5)
        several += len(alone) > 2
        torn += packed.pieces[sample_id][-1][1][-1] != -100
    assert several >= 5  # samples with documents in their midst
    assert torn >= 5  # and with one that goes on in the next


@torch.no_grad()
def test_without_the_document_numbers_neighbours_would_be_seen(packed):
    differences = []
    for sample_id in range(NUM_SAMPLES):
        batch = batch_of(packed, sample_id)
        mixed = {"tokens": batch["tokens"], "labels": batch["labels"]}
        apart = recipe.loss(packed.model, batch).sum.item()
        differences.append(abs(recipe.loss(packed.model, mixed).sum.item() / apart - 1))
    assert max(differences) > 1e-3


def test_the_gradient_of_a_packed_batch_is_that_of_its_documents_alone(packed):
    packed.model.zero_grad()
    recipe.loss(packed.model, batch_of(packed, *range(8))).sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in packed.model.named_parameters()}
    packed.model.zero_grad()
    for piece in (piece for pieces in packed.pieces[:8] for piece in pieces):
        loss_alone(packed, *piece).sum.backward()
    for name, parameter in packed.model.named_parameters():
        largest = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5 * largest)
