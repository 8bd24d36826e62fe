"""Write down what is said in recordings."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch
from torch import nn

from bigbatch.recipes.core.data.splits import SPLITS, TRAIN, prepared_splits, shown_counts
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import ForeignSpeech, Session
from bigbatch.recipes.core.metrics import CONFIDENCE, bootstrap_intervals
from bigbatch.recipes.core.models.hugging_face import own_export
from bigbatch.recipes.core.models.speech import SpeechModel, count_operations, ctc_loss
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.transcribe import data
from bigbatch.recipes.transcribe.audio import Chunk, UnusableError, read_chunks
from bigbatch.recipes.transcribe.config import TranscribeConfig
from bigbatch.recipes.transcribe.decoding import BeamSearch, Language, best_path

READS_FILES = True
"""An input of `predictor` is the path of a file."""
INPUTS = ("samples", "lengths", "time_masks", "band_masks")
EXPORTS_OWN = ("onnx",)
"""Formats that it is exported to, though transformers has no class for it."""
GENERATED_AT_ONCE = 8


def prepare(config: TranscribeConfig) -> Path:
    """Read the recordings and bring them into one form."""
    folder = data.prepare(config.data)
    for split in SPLITS:  # which recordings are too short follows from the model
        samples = data.open_split(folder, split, config)
        if samples and samples.counts:
            print(f"left out of {split}: {shown_counts(samples.counts)}", file=sys.stderr, flush=True)
    return folder


def open_data(config: TranscribeConfig) -> DataSplits:
    """Map the prepared recordings into memory."""
    folder = prepared_splits(config.data)
    train, validation, test = (data.open_split(folder, split, config) for split in SPLITS)
    assert train is not None  # prepare refuses data without training recordings
    facts = {
        "alphabet": train.alphabet,
        "prepared": str(folder),
        "seconds_per_sample": train.mean_seconds,
        "train_samples": train.num_samples,
    }
    return DataSplits(train, validation, facts, test)


class Transcriber(nn.Module):
    """A model, and what its units stand for."""

    def __init__(self, config: TranscribeConfig, alphabet: list[str]) -> None:
        super().__init__()
        self.alphabet, self.unit = alphabet, config.data.unit
        self.model = SpeechModel(config.model, config.data.sample_rate, len(alphabet))

    def forward(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the model does: log-probabilities float32 [B, T, K] and frames [B]."""
        return self.model(**inputs)

    def text(self, units: list[int]) -> str:
        """Return the text of units."""
        return data.as_text(units, self.alphabet, self.unit)


def build_model(config: TranscribeConfig, facts: dict[str, Any], initialize: bool = True) -> Transcriber:
    """Build the model with first weights."""
    return Transcriber(config, facts["alphabet"])


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the units of all transcripts."""
    return int(batch["unit_lengths"].sum())


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the CTC loss over the utterances; it counts by the unit."""
    return _loss(*_run(model, batch), batch)


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the loss, and how many words [B, 4] and characters [B, 4] of the best path are how (`edits`)."""
    logarithms, frames = _run(model, batch)
    best = logarithms.argmax(-1).tolist()
    texts = [model.text(best_path(row[:count])) for row, count in zip(best, frames.tolist(), strict=True)]
    words, characters = edits(_references(model, batch), texts)
    device = logarithms.device
    arrays = {"words": torch.from_numpy(words).to(device), "characters": torch.from_numpy(characters).to(device)}
    return Outputs(_loss(logarithms, frames, batch), arrays)


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: the loss alone says little here."""
    return {}


