"""Text from a native decoder, or an encoder-decoder and its sources, token by token with a cache of keys and values.

And the opening of a model to do so. beam_search.py looks for the likeliest text instead of choosing token by token.

Shapes: R rows (prompts times samples), V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from bigbatch.recipes.core.checkpoint import MANIFEST, fill, open_checkpoint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import ForeignDecoder, ForeignSeq2Seq
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder, KeyValueCache, load_hugging_face, section_from_hugging_face
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.recipes.core.models.seq2seq import Seq2Seq

Model = Decoder | Seq2Seq | ForeignDecoder | ForeignSeq2Seq
Cache = Any
"""KeyValueCache, Seq2SeqCache or ForeignCache, as the model is."""
Tokens = Sequence[Sequence[int]]


class Sampling(NamedTuple):
    """How the next token is chosen and when to stop."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    """0 is greedy; the three below then have no effect."""
    top_k: int = 50
    """Choose among the likeliest this many; 0 is all."""
    top_p: float = 1.0
    """Choose among the likeliest that together have this probability."""
    seed: int = 0
    num_samples: int = 1
    """Continuations of each prompt."""
    stop_tokens: tuple[int, ...] = ()
    """End of text."""


class Completion(NamedTuple):
    """What follows a prompt, the end-of-text token left out, and why it ends."""

    tokens: list[int]
    stopped: Literal["end", "length", "context"]
    """`end`: the model ended the text; `length`: max_new_tokens; `context`: the model's positions are used up."""


def generate(
    model: Model, prompts: Tokens, sampling: Sampling, sources: Tokens | None = None
) -> list[list[Completion]]:
    """Return the continuations of each prompt; those of a Seq2Seq begin its targets, and `sources` are beside them.

    A prompt's continuations do not depend on the others of the call. Sample s of every prompt draws from a stream of
    random numbers that (seed, s) alone determine. Collective under ZeRO-3: every rank must call it.
    """
    rows: list[list[int]] = [[] for _ in range(len(prompts) * sampling.num_samples)]
    for step in stream(model, prompts, sampling, sources):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    count = sampling.num_samples
    return [
        [
            Completion(row, why_stopped(model, prompt, row, sampling))
            for row in rows[index * count : (index + 1) * count]
        ]
        for index, prompt in enumerate(prompts)
    ]


