"""A conditional random field over the tags of a sentence, linear chain, computed exactly in float32.

Shapes: N sentences of at most T words, C tags. Formulas: https://arxiv.org/abs/1603.01360, section 2.2.
"""

from collections.abc import Sequence

import torch
from torch import nn

FORBIDDEN = -1e4  # as a logarithm of a chance; finite, so that sums and gradients stay numbers


class ConditionalRandomField(nn.Module):
    """Scores of neighbouring tags, of the first and of the last; a tag I-x stands behind B-x or I-x alone.

    It may be the first: a long sentence is read in parts.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__()
        self.tags = tuple(tags)
        size = len(tags)
        self.transitions = nn.Parameter(torch.zeros(size, size))  # from the row's tag to the column's
        self.edges = nn.Parameter(torch.zeros(2, size))  # of the first word and of the last

    def forward(
        self, emissions: torch.Tensor, lengths: torch.Tensor, tags: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return minus the log likelihood of tags [N, T], summed over the sentences, 0 without, and the best tags.

        The best [N, T] are looked for in evaluation alone, else all -1, as behind a sentence's end. emissions are
        [N, T, C], lengths [N].
        """
        emissions = emissions.float()
        transitions = self.transitions.float() + _allowed(self.tags, emissions.device)
        first, last = self.edges.float().unbind()
        loss = emissions.new_zeros(())
        if tags is not None:
            total = log_partition(emissions, transitions, first, last, lengths)
            loss = (total - path_score(emissions, transitions, first, last, lengths, tags)).sum()
        if self.training:
            return loss, torch.full(emissions.shape[:2], -1, device=emissions.device)
        return loss, best_path(emissions, transitions, first, last, lengths)


def log_partition(
    emissions: torch.Tensor, transitions: torch.Tensor, first: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Return the logarithm [N] of the summed exponentials of all paths' scores (the forward algorithm)."""
    scores = first + emissions[:, 0]  # [N, C], of all paths that end in a tag
    for place in range(1, emissions.shape[1]):
        further = torch.logsumexp(scores.unsqueeze(2) + transitions, 1) + emissions[:, place]
        scores = torch.where((place < lengths).unsqueeze(1), further, scores)
    return torch.logsumexp(scores + last, 1)


def path_score(
    emissions: torch.Tensor,
    transitions: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    lengths: torch.Tensor,
    tags: torch.Tensor,
) -> torch.Tensor:
    """Return the score [N] of one path a sentence."""
    is_word = torch.arange(emissions.shape[1], device=tags.device) < lengths.unsqueeze(1)
    tags = tags.masked_fill(~is_word, 0)
    own = emissions.gather(2, tags.unsqueeze(2)).squeeze(2)
    steps = transitions[tags[:, :-1], tags[:, 1:]]
    ends = tags.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
    return (own * is_word).sum(1) + (steps * is_word[:, 1:]).sum(1) + first[tags[:, 0]] + last[ends]


def best_path(
    emissions: torch.Tensor, transitions: torch.Tensor, first: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Return the path [N, T] with the highest score, -1 behind its end (Viterbi's algorithm)."""
    scores, origins = first + emissions[:, 0], []
    stay = torch.arange(emissions.shape[2], device=emissions.device)
    for place in range(1, emissions.shape[1]):
        further, origin = (scores.unsqueeze(2) + transitions).max(1)
        is_word = (place < lengths).unsqueeze(1)
        scores = torch.where(is_word, further + emissions[:, place], scores)
        origins.append(torch.where(is_word, origin, stay))
    path = [(scores + last).argmax(1)]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1].unsqueeze(1)).squeeze(1))
    found = torch.stack(path[::-1], 1)
    is_word = torch.arange(found.shape[1], device=found.device) < lengths.unsqueeze(1)
    return found.masked_fill(~is_word, -1)


def _allowed(tags: Sequence[str], device: torch.device) -> torch.Tensor:
    """Return what is added to the scores of pairs [C, C]: 0, or FORBIDDEN."""
    inside = [tag[2:] if tag.startswith("I-") else None for tag in tags]
    pairs = [[0.0 if kind is None or before[2:] == kind else FORBIDDEN for kind in inside] for before in tags]
    return torch.tensor(pairs, device=device)
