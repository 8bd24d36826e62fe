"""Recordings one by one, whatever holds them, each with its transcript: opened by soundfile, in one form."""

import io
import math
import re
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import soundfile
from scipy.signal import resample_poly

from bigbatch.recipes.core.config import TableSource
from bigbatch.recipes.core.data.rows import read_rows, shown
from bigbatch.recipes.core.data.sources import SourceFile, first_line, format_of, is_recording, recordings_below
from bigbatch.recipes.core.data.splits import leave_out
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.transcribe.config import AudioDataSection
from bigbatch.recipes.transcribe.tones import TONE_RATE, make_tones

FULL_SCALE = 2**15


class Recording(NamedTuple):
    """What is said, and how it sounds, in the form of `data`."""

    samples: np.ndarray  # int16 [S]
    text: str
    origin: str


class Found(NamedTuple):
    """A recording as its source names it."""

    source: Any
    """A path, the bytes of a file, or samples."""
    text: Any
    origin: str
    start: Any = None
    """Seconds."""
    duration: Any = None


class UnusableError(Exception):
    """A recording cannot be taken; `kind` says in a few words why."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def read_recordings(file: SourceFile, data: AudioDataSection, counts: Counter[str]) -> Iterator[Recording]:
    """Yield the recordings of a source, always in the same order, without those that are to be left out."""
    for found in _READERS[file.format](file, data):
        counts["read"] += 1
        try:
            text = _transcript(found.text, file, data)
            samples = _samples(found, data)
        except UnusableError as problem:
            leave_out(data, counts, problem.kind, found.origin, str(problem))
            continue
        yield Recording(samples, text, found.origin)


def _transcript(text: Any, file: SourceFile, data: AudioDataSection) -> str:
    """Return the text with one space between words, some of them replaced."""
    if not isinstance(text, str) or not text.split():
        raise UnusableError("without_transcript", f"has no transcript but {shown(text)}")
    text = unicodedata.normalize("NFC", text.lower() if data.lowercase else text)
    return " ".join(file.table.words.get(word, word) for word in text.split())


def _samples(found: Found, data: AudioDataSection) -> np.ndarray:
    if isinstance(found.source, np.ndarray):
        return in_rate(found.source, TONE_RATE, data)
    with open_sound(found.source, data) as sound:
        start, stop = 0, sound.frames
        for name, value in (("start", found.start), ("duration", found.duration)):
            if value is None or value == "":
                continue
            try:
                frames = round(float(value) * sound.samplerate)
            except (TypeError, ValueError, OverflowError):
                frames = -1
            start, stop = (frames, stop) if name == "start" else (start, start + frames)
            if not 0 <= start <= stop <= sound.frames:
                seconds = sound.frames / sound.samplerate
                raise UnusableError("outside_the_file", f"has {name} {shown(value)}; the file has {seconds:g} seconds")
        return in_rate(read_mono(sound, start, stop), sound.samplerate, data)


def open_sound(source: Any, data: AudioDataSection) -> soundfile.SoundFile:
    """Open a path or the bytes of a file; raise UnusableError where it is no recording, or of another rate."""
    if isinstance(source, Path) and not source.is_file():
        raise UnusableError("missing", f"there is no file {source}")
    what = f"{source} " if isinstance(source, Path) else ""
    try:
        sound = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise UnusableError("unreadable", f"{what}cannot be read as a recording ({first_line(error)})") from None
    problem = None
    if sound.samplerate != data.sample_rate and not data.resample:
        found = f"{what}has {sound.samplerate:,} samples a second, data.sample_rate {data.sample_rate:,}"
        problem = UnusableError("of_another_rate", f"{found}; data.resample true brings it there")
    elif not sound.frames:
        problem = UnusableError("empty", f"{what}holds no sample")
    if problem:
        sound.close()
        raise problem
    return sound


def read_mono(sound: soundfile.SoundFile, start: int, stop: int) -> np.ndarray:
    """Return samples of an open file as int16, the mean of its channels."""
    try:
        sound.seek(start)
        found = sound.read(stop - start, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise UnusableError("unreadable", f"cannot be read to its end ({first_line(error)})") from None
    if len(found) < stop - start:
        raise UnusableError("unreadable", f"ends at sample {start + len(found):,}; its head says {sound.frames:,}")
    if not np.isfinite(found).all():
        raise UnusableError("unreadable", "holds a sample that is not a number")
    return as_samples(found.mean(1))


def in_rate(samples: np.ndarray, rate: int, data: AudioDataSection) -> np.ndarray:
    """Return samples of a rate in that of the settings."""
    if not len(samples):
        raise UnusableError("empty", "holds no sample")
    return resampled(samples, Fraction(data.sample_rate, rate))


def resampled(samples: np.ndarray, ratio: Fraction) -> np.ndarray:
    """Return samples int16 [S] as `ratio` times as many, by a low-pass filter (scipy's polyphase one)."""
    if ratio == 1:
        return samples
    return as_samples(resample_poly(samples.astype(np.float32) / FULL_SCALE, ratio.numerator, ratio.denominator))


def as_samples(wave: np.ndarray) -> np.ndarray:
    """Return numbers from -1 to 1 as int16."""
    return (wave * FULL_SCALE).round().clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


# ----------------------------------------------------------------------------------------------------------- sources


def _read_list(file: SourceFile, data: AudioDataSection) -> Iterator[Found]:
    """Read a manifest; where its first row has `start` or `duration`, all have."""
    rows = file._replace(format=str(format_of(file.path)), table=TableSource(path=file.path))
    columns = {data.audio_key: "data.audio_key", data.text_key: "data.text_key"}
    for name in ("start", "duration"):
        try:
            next(read_rows(rows, {name: ""}), None)
            columns[name] = name
        except UserError:
            continue
    for row in read_rows(rows, columns):
        name, text = row.values[data.audio_key], row.values[data.text_key]
        if not isinstance(name, str) or not name:
            raise UserError(row.origin, f"names no recording in column {data.audio_key!r} but {shown(name)}")
        path = Path(file.path).parent / Path(name).expanduser()
        yield Found(path, text, row.origin, row.values.get("start"), row.values.get("duration"))


def _read_folder(file: SourceFile, data: AudioDataSection) -> Iterator[Found]:
    folder = Path(file.path)
    found = {path.relative_to(folder).as_posix(): path for path in recordings_below(folder)}
    texts = {name: path.read_bytes() for name, path in found.items() if path.suffix == ".txt"}
    for name, match in _chosen([name for name in found if is_recording(Path(name))], file):
        yield Found(found[name], _text_of(name, match, texts), str(found[name]))


def _read_archive(file: SourceFile, data: AudioDataSection) -> Iterator[Found]:
    """Read .wav files and their .txt files without unpacking the archive onto the disk."""
    try:
        contents = dict(_members(file.path))
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error, RuntimeError) as error:
        raise UserError(file.path, f"cannot be read as an archive ({first_line(error)})") from None
    names = sorted(name for name in contents if is_recording(Path(name)))
    for name, match in _chosen(names, file):
        yield Found(contents[name], _text_of(name, match, contents), f"{file.path}!{name}")


