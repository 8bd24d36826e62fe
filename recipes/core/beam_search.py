"""The likeliest text of a native decoder or encoder-decoder, looked for with beams.

Shapes: P prompts, K beams, V vocabulary, C = 2 K candidates or more, L tokens so far.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Model, Tokens, next_logits, read_prompts

NONE = -1e9
"""A score that no text has."""


class Search(NamedTuple):
    """How far and how wide to look."""

    num_beams: int = 4
    """1 is greedy."""
    max_new_tokens: int = 100
    length_penalty: float = 1.0
    """A text's score is its log-probability over its number of tokens to this power: more favours longer texts."""
    stop_tokens: tuple[int, ...] = ()
    """End of text."""
    early_stopping: bool = False
    """Stop with the first K texts that end; else when no beam is better than the worst of these."""
    min_new_tokens: int = 0
    no_repeat_tokens: int = 0
    """No run of so many tokens stands twice in a text; 0 lets it."""
    forbidden_tokens: tuple[int, ...] = ()


class Found(NamedTuple):
    """A text without the token that ends it, and its score."""

    tokens: list[int]
    score: float


class _Beams(NamedTuple):
    """Texts that go on, the best first, and those that have ended."""

    running: torch.Tensor  # [P, K, L]
    running_scores: torch.Tensor  # [P, K], log-probabilities
    ended: list[list[tuple[float, list[int]]]]  # of each prompt at most K, the best first
    is_open: torch.Tensor  # [P], whether a better text may come


def beam_search(
    model: Model, prompts: Tokens, search: Search, sources: Tokens | None = None, num_texts: int = 1
) -> list[list[Found]]:
    """Return the best `num_texts` texts of each prompt, at most `num_beams`, the best first.

    Those of a Seq2Seq begin its targets, and `sources` are beside them. As transformers' generate searches, texts that
    a limit ends among the others. Collective under ZeRO-3: every rank must call it with the same arguments.
    """
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        ended = _search(model, prompts, search, sources)
    finally:
        model.train(was_training)
    stops = set(search.stop_tokens)
    return [
        [Found(tokens[:-1] if tokens[-1] in stops else tokens, score) for score, tokens in found[:num_texts]]
        for found in ended
    ]


@torch.no_grad()
def _search(
    model: Model, prompts: Tokens, search: Search, sources: Tokens | None
) -> list[list[tuple[float, list[int]]]]:
    width, found = search.num_beams, [[] for _ in prompts]
    limit = min(search.max_new_tokens, model.section.max_positions - max(map(len, prompts)))
    if limit < 1 or not all(map(len, prompts)):
        lengths = f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens"
        raise UserError("prompt", f"found {lengths}; right is one or more, and less than {model.section.max_positions}")
    logits, cache = read_prompts(model, prompts, limit, width, sources)
    scores = torch.full((len(prompts), width), NONE, device=logits.device)
    scores[:, 0] = 0  # all beams begin as one
    running = torch.zeros(len(prompts), width, 0, dtype=torch.long, device=logits.device)
    beams = _Beams(running, scores, found, scores[:, 0] == 0)
    for length in range(1, limit + 1):
        chances = logits.float().log_softmax(-1).unflatten(0, (-1, width))
        _forbid(chances, beams.running, prompts, search)
        beams, origins = _step(beams, chances, length, length == limit, search)
        is_open = beams.is_open.nonzero().flatten()  # the others take no more time
        if length == limit or not len(is_open):
            break
        cache.select((origins[is_open] + is_open.unsqueeze(1) * width).flatten())
        numbers = is_open.tolist()
        prompts, ended = [prompts[number] for number in numbers], [beams.ended[number] for number in numbers]
        beams = _Beams(beams.running[is_open], beams.running_scores[is_open], ended, beams.is_open[is_open])
        logits = next_logits(model, beams.running[..., -1].reshape(-1, 1), cache)
    return found


def _step(
    beams: _Beams, chances: torch.Tensor, length: int, is_last: bool, search: Search
) -> tuple[_Beams, torch.Tensor]:
    """Add a token to every beam; return also the beam [P, K] that each goes on from."""
    _, width, size = chances.shape
    total = (chances + beams.running_scores.unsqueeze(-1)).flatten(1)  # [P, K V]
    # As many that end as can be, and K that go on.
    candidates = min(max(2, 1 + len(search.stop_tokens)) * width, total.shape[1])
    scores, places = total.topk(candidates)  # [P, C]
    origins, tokens = places // size, places % size
    ends = torch.isin(tokens, torch.tensor(search.stop_tokens, device=tokens.device)) | is_last
    texts = torch.cat((_gather(beams.running, origins), tokens.unsqueeze(-1)), -1)  # [P, C, L + 1]
    _keep_ended(beams, texts, scores, ends, length, search)
    running_scores, order = scores.masked_fill(ends, 2 * NONE).topk(width)
    is_open = beams.is_open & _may_be_better(beams.ended, running_scores[:, 0], length, search)
    return _Beams(_gather(texts, order), running_scores, beams.ended, is_open), origins.gather(1, order)


def _keep_ended(
    beams: _Beams, texts: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor, length: int, search: Search
) -> None:
    """Put the texts that end, of the best K candidates, among the ended ones of their prompt."""
    width = search.num_beams
    for prompt, place in (ends[:, :width] & beams.is_open.unsqueeze(1)).nonzero().tolist():
        score = scores[prompt, place].item() / length**search.length_penalty
        beams.ended[prompt].append((score, texts[prompt, place].tolist()))
    for found in beams.ended:
        found.sort(key=lambda one: -one[0])  # stable: of equals the earlier is kept
        del found[width:]


def _may_be_better(
    ended: list[list[tuple[float, list[int]]]], best: torch.Tensor, length: int, search: Search
) -> torch.Tensor:
    """Tell of which prompts [P] the best beam scores above the worst of K ended texts, or these are not yet K."""
    enough = -torch.inf if not search.early_stopping else torch.inf
    worst = [max(found[-1][0], enough) if len(found) == search.num_beams else NONE for found in ended]
    return best / length**search.length_penalty > torch.tensor(worst, device=best.device)


def _forbid(chances: torch.Tensor, running: torch.Tensor, prompts: Tokens, search: Search) -> None:
    """Take away the chance of tokens [P, K, V] that the settings do not let stand next."""
    if search.forbidden_tokens:
        chances[..., list(search.forbidden_tokens)] = -torch.inf
    if running.shape[-1] < search.min_new_tokens:
        chances[..., list(search.stop_tokens)] = -torch.inf
    if size := search.no_repeat_tokens:
        for prompt, texts in enumerate(running.tolist()):
            for beam, text in enumerate(texts):
                if banned := _repeating([*prompts[prompt], *text], size):
                    chances[prompt, beam, banned] = -torch.inf


def _repeating(text: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would end a run of `size` tokens that stands in a text already."""
    if len(text) + 1 < size:
        return []
    last = tuple(text[len(text) - size + 1 :])
    return [text[at + size - 1] for at in range(len(text) - size + 1) if tuple(text[at : at + size - 1]) == last]


def _gather(texts: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """Return texts [P, C, L] of beams [P, C] out of [P, K, L]."""
    return texts.gather(1, beams.unsqueeze(-1).expand(-1, -1, texts.shape[-1]))
