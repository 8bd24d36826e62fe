"""Interpolated Kneser-Ney smoothing with three discounts for each length of n-gram, which are learned.

With h the words before a word w, h' the same without the first, c the counts of tables.py and D(c) the discount of a
count (0 of 0, D1 of 1, D2 of 2, D3 of 3 and more), for each length from the shortest on:

    p(w | h) = (c(h w) - D(c(h w)) + (D1 N1(h) + D2 N2(h) + D3 N3(h)) p(w | h')) / sum over v of c(h v)

where Ni(h) counts the words that follow h with a count of i. Below the shortest all words are alike. Where h has never
been seen, p(w | h) is p(w | h'). (Chen and Goodman 1998, section 3: "modified Kneser-Ney"; as there, the discounts
begin at formulas of small counts and are then fitted to text that was not counted.)

Shapes: B stretches of T words, K the longest n-gram, V words.
"""

import torch
from torch import nn

from bigbatch.recipes.core.data.ngrams import BUCKETS
from bigbatch.recipes.core.data.shards import IGNORED_LABEL


class KneserNey(nn.Module):
    """The interpolation: its only weights are the discounts, that of a count c as the logit of D / c."""

    def __init__(self, vocabulary_size: int, discounts: list[list[float]]) -> None:
        """Begin with given discounts, three for each length."""
        super().__init__()
        self.vocabulary_size, self.order = vocabulary_size, len(discounts)
        shares = [value / count for three in discounts for count, value in enumerate(three, 1)]
        self.logits = nn.Parameter(torch.tensor(shares).logit())  # a vector: no weight decay

    def discounts(self) -> torch.Tensor:
        """Return them as [K, 3]: the first between 0 and 1, the second 0 and 2, the third 0 and 3."""
        shares = self.logits.float().sigmoid().view(self.order, BUCKETS)
        return shares * torch.arange(1, BUCKETS + 1, device=shares.device)

    def forward(self, statistics: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the negative logarithm of the probabilities of words [B, T], summed over those with a label."""
        probability = statistics.new_full(labels.shape, 1 / self.vocabulary_size)
        for discounts, of_length in zip(self.discounts(), statistics.unbind(-2), strict=True):
            count, total, followers = of_length[..., 0], of_length[..., 1], of_length[..., 2:]
            kept = count - torch.cat([discounts.new_zeros(1), discounts])[count.clamp(max=BUCKETS).long()]
            mixed = (kept + followers @ discounts * probability) / total.clamp(min=1)
            probability = torch.where(total > 0, mixed, probability)
        return -(probability.log() * (labels != IGNORED_LABEL)).sum()
