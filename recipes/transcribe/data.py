"""Recordings and transcripts: from their sources to a prepared folder, and its splits as samples.

The samples of all recordings lie in one table of the folder, in the order they were read; a split names its own there.
B utterances of S samples at the most, L units of text.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import xxhash

from bigbatch.recipes.core.data.examples import (
    ORIGIN,
    Built,
    Examples,
    read_examples,
    record_batches,
    write_split,
)
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.rows import shown
from bigbatch.recipes.core.data.sampler import Order, random_words
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.data.splits import (
    SPLITS,
    TRAIN,
    check_splits,
    count_leaks,
    cut_splits,
    leave_out,
    prepare_splits,
    shown_counts,
    tell_prepared,
)
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.transcribe.audio import read_recordings, resampled
from bigbatch.recipes.transcribe.config import AudioDataSection, AugmentSection, TranscribeConfig

RECORDINGS = "recordings"  # the table of all samples
SAMPLES_AT_ONCE = 2**24
PIECES, AUGMENT = range(2)  # streams of random numbers

_SAMPLES = pyarrow.schema({"samples": pyarrow.list_(pyarrow.int16())})
_SPLIT = pyarrow.schema(
    {
        "recording": pyarrow.int64(),
        "num_samples": pyarrow.int64(),
        "units": pyarrow.list_(pyarrow.int32()),
        ORIGIN: pyarrow.string(),
    }
)


class RecordingRow(NamedTuple):
    """What is known of a recording beside its samples."""

    text: str
    """Stands for the samples."""
    labels: tuple[str, ...]
    origin: str
    place: int
    """Its row in the table of samples."""
    num_samples: int
    transcript: str


def prepare(data: AudioDataSection) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it."""
    folder = prepare_splits(data, _build)
    sizes, alphabet = (read_examples(folder).facts[name] for name in ("sizes", "alphabet"))
    held = [f"{split}: {count:,} recordings, {seconds / 3600:.2f} hours" for split, (count, seconds) in sizes.items()]
    held.append(f"alphabet of {len(alphabet)}: {shown(' '.join(alphabet))}")
    tell_prepared(folder, data, held, "recordings that are")
    return folder


def open_split(folder: Path, split: str, config: TranscribeConfig) -> "SpeechSamples | None":
    """Open a split of a prepared folder, a training one augmented; None where there is none of this name."""
    return SpeechSamples(folder, split, config) if split in read_examples(folder).splits else None