def _members(path: str) -> Iterator[tuple[str, bytes]]:
    if path.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if not name.endswith("/"))
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if stream := archive.extractfile(member):  # none of a folder
                yield member.name, stream.read()


def _chosen(names: list[str], file: SourceFile) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Yield the recordings that the source's pattern matches."""
    pattern = file.table.pattern
    found = [(name, re.fullmatch(pattern or ".*", str(PurePosixPath(name).with_suffix("")))) for name in names]
    chosen = [(name, match) for name, match in found if match]
    if not chosen:
        such = f", such as {names[0]}" if names else ""
        raise UserError(file.path, f"holds {len(names):,} recordings{such}; the pattern {pattern!r} matches none")
    yield from chosen


def _text_of(name: str, match: re.Match[str] | None, texts: dict[str, bytes]) -> str | None:
    """Return what the name says, else the .txt file beside."""
    if match and "text" in match.re.groupindex:
        return match["text"]
    content = texts.get(str(PurePosixPath(name).with_suffix(".txt")))
    try:
        return content.decode() if content else None
    except UnicodeDecodeError:
        raise UserError(str(PurePosixPath(name).with_suffix(".txt")), "is not UTF-8") from None


def _read_tones(file: SourceFile, data: AudioDataSection) -> Iterator[Found]:
    for number, (text, samples) in enumerate(make_tones()):
        yield Found(samples, text, f"{file.path}:{number}")


_READERS = {
    "audio_list": _read_list,
    "audio_folder": _read_folder,
    "audio_archive": _read_archive,
    "tones": _read_tones,
}


class Chunk(NamedTuple):
    """A part of a recording and what it hears around it."""

    samples: np.ndarray  # int16 [S]
    before: int
    """Frames of output that belong to the chunk before."""
    count: int
    """Frames of output that are its own."""


def read_chunks(source: Path, data: AudioDataSection, frame: int, chunk: float, context: float) -> Iterator[Chunk]:
    """Yield a file in parts of `chunk` seconds, each with `context` seconds on both sides, read as they are needed.

    `frame` samples become one frame of output. Ends lie where both the file's samples and ours do, so that a part is
    resampled as the whole would be but for its ends.
    """
    with open_sound(source, data) as sound:
        ratio = Fraction(data.sample_rate, sound.samplerate)
        step = math.lcm(frame, ratio.numerator)
        chunk_steps, context_steps = (max(1, round(s * data.sample_rate / step)) for s in (chunk, context))
        theirs, ours = int(step / ratio), step // frame  # of a step: the file's samples, and frames of output
        begin = 0
        while begin * theirs < sound.frames:
            first, last = max(0, begin - context_steps), begin + chunk_steps + context_steps
            samples = read_mono(sound, first * theirs, min(last * theirs, sound.frames))
            samples = resampled(samples, ratio)
            before = (begin - first) * ours
            count = min(chunk_steps * ours, len(samples) // frame - before)
            if count > 0:  # less than a frame may be left
                yield Chunk(samples, before, count)
            begin += chunk_steps
