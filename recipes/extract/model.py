"""Models of both tasks: a backbone that makes a state of each word, and a head over words or over a marked pair.

Shapes: N sentences of at most T words, P tokens a word and L letters a word; F features; C tags or relations; D states.
An encoder's tokens lie in R rows of K. See `collate` in data.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bigbatch.recipes.core.layers import Embedding, Linear
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Encoder, Pooler
from bigbatch.recipes.core.models.recurrent import locked_dropout, recurrent
from bigbatch.recipes.core.start import start_encoder, start_head
from bigbatch.recipes.extract.config import EncoderBackboneSection, ExtractConfig, ObjectiveSection, WordBackboneSection
from bigbatch.recipes.extract.crf import ConditionalRandomField
from bigbatch.recipes.extract.features import NUM_CHARACTERS

MOST_DISTANCE = 30  # words; greater distances are this
INITIALIZER_RANGE = 0.02
FILTER_WIDTH = 3
THEIR_HEAD = "classifier"


class Objective(nn.Module):
    """The loss of logits, and what they say: with a CRF of whole sentences, else of each by itself."""

    def __init__(self, tags: list[str] | None, section: ObjectiveSection) -> None:
        super().__init__()
        self.label_smoothing, self.outside_margin = section.label_smoothing, section.outside_margin
        self.crf = ConditionalRandomField(tags) if tags else None

    def forward(
        self, logits: torch.Tensor, word_counts: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss summed over the labels, 0 without, and the best tags [N, T], or the chances [N, C].

        logits are [N, T, C] where there are word_counts [N], else [N, C]; labels [N, T] or [N].
        """
        if self.training and self.outside_margin and word_counts is not None:
            logits = torch.cat([logits[..., :1] + self.outside_margin, logits[..., 1:]], -1)
        if self.crf is not None:
            assert word_counts is not None
            return self.crf(logits, word_counts, labels)
        logits, loss = logits.float(), logits.new_zeros((), dtype=torch.float32)
        if word_counts is not None:
            is_word = torch.arange(logits.shape[1], device=logits.device) < word_counts.unsqueeze(1)
            labels = None if labels is None else labels.masked_fill(~is_word, -100)
            found = logits.argmax(-1).masked_fill(~is_word, -1)
        else:
            found = logits.softmax(-1)
        if labels is not None:
            smoothing = self.label_smoothing if self.training else 0.0
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", label_smoothing=smoothing)
        return loss, found


class EncoderExtractor(nn.Module):
    """BERT with transformers' heads: a linear layer over all tokens, or over the pooled first one."""

    def __init__(self, section: EncoderSection, vocabulary_size: int, config: ExtractConfig, labels: list[str]) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, EncoderBackboneSection)
        self.longest = config.data.sequence_length
        self.encoder = Encoder(section, vocabulary_size)
        self.pooler = Pooler(section) if config.data.task == "relations" else None
        self.dropout = nn.Dropout(model.head_dropout)
        self.head = Linear(section.hidden_size, len(labels), True, section.initializer_range)
        tags = labels if config.data.task == "entities" and model.crf else None
        self.objective = Objective(tags, config.objective)

    def forward(
        self,
        tokens: torch.Tensor,  # [R, K]
        documents: torch.Tensor | None = None,  # [R, K]
        firsts: torch.Tensor | None = None,  # [N], of the flattened tokens
        places: torch.Tensor | None = None,  # [N, T], of each word's first token among them
        word_counts: torch.Tensor | None = None,  # [N]
        labels: torch.Tensor | None = None,  # [N, T] or [N]
    ) -> Any:
        """Return what `Objective` does; with tokens alone the logits [R, K, C] of all, or [R, C] of rows."""
        hidden = self.encoder(tokens, documents=documents)
        if self.pooler is None:
            logits = self.head(self.dropout(hidden))
            if places is None:
                return logits
            return self.objective(logits.flatten(0, 1)[places], word_counts, labels)
        chosen = hidden[:, 0] if firsts is None else hidden.flatten(0, 1)[firsts]
        logits = self.head(self.dropout(self.pooler(chosen)))
        return logits if firsts is None else self.objective(logits, None, labels)


