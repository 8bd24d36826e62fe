"""A BERT with a head that tells of each token how well an answer begins there, and how well it ends there.

Shapes: R rows of T tokens hold W windows, the longest of L; S spans of a window, the best ones. See data.py.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.layers import Linear, gather_windows
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Encoder
from bigbatch.recipes.core.start import start_encoder, start_head
from bigbatch.recipes.question_answering.config import AnswerSection, SpanModelSection

THEIR_HEAD = "qa_outputs"
INPUTS = ("tokens", "documents", "segments")  # of a batch, what the model takes
LAYOUT = ("firsts", "lengths", "contexts")  # and where its windows lie


class SpanModel(nn.Module):
    """The encoder and its head, as in BERT (https://arxiv.org/abs/1810.04805, section 4.2)."""

    def __init__(self, section: EncoderSection, vocabulary_size: int, most_tokens: int) -> None:
        super().__init__()
        self.most_tokens = most_tokens  # of an answer, for evaluation
        self.encoder = Encoder(section, vocabulary_size)
        self.head = Linear(section.hidden_size, 2, True, section.initializer_range)

    def forward(
        self, tokens: torch.Tensor, documents: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits [R, T, 2] of a first and of a last token."""
        return self.head(self.encoder(tokens, documents=documents, segments=segments))


class Spans(NamedTuple):
    """The best answers of each window, and how good it is to give none."""

    scores: torch.Tensor  # [W, S]
    starts: torch.Tensor  # [W, S] columns of the window
    ends: torch.Tensor  # [W, S]
    nulls: torch.Tensor  # [W]


def build_model(
    section: SpanModelSection, answers: AnswerSection, facts: dict[str, Any], initialize: bool
) -> SpanModel:
    """Build the model that the facts describe; its first weights come from where the document says."""
    shape = EncoderSection.model_validate(facts["encoder"])
    model = SpanModel(shape, facts["vocabulary_size"], answers.most_tokens)
    start_encoder(model.encoder, None, section, facts["vocabulary_size"], initialize)
    start_head(model.head, section, THEIR_HEAD, initialize, lack="answers no questions")
    return model


def span_loss(
    logits: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Return the mean of both cross-entropies over the tokens of a window, summed over the windows."""
    found, is_token = gather_windows(logits.float(), firsts, lengths)  # [W, L, 2]
    found = found.masked_fill(~is_token.unsqueeze(-1), -torch.inf)
    losses = (F.cross_entropy(found[..., side], right, reduction="sum") for side, right in enumerate((starts, ends)))
    return sum(losses, torch.zeros((), device=logits.device)) / 2


def best_spans(
    logits: torch.Tensor,  # [R, T, 2]
    firsts: torch.Tensor,  # [W]
    lengths: torch.Tensor,  # [W]
    contexts: torch.Tensor,  # [W]
    most_tokens: int,
    count: int,
) -> Spans:
    """Return the `count` best answers of each window by the sum of both logits, all inside the context.

    Exact: every pair of a first and a last token at most `most_tokens` long is looked at. What is too many has a score
    of minus infinity.
    """
    found, _ = gather_windows(logits.float(), firsts, lengths)
    columns = torch.arange(found.shape[1], device=found.device)
    in_context = (columns >= contexts.unsqueeze(1)) & (columns < lengths.unsqueeze(1) - 1)  # the last is [SEP]
    starts, ends = found.masked_fill(~in_context.unsqueeze(-1), -torch.inf).unbind(-1)
    reach = min(most_tokens, found.shape[1])
    pairs = starts.unsqueeze(-1) + F.pad(ends, (0, reach - 1), value=-torch.inf).unfold(1, reach, 1)  # [W, L, reach]
    scores, places = pairs.flatten(1).topk(min(count, found.shape[1] * reach))
    first = places // reach
    return Spans(scores, first, first + places % reach, found[:, 0].sum(-1))
