"""GGUF files run by llama.cpp, in this process, through the C functions that the xllamacpp wheel exports.

The wheel's own classes give no logits. Of C's structures only the first members are named here: they are handed over
in blocks larger than they are, last among the arguments, where what is behind them is not looked at. What the named
members are by default is compared when the library is opened; a wheel that lays them out otherwise is refused.

Shapes: B rows, T tokens, V vocabulary, R rows that generate.
"""

import contextlib
import ctypes
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling, choose
from bigbatch.recipes.core.models.hugging_face import read_json

MOST_ROWS = 64
"""Sequences of one context; llama.cpp has room for 256, and memory for each is set aside at once."""
THREAD_BYTES = 2**27
"""Weights that pay for one more thread, for threads wait for each other many times a token, busily."""
CELLS = 256  # a sequence's memory is a multiple of it
DEFAULTS = (512, 2048, 512, 1)
ERROR = 4  # ggml_log_level
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class ModelParameters(ctypes.Structure):
    """llama_model_params, none of it named."""

    _fields_ = [("rest", ctypes.c_uint64 * 128)]


class ContextParameters(ctypes.Structure):
    """llama_context_params, its sizes named."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")] + [
        ("rest", ctypes.c_uint64 * 126)
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("n_tokens", ctypes.c_int32)] + [
        (name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")
    ]


class Library(NamedTuple):
    """llama.cpp, what it last said was wrong, and the function by which it says so, which must live as long."""

    functions: Any
    errors: list[str]
    log: Any


@cache
def open_library() -> Library:
    """Open llama.cpp; raise UserError where the wheel is missing or another one than this is written for."""
    try:
        from xllamacpp import xllamacpp  # pyright: ignore[reportAttributeAccessIssue] - compiled
    except ImportError:
        raise UserError("llama.cpp", "is not installed; right is: pip install 'bigbatch[deploy]'") from None
    functions, errors = ctypes.CDLL(xllamacpp.__file__), []
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "u": ctypes.c_size_t, "-": None}
    kinds |= {"s": ctypes.c_char_p, "b": ctypes.c_bool, "M": ModelParameters, "C": ContextParameters, "B": Batch}
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = kinds[result], [kinds[kind] for kind in arguments]
    found = functions.llama_context_default_params()
    if (found.n_ctx, found.n_batch, found.n_ubatch, found.n_seq_max) != DEFAULTS:
        raise UserError("llama.cpp", "is another one than this is written for; right is the extra deploy's")
    log = LOG(lambda level, text, _: errors.append(text.decode(errors="replace").strip()) if level == ERROR else None)
    functions.llama_log_set(log, None)
    functions.llama_backend_init()
    return Library(functions, errors, log)


_SIGNATURES = {
    "llama_backend_init": ("-", ""),
    "llama_log_set": ("-", "pp"),
    "llama_model_default_params": ("M", ""),
    "llama_context_default_params": ("C", ""),
    "llama_model_load_from_file": ("p", "sM"),
    "llama_model_free": ("-", "p"),
    "llama_model_get_vocab": ("p", "p"),
    "llama_model_n_ctx_train": ("i", "p"),
    "llama_vocab_n_tokens": ("i", "p"),
    "llama_init_from_model": ("p", "pC"),
    "llama_free": ("-", "p"),
    "llama_set_n_threads": ("-", "pii"),
    "llama_get_memory": ("p", "p"),
    "llama_memory_seq_cp": ("-", "piiii"),
    "llama_decode": ("i", "pB"),
    "llama_get_logits": ("p", "p"),
    "llama_tokenize": ("i", "psipibb"),
    "ggml_quantize_chunk": ("u", "ipplllp"),
}


def open_session(folder: Path, threads: int | None = None) -> "LlamaSession":
    """Open the GGUF file that a model folder's deployment.json names."""
    return LlamaSession(folder / Path(read_json(folder / "deployment.json").get("file", "model.gguf")).name, threads)


