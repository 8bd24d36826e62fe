"""The run document of speech to text."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import (
    AudioSource,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    Section,
    SplitSection,
)
from bigbatch.recipes.core.models.config import SpeechSection


class ConcatenateSection(Section):
    """Several recordings one behind the other become one sample, drawn anew in every epoch."""

    least: PositiveInt = 1
    most: PositiveInt
    """A sample begins with the recording of its own number; how many others follow, and which, is drawn. Those of
    validation and test are always the same."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.most < self.least:
            raise ValueError(f"most {self.most} is less than least {self.least}")
        return self


class AudioDataSection(SplitSection):
    """Recordings with their transcripts, and the form that all get."""

    train: Annotated[tuple[AudioSource, ...], Field(min_length=1)]
    validation: tuple[AudioSource, ...] = ()
    test: tuple[AudioSource, ...] = ()
    split_seed: NonNegativeInt = 0
    """Which recordings are cut is a function of this and of their samples, not of the run's seed."""
    audio_key: str = "audio"
    """Column of the paths in a manifest."""
    text_key: str = "text"
    """Column of the transcripts in a manifest."""
    sample_rate: PositiveInt = 16000
    """Samples a second of every recording; several channels become their mean."""
    resample: bool = False
    """Bring recordings of another rate to this one; otherwise they cannot be taken."""
    unit: Literal["character", "word"] = "character"
    """What the model hears: characters of transcripts, with the space between words, or whole words of a small
    vocabulary."""
    alphabet: str | None = None
    """All characters, or all words with spaces between; by default those of the training transcripts. A transcript
    with another cannot be taken."""
    lowercase: bool = True
    """Write transcripts in small letters."""
    concatenate: ConcatenateSection | None = None
    on_error: Literal["fail", "skip"] = "fail"
    """A recording that is missing, cannot be read, is empty, has another sample rate, no transcript or one outside the
    alphabet, or is too short for it. Told, or left out and counted. `--on-error` sets it."""
    on_leak: Literal["report", "drop", "fail"] = "report"
    """Recordings of validation and test that are in an earlier split too, sample by sample; `drop` leaves them out
    there."""


class AugmentSection(Section):
    """What is done to a training recording, drawn anew in every epoch from the seed and the sample's number alone."""

    speeds: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    """Each recording is played at one of these speeds (Ko et al. 2015, https://doi.org/10.21437/Interspeech.2015-711)."""
    gain_decibels: NonNegativeFloat = 0.0
    """Louder or quieter by up to so much."""
    time_masks: NonNegativeInt = 0
    """SpecAugment (https://arxiv.org/abs/1904.08779) without its time warping, which its authors found to do least:
    so many stretches of time are hidden."""
    time_mask_seconds: PositiveFloat = 0.4
    """Each is up to so long."""
    time_mask_share: Fraction = 0.2
    """And up to this part of the sample."""
    band_masks: NonNegativeInt = 0
    """So many stretches of mel bands are hidden."""
    band_mask_width: PositiveInt = 8
    """Each is up to so many bands wide."""


class DecodeSection(Section):
    """How `evaluate` and `predict` find the text; validation while training takes the likeliest unit at each frame."""

    beam_size: PositiveInt = 1
    """Beginnings of the text that are followed; 1: the likeliest unit at each frame."""
    ngram_order: NonNegativeInt = 0
    """Units of an n-gram model of the training transcripts (interpolated Kneser-Ney); 0: none. Needs a beam."""
    ngram_weight: NonNegativeFloat = 0.5
    """Of the logarithm of the n-gram model's probability, beside 1 for that of the acoustic one."""
    unit_bonus: NonNegativeFloat = 0.5
    """Added for each unit, for an n-gram model likes short texts."""
    chunk_seconds: PositiveFloat = 30.0
    """A longer file is read in chunks; no more than one is in memory."""
    context_seconds: PositiveFloat = 3.0
    """What a chunk hears of the one before and the one behind."""

    @model_validator(mode="after")
    def _ngrams_need_a_beam(self) -> Self:
        if self.ngram_order and self.beam_size == 1:
            raise ValueError("ngram_order needs a beam_size of 2 or more")
        return self


class TranscribeConfig(RunConfig):
    """Write down what is said in recordings."""

    recipe: Literal["transcribe"] = "transcribe"
    model: SpeechSection
    data: AudioDataSection
    augment: AugmentSection = AugmentSection()
    decode: DecodeSection = DecodeSection()

    @property
    def frame_samples(self) -> int:
        """Samples that become one frame of output."""
        return round(self.model.hop_seconds * self.data.sample_rate) * self.model.frame_stride

    @model_validator(mode="after")
    def _bands_hear(self) -> Self:
        if self.model.lowest_hertz >= self.data.sample_rate / 2:
            found = f"model.lowest_hertz {self.model.lowest_hertz:g}"
            raise ValueError(f"{found} is not below half of data.sample_rate {self.data.sample_rate}")
        return self


Config = TranscribeConfig
