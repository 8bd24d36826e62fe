"""The backbones trained from first weights: from tokens to one vector of features a window.

Every parameter is used only inside the forward pass of the module that owns it, which is where ZeRO-3 gathers it.

Shapes: R rows, T tokens, W windows, L tokens of the longest window, D embedding size, H heads, E size of a head,
F features. Windows lie side by side in rows (R = W and T = L where each has a row of its own). `documents` [R, T] is
the window's number, W on padding; `firsts` [W] is the index of a window's first token among R * T, `lengths` [W] how
many it has.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bigbatch.recipes.classify.config import AttentionBackboneSection, RecurrentBackboneSection
from bigbatch.recipes.core.layers import (
    Embedding,
    Linear,
    attend,
    attention_mask,
    count_positions,
    draw,
    gather_windows,
    rotary_table,
)
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Block, Context
from bigbatch.recipes.core.models.recurrent import recurrent

INITIALIZER_RANGE = 0.02
EMBEDDING_RANGE = 0.1


class AttentionBackbone(nn.Module):
    """Self-attention layers over embeddings, none where `num_layers` is 0, and learned queries that gather the states.

    The layers are pre-norm with rotary positions: a small data set has too few long texts to learn a vector for each
    position. Without layers there is no norm either: it would make the noise of a rare token's first vector as loud as
    what a frequent one has learned.
    """

    def __init__(self, section: AttentionBackboneSection, vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        shape = EncoderSection(
            norm="pre",
            positions="rotary",
            num_layers=max(1, section.num_layers),
            hidden_size=section.embedding_size,
            num_heads=section.num_heads,
            max_positions=sequence_length,
            dropout=section.dropout,
        )
        self.shape = shape
        self.feature_size = section.embedding_size
        self.embed = TokenEmbedding(section, vocabulary_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(section.num_layers))
        self.norm = nn.LayerNorm(section.embedding_size) if section.num_layers else nn.Identity()
        self.pool = AttentionPooling(section.embedding_size, section.num_heads)

    def forward(
        self, tokens: torch.Tensor, documents: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the features [W, D] of windows that lie in tokens [R, T]."""
        hidden = self.embed(tokens, documents)
        if self.blocks:
            context = self._context(hidden, count_positions(tokens, documents), documents)
            for block in self.blocks:
                hidden = block(hidden, context)
        return self.pool(self.norm(hidden), firsts, lengths)

    def _context(self, hidden: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor) -> Context:
        rotary = rotary_table(positions, self.shape.head_size, self.shape.rope_theta, hidden.dtype)
        return Context(rotary, attention_mask(documents.unsqueeze(1) == documents.unsqueeze(2), hidden.dtype))


class TokenEmbedding(nn.Module):
    """A vector for each token, and one for each pair of neighbours in a window where there are buckets for them.

    Pairs share the buckets by a hash, as in fastText (https://arxiv.org/abs/1607.01759, section 2.2).
    """

    def __init__(self, section: AttentionBackboneSection | RecurrentBackboneSection, vocabulary_size: int) -> None:
        super().__init__()
        size, self.num_buckets = section.embedding_size, section.bigram_buckets
        self.tokens = Embedding(vocabulary_size, size, EMBEDDING_RANGE)
        self.bigrams = Embedding(self.num_buckets, size, EMBEDDING_RANGE) if self.num_buckets else None
        self.dropout = nn.Dropout(section.embedding_dropout)

    def forward(self, tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """Return vectors [R, T, D] of tokens [R, T]; a pair's is added at its second token."""
        hidden = self.tokens(tokens)
        if self.bigrams is not None:
            before, after = tokens[:, :-1], tokens[:, 1:]
            buckets = (before * 1_000_003 + after * 7_919) % 2_147_483_647 % self.num_buckets
            is_pair = documents[:, :-1] == documents[:, 1:]
            hidden = hidden + F.pad(self.bigrams(buckets) * is_pair.unsqueeze(-1), (0, 0, 1, 0))
        return self.dropout(hidden)


class AttentionPooling(nn.Module):
    """Each head has a learned query that looks for its part of the features among a window's tokens."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, size // num_heads
        self.query = nn.Parameter(torch.empty(num_heads, self.head_size))
        draw(self.query, INITIALIZER_RANGE)
        self.key_value = Linear(size, 2 * size, True, INITIALIZER_RANGE)

    def forward(self, hidden: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return a vector [W, D] for each window of hidden states [R, T, D]."""
        states, is_token = gather_windows(hidden, firsts, lengths)
        key, value = self.key_value(states).unflatten(-1, (2, self.num_heads, self.head_size)).unbind(2)
        query = self.query.expand(len(firsts), 1, -1, -1)
        return attend(query, key, value, attention_mask(is_token.unsqueeze(1), hidden.dtype), False).squeeze(1)


class RecurrentBackbone(nn.Module):
    """LSTM or GRU layers over embeddings, and one vector for each window's states; no step is made on padding."""

    def __init__(self, section: RecurrentBackboneSection, vocabulary_size: int) -> None:
        super().__init__()
        self.pooling = section.pooling
        self.feature_size = section.hidden_size * (2 if section.bidirectional else 1)
        self.embed = TokenEmbedding(section, vocabulary_size)
        self.layers = recurrent(
            section.cell,
            section.embedding_size,
            section.hidden_size,
            num_layers=section.num_layers,
            dropout=section.dropout if section.num_layers > 1 else 0.0,
            bidirectional=section.bidirectional,
        )
        self.dropout = nn.Dropout(section.dropout)

    def forward(
        self, tokens: torch.Tensor, documents: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the features [W, F] of windows that have a row of tokens [W, T] each."""
        packed = pack_padded_sequence(
            self.embed(tokens, documents), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        outputs, final = self.layers(packed)
        return self.dropout(self._pool(outputs, final))

    def _pool(self, outputs, final) -> torch.Tensor:
        if self.pooling == "last":  # of each direction: the backward one ends at the first token
            states = final[0] if isinstance(final, tuple) else final
            directions = 2 if self.layers.bidirectional else 1
            return states[-directions:].transpose(0, 1).flatten(1)
        states, lengths = pad_packed_sequence(outputs, True, -math.inf if self.pooling == "max" else 0.0)
        if self.pooling == "max":
            return states.amax(1)
        return states.sum(1) / lengths.to(states).unsqueeze(1)
