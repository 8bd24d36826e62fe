import numpy as np
import pytest
import torch
from torch import nn

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import Loss
from bigbatch.tools.pruning import unstructured


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 8)
        self.inner = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.inner(self.table(tokens)))


class Recipe:
    @staticmethod
    def loss(model, batch):
        return Loss(model(batch["tokens"]).square().sum(), len(batch["tokens"]))


BATCHES = [{"tokens": torch.tensor([1, 2, 3])}, {"tokens": torch.tensor([4, 5])}]


def test_embeddings_heads_and_vectors_are_left_alone():
    assert unstructured.prunable(Small()).keys() == {"inner.0.weight", "inner.2.weight"}


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_the_smallest_weights_go_of_each_matrix_or_of_all_together(ratio):
    scores = unstructured.magnitudes(Small())
    joined = np.sort(np.concatenate([own.numpy().ravel() for own in scores.values()]))
    together = unstructured.masks(scores, ratio, is_global=True)
    for name, mask in together.items():
        assert np.array_equal(mask.numpy() == 1, scores[name].numpy() > joined[round(ratio * len(joined)) - 1])
    for name, mask in unstructured.masks(scores, ratio, is_global=False).items():
        own = np.sort(scores[name].numpy().ravel())
        assert np.array_equal(mask.numpy() == 1, scores[name].numpy() > own[round(ratio * len(own)) - 1])
    model = Small()
    unstructured.apply_masks(model, together)
    zeros = sum(int((weight == 0).sum()) for weight in unstructured.prunable(model).values())
    assert zeros == round(ratio * 192)


def test_two_of_every_four_inputs_stay_and_they_are_the_larger_ones():
    scores = unstructured.magnitudes(Small())
    for name, mask in unstructured.two_of_four(scores).items():
        for own, kept in zip(scores[name].numpy().reshape(-1, 4), mask.numpy().reshape(-1, 4), strict=True):
            assert set(np.flatnonzero(kept)) == set(np.argsort(own)[2:])
    with pytest.raises(UserError, match="a multiple of 4; odd has 6 inputs"):
        unstructured.two_of_four({"odd": torch.ones(2, 6)})


def test_movement_sums_minus_weight_times_gradient_at_the_weights_that_the_scores_leave():
    found = unstructured.movements(Recipe, Small(), BATCHES, num_steps=2, ratio=0.5)
    model, expected = Small(), {}
    weights = {name: weight.detach().clone() for name, weight in unstructured.prunable(model).items()}
    for share, batch in zip((0.0, 0.5 * (1 - 0.5**3)), BATCHES, strict=True):
        if share:
            unstructured.apply_masks(model, unstructured.masks(expected, share, is_global=False))
        loss = Recipe.loss(model, batch)
        own = unstructured.prunable(model)
        gradients = torch.autograd.grad(loss.sum / loss.num_targets, list(own.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            expected[name] = expected.get(name, 0) - weight * gradient
    for name, own in expected.items():
        assert torch.allclose(found[name], own, atol=1e-6)
        assert own.abs().max() > 0.01
