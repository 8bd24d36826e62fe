"""Models of any format behind the modules that recipes know, so that their figures and answers are the same.

A session runs a model, wherever it may be, and is called as transformers calls its own. What stands in for a native
module here takes rows of several windows apart, each into a padded row of its own with an attention mask, which all
formats know, and puts the answers back where the tokens were.

Shapes: R rows of T tokens hold W windows, the longest of L; B rows, S tokens so far, V vocabulary, C labels.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.layers import gather_windows


class Session(Protocol):
    """A model in any format, called with inputs and giving outputs of transformers' names.

    Inputs are input_ids [B, L], attention_mask [B, L] (1 for a token, padding behind the tokens), token_type_ids
    [B, L], all int64; decoder_input_ids of an encoder-decoder; pixel_values [B, C, S, S] float32; of speech samples
    [B, S] int16 and lengths [B]. Outputs are logits, start_logits and end_logits, or last_hidden_state, as long as the
    inputs are and on their device; of speech log_probabilities [B, T, K] and frames [B]. An input that the model does
    not take is ignored; token_type_ids that it needs and does not get are 0.
    """

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model on a batch."""
        ...


class SessionCache(Protocol):
    """What a decoder remembers of the rows that it is writing."""

    def select(self, rows: torch.Tensor) -> None:
        """Let each row go on as another one [B] has begun; there may be fewer, or more."""
        ...


class DecoderSession(Session, Protocol):
    """A session whose model writes. One whose engine writes by itself has `stream_tokens` for the other two."""

    def open_cache(self, **inputs: torch.Tensor) -> SessionCache:
        """Return an empty cache; an encoder-decoder encodes the sources, input_ids and attention_mask, first."""
        ...

    def decode(self, cache: SessionCache, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, 1, V] behind the last of the next tokens, and remember these.

        A decoder gets input_ids [B, T], attention_mask [B, S + T] (0 for padding, ahead of the tokens here) and
        position_ids [B, T]; it may be asked for more tokens than it has positions, the last of which then stands
        several times. An encoder-decoder gets decoder_input_ids [B, T].
        """
        ...


class Foreign(nn.Module):
    """A module around a session; its one parameter is empty, and tells on which device its tensors are."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)


def session_of(model: nn.Module) -> Any:
    """Return the session that runs a model, wherever in it that stands; None where it is native."""
    return next((module.session for module in model.modules() if isinstance(module, Foreign)), None)


class ForeignEncoder(Foreign):
    """Stands in for an Encoder together with the head behind it: gives a session's outputs instead of hidden states.

    Outputs of windows, not of tokens, stand at their first tokens; several are put side by side.
    """

    def __init__(self, session: Session, *outputs: str, has_segments: bool = True, padding: int = 0) -> None:
        super().__init__(session)
        self.outputs, self.has_segments, self.padding = outputs, has_segments, padding

    def forward(
        self,
        tokens: torch.Tensor,  # [R, T]
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,  # [R, T]
        segments: torch.Tensor | None = None,  # [R, T]
    ) -> torch.Tensor:
        """Return the outputs [R, T, C], 0 where nothing lies; `positions` are those that the documents give."""
        firsts, lengths = _windows(tokens, documents)
        inputs, is_token = _inputs(tokens, firsts, lengths, self.padding)
        if self.has_segments:
            segments = torch.zeros_like(tokens) if segments is None else segments
            inputs["token_type_ids"] = gather_windows(segments.long(), firsts, lengths)[0] * is_token
        found = self.session(**inputs)
        rows = [found[name] for name in self.outputs]
        result = rows[0] if len(rows) == 1 else torch.stack(rows, -1)
        if result.dim() == 3:
            return _packed(result, tokens, firsts, is_token)
        return _packed(result.unsqueeze(1), tokens, firsts, is_token[:, :1])


class ForeignVision(Foreign):
    """Stands in for a VisionTransformer."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, C] of images' pixels [B, 3 or 1, S, S]."""
        return self.session(pixel_values=pixels.float())["logits"]


