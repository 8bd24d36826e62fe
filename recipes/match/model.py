"""Models that match texts: one vector a text, or one score a pair; and what they are trained by.

Shapes: R rows of T tokens hold W windows; P pairs of G groups, each with n negatives; D numbers of a vector.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.layers import Embedding, Linear
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Encoder, Pooler
from bigbatch.recipes.core.recipe import Batch
from bigbatch.recipes.core.start import start_encoder, start_head
from bigbatch.recipes.match.config import MatchModelSection, ObjectiveSection

THEIR_HEAD = "classifier"


class BiEncoder(nn.Module):
    """Gives each text a vector of length 1 by itself."""

    def __init__(self, section: EncoderSection, vocabulary_size: int, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.encoder = Encoder(section, vocabulary_size)

    def forward(
        self,
        tokens: torch.Tensor,
        documents: torch.Tensor | None = None,
        firsts: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the vectors [W, D], in float32; of tokens alone the hidden states [R, T, D]."""
        hidden = self.encoder(tokens, documents=documents)
        if documents is None or firsts is None or lengths is None:
            return hidden
        if self.pooling == "first":
            return F.normalize(hidden.flatten(0, 1)[firsts].float(), dim=-1)
        return F.normalize(_sums(hidden, documents, len(firsts)) / lengths.unsqueeze(1), dim=-1)


class WordBag(nn.Module):
    """Gives each text the sum of its tokens' vectors, brought to length 1.

    Random vectors as long as their tokens are rare have cosines near those of tf-idf (Johnson and Lindenstrauss), from
    where training goes on.
    """

    def __init__(self, size: int, vocabulary_size: int, rarities: torch.Tensor | None) -> None:
        super().__init__()
        self.tokens = _RareEmbedding(vocabulary_size, size, rarities)

    def forward(
        self, tokens: torch.Tensor, documents: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the vectors [W, D], in float32."""
        return F.normalize(_sums(self.tokens(tokens), documents, len(firsts)), dim=-1)


class _RareEmbedding(Embedding):
    def __init__(self, num_embeddings: int, embedding_dim: int, rarities: torch.Tensor | None) -> None:
        self.rarities = rarities
        super().__init__(num_embeddings, embedding_dim, embedding_dim**-0.5)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.rarities is not None:
            with torch.no_grad():
                self.weight.mul_(self.rarities.to(self.weight).unsqueeze(1))


class CrossEncoder(nn.Module):
    """Reads both texts of a pair together, as BERT does, and scores it by one number."""

    def __init__(self, section: EncoderSection, vocabulary_size: int) -> None:
        super().__init__()
        self.encoder, self.pooler = Encoder(section, vocabulary_size), Pooler(section)
        self.dropout = nn.Dropout(section.dropout)
        self.head = Linear(section.hidden_size, 1, True, section.initializer_range)

    def forward(
        self,
        tokens: torch.Tensor,  # [R, T]
        documents: torch.Tensor | None = None,
        firsts: torch.Tensor | None = None,  # [W]
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits [W, 1]; without `firsts` each row is a pair."""
        hidden = self.encoder(tokens, documents=documents, segments=segments)
        states = hidden[:, 0] if firsts is None else hidden.flatten(0, 1)[firsts]
        return self.head(self.dropout(self.pooler(states)))


def build_model(
    section: MatchModelSection, facts: dict[str, Any], initialize: bool, rarities: torch.Tensor | None = None
) -> nn.Module:
    """Build the model that the facts describe; its first weights come from where the document says."""
    size = facts["vocabulary_size"]
    if section.backbone == "words":
        return WordBag(section.embedding_size, size, rarities)
    shape = EncoderSection.model_validate(facts["encoder"])
    if section.kind == "bi":
        model: Any = BiEncoder(shape, size, section.pooling)
        start_encoder(model.encoder, None, section, size, initialize)
        return model
    model = CrossEncoder(shape, size)
    start_encoder(model.encoder, model.pooler, section, size, initialize)
    start_head(model.head, section, THEIR_HEAD, initialize, lack="scores no pairs")
    return model


def loss_of_vectors(vectors: torch.Tensor, batch: Batch, objective: ObjectiveSection) -> torch.Tensor:
    """Return the loss summed over pairs, of vectors [(2 + n) P, D]: all left texts, all right ones, all negatives."""
    count = len(batch["scores"])
    left, right = vectors[:count], vectors[count : 2 * count]
    if objective.loss == "contrastive":
        return _contrastive(left, right, vectors[2 * count :], batch, objective)
    cosines = (left * right).sum(-1)
    if objective.loss == "cosine":
        return (cosines - batch["scores"]).square().sum()
    return _ranking(cosines, batch, objective.temperature)


def _contrastive(
    left: torch.Tensor, right: torch.Tensor, negatives: torch.Tensor, batch: Batch, objective: ObjectiveSection
) -> torch.Tensor:
    """Return InfoNCE within groups. A text that belongs to a pair's left or right one too is no negative of it."""
    lefts, rights, groups = batch["lefts"], batch["rights"], batch["groups"]
    targets = torch.arange(len(left), device=left.device)
    is_own = targets.unsqueeze(1) == targets
    is_other = (lefts.unsqueeze(1) != lefts) & (rights.unsqueeze(1) != rights) & (groups.unsqueeze(1) == groups)
    allowed, scale = is_own | is_other, 1 / objective.temperature
    logits = (left @ right.T * scale).masked_fill(~allowed, -torch.inf)
    backward = F.cross_entropy(logits.T, targets, reduction="sum") if objective.symmetric else None
    if objective.popularity:
        logits = logits - batch["counts"].log()
    if len(negatives):
        numbers = batch["negatives"]  # [P, n]
        owners = groups.unsqueeze(1).expand_as(numbers).flatten()
        is_negative = (groups.unsqueeze(1) == owners) & (rights.unsqueeze(1) != numbers.flatten())
        further = (left @ negatives.T * scale).masked_fill(~is_negative, -torch.inf)
        logits = torch.cat([logits, further], 1)
    forward = F.cross_entropy(logits, targets, reduction="sum")
    return forward if backward is None else (forward + backward) / 2


def _ranking(cosines: torch.Tensor, batch: Batch, temperature: float) -> torch.Tensor:
    """Return log(1 + sum of exp((worse - better) / temperature)) over each group's pairs of pairs, a pair's share."""
    scores, groups = batch["scores"], batch["groups"]
    num_groups = int(groups.max()) + 1
    size = len(scores) // num_groups
    is_worse = (scores.unsqueeze(1) > scores) & (groups.unsqueeze(1) == groups)
    gaps = ((cosines - cosines.unsqueeze(1)) / temperature).masked_fill(~is_worse, -torch.inf)
    found = gaps.view(num_groups, -1)
    return torch.logsumexp(torch.cat([found.new_zeros(num_groups, 1), found], 1), 1).sum() * size


def loss_of_logits(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the binary cross-entropy summed over pairs, of logits [W]; of a pair's several windows the mean."""
    losses = F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")
    return losses * (len(batch["scores"]) / len(logits))


def _sums(hidden: torch.Tensor, documents: torch.Tensor, num_windows: int) -> torch.Tensor:
    """Add up each window's states: [W, D] in float32."""
    sums = torch.zeros(num_windows + 1, hidden.shape[-1], device=hidden.device)
    return sums.index_add(0, documents.flatten().long(), hidden.flatten(0, 1).float())[:-1]  # padding is the last
