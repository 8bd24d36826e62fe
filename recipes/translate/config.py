"""The run document of translation, and of judging translations."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import (
    ParallelSource,
    PositiveInt,
    RunConfig,
    Section,
    SplitDataSection,
    TableSource,
    TokenizerSection,
)
from bigbatch.recipes.core.models.config import Seq2SeqSection

Source = str | ParallelSource | TableSource


class PairDataSection(SplitDataSection):
    """Texts and their translations."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of pairs: two files of lines, {"path": ..., "target": ...}; tables (.jsonl, .tsv, .csv, .parquet,
    folders, globs, `hf:NAME[:CONFIG[:SPLIT]]`); or `python:numbers`. A relative path is looked for here, then under
    $BIGBATCH_DATA."""
    validation: tuple[Source, ...] = ()
    test: tuple[Source, ...] = ()
    source_column: str = "source"
    target_column: str = "target"
    score_column: str | None = None
    """How good a translation is, a number; for `model.head` quality alone."""
    tokenizer: TokenizerSection = TokenizerSection()
    """Of both languages. Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt = 64
    """Tokens of a row, the source's and as many of the target's. While training to translate several pairs share a row,
    none sees another: so a batch has as many tokens whatever the sentences' lengths. A longer text is an error
    (`on_error`)."""

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are read, each with the setting that asks for it."""
        names = ("source_column", "target_column", "score_column")
        return {column: f"data.{name}" for name in names if (column := getattr(self, name))}

    @property
    def shares_rows(self) -> bool:
        """Whether several pairs share a sample, how many of them only their tokens tell."""
        return self.score_column is None


class TranslateModelSection(Section):
    """An encoder-decoder."""

    backbone: Literal["seq2seq"] = "seq2seq"
    head: Literal["translation", "quality"] = "translation"
    """quality: a score of a pair, from what the model thinks of each of the translation's tokens."""
    initialize_from: str | None = None
    """A run folder or checkpoint of an encoder-decoder, such as this recipe's, or a Hugging Face folder of a Marian, a
    BART or an mBART; its tokenizer and shape come with it."""
    shape: Seq2SeqSection | None = None
    """Where nothing is given to start from."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of all layers; by default as in the shape."""

    @model_validator(mode="after")
    def _has_one_shape(self) -> Self:
        if (self.shape is None) == (self.initialize_from is None):
            found = "neither" if self.shape is None else "both"
            raise ValueError(f"has {found} of shape and initialize_from; one of them is right")
        return self


class ObjectiveSection(Section):
    """What is minimized."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target that is spread over the whole vocabulary (https://arxiv.org/abs/1512.00567, section 7); the
    validation loss is without it. Of no effect on `model.head` quality."""


class SearchSection(Section):
    """How a translation is looked for."""

    num_beams: PositiveInt = 4
    """1 is greedy."""
    length_penalty: float = 1.0
    """A translation's score is its log-probability over its number of tokens to this power."""
    max_new_tokens: PositiveInt = 128
    """The longest translation."""
    batch_size: PositiveInt = 64
    """Sentences at once, of about the same length."""


class TranslateConfig(RunConfig):
    """Translate, or tell how good a translation is."""

    num_outputs: ClassVar[int] = 1

    recipe: Literal["translate"] = "translate"
    model: TranslateModelSection
    data: PairDataSection
    objective: ObjectiveSection = ObjectiveSection()
    search: SearchSection = SearchSection()

    @model_validator(mode="after")
    def _scores_are_for_quality(self) -> Self:
        if (self.model.head == "quality") != (self.data.score_column is not None):
            needs = "needs" if self.model.head == "quality" else "has no use for"
            raise ValueError(f"model.head {self.model.head!r} {needs} data.score_column")
        shape = self.model.shape
        if shape and self.data.sequence_length > shape.max_positions:
            found = f"data.sequence_length {self.data.sequence_length}"
            raise ValueError(f"{found} is more than model.shape.max_positions {shape.max_positions}")
        return self


Config = TranslateConfig
