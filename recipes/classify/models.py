"""A classifier: a backbone that makes one vector of a window, and a head that makes logits of it.

Shapes: R rows of T tokens hold W windows of N texts; C labels, F features. See `Batch` in data.py.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.classify.backbones import AttentionBackbone, RecurrentBackbone
from bigbatch.recipes.classify.config import ClassifyConfig
from bigbatch.recipes.classify.heads import build_other
from bigbatch.recipes.core.foreign import ForeignEncoder, Session
from bigbatch.recipes.core.layers import Linear
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import Encoder, Pooler
from bigbatch.recipes.core.start import start_encoder, start_head

HEAD_RANGE = 0.02


class Objective(nn.Module):
    """The summed loss of logits: cross-entropy, or binary cross-entropy over all labels with multi_label.

    Weights of classes and label smoothing count in training alone, so that validation is the plain loss.
    """

    def __init__(self, multi_label: bool, label_smoothing: float, class_weights: list[float] | None) -> None:
        super().__init__()
        self.multi_label, self.label_smoothing, self.class_weights = multi_label, label_smoothing, class_weights

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits [N, C], summed over the texts; labels are [N], with multi_label [N, C]."""
        logits = logits.float()
        weights, smoothing = None, self.label_smoothing if self.training else 0.0
        if self.training and self.class_weights:
            weights = torch.tensor(self.class_weights, device=logits.device)
        if not self.multi_label:
            return F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
        targets = labels * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weights)
        return losses.mean(-1).sum()


class Classifier(nn.Module):
    """From windows of tokens to the logits of texts."""

    def __init__(self, backbone: nn.Module, num_labels: int, head_dropout: float, objective: Objective) -> None:
        super().__init__()
        self.backbone, self.objective = backbone, objective
        self.dropout = nn.Dropout(head_dropout)
        self.head = Linear(backbone.feature_size, num_labels, True, HEAD_RANGE)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: torch.Tensor,  # [R, T]
        documents: torch.Tensor | None = None,  # [R, T]
        firsts: torch.Tensor | None = None,  # [W]
        lengths: torch.Tensor | None = None,  # [W]
        examples: torch.Tensor | None = None,  # [W]
        labels: torch.Tensor | None = None,  # [N] or [N, C]
    ) -> Any:
        """Return the logits [N, C], with labels (summed loss, logits); with tokens alone each row is a text."""
        documents, firsts, lengths, examples = _whole_rows(tokens, documents, firsts, lengths, examples)
        logits = self.head(self.dropout(self.backbone(tokens, documents, firsts, lengths)))
        logits = _mean_over_windows(logits, examples)
        return logits if labels is None else (self.objective(logits, labels), logits)


class OtherClassifier(nn.Module):
    """Transformers' own classifier of a family that is not native; a window has a row of its own."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.padding = getattr(model.config, "pad_token_id", None) or 0

    def forward(
        self,
        tokens: torch.Tensor,
        documents: torch.Tensor | None = None,
        firsts: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        examples: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Any:
        """Return what `Classifier` does."""
        documents, firsts, lengths, examples = _whole_rows(tokens, documents, firsts, lengths, examples)
        useful = documents < len(firsts)
        logits = self.model(
            input_ids=tokens.masked_fill(~useful, self.padding), attention_mask=useful.to(tokens.dtype)
        ).logits
        logits = _mean_over_windows(logits, examples)
        return logits if labels is None else (self.objective(logits, labels), logits)


class EncoderBackbone(nn.Module):
    """The native encoder and how one vector is made of a window's states."""

    def __init__(self, section: EncoderSection, vocabulary_size: int, pooling: str) -> None:
        super().__init__()
        self.feature_size = section.hidden_size
        self.encoder = Encoder(section, vocabulary_size)
        self.pooler = Pooler(section) if pooling == "first" else None

    def forward(
        self, tokens: torch.Tensor, documents: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the features [W, F] of windows that lie in tokens [R, T]."""
        hidden = self.encoder(tokens, documents=documents).flatten(0, 1)
        if self.pooler is not None:
            return self.pooler(hidden[firsts])
        sums = hidden.new_zeros(len(firsts) + 1, hidden.shape[-1], dtype=torch.float32)
        sums.index_add_(0, documents.flatten().long(), hidden.float())  # padding goes to the last row
        return (sums[:-1] / lengths.unsqueeze(1)).to(hidden.dtype)


def build_classifier(config: ClassifyConfig, facts: dict[str, Any], initialize: bool) -> nn.Module:
    """Build the model that the facts describe; its first weights come from where the document says."""
    section, size, labels = config.model, facts["vocabulary_size"], facts["labels"]
    objective = Objective(config.data.multi_label, config.objective.label_smoothing, facts.get("class_weights"))
    if section.backbone == "attention":
        backbone: nn.Module = AttentionBackbone(section, size, config.data.sequence_length)
        return Classifier(backbone, len(labels), section.dropout, objective)
    if section.backbone == "rnn":
        return Classifier(RecurrentBackbone(section, size), len(labels), 0.0, objective)
    source = Path(section.initialize_from).expanduser() if section.initialize_from and initialize else None
    if facts.get("hugging_face"):
        other = build_other(facts["hugging_face"], source, labels, config.data.multi_label, section.keep_head)
        return OtherClassifier(other, objective)
    shape = EncoderSection.model_validate(facts["encoder"])
    backbone = EncoderBackbone(shape, size, section.pooling)
    model = Classifier(backbone, len(labels), section.head_dropout, objective)
    start_encoder(backbone.encoder, backbone.pooler, section, size, initialize)
    start_head(model.head, section, "classifier", initialize, labels)
    return model


class ForeignBackbone(nn.Module):
    """A session that gives the logits of windows."""

    def __init__(self, encoder: ForeignEncoder, num_labels: int) -> None:
        super().__init__()
        self.feature_size, self.encoder = num_labels, encoder

    def forward(
        self, tokens: torch.Tensor, documents: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits [W, C] of windows that lie in tokens [R, T]."""
        return self.encoder(tokens, documents=documents).flatten(0, 1)[firsts]


def foreign_classifier(config: ClassifyConfig, facts: dict[str, Any], session: Session) -> Classifier:
    """Build a classifier whose logits a session gives."""
    objective = Objective(config.data.multi_label, config.objective.label_smoothing, facts.get("class_weights"))
    other = facts.get("hugging_face") or {}
    encoder = ForeignEncoder(session, "logits", has_segments=not other, padding=other.get("pad_token_id") or 0)
    model = Classifier(ForeignBackbone(encoder, len(facts["labels"])), len(facts["labels"]), 0.0, objective)
    model.head = nn.Identity()  # type: ignore[assignment]
    return model


def _whole_rows(
    tokens: torch.Tensor,
    documents: torch.Tensor | None,
    firsts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    examples: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the layout given, or that of rows which are a text each."""
    if documents is not None and firsts is not None and lengths is not None and examples is not None:
        return documents, firsts, lengths, examples
    rows = torch.arange(len(tokens), device=tokens.device)
    width = tokens.shape[1]
    return rows.unsqueeze(1).expand_as(tokens), rows * width, torch.full_like(rows, width), rows


def _mean_over_windows(logits: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
    """Average the logits [W, C] of each text's windows: [N, C]."""
    num_texts = int(examples.max()) + 1
    if num_texts == len(examples):
        return logits
    counts = torch.bincount(examples, minlength=num_texts).unsqueeze(1)
    sums = logits.new_zeros(num_texts, logits.shape[1], dtype=torch.float32).index_add_(0, examples, logits.float())
    return (sums / counts).to(logits.dtype)