class SpeechSamples:
    """A split as `Samples`."""

    def __init__(self, folder: Path, split: str, config: TranscribeConfig) -> None:
        """Map the split into memory; a recording that is too short for its transcript is refused, or in `counts`."""
        self.examples, self.recordings = Examples(folder, split), Examples(folder, RECORDINGS)
        self.config, self.alphabet = config, self.examples.facts["alphabet"]
        self.augment = config.augment if split == TRAIN else AugmentSection()
        self.seed = config.seed if split == TRAIN else 0
        self.places, self.lengths = (self.examples.numbers(name) for name in ("recording", "num_samples"))
        space = [self.alphabet.index(" ") + 1] if config.data.concatenate and config.data.unit == "character" else []
        self.space = np.array(space, np.int32)
        self.counts: Counter[str] = Counter()
        self.kept = self._long_enough()
        self.num_samples = len(self.kept)
        if not self.num_samples:
            raise UserError(f"data.{split}", "every recording is too short for its transcript")
        self.fingerprint = self._fingerprint(split)

    @property
    def mean_seconds(self) -> float:
        """Seconds of a sample, on average."""
        section = self.config.data.concatenate
        pieces = (section.least + section.most) / 2 if section else 1.0
        return float(self.lengths[self.kept].mean()) * pieces / self.config.data.sample_rate

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples as `collate` does, units int64 [B, L] and unit_lengths [B], and for training the masks.

        time_masks and band_masks are int64 [B, N, 2].
        """
        order = Order(sample_ids, epochs)
        words = random_words(self.seed, order, AUGMENT, 1)[:, 0]
        waves: list[np.ndarray] = []
        masks: list[tuple[np.ndarray, np.ndarray]] = []
        for pieces, word in zip(self._pieces(order), words.tolist(), strict=True):
            generator = np.random.default_rng(word)
            found = self.recordings.lists("samples", self.places[pieces])
            wave = np.concatenate([self._played(samples, generator) for samples in found])
            waves.append(wave)
            masks.append(self._masks(len(wave), generator))
        units, unit_lengths = padded(list(self.texts(order)), np.int64)
        batch = {**collate(waves), "units": units, "unit_lengths": unit_lengths}
        for place, name in enumerate(("time_masks", "band_masks")):
            found = np.stack([both[place] for both in masks])
            batch |= {name: found} if found.size else {}
        return batch

    def texts(self, order: Order) -> Iterator[np.ndarray]:
        """Yield the units of each sample's text."""
        for pieces in self._pieces(order):
            texts = self.examples.lists("units", pieces)
            yield np.concatenate([part for units in texts for part in (self.space, units)][1:])

    def _pieces(self, order: Order) -> Iterator[np.ndarray]:
        """Yield the rows of the recordings that make up each sample."""
        section = self.config.data.concatenate
        if section is None:
            yield from self.kept[order.ids][:, None]
            return
        words = random_words(self.seed, order, PIECES, section.most)
        counts = section.least + words[:, 0] % np.uint64(section.most - section.least + 1)
        others = self.kept[(words[:, 1:] % np.uint64(self.num_samples)).astype(np.int64)]
        for first, rest, count in zip(self.kept[order.ids], others, counts.tolist(), strict=True):
            yield np.concatenate([[first], rest[: count - 1]])

    def _played(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return a recording faster or slower, and louder or quieter."""
        section = self.augment
        if section.speeds != (1.0,):
            speed = section.speeds[generator.integers(len(section.speeds))]
            samples = resampled(samples, speed_ratio(speed))
        if section.gain_decibels:
            factor = 10 ** (generator.uniform(-section.gain_decibels, section.gain_decibels) / 20)
            samples = (samples * factor).round().clip(-(2**15), 2**15 - 1).astype(np.int16)
        return samples

    def _masks(self, num_samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the hidden stretches of time, in frames, and of mel bands."""
        section, model = self.augment, self.config.model
        frames = num_samples / self.config.data.sample_rate / model.hop_seconds
        longest = min(section.time_mask_seconds / model.hop_seconds, section.time_mask_share * frames)
        return (
            _stretches(section.time_masks, int(longest), int(frames), generator),
            _stretches(section.band_masks, min(section.band_mask_width, model.num_mels), model.num_mels, generator),
        )

    def _long_enough(self) -> np.ndarray:
        """Return the rows whose recordings, played at the highest speed, have a frame for all that CTC has to place."""
        frame, data = self.config.frame_samples, self.config.data
        frames = (self.lengths * float(min(map(speed_ratio, self.augment.speeds)))).astype(np.int64) // frame
        units = self.examples.lists("units", np.arange(self.examples.num_rows))
        needed = np.array([frames_needed(one) for one in units]) + (data.concatenate is not None)  # for what joins two
        for row in np.flatnonzero(frames < needed).tolist():
            text = as_text(units[row].tolist(), self.alphabet, data.unit)
            found = f"has {frames[row]} frames, and CTC needs {needed[row]} for {shown(text)}"
            hint = "right is a longer recording, or lower frame_stride, model.hop_seconds or augment.speeds"
            (origin,) = self.examples.texts(ORIGIN, np.array([row]))
            leave_out(data, self.counts, "too_short_for_their_transcripts", origin, f"{found}; {hint}")
        return np.flatnonzero(frames >= needed)

    def _fingerprint(self, split: str) -> str:
        data, augmented = self.config.data, self.augment != AugmentSection()
        content = [self.examples.fingerprint, self.recordings.fingerprint, self.alphabet, self.kept.tolist()]
        content += [data.concatenate and data.concatenate.model_dump(), self.augment.model_dump()]
        content += [self.seed if augmented or data.concatenate else 0]
        return fingerprint_of(content)


def _stretches(count: int, longest: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Draw `count` stretches of a range: begin and end [count, 2]."""
    widths = generator.integers(0, longest + 1, count)
    begins = generator.integers(0, size - widths + 1)
    return np.stack([begins, begins + widths], 1)


def collate(waves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return samples int16 [B, S], 0 behind an end, and lengths int64 [B]."""
    return dict(zip(("samples", "lengths"), padded(waves, np.int16), strict=True))


def padded(lists: Sequence[np.ndarray], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return lists as one array with 0 behind their ends, and how long each is."""
    lengths = np.array([len(one) for one in lists], np.int64)
    found = np.zeros((len(lists), lengths.max()), dtype)
    for row, one in zip(found, lists, strict=True):
        row[: len(one)] = one
    return found, lengths


def speed_ratio(speed: float) -> Fraction:
    """Return how many samples a recording played at this speed has, for each one of its own."""
    return 1 / Fraction(speed).limit_denominator(100)


def frames_needed(units: np.ndarray) -> int:
    """Count the frames that CTC needs: one a unit, and one between two that are equal."""
    return len(units) + int((units[1:] == units[:-1]).sum())


def as_text(units: Sequence[int], alphabet: Sequence[str], unit: str) -> str:
    """Return the text of units, which count from 1 on."""
    text = ("" if unit == "character" else " ").join(alphabet[number - 1] for number in units)
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------- prepare


def _build(folder: Path, files: dict[str, list[SourceFile]], data: AudioDataSection) -> Built:
    counts: Counter[str] = Counter()
    rows: dict[str, list[RecordingRow]] = {split: [] for split in SPLITS}
    written = {RECORDINGS: write_split(folder, RECORDINGS, _SAMPLES, _read(data, files, rows, counts))}
    rows = cut_splits(data, rows)
    if not rows[TRAIN]:
        raise UserError("data.train", f"no recording is left to train on ({shown_counts(counts)})")
    alphabet = _alphabet(data, rows[TRAIN])
    rows = {split: [row for row in found if _is_written(row, alphabet, data, counts)] for split, found in rows.items()}
    leaks = count_leaks(data, rows)
    check_splits(data, rows, counts)
    numbers = {unit: number for number, unit in enumerate(alphabet, 1)}
    for split, found in rows.items():
        if found:
            records = (
                (row.place, row.num_samples, [numbers[unit] for unit in _units(row.transcript, data)], row.origin)
                for row in found
            )
            written[split] = write_split(folder, split, _SPLIT, record_batches(_SPLIT, records))
    sizes = {
        split: (len(found), sum(row.num_samples for row in found) / data.sample_rate)
        for split, found in rows.items()
        if found
    }
    return Built(written, {"alphabet": alphabet, "sizes": sizes, "counts": dict(+counts), "leaks": leaks})


def _read(
    data: AudioDataSection,
    files: dict[str, list[SourceFile]],
    rows: dict[str, list[RecordingRow]],
    counts: Counter[str],
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the samples of all recordings, and note in `rows` what else is known of them."""
    waiting: list[np.ndarray] = []
    place = 0
    for split, file in ((split, file) for split, found in files.items() for file in found):
        for samples, text, origin in read_recordings(file, data, counts):
            key = xxhash.xxh3_128_hexdigest(samples.tobytes())
            rows[split].append(RecordingRow(key, (), origin, place, len(samples), text))
            waiting.append(samples)
            place += 1
            if sum(map(len, waiting)) >= SAMPLES_AT_ONCE:
                yield _chunk(waiting)
                waiting = []
    if waiting:
        yield _chunk(waiting)


def _chunk(recordings: list[np.ndarray]) -> pyarrow.RecordBatch:
    ends = np.cumsum([0, *map(len, recordings)]).astype(np.int32)
    return pyarrow.record_batch([pyarrow.ListArray.from_arrays(ends, np.concatenate(recordings))], schema=_SAMPLES)


def _units(text: str, data: AudioDataSection) -> Sequence[str]:
    return text if data.unit == "character" else text.split()


def _alphabet(data: AudioDataSection, rows: list[RecordingRow]) -> list[str]:
    """Return the given units, else those of the training transcripts, sorted; with the space that joins recordings."""
    found = {unit for row in rows for unit in _units(row.transcript, data)}
    if data.alphabet is not None:
        found = set(_units(data.alphabet, data))
    if data.concatenate and data.unit == "character":
        found.add(" ")
    return sorted(found)


def _is_written(row: RecordingRow, alphabet: list[str], data: AudioDataSection, counts: Counter[str]) -> bool:
    strange = sorted(set(_units(row.transcript, data)) - set(alphabet))
    if strange:
        named = "data.alphabet" if data.alphabet is not None else "the training transcripts"
        found = f"has the transcript {shown(row.transcript)}, and {strange[0]!r} is not in {named}"
        leave_out(data, counts, "outside_the_alphabet", row.origin, found)
    return not strange
