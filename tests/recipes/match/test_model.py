"""The objectives against sums written out a pair at a time, and the bag of words against tf-idf."""

import math

import numpy as np
import pytest
import torch

from bigbatch.recipes.match.config import ObjectiveSection
from bigbatch.recipes.match.model import WordBag, loss_of_logits, loss_of_vectors


def unit_vectors(count: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_batch(negatives: int = 0, **columns: list) -> dict[str, torch.Tensor]:
    """Return six pairs in two groups; the first two right texts are the same, and the last two left ones."""
    batch = {"lefts": [0, 1, 2, 3, 4, 4], "rights": [7, 7, 8, 9, 10, 11], "groups": [0, 0, 0, 1, 1, 1]}
    batch |= {
        "scores": [1.0] * 6,
        "counts": [2.0, 2.0, 1.0, 3.0, 1.0, 5.0],
        "negatives": [[20 + 2 * pair + n for n in range(negatives)] for pair in range(6)],
    }
    return {name: torch.tensor(values) for name, values in (batch | columns).items()}


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("popularity", [True, False])
def test_contrastive_finds_the_right_text_among_its_group_and_the_negatives(negatives, symmetric, popularity):
    batch, vectors = make_batch(negatives), unit_vectors(6 * (2 + negatives), 1)
    objective = ObjectiveSection(temperature=0.2, symmetric=symmetric, popularity=popularity)
    left, right, others = vectors[:6], vectors[6:12], vectors[12:]
    lefts, rights, groups = (batch[name].tolist() for name in ("lefts", "rights", "groups"))
    total = 0.0
    for i in range(6):
        near = [j for j in range(6) if groups[i] == groups[j]]
        rivals = [j for j in near if j != i and rights[i] != rights[j] and lefts[i] != lefts[j]]
        own = float(left[i] @ right[i]) / 0.2
        counts = [math.log(batch["counts"][j]) if popularity else 0.0 for j in range(6)]
        forward = [own - counts[i]] + [float(left[i] @ right[j]) / 0.2 - counts[j] for j in rivals]
        forward += [float(left[i] @ others[negatives * j + n]) / 0.2 for j in near for n in range(negatives)]
        backward = [own] + [float(left[j] @ right[i]) / 0.2 for j in rivals]
        both = [math.log(sum(map(math.exp, found))) - found[0] for found in (forward, backward)]
        total += sum(both) / 2 if symmetric else both[0]
    assert loss_of_vectors(vectors, batch, objective).item() == pytest.approx(total, rel=1e-5)


def test_a_negative_that_is_right_for_another_pair_is_none_for_that_one():
    vectors = unit_vectors(18, 2)
    objective = ObjectiveSection(symmetric=False, temperature=1.0)
    own = make_batch() | {
        "negatives": torch.tensor([[8], [21], [22], [23], [24], [25]])
    }  # the first pair's is the third's right text
    changed = vectors.clone()
    changed[12] = vectors[8]  # as near to the third left text as its right one: it would be a rival
    without = own | {"negatives": torch.tensor([[20], [21], [22], [23], [24], [25]])}
    assert loss_of_vectors(changed, own, objective) < loss_of_vectors(changed, without, objective)


def test_ranking_compares_pairs_of_different_scores_in_their_group():
    scores = [0.2, 0.9, 0.9, 0.5, 0.1, 0.3]
    batch, vectors = make_batch(scores=scores), unit_vectors(12, 3)
    cosines = [float(vectors[i] @ vectors[6 + i]) for i in range(6)]
    total = 0.0
    for group in ((0, 1, 2), (3, 4, 5)):
        worse = [(i, j) for i in group for j in group if scores[i] > scores[j]]
        total += 3 * math.log(1 + sum(math.exp((cosines[j] - cosines[i]) / 0.1) for i, j in worse))
    objective = ObjectiveSection(loss="ranking", temperature=0.1)
    assert loss_of_vectors(vectors, batch, objective).item() == pytest.approx(total, rel=1e-5)


def test_a_group_of_equal_scores_has_no_loss_and_a_finite_gradient():
    vectors = unit_vectors(12, 4).requires_grad_()
    loss = loss_of_vectors(vectors, make_batch(scores=[0.5] * 6), ObjectiveSection(loss="ranking"))
    loss.backward()
    assert loss.item() == 0
    assert vectors.grad is not None
    assert not vectors.grad.any()


def test_of_a_pairs_several_windows_the_mean_counts():
    logits, targets = torch.tensor([0.3, -1.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    batch = {"scores": torch.ones(2), "targets": targets}
    expected = [
        math.log(1 + math.exp(-0.3)),
        math.log(1 + math.exp(1)),
        math.log(1 + math.exp(2)),
        math.log(1 + math.exp(0.5)),
    ]
    assert loss_of_logits(logits, batch).item() == pytest.approx(sum(expected) / 2)


def test_cosines_of_fresh_bags_of_words_are_near_those_of_tf_idf():
    torch.manual_seed(0)
    rarities = torch.rand(50) + 0.5
    model = WordBag(4096, 50, rarities)
    counts = torch.randint(0, 3, (8, 50))
    texts = [torch.repeat_interleave(torch.arange(50), row) for row in counts]
    tokens, documents = torch.cat(texts)[None], torch.repeat_interleave(torch.arange(8), counts.sum(1))[None]
    lengths = counts.sum(1)
    vectors = model(tokens, documents, lengths.cumsum(0) - lengths, lengths)
    weighted = torch.nn.functional.normalize(counts * rarities, dim=-1)
    gaps = (vectors @ vectors.T - weighted @ weighted.T).detach().numpy()
    assert np.abs(gaps).max() < 4 / math.sqrt(4096)
