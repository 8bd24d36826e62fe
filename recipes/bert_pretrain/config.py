"""The run document of BERT pretraining."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import Fraction, PositiveInt, RunConfig, Section, TokenDataSection
from bigbatch.recipes.core.models.config import EncoderSection


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

    recipe: Literal["bert_pretrain"] = "bert_pretrain"
    model: EncoderSection = EncoderSection()
    data: TokenDataSection
    masking: MaskingSection = MaskingSection()
    sample: FillSection = FillSection()


Config = BertPretrainConfig
