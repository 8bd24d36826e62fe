"""An LSTM or GRU over words, whose output weights are the input's: a small AWD-LSTM (https://arxiv.org/abs/1708.02182).

Shapes: B stretches of T words behind C others, E embedding size, V words.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.layers import Embedding
from bigbatch.recipes.core.loss import chunked_cross_entropy
from bigbatch.recipes.core.models.recurrent import locked_dropout, recurrent
from bigbatch.recipes.next_word.config import RecurrentSection

EMBEDDING_RANGE = 0.05


class RecurrentLanguageModel(nn.Module):
    """Layers of one direction, each stretch from a state of zero; the last is as wide as the embedding."""

    def __init__(self, section: RecurrentSection, vocabulary_size: int) -> None:
        super().__init__()
        self.section = section
        size = section.embedding_size
        self.embed = WordEmbedding(vocabulary_size, size, section.embedding_dropout)
        widths = [size, *(section.num_layers - 1) * [section.hidden_size], size]
        self.layers = nn.ModuleList(
            recurrent(section.cell, before, width, section.weight_dropout)
            for before, width in itertools.pairwise(widths)
        )
        self.head = TiedHead(self.embed.words)

    def forward(
        self,
        tokens: torch.Tensor,  # [B, C + T]
        labels: torch.Tensor | None = None,  # [B, T]
        lasts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss summed over labels of the last words, or the logits [B, V] behind the places `lasts` [B]."""
        section = self.section
        hidden = locked_dropout(self.embed(tokens), section.input_dropout, self.training)
        for number, layer in enumerate(self.layers, 1):
            is_last = number == len(self.layers)
            dropout = section.output_dropout if is_last else section.hidden_dropout
            hidden = locked_dropout(layer(hidden)[0], dropout, self.training)  # [B, T, E]
        if labels is not None:
            hidden = hidden[:, -labels.shape[1] :]
        if lasts is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), lasts]
        return self.head(hidden, labels)


class WordEmbedding(nn.Module):
    """A vector for each word; in training whole words are dropped, wherever they stand in the batch."""

    def __init__(self, vocabulary_size: int, size: int, dropout: float) -> None:
        super().__init__()
        self.words, self.dropout = Embedding(vocabulary_size, size, EMBEDDING_RANGE), dropout

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the vectors [B, T, E] of words [B, T]."""
        vectors = self.words(tokens)
        if not self.training or not self.dropout:
            return vectors
        kept = F.dropout(vectors.new_ones(self.words.num_embeddings), self.dropout)
        return vectors * kept[tokens].unsqueeze(-1)


class TiedHead(nn.Module):
    """The logits of all words; it makes the loss too, for this is where ZeRO-3 gathers the tied weight."""

    def __init__(self, words: Embedding) -> None:
        super().__init__()
        self.weight = words.weight
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits [..., V] of states [..., E], or the loss summed over labels [...]."""
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten(), bias=self.bias)
