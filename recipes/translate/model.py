"""An encoder-decoder that tells how good a translation is, without a reference.

It reads the source, and of the translation what a translator would think of each of its tokens, as a predictor and an
estimator do (https://arxiv.org/abs/1609.06248).

Shapes: B pairs, S tokens of the source, T of the translation, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.layers import Linear
from bigbatch.recipes.core.models.seq2seq import Seq2Seq


class QualityModel(nn.Module):
    """An encoder-decoder and a head that makes one number of a pair; it learns numbers of mean 0 and deviation 1."""

    def __init__(self, model: Seq2Seq, score_mean: float, score_deviation: float) -> None:
        super().__init__()
        self.model, self.score_mean, self.score_deviation = model, score_mean, score_deviation
        size, deviation = model.section.hidden_size, model.section.initializer_range
        self.mix = Linear(2 * size + 1, size, True, deviation)
        self.out = Linear(size + 1, 1, True, deviation)

    def forward(
        self,
        tokens: torch.Tensor,  # [B, S]
        written: torch.Tensor,  # [B, T]
        labels: torch.Tensor,  # [B, T]
        documents: torch.Tensor,  # [B, S]
        target_documents: torch.Tensor,  # [B, T]
    ) -> torch.Tensor:
        """Return how good each pair is [B] float32."""
        states = self.model.states(tokens, written, documents, target_documents)
        is_token = labels != IGNORED_LABEL
        said = labels.clamp(min=0)
        chances = self.model.head(states).float().log_softmax(-1).gather(-1, said.unsqueeze(-1))  # [B, T, 1]
        chances = chances.to(states.dtype)
        mixed = F.gelu(self.mix(torch.cat((states, states * self.model.embed(said), chances), -1)))
        weights = (is_token / is_token.sum(1, keepdim=True)).to(states.dtype).unsqueeze(-1)
        means = (torch.cat((mixed, chances), -1) * weights).sum(1)  # [B, D + 1]
        return self.out(means).squeeze(-1).float() * self.score_deviation + self.score_mean