def edits(references: list[str], hypotheses: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Count, by utterance, words [B, 4] and characters [B, 4]: right, another, missing, and too many (jiwer)."""
    found = []
    for process in (jiwer.process_words, jiwer.process_characters):
        pairs = (process(*pair) for pair in zip(references, hypotheses, strict=True))
        found.append(np.array([(one.hits, one.substitutions, one.deletions, one.insertions) for one in pairs]))
    return found[0], found[1]


def figures(
    config: TranscribeConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Tell the error rates; when thorough with intervals."""
    words, characters = arrays["words"], arrays["characters"]
    return error_rates(words, characters) | ({"details": _intervals(words, characters)} if thorough else {})


def _intervals(words: np.ndarray, characters: np.ndarray) -> dict[str, Any]:
    """Return percentiles of the error rates over resampled utterances."""
    intervals = bootstrap_intervals(len(words), lambda rows: error_rates(words[rows], characters[rows]))
    return {"utterances": len(words), "intervals": intervals, "confidence": CONFIDENCE}


def error_rates(words: np.ndarray, characters: np.ndarray) -> dict[str, float]:
    """Return the share of words, of characters and of utterances that are wrong, from `edits` [N, 4] each."""
    found = {}
    for name, counts in (("word", words), ("character", characters)):
        right, *wrong = counts.sum(0).tolist()
        found[f"{name}_error_rate"] = sum(wrong) / (right + wrong[0] + wrong[1])
    return {**found, "sentence_error_rate": float((words[:, 1:].sum(1) > 0).mean())}


def figure_names(config: TranscribeConfig, facts: dict[str, Any]) -> list[str]:
    """Name the error rates."""
    return list(error_rates(np.ones((1, 4)), np.ones((1, 4))))


def generated_figures(
    config: TranscribeConfig, facts: dict[str, Any], model: Transcriber, samples: data.SpeechSamples
) -> dict[str, Any]:
    """Return the error rates of a beam search, where the document asks for one."""
    if config.decode.beam_size == 1:
        return {}
    language, parts, device = _language(config, facts), [], next(model.parameters()).device
    model.eval()
    for begin in range(0, samples.num_samples, GENERATED_AT_ONCE):
        ids = np.arange(begin, min(begin + GENERATED_AT_ONCE, samples.num_samples))
        arrays = samples.batch(ids, np.zeros_like(ids))
        batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        with torch.inference_mode():
            logarithms, frames = _run(model, batch)
        rows = zip(logarithms.cpu().numpy(), frames.tolist(), strict=True)
        texts = [_decode(config, language, model, [row[:count]]) for row, count in rows]
        parts.append(edits(_references(model, batch), texts))
    words, characters = (np.concatenate(counts) for counts in zip(*parts, strict=True))
    found = error_rates(words, characters) | {"details": _intervals(words, characters)}
    return {f"beam_{name}": value for name, value in found.items()}


def flops_per_sample(config: TranscribeConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the layers; those of the features are less than a hundredth."""
    with torch.device("meta"):
        model = build_model(config, facts, initialize=False)
    return count_operations(model.model, facts["seconds_per_sample"] / config.model.hop_seconds)


def samples_of_text(config: TranscribeConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return nothing: the model writes no text by itself."""
    return []


def predictor(
    config: TranscribeConfig, facts: dict[str, Any], model: Transcriber
) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Return a function from paths of recordings to {"transcript", "seconds"}; a long one is read in chunks."""
    section, frame = config.decode, config.frame_samples
    anything = config.data.model_copy(update={"resample": True})
    language = _language(config, facts)
    model.eval()

    def answer(path: str) -> dict[str, Any]:
        chunks = read_chunks(Path(path), anything, frame, section.chunk_seconds, section.context_seconds)
        try:
            text = _decode(config, language, model, (listen(model, chunk) for chunk in chunks))
        except UnusableError as problem:
            raise UserError(path, str(problem)) from None
        return {"transcript": text, "seconds": round(soundfile.info(path).duration, 3)}

    return lambda paths: [answer(path) for path in paths]


def hugging_face(config: TranscribeConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors; transformers has no such class."""
    processor = {"sampling_rate": config.data.sample_rate}
    return own_export(config.recipe, lambda: build_model(config, facts, initialize=False), processor=processor)


def foreign(config: TranscribeConfig, facts: dict[str, Any], session: Session) -> Transcriber:
    """Return what stands in for the model where a session gives the log-probabilities."""
    with torch.device("meta"):
        model = Transcriber(config, facts["alphabet"])
    model.model = ForeignSpeech(session)  # type: ignore[assignment]
    return model


def listen(model: Transcriber, chunk: Chunk) -> np.ndarray:
    """Return the log-probabilities [T, K] of a chunk's own frames."""
    device = next(model.parameters()).device
    inputs = {name: torch.from_numpy(array).to(device) for name, array in data.collate([chunk.samples]).items()}
    with torch.inference_mode():
        logarithms, _ = model(**inputs)
    return logarithms[0, chunk.before : chunk.before + chunk.count].cpu().numpy()


def _run(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return model(**{name: batch[name] for name in INPUTS if name in batch})


def _loss(logarithms: torch.Tensor, frames: torch.Tensor, batch: Batch) -> Loss:
    total = ctc_loss(logarithms, frames, batch["units"], batch["unit_lengths"])
    return Loss(total, int(batch["unit_lengths"].sum()))


def _references(model: Transcriber, batch: Batch) -> list[str]:
    pairs = zip(batch["units"].tolist(), batch["unit_lengths"].tolist(), strict=True)
    return [model.text(units[:length]) for units, length in pairs]


def _language(config: TranscribeConfig, facts: dict[str, Any]) -> Language | None:
    if not config.decode.ngram_order:
        return None
    return Language(data.SpeechSamples(Path(facts["prepared"]), TRAIN, config), config.decode.ngram_order)


def _decode(
    config: TranscribeConfig, language: Language | None, model: Transcriber, parts: Iterable[np.ndarray]
) -> str:
    """Return the text of log-probabilities [T, K] that come in parts."""
    if config.decode.beam_size == 1:
        return model.text(best_path([unit for part in parts for unit in part.argmax(-1).tolist()]))
    search = BeamSearch(config.decode, language)
    for part in parts:
        search.read(part)
    return model.text(search.finish())
