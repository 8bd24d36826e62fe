"""What a run will be, computed from documents and the heads of files: parameters, bytes of a checkpoint. No torch."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.config import OptimizerSection, TokenizerSection
from bigbatch.recipes.core.data.sources import locate
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import (
    DecoderSection,
    EncoderSection,
    Seq2SeqSection,
    SpeechSection,
    VisionSection,
    padded_vocabulary,
)
from bigbatch.recipes.core.recipe import RECORD_FILE, own_recipe

ASSUMED_CHARACTERS, ASSUMED_WORDS = 256, 30_000  # how many different ones a text has is not known before it is read
ASSUMED_LABELS = 20  # each hashed feature has a weight for every one
LETTERS, DISTANCES = 512, 122  # of which words have a vector each (recipes/extract)

SEQ2SEQ_POSITION_OFFSET = 2  # of recipes/core/models/seq2seq.py, which needs torch

OUTER_BYTES = 8
"""A parameter's, of ranks that train alone (recipes/core/local_sgd.py): that of the last meeting, and momentum."""

_MOMENTS = {"adamw": 2, "adam": 2, "lamb": 2, "adamw_8bit": 2, "lion": 1, "adagrad": 1}


def count_parameters(model: Any, vocabulary_size: int, num_labels: int = 0) -> int:
    """Count the parameters of a model's section, tied embeddings once, and of a head for labels where there are any."""
    if getattr(model, "kind", None) == "ngram":
        return 3 * model.order
    if getattr(model, "kind", None) == "rnn":
        widths = [model.embedding_size, *(model.num_layers - 1) * [model.hidden_size], model.embedding_size]
        return (widths[0] + 1) * vocabulary_size + _recurrent(model.cell, widths)
    if getattr(model, "backbone", None) == "seq2seq":
        return _seq2seq(model.shape, vocabulary_size, getattr(model, "head", None) == "quality")
    if hasattr(model, "backbone"):
        backbone, features = _backbone(model, vocabulary_size)
        return backbone + (features + 1) * num_labels
    if isinstance(model, EncoderSection):
        hidden = model.hidden_size
        fill_head = hidden * hidden + 3 * hidden + padded_vocabulary(vocabulary_size, model)
        pair_head = (hidden + 1) * (hidden + num_labels) if num_labels else 0  # behind a pooler
        return _encoder(model, vocabulary_size) + fill_head + pair_head
    return _decoder(model, vocabulary_size)


def _backbone(model: Any, vocabulary_size: int) -> tuple[int, int]:
    """Return how many parameters a classifier's backbone has, and the size of the features that it gives."""
    if model.backbone == "words" and hasattr(model, "feature_buckets"):
        return _words(model, vocabulary_size), 2 * model.hidden_size if model.num_layers else model.embedding_size
    if model.backbone == "words":
        return vocabulary_size * model.embedding_size, model.embedding_size
    if model.backbone == "encoder":
        hidden = model.encoder.hidden_size
        kind, pooling = getattr(model, "kind", None), getattr(model, "pooling", None)
        has_pooler = kind == "cross" or (kind != "bi" and pooling == "first")
        pooler = hidden * hidden + hidden if has_pooler else 0
        further = getattr(model, "sentence_layers", 0) * _layer(hidden, model.encoder.inner_size)
        return _encoder(model.encoder, vocabulary_size) + pooler + further, hidden
    size = model.embedding_size
    embeddings = (vocabulary_size + model.bigram_buckets) * size
    if model.backbone == "attention":  # learned queries, and keys and values for them, behind the layers' norm
        layers = model.num_layers * _layer(size, 4 * size) + (2 * size if model.num_layers else 0)
        return embeddings + layers + 2 * size * size + 3 * size, size
    gates, directions = (4 if model.cell == "lstm" else 3), (2 if model.bidirectional else 1)
    inputs = [size] + [directions * model.hidden_size] * (model.num_layers - 1)
    layers = sum(directions * gates * model.hidden_size * (width + model.hidden_size + 2) for width in inputs)
    return embeddings + layers, directions * model.hidden_size


def _seq2seq(model: Seq2SeqSection, vocabulary_size: int, judges: bool) -> int:
    hidden, rows = model.hidden_size, padded_vocabulary(vocabulary_size, model)
    layer, source_attention = _layer(hidden, model.inner_size), 4 * hidden * hidden + 6 * hidden
    layers = model.num_encoder_layers * layer + model.num_decoder_layers * (layer + source_attention)
    outer = (hidden + 1) * rows
    if model.family != "marian":  # positions and the embedding's norm on both sides
        outer += 2 * hidden * (model.max_positions + SEQ2SEQ_POSITION_OFFSET + 2)
    if model.family == "mbart":  # the last norms
        outer += 4 * hidden
    judging = (2 * hidden + 1) * hidden + hidden + hidden + 2 if judges else 0
    return outer + layers + judging