class ForeignSpeech(Foreign):
    """Stands in for a SpeechModel."""

    def forward(self, samples: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities [B, T, K] of samples int16 [B, S], and how many frames of them [B] count."""
        found = self.session(samples=samples, lengths=lengths)
        return found["log_probabilities"], found["frames"]


class ForeignDecoder(Foreign):
    """Stands in for a Decoder of a section."""

    def __init__(self, session: Session, section: Any) -> None:
        super().__init__(session)
        self.section = section

    def forward(
        self,
        tokens: torch.Tensor,  # [B, T]
        labels: torch.Tensor | None = None,  # [B, T]
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,  # [B, T]
        cache: "ForeignCache | None" = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Return what a Decoder does; `positions` are those that the documents give."""
        if cache is not None:
            return cache.decode(tokens)
        firsts, lengths = _runs(tokens, documents)
        inputs, is_token = _inputs(tokens, firsts, lengths)
        logits = self.session(**inputs)["logits"]
        if labels is None:
            packed = _packed(logits, tokens, firsts, is_token)
            return packed[:, -1:] if last_only else packed
        return _loss(logits, labels, firsts, lengths)

    def open_cache(self, padding: torch.Tensor) -> "ForeignCache":
        """Return an empty cache of rows aligned at their ends, `padding` [B] tokens ahead of each."""
        return ForeignCache(self, self.session.open_cache(), padding)


class ForeignSeq2Seq(Foreign):
    """Stands in for a Seq2Seq of a section."""

    def __init__(self, session: Session, section: Any) -> None:
        super().__init__(session)
        self.section = section

    def forward(
        self,
        tokens: torch.Tensor,  # [R, T]
        written: torch.Tensor,  # [R, T']
        labels: torch.Tensor | None = None,  # [R, T']
        documents: torch.Tensor | None = None,  # [R, T]
        target_documents: torch.Tensor | None = None,  # [R, T']
    ) -> torch.Tensor:
        """Return what a Seq2Seq does."""
        firsts, lengths = _runs(tokens, documents)
        inputs, _ = _inputs(tokens, firsts, lengths)
        firsts, lengths = _runs(written, target_documents)
        targets, is_token = _inputs(written, firsts, lengths)
        logits = self.session(**inputs, decoder_input_ids=targets["input_ids"])["logits"]
        if labels is not None:
            return _loss(logits, labels, firsts, lengths)
        return _packed(logits, written, firsts, is_token)

    def open_cache(
        self, sources: Sequence[Sequence[int]], max_length: int, padding: torch.Tensor | None = None
    ) -> "ForeignCache":
        """Encode sources of any lengths and return the cache that `decode` begins with."""
        lengths = torch.tensor([len(source) for source in sources], device=self.anchor.device)
        flat = torch.tensor([token for source in sources for token in source], device=self.anchor.device)
        inputs, _ = _inputs(flat.unsqueeze(0), lengths.cumsum(0) - lengths, lengths)
        padding = torch.zeros_like(lengths) if padding is None else padding
        return ForeignCache(self, self.session.open_cache(**inputs), padding, reads_source=True)

    def decode(self, tokens: torch.Tensor, cache: "ForeignCache") -> torch.Tensor:
        """Return the logits [B, 1, V] behind the last of the next tokens [B, T] of targets, and remember them."""
        return cache.decode(tokens)


class ForeignCache:
    """A session's cache, and where the rows in it begin."""

    def __init__(self, model: Any, cache: SessionCache, padding: torch.Tensor, reads_source: bool = False) -> None:
        self.session, self.cache, self.padding, self.reads_source = model.session, cache, padding, reads_source
        self.last_position, self.length = model.section.max_positions - 1, 0

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, 1, V] behind the last of the next tokens [B, T]."""
        if self.reads_source:
            return self.session.decode(self.cache, decoder_input_ids=tokens)
        self.length += tokens.shape[1]
        columns = torch.arange(self.length, device=tokens.device) - self.padding.unsqueeze(1)  # [B, S + T]
        positions = columns[:, -tokens.shape[1] :].clamp(0, self.last_position)
        mask = (columns >= 0).long()
        return self.session.decode(self.cache, input_ids=tokens, attention_mask=mask, position_ids=positions)

    def repeat(self, num_samples: int) -> None:
        """Continue each row in several ways."""
        rows = torch.arange(len(self.padding), device=self.padding.device)
        self.select(rows.repeat_interleave(num_samples))

    def select(self, rows: torch.Tensor) -> None:
        """Let each row go on as another one [B] has begun."""
        self.cache.select(rows)
        self.padding = self.padding[rows]


def _inputs(
    tokens: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor, padding: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Give each window a row: input_ids and attention_mask [W, L], and what is a token there."""
    found, is_token = gather_windows(tokens, firsts, lengths)
    return {"input_ids": found.masked_fill(~is_token, padding), "attention_mask": is_token.long()}, is_token


def _packed(found: torch.Tensor, tokens: torch.Tensor, firsts: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Put outputs [W, L, C] of windows back where they lie in rows of tokens [R, T]: [R, T, C], 0 elsewhere."""
    places = firsts.unsqueeze(1) + torch.arange(is_token.shape[1], device=firsts.device)
    packed = found.new_zeros(tokens.numel(), found.shape[-1])
    packed[places[is_token]] = found[is_token]
    return packed.view(*tokens.shape, -1)


def _loss(logits: torch.Tensor, labels: torch.Tensor, firsts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy summed over labels [R, T] of logits [W, L, V]."""
    wanted, is_token = gather_windows(labels, firsts, lengths)
    wanted = wanted.masked_fill(~is_token, IGNORED_LABEL)
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def _windows(tokens: torch.Tensor, documents: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the windows of rows begin in the flattened tokens and how long they are, [W] each.

    Without documents each row is one. The highest number is that of places where nothing lies (packing.lay_out), if it
    stands in several places, or over zeros alone.
    """
    firsts, lengths = _runs(tokens, documents)
    if documents is None:
        return firsts, lengths
    numbers = documents.flatten()[firsts]
    is_last = numbers == numbers.max()
    if int(is_last.sum()) > 1 or not tokens[documents == numbers.max()].any():
        firsts, lengths = firsts[~is_last], lengths[~is_last]
    return firsts, lengths


def _runs(tokens: torch.Tensor, documents: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where runs of one number begin in the flattened rows [R, T], and their lengths; without numbers, of rows.

    A run of a negative number is none.
    """
    is_first = torch.zeros_like(tokens, dtype=torch.bool)
    is_first[:, 0] = True
    if documents is not None:
        is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    firsts = is_first.flatten().nonzero().flatten()
    lengths = torch.diff(firsts, append=firsts.new_tensor([tokens.numel()]))
    if documents is None:
        return firsts, lengths
    is_window = documents.flatten()[firsts] >= 0
    return firsts[is_window], lengths[is_window]
