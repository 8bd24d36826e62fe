"""The random field against adding up, and looking at, every path."""

from itertools import pairwise, product

import pytest
import torch

from bigbatch.recipes.extract.crf import ConditionalRandomField, best_path, log_partition, path_score

TAGS = ("O", "B-x", "I-x", "B-y", "I-y")


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(2)
    emissions = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    transitions = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    first, last = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return emissions, transitions, first, last, torch.tensor([4, 1, 3])


def every_path(emissions, transitions, first, last, length):
    """Return the score of each path of one sentence, added up by hand."""
    found = {}
    for path in product(range(5), repeat=length):
        score = first[path[0]] + last[path[-1]] + sum(emissions[place, tag] for place, tag in enumerate(path))
        found[path] = float(score + sum(transitions[a, b] for a, b in pairwise(path)))
    return found


def test_partition_best_path_and_a_paths_score_are_those_of_all_paths(scores):
    emissions, transitions, first, last, lengths = scores
    total, best = log_partition(*scores), best_path(*scores)
    tags = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(3))
    own = path_score(*scores, tags)
    for number, length in enumerate(lengths.tolist()):
        paths = every_path(emissions[number], transitions, first, last, length)
        assert total[number].item() == pytest.approx(torch.tensor(list(paths.values())).logsumexp(0).item())
        assert tuple(best[number, :length].tolist()) == max(paths, key=lambda path: paths[path])
        assert (best[number, length:] == -1).all()
        assert own[number].item() == pytest.approx(paths[tuple(tags[number, :length].tolist())])


def test_no_chance_is_given_to_an_inner_tag_behind_another_type_and_the_chances_of_the_rest_add_up_to_one():
    torch.manual_seed(1)
    field = ConditionalRandomField(TAGS)
    torch.nn.init.normal_(field.transitions)
    emissions, length = torch.randn(1, 3, 5), torch.tensor([3])
    chances = {}
    for path in product(range(5), repeat=3):
        loss, _ = field(emissions, length, torch.tensor([path]))
        chances[path] = loss.neg().exp().item()
        named = [TAGS[tag] for tag in path]
        is_possible = all(b[0] != "I" or a[2:] == b[2:] for a, b in pairwise(named))
        assert (chances[path] > 1e-6) == is_possible
    assert sum(chances.values()) == pytest.approx(1.0, rel=1e-4)
    _, best = field.eval()(emissions, length)
    assert tuple(best[0].tolist()) == max(chances, key=lambda path: chances[path])


def test_words_behind_a_sentences_end_change_neither_loss_nor_gradient():
    torch.manual_seed(1)
    field, lengths = ConditionalRandomField(TAGS), torch.tensor([2, 4])
    emissions, tags = torch.randn(2, 4, 5), torch.tensor([[0, 1, 0, 0], [1, 2, 0, 3]])
    other = emissions.clone()
    other[0, 2:] += 7
    found = []
    for values in (emissions.requires_grad_(), other.requires_grad_()):
        loss, _ = field(values, lengths, tags)
        loss.backward()
        found.append((loss.item(), values.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    assert torch.allclose(found[0][1], found[1][1])
    assert not found[0][1][0, 2:].any()