def stream(
    model: Model, prompts: Tokens, sampling: Sampling, sources: Tokens | None = None
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each row, None where a row has ended; samples of a prompt are adjacent."""
    if not prompts:
        return
    limits = [_limit(model, prompt, sampling.max_new_tokens) for prompt in prompts]
    write = getattr(getattr(model, "session", None), "stream_tokens", None)
    if write:
        yield from write(prompts, sampling)
        return
    limits = np.repeat(limits, sampling.num_samples)
    generators = [np.random.default_rng((sampling.seed, sample)) for sample in range(sampling.num_samples)]
    was_training = model.training
    model.eval()
    try:
        logits, cache = read_prompts(model, prompts, int(max(limits)), sampling.num_samples, sources)
        running = np.ones(len(limits), dtype=bool)
        for step in range(int(max(limits))):
            uniforms = np.tile([generator.random() for generator in generators], len(prompts))
            chosen = choose(logits, sampling, uniforms)
            tokens = chosen.tolist()
            running &= (step < limits) & ~np.isin(tokens, sampling.stop_tokens)
            if not running.any():
                return
            yield [token if runs else None for token, runs in zip(tokens, running, strict=True)]
            if step + 1 < max(limits[running]):
                logits = next_logits(model, chosen.unsqueeze(1), cache)
    finally:
        model.train(was_training)


def _limit(model: Model, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens may follow a prompt."""
    positions = model.section.max_positions
    if not prompt:
        raise UserError("prompt", "is empty; it needs one token at least")
    if len(prompt) >= positions:
        raise UserError("prompt", f"has {len(prompt)} tokens; the model has {positions} positions, one must be free")
    return min(max_new_tokens, positions - len(prompt))


def why_stopped(
    model: Model, prompt: Sequence[int], tokens: list[int], sampling: Sampling
) -> Literal["end", "length", "context"]:
    """Tell why a row of `stream` has ended."""
    if len(tokens) < _limit(model, prompt, sampling.max_new_tokens):
        return "end"
    return "length" if len(tokens) == sampling.max_new_tokens else "context"


@torch.no_grad()
def read_prompts(
    model: Model, prompts: Tokens, num_new_tokens: int, num_samples: int, sources: Tokens | None = None
) -> tuple[torch.Tensor, Cache]:
    """Return the logits [R, V] behind each prompt and the cache; prompts are aligned at their ends."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt)
    if isinstance(model, Seq2Seq | ForeignSeq2Seq):
        if sources is None or not all(map(len, sources)):
            raise UserError("source", "is missing or empty; it needs one token at least")
        cache = model.open_cache(sources, longest + num_new_tokens, padding)
    elif isinstance(model, ForeignDecoder):
        cache = model.open_cache(padding)
    else:
        cache = KeyValueCache(model, len(prompts), longest + num_new_tokens, padding)
    logits = next_logits(model, tokens.to(device), cache)
    cache.repeat(num_samples)
    return logits.repeat_interleave(num_samples, dim=0), cache


@torch.no_grad()  # not inference_mode: weights that ZeRO-3 gathers there could not take part in training any more
def next_logits(model: Model, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Return the logits [R, V] behind the last of tokens [R, T]."""
    if isinstance(model, Seq2Seq | ForeignSeq2Seq):
        return model.decode(tokens, cache)[:, -1]
    return model(tokens, cache=cache, last_only=True)[:, -1]


def choose(logits: torch.Tensor, sampling: Sampling, uniforms: np.ndarray) -> torch.Tensor:
    """Choose a token [R] for each row of logits [R, V]: the likeliest, or where the distribution passes `uniforms`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    tokens = None
    if 0 < sampling.top_k < logits.shape[1]:
        logits, tokens = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, tokens = logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        kept = probabilities.cumsum(-1) - probabilities < sampling.top_p
        kept[:, 0] = True  # the likeliest, even at top_p 0
        probabilities = probabilities * kept
    cumulative = probabilities.double().cumsum(-1)
    targets = torch.from_numpy(uniforms).to(cumulative.device).unsqueeze(1) * cumulative[:, -1:]
    chosen = (cumulative <= targets).sum(-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return (chosen if tokens is None else tokens.gather(1, chosen)).squeeze(1)


class Loaded(NamedTuple):
    """An opened model, float32 and in evaluation mode."""

    model: Decoder
    section: DecoderSection
    tokenizer: Path | None
    """The folder that holds tokenizer.json."""
    document: dict[str, Any]
    """The run document that the model was trained by, or the Hugging Face folder's config.json."""


def load_model(path: Path) -> Loaded:
    """Open a Hugging Face folder of a native family, a checkpoint, or a run's best one (else its newest)."""
    if (path / "config.json").exists():
        return _load_hugging_face(path)
    if (path / "run.json").exists() or (path / MANIFEST).exists():
        return _load_checkpoint(path)
    if not path.exists():
        raise UserError(str(path), "there is no such folder; give a run folder, a checkpoint or a Hugging Face folder")
    raise UserError(str(path), "has no run.json, no manifest.json and no config.json: no model that can be opened")


def _load_hugging_face(folder: Path) -> Loaded:
    config = read_json(folder / "config.json")
    section = section_from_hugging_face(config)
    model = Decoder(section, config["vocab_size"]).eval()
    load_hugging_face(model, folder)
    return Loaded(model, section, folder if (folder / "tokenizer.json").exists() else None, config)


def _load_checkpoint(path: Path) -> Loaded:
    reader = open_checkpoint(path)
    document, facts = reader.manifest["run"], reader.manifest["facts"]
    if "family" not in document.get("model", {}):
        raise UserError(str(path), f"is a model of the recipe {document['recipe']!r}, which generates no text")
    section = DecoderSection.model_validate(document["model"])
    model = Decoder(section, facts["vocabulary_size"]).eval()
    fill(reader, model)
    tokenizer = Path(facts["tokenizer"])
    return Loaded(model, section, tokenizer if (tokenizer / "tokenizer.json").exists() else None, document)
