"""The run document of BERT pretraining."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bigbatch.recipes.core.config import Fraction, PositiveInt, RunConfig, Section, TokenDataSection
from bigbatch.recipes.core.models.config import EncoderSection

SHORTEST_PAIR = 8  # tokens, three of them special


class MaskingSection(Section):
    """Which tokens are to be filled in, drawn anew in every epoch."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Of a sample's ordinary tokens."""
    masked_share: Fraction = 0.8
    """Of these, so many become [MASK]."""
    random_share: Fraction = 0.1
    """So many become any ordinary token; the rest stay what they are."""
    whole_words: bool = False
    """Take all pieces of a word or none."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        total = self.masked_share + self.random_share
        if total > 1 + 1e-9:
            raise ValueError(f"masked_share and random_share are {total:g} together; right is 1 or less")
        return self


class FillSection(Section):
    """Texts with [MASK] in them that the report shows filled in."""

    prompts: tuple[str, ...] = ()
    candidates: PositiveInt = 3
    """How many of the likeliest tokens to show for each."""


class BertPretrainConfig(RunConfig):
    """Train an encoder to fill in masked tokens."""

    axes: ClassVar[tuple[str, ...]] = ("tensor", "pipeline", "sequence")
    recipe: Literal["bert_pretrain"] = "bert_pretrain"
    model: EncoderSection = EncoderSection()
    data: TokenDataSection
    masking: MaskingSection = MaskingSection()
    sentence_task: Literal["none", "next_sentence", "sentence_order"] = "none"
    """A second task, on rows of two segments. next_sentence: half of the second ones are of another document (BERT).
    sentence_order: half of the pairs are swapped (ALBERT)."""
    sample: FillSection = FillSection()

    @field_validator("sentence_task")
    @classmethod
    def _pairs_fit(cls, task: str, others: ValidationInfo) -> str:
        model, data = others.data.get("model"), others.data.get("data")
        if task == "none" or not isinstance(model, EncoderSection) or not isinstance(data, TokenDataSection):
            return task
        if data.packing != "isolate":
            raise ValueError(f"{task!r} puts one pair into a row: data.packing {data.packing!r} has to be 'isolate'")
        if data.unit == "sentence":
            raise ValueError(f"{task!r} cuts documents between sentences: data.unit 'sentence' leaves nothing to cut")
        if data.sequence_length < SHORTEST_PAIR:
            raise ValueError(f"{task!r} needs data.sequence_length {SHORTEST_PAIR} or more, not {data.sequence_length}")
        if model.num_segments < 2:
            raise ValueError(f"{task!r} needs model.num_segments 2 or more, not {model.num_segments}")
        return task


Config = BertPretrainConfig