class LlamaSession:
    """A decoder in a GGUF file; calls of several threads wait for each other."""

    def __init__(self, file: Path, threads: int | None = None) -> None:
        """Load the file; raise UserError for one that llama.cpp cannot."""
        self.library = open_library()
        self.lock = threading.Lock()
        functions = self.library.functions
        self.library.errors.clear()
        self.model = functions.llama_model_load_from_file(os.fsencode(file), functions.llama_model_default_params())
        if not self.model:
            raise UserError(str(file), f"is no model that llama.cpp can load: {'; '.join(self.library.errors)}")
        most = len(os.sched_getaffinity(0))
        self.threads = threads or min(most, 1 + file.stat().st_size // THREAD_BYTES)
        self.vocabulary = functions.llama_model_get_vocab(self.model)
        self.vocabulary_size = functions.llama_vocab_n_tokens(self.vocabulary)
        self.max_positions = functions.llama_model_n_ctx_train(self.model)

    def close(self) -> None:
        """Give the model's memory back."""
        if self.model:
            self.library.functions.llama_model_free(self.model)
            self.model = None

    __del__ = close

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits [B, T, V] of `input_ids` [B, T], zeros where `attention_mask` has none."""
        tokens = inputs["input_ids"].cpu().numpy()
        mask = inputs["attention_mask"].cpu().numpy().astype(bool) if "attention_mask" in inputs else tokens >= 0
        logits = np.zeros((*tokens.shape, self.vocabulary_size), np.float32)
        for start in range(0, len(tokens), MOST_ROWS):
            rows = slice(start, start + MOST_ROWS)
            texts = [row[kept] for row, kept in zip(tokens[rows], mask[rows], strict=True)]
            with self.lock, self._context(len(texts), tokens.shape[1]) as context:
                pieces = [Piece(row, 0, text) for row, text in enumerate(texts)]
                logits[rows][mask[rows]] = self._decode(context, pieces)
        return {"logits": torch.from_numpy(logits)}

    def stream_tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int | None]]:
        """Yield the tokens that `recipes.core.generate.stream` would, with llama.cpp's logits."""
        samples = sampling.num_samples
        most = max(1, MOST_ROWS // samples)
        groups = [self._stream(prompts[start : start + most], sampling) for start in range(0, len(prompts), most)]
        sizes = [len(prompts[start : start + most]) * samples for start in range(0, len(prompts), most)]
        for steps in itertools.zip_longest(*groups):
            yield [token for step, size in zip(steps, sizes, strict=True) for token in (step or [None] * size)]

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens as llama.cpp finds them, special ones not looked for."""
        encoded = text.encode()
        found = np.empty(len(encoded) + 8, np.int32)
        count = self.library.functions.llama_tokenize(
            self.vocabulary, encoded, len(encoded), found.ctypes.data, len(found), False, False
        )
        return found[:count].tolist()

    def _stream(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int | None]]:
        """Yield the tokens of some prompts, which share one context."""
        samples = sampling.num_samples
        lengths = np.repeat([len(prompt) for prompt in prompts], samples)  # [R]
        limits = np.minimum(sampling.max_new_tokens, self.max_positions - lengths)
        generators = [np.random.default_rng((sampling.seed, sample)) for sample in range(samples)]
        running, ends = np.arange(len(lengths)), frozenset(sampling.stop_tokens)
        with self._context(len(lengths), int((lengths + limits).max())) as context:
            pieces = [Piece(row * samples, 0, prompt) for row, prompt in enumerate(prompts)]
            with self.lock:
                logits = self._decode(context, pieces, last_only=True).repeat(samples, axis=0)
                self._copy_prompts(context, len(prompts), samples)
            for step in range(int(limits.max())):
                uniforms = np.array([generator.random() for generator in generators])[running % samples]
                chosen = choose(torch.from_numpy(logits), sampling, uniforms).numpy()
                goes_on = (step < limits[running]) & [token not in ends for token in chosen.tolist()]
                running, chosen = running[goes_on], chosen[goes_on]
                if not len(running):
                    return
                tokens: list[int | None] = [None] * len(lengths)
                for row, token in zip(running, chosen.tolist(), strict=True):
                    tokens[row] = token
                yield tokens
                if step + 1 < limits[running].max():
                    with self.lock:
                        logits = self._run(context, chosen, lengths[running] + step, running)

    def _copy_prompts(self, context: Any, num_prompts: int, samples: int) -> None:
        functions = self.library.functions
        memory = functions.llama_get_memory(context)
        for first in range(0, num_prompts * samples, samples):
            for row in range(first + 1, first + samples):
                functions.llama_memory_seq_cp(memory, first, row, -1, -1)

    @contextlib.contextmanager
    def _context(self, num_rows: int, length: int) -> Iterator[Any]:
        """Set memory aside for rows of up to `length` tokens."""
        if length > self.max_positions:  # llama.cpp would end the process at a GPT-2's
            raise UserError("input_ids", f"found {length} tokens; the model has {self.max_positions} positions")
        functions = self.library.functions
        parameters = functions.llama_context_default_params()
        cells = -(-length // CELLS) * CELLS
        parameters.n_ctx = parameters.n_batch = num_rows * cells
        parameters.n_seq_max = num_rows
        self.library.errors.clear()
        context = functions.llama_init_from_model(self.model, parameters)
        if not context:
            why = "; ".join(self.library.errors)
            raise UserError("llama.cpp", f"has no room for {num_rows} rows of {length} tokens: {why}")
        try:
            functions.llama_set_n_threads(context, self.threads, self.threads)
            yield context
        finally:
            functions.llama_free(context)

    def _decode(self, context: Any, pieces: "list[Piece]", last_only: bool = False) -> np.ndarray:
        """Return the logits [N, V] behind all tokens of the pieces, or the last of each."""
        lengths = [len(piece.tokens) for piece in pieces]
        tokens = np.concatenate([np.asarray(piece.tokens, np.int32) for piece in pieces])
        if tokens.min() < 0 or tokens.max() >= self.vocabulary_size:
            raise UserError("input_ids", f"found {tokens.max()}; the vocabulary has {self.vocabulary_size} tokens")
        positions = np.concatenate([piece.start + np.arange(len(piece.tokens)) for piece in pieces])
        rows = np.repeat([piece.row for piece in pieces], lengths)
        wanted = np.ones(len(rows), np.int8)
        if last_only:
            wanted[:] = 0
            wanted[np.cumsum(lengths) - 1] = 1
        return self._run(context, tokens, positions, rows, wanted)

    def _run(
        self,
        context: Any,
        tokens: np.ndarray,  # [N]
        positions: np.ndarray,  # [N]
        rows: np.ndarray,  # [N]
        wanted: np.ndarray | None = None,  # [N] int8, which have logits; None: all
    ) -> np.ndarray:
        """Return the logits [number wanted, V] behind tokens at positions of rows."""
        tokens, positions, rows = (np.ascontiguousarray(array, np.int32) for array in (tokens, positions, rows))
        wanted = np.ones(len(rows), np.int8) if wanted is None else wanted
        ones, pointers = np.ones_like(rows), rows.ctypes.data + rows.itemsize * np.arange(len(rows), dtype=np.uint64)
        arrays = (tokens, None, positions, ones, pointers, wanted)
        addresses = [None if array is None else array.ctypes.data for array in arrays]
        functions = self.library.functions
        if status := functions.llama_decode(context, Batch(len(tokens), *addresses)):
            raise RuntimeError(f"llama_decode gave {status}: {'; '.join(self.library.errors)}")
        shape = (int(wanted.sum()), self.vocabulary_size)
        address = ctypes.cast(functions.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, shape).copy()


class Piece(NamedTuple):
    """Tokens of a row, the first at position `start`."""

    row: int
    start: int
    tokens: Any
