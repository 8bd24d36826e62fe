"""What a run will be, computed from its document alone: parameters and bytes of a checkpoint. No torch."""

import json
import os
from pathlib import Path
from typing import Any

from bigbatch.recipes.core.config import OptimizerSection, TokenizerSection
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection, padded_vocabulary

ASSUMED_CHARACTERS = 256  # how many different ones a text has is not known before it is read

_MOMENTS = {"adamw": 2, "adam": 2, "lamb": 2, "adamw_8bit": 2, "lion": 1, "adagrad": 1}


def count_parameters(model: DecoderSection | EncoderSection, vocabulary_size: int) -> int:
    """Count the model's parameters, tied embeddings once."""
    hidden, feed_forward = model.hidden_size, model.inner_size
    rows = padded_vocabulary(vocabulary_size, model)
    if isinstance(model, EncoderSection):
        positions = model.max_positions if model.positions == "absolute" else 0
        layer = 4 * hidden * hidden + 2 * hidden * feed_forward + 9 * hidden + feed_forward
        head = hidden * hidden + 3 * hidden + rows
        return (rows + positions + model.num_segments + 2) * hidden + model.num_layers * layer + head
    embedding = rows * hidden
    outer = embedding if model.tie_embeddings else 2 * embedding
    if model.family == "gpt2":  # biases everywhere, two parameters a normalized feature, learned positions
        layer = 4 * hidden * hidden + 2 * hidden * feed_forward + 9 * hidden + feed_forward
        return outer + model.max_positions * hidden + model.num_layers * layer + 2 * hidden
    key_value = model.head_size * model.key_value_heads
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * feed_forward + 2 * hidden
    return outer + model.num_layers * layer + hidden


def checkpoint_bytes(parameters: int, optimizer: OptimizerSection) -> int:
    """Return the size of a checkpoint: float32 masters and the optimizer's float32 moments."""
    moments = int(optimizer.momentum > 0) if optimizer.name == "sgd" else _MOMENTS[optimizer.name]
    return 4 * (1 + moments) * parameters


def vocabulary_size(tokenizer: TokenizerSection) -> int:
    """Return the tokenizer's size, exact for one that exists; raise UserError for a file that is none."""
    if tokenizer.kind == "character":
        return ASSUMED_CHARACTERS
    if tokenizer.kind in ("bpe", "wordpiece"):
        return tokenizer.vocabulary_size or 0
    path = locate(tokenizer.path or "")
    return _size_of_file(path / "tokenizer.json" if path.is_dir() else path)


def locate(path: str) -> Path:
    """Return the path as it is, or under $BIGBATCH_DATA where only that exists."""
    here = Path(path).expanduser()
    below = Path(os.environ.get("BIGBATCH_DATA", ".")) / here
    return below if not here.exists() and below.exists() else here


def _size_of_file(path: Path) -> int:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]  # the id of each token, or a list of [token, score]
        last = max(vocabulary.values()) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        return 1 + max([last, *(token["id"] for token in document.get("added_tokens", []))])
    except OSError:
        raise UserError("data.tokenizer.path", f"there is no {path}; give a tokenizer.json") from None
    except (ValueError, KeyError, TypeError):
        raise UserError("data.tokenizer.path", f"{path} is no tokenizer.json of Hugging Face's tokenizers") from None
