"""A BERT over a whole window of sentences, and a head that scores each by the state of its own [CLS].

Shapes: R rows of T tokens hold W windows of at most S sentences; D hidden size. See data.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.layers import Linear, attention_mask
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Block, Context, Encoder
from bigbatch.recipes.core.start import start_encoder, start_head
from bigbatch.recipes.summarize.config import ObjectiveSection, SummarizeConfig

THEIR_HEAD = "classifier"
INPUTS = ("tokens", "documents", "segments", "places")  # of a batch, what the model takes


class SentenceModel(nn.Module):
    """The encoder, further layers over the sentences where there are such, and the head."""

    def __init__(
        self,
        section: EncoderSection,
        vocabulary_size: int,
        sentence_layers: int,
        objective: ObjectiveSection,
        window_sentences: int,
    ) -> None:
        super().__init__()
        self.objective, self.window_sentences = objective, window_sentences  # what loss and evaluation want to know
        self.encoder = Encoder(section, vocabulary_size)
        self.blocks = nn.ModuleList(Block(section) for _ in range(sentence_layers))
        self.head = Linear(section.hidden_size, 1, True, section.initializer_range)

    def forward(
        self,
        tokens: torch.Tensor,
        documents: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits [W, S] of the sentences at `places`; without, those [R, T, 1] of all tokens."""
        hidden = self.encoder(tokens, documents=documents, segments=segments)
        if places is None:
            return self.head(hidden)
        found = hidden.flatten(0, 1)[places.clamp(min=0)]  # [W, S, D]
        if self.blocks:
            # A place beyond the last sees itself too: a row without any would be no number.
            is_there = (places >= 0).unsqueeze(1) | torch.eye(places.shape[1], dtype=torch.bool, device=places.device)
            context = Context(None, attention_mask(is_there, found.dtype))
            for block in self.blocks:
                found = block(found, context)
        return self.head(found).squeeze(-1)


def build_model(config: SummarizeConfig, facts: dict[str, Any], initialize: bool) -> SentenceModel:
    """Build the model that the facts describe; its first weights come from where the document says."""
    section: Any = config.model
    shape = EncoderSection.model_validate(facts["encoder"])
    size, most = facts["vocabulary_size"], config.data.window_sentences
    model = SentenceModel(shape, size, section.sentence_layers, config.objective, most)
    start_encoder(model.encoder, None, section, size, initialize)
    start_head(model.head, section, THEIR_HEAD, initialize, lack="scores no sentences")
    return model


def sentence_loss(
    logits: torch.Tensor, places: torch.Tensor, labels: torch.Tensor, worths: torch.Tensor, objective: ObjectiveSection
) -> torch.Tensor:
    """Return the loss of each window, for `binary` the mean over its sentences, summed over the windows; all [W, S]."""
    is_there, logits = places >= 0, logits.float()
    if objective.loss == "binary":
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").masked_fill(~is_there, 0.0)
        return (losses.sum(1) / is_there.sum(1)).sum()
    right = (worths / objective.temperature).masked_fill(~is_there, -torch.inf).softmax(1)
    chances = logits.masked_fill(~is_there, -torch.inf).log_softmax(1).masked_fill(~is_there, 0.0)
    return -(right * chances).sum()