def _words(model: Any, vocabulary_size: int) -> int:
    """Count vectors of words, letters and distances, the layers over them, and the weights of hashed features."""
    letters = model.character_size and LETTERS * model.character_size
    filters = model.character_size and (3 * model.character_size + 1) * model.character_filters
    distances = DISTANCES * model.position_size
    size = model.embedding_size + (model.character_size and model.character_filters)
    gates, widths = (4 if model.cell == "lstm" else 3), [size] + [2 * model.hidden_size] * (model.num_layers - 1)
    layers = [2 * gates * model.hidden_size * (width + model.hidden_size + 2) for width in widths[: model.num_layers]]
    features = model.feature_buckets * ASSUMED_LABELS
    return vocabulary_size * model.embedding_size + letters + filters + distances + sum(layers) + features


def _recurrent(cell: str, widths: list[int]) -> int:
    """Count layers of one direction of these widths, the first the inputs' own."""
    gates = 4 if cell == "lstm" else 3
    return sum(gates * width * (before + width + 2) for before, width in itertools.pairwise(widths))


def _encoder(model: EncoderSection, vocabulary_size: int) -> int:
    positions = model.max_positions if model.positions == "absolute" else 0
    rows = padded_vocabulary(vocabulary_size, model) + positions + model.num_segments
    return (rows + 2) * model.hidden_size + model.num_layers * _layer(model.hidden_size, model.inner_size)


def count_active_parameters(model: DecoderSection, vocabulary_size: int) -> int:
    """Count the parameters of a decoder that one token meets: of a mixture the chosen experts alone."""
    idle = model.num_expert_layers * max(0, model.num_experts - model.experts_per_token) * expert_parameters(model)
    return count_parameters(model, vocabulary_size) - idle