class WordExtractor(nn.Module):
    """Vectors of words, letters and places through recurrent layers, and weights of hashed features beside them."""

    def __init__(
        self, section: WordBackboneSection, vocabulary_size: int, config: ExtractConfig, labels: list[str]
    ) -> None:
        super().__init__()
        self.longest = config.data.sequence_length
        self.section, self.is_pair = section, config.data.task == "relations"
        self.embed = WordEmbedding(section, vocabulary_size, self.is_pair)
        size = self.embed.feature_size
        self.layers = None
        if section.num_layers:
            settings: dict[str, Any] = {"num_layers": section.num_layers, "bidirectional": True}
            settings["dropout"] = section.dropout if section.num_layers > 1 else 0.0
            self.layers = recurrent(section.cell, size, section.hidden_size, **settings)
            size = 2 * section.hidden_size
        self.head = Linear((4 if self.is_pair else 1) * size, len(labels), True, INITIALIZER_RANGE)
        self.features = Embedding(section.feature_buckets, len(labels), 0.0) if section.feature_buckets else None
        tags = labels if not self.is_pair and section.crf else None
        self.objective = Objective(tags, config.objective)

    def forward(
        self,
        pieces: torch.Tensor,  # [N, T, P], -1 for none
        word_counts: torch.Tensor,  # [N]
        characters: torch.Tensor | None = None,  # [N, T, L], 0 for none
        features: torch.Tensor | None = None,  # [N, T, F] or [N, F], -1 for none
        marks: torch.Tensor | None = None,  # [N, 4], of both entities the first word and the one behind the last
        labels: torch.Tensor | None = None,  # [N, T] or [N]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `Objective` does."""
        hidden = self.embed(pieces, characters, marks)
        hidden = locked_dropout(hidden, self.section.dropout, self.training)
        if self.layers is not None:
            packed = pack_padded_sequence(hidden, word_counts.cpu(), batch_first=True, enforce_sorted=False)
            hidden, _ = pad_packed_sequence(self.layers(packed)[0], True, total_length=pieces.shape[1])
        if marks is not None:
            hidden = F.dropout(_pooled(hidden, word_counts, marks), self.section.dropout, self.training)
        else:
            hidden = locked_dropout(hidden, self.section.dropout, self.training)
        logits = self.head(hidden).float()
        if self.features is not None and features is not None:
            logits = logits + self._weigh(features)
        return self.objective(logits, None if self.is_pair else word_counts, labels)

    def _weigh(self, features: torch.Tensor) -> torch.Tensor:
        """Return the summed weights [..., C] of features [..., F], over the root of how many there are."""
        assert self.features is not None
        is_there = (features >= 0).float()
        counts = is_there.sum(-1, keepdim=True).clamp(min=1)
        is_there = F.dropout(is_there, self.section.feature_dropout, self.training) / counts.sqrt()
        weights = self.features(features.clamp(min=0)).float()
        return torch.matmul(is_there.unsqueeze(-2), weights).squeeze(-2)


class WordEmbedding(nn.Module):
    """A vector of each word: the sum of its tokens', patterns of its letters, and how far it is from both entities."""

    def __init__(self, section: WordBackboneSection, vocabulary_size: int, is_pair: bool) -> None:
        super().__init__()
        self.feature_size = section.embedding_size
        self.tokens = Embedding(vocabulary_size, section.embedding_size, section.embedding_size**-0.5)
        self.letters = None
        if section.character_size:
            self.letters = Embedding(NUM_CHARACTERS, section.character_size, section.character_size**-0.5)
            width = FILTER_WIDTH * section.character_size
            self.filters = Linear(width, section.character_filters, True, width**-0.5)
            self.feature_size += section.character_filters
        self.distances = None
        if is_pair and section.position_size:
            deviation = section.position_size**-0.5
            self.distances = Embedding(2 * (2 * MOST_DISTANCE + 1), section.position_size, deviation)
            self.feature_size += 2 * section.position_size

    def forward(
        self, pieces: torch.Tensor, characters: torch.Tensor | None, marks: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the vectors [N, T, D]."""
        found = [(self.tokens(pieces.clamp(min=0)) * (pieces >= 0).unsqueeze(-1)).sum(2)]
        if self.letters is not None:
            assert characters is not None
            letters = F.pad(self.letters(characters), (0, 0, 1, 1))  # [N, T, L + 2, D]
            windows = letters.unfold(2, FILTER_WIDTH, 1).flatten(-2)  # [N, T, L, 3 D]
            matches = F.relu(self.filters(windows)) * (characters > 0).unsqueeze(-1)
            found.append(matches.amax(2))
        if self.distances is not None:
            assert marks is not None
            places = torch.arange(pieces.shape[1], device=pieces.device)
            for number in (0, 1):
                first, stop = marks[:, 2 * number, None], marks[:, 2 * number + 1, None]
                away = (places - first).clamp(max=0) + (places - stop + 1).clamp(min=0)  # 0 inside
                away = away.clamp(-MOST_DISTANCE, MOST_DISTANCE) + MOST_DISTANCE
                found.append(self.distances(away + number * (2 * MOST_DISTANCE + 1)))
        return torch.cat(found, -1)


def _pooled(hidden: torch.Tensor, word_counts: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Return the largest values [N, 4 D] over all words, over those from one entity to the other, and over each."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    first, last = marks.amin(1, keepdim=True), marks.amax(1, keepdim=True)
    spans = [
        places < word_counts.unsqueeze(1),
        (places >= first) & (places < last),
        (places >= marks[:, :1]) & (places < marks[:, 1:2]),
        (places >= marks[:, 2:3]) & (places < marks[:, 3:]),
    ]
    return torch.cat([hidden.masked_fill(~span.unsqueeze(-1), -torch.inf).amax(1) for span in spans], -1)


def build_model(config: ExtractConfig, facts: dict[str, Any], initialize: bool) -> nn.Module:
    """Build the model that the facts describe; its first weights come from where the document says."""
    section, size, labels = config.model, facts["vocabulary_size"], facts["labels"]
    if isinstance(section, WordBackboneSection):
        return WordExtractor(section, size, config, labels)
    model = EncoderExtractor(EncoderSection.model_validate(facts["encoder"]), size, config, labels)
    start_encoder(model.encoder, model.pooler, section, size, initialize)
    start_head(model.head, section, THEIR_HEAD, initialize, labels)
    return model