def count_vision_parameters(model: VisionSection, image_size: int, num_channels: int, num_labels: int) -> int:
    """Count the parameters of a Vision Transformer."""
    hidden, tokens = model.hidden_size, (image_size // model.patch_size) ** 2
    outer = num_channels * model.patch_size**2 + 1 + tokens + 2 * (model.pooling == "class") + 2
    return outer * hidden + model.num_layers * _layer(hidden, model.blocks.inner_size) + (hidden + 1) * num_labels


def count_speech_parameters(model: SpeechSection, num_units: int) -> int:
    """Count the parameters of a model of speech, whose alphabet has so many units."""
    total, channels, bands = 0, 1, model.num_mels
    for layer in model.convolutions:
        bands = -(-bands // layer.band_stride)
        total += layer.channels * (channels * layer.frames * layer.bands + 1 + 2 * bands)
        channels = layer.channels
    gates, directions = 4 if model.cell == "lstm" else 3, 1 + model.bidirectional
    inputs, width = model.recurrent_inputs, directions * model.hidden_size
    for _ in range(model.num_layers):
        total += directions * gates * model.hidden_size * (inputs + model.hidden_size + 2)
        inputs = width
    return total + 2 * width + (width + 1) * (num_units + 1)


def expert_parameters(model: DecoderSection) -> int:
    """Count the parameters of one feed-forward layer, which one of several experts is too."""
    hidden, inner = model.hidden_size, model.inner_size
    return 2 * hidden * inner + inner + hidden if model.family == "gpt2" else 3 * hidden * inner


def _decoder(model: DecoderSection, vocabulary_size: int) -> int:
    further = (model.num_experts - 1) * expert_parameters(model) + model.num_experts * model.hidden_size  # the router
    return _dense_decoder(model, vocabulary_size) + model.num_expert_layers * further


def _dense_decoder(model: DecoderSection, vocabulary_size: int) -> int:
    hidden, feed_forward = model.hidden_size, model.inner_size
    embedding = padded_vocabulary(vocabulary_size, model) * hidden
    outer = embedding if model.tie_embeddings else 2 * embedding
    if model.family == "gpt2":  # learned positions
        return outer + model.max_positions * hidden + model.num_layers * _layer(hidden, feed_forward) + 2 * hidden
    key_value = model.head_size * model.key_value_heads
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * feed_forward + 2 * hidden
    return outer + model.num_layers * layer + hidden


def _layer(hidden: int, feed_forward: int) -> int:
    """Count a transformer's layer with biases everywhere and two parameters a normalized feature."""
    return 4 * hidden * hidden + 2 * hidden * feed_forward + 9 * hidden + feed_forward


class Start(NamedTuple):
    """What is known, without reading weights, of the model that another starts from; None where it does not say."""

    parameters: int
    max_positions: int | None
    num_layers: int | None
    foreign: str | None
    """The family, where it is not one of ours."""
    vocabulary_size: int | None


def look_at_start(path: Path, is_decoder: bool = False) -> Start:
    """Look at a run folder, a checkpoint or a Hugging Face folder; raise UserError for one that has no encoder.

    Or, where one is asked for, no decoder.
    """
    where, what = "model.initialize_from", "a decoder" if is_decoder else "an encoder"
    if (path / "config.json").is_file() and own_recipe(path) is None:
        config = _read_object(path / "config.json", where)
        family = config.get("model_type")
        lengths = (config.get("max_position_embeddings"), config.get("num_hidden_layers"))
        foreign = None if family == "bert" else str(family)
        return Start(_stored_parameters(path, where), *lengths, foreign, config.get("vocab_size"))
    manifest = _manifest(path, where, what)
    tensors, facts, run = (manifest.get(key) or {} for key in ("tensors", "facts", "run"))
    has_encoder = any(name.startswith(("encoder.", "backbone.encoder.", "model.encoder.")) for name in tensors)
    if not ("family" in run.get("model", {}) if is_decoder else has_encoder):
        raise UserError(
            where, f"{path} is a model of the recipe {run.get('recipe')!r}, which has no {what.rsplit(maxsplit=1)[-1]}"
        )
    shape = facts.get("encoder") or run["model"]
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    lengths = (shape.get("max_positions"), shape.get("num_layers"))
    return Start(parameters, *lengths, None, facts.get("vocabulary_size"))


def _manifest(path: Path, where: str, what: str) -> dict[str, Any]:
    """Return what a run, a checkpoint or a folder of this project's own says of its model."""
    if own_recipe(path) is not None:
        return {**_read_object(path / RECORD_FILE, where), "tensors": _stored_tensors(path, where)}
    checkpoints = sorted(path.glob("checkpoints/step_*/manifest.json"))
    if not checkpoints and not (path / "manifest.json").is_file():
        found = "holds no finished checkpoint" if path.is_dir() else "is not there"
        advice = f"give a run or checkpoint of {what}, or a folder that transformers has saved"
        raise UserError(where, f"{path} {found}; {advice}")
    return _read_object(checkpoints[-1] if checkpoints else path / "manifest.json", where)


def _stored_parameters(folder: Path, where: str) -> int:
    """Add up what the heads of the safetensors files say."""
    total = sum(math.prod(tensor["shape"]) for tensor in _stored_tensors(folder, where).values())
    if not total:
        raise UserError(where, f"{folder} holds no weights in safetensors files")
    return total


def _stored_tensors(folder: Path, where: str) -> dict[str, Any]:
    """Return what the heads of the safetensors files say of each tensor."""
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                head = json.loads(file.read(min(size, path.stat().st_size)))
            shapes = {name: tensor["shape"] for name, tensor in head.items() if name != "__metadata__"}
            found |= {name: {"shape": [int(size) for size in shape]} for name, shape in shapes.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(where, f"{path} is no safetensors file") from None
    return found


def _read_object(path: Path, where: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(where, f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UserError(where, f"{path} holds no JSON object")
    return document


def checkpoint_bytes(parameters: int, optimizer: OptimizerSection) -> int:
    """Return the size of a checkpoint: float32 masters and the optimizer's float32 moments."""
    moments = int(optimizer.momentum > 0) if optimizer.name == "sgd" else _MOMENTS[optimizer.name]
    return 4 * (1 + moments) * parameters


def vocabulary_of(config: Any) -> int:
    """Return how many tokens a run's model knows: as many as its tokenizer, or as a decoder that it starts from."""
    if config.start_brings_tokenizer and config.model.initialize_from:
        start = look_at_start(Path(config.model.initialize_from).expanduser(), is_decoder=True)
        return start.vocabulary_size or 0
    return vocabulary_size(config.data.tokenizer)


def vocabulary_size(tokenizer: TokenizerSection) -> int:
    """Return the tokenizer's size, exact for one that exists; raise UserError for a file that is none."""
    if tokenizer.kind == "character":
        return ASSUMED_CHARACTERS
    if tokenizer.kind in ("bpe", "wordpiece"):
        return tokenizer.vocabulary_size or 0
    if tokenizer.kind == "word":
        return tokenizer.vocabulary_size or ASSUMED_WORDS
    path = locate(tokenizer.path or "")
    return _size_of_file(path / "tokenizer.json" if path.is_dir() else path)


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
