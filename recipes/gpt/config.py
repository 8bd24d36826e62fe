"""The run document of the GPT recipe."""

from typing import ClassVar, Literal

from bigbatch.recipes.core.config import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    RunConfig,
    Section,
    TokenDataSection,
)
from bigbatch.recipes.core.models.config import DecoderSection


class SampleSection(Section):
    """How text is generated: in the report while training, and by `bigbatch generate`."""

    prompts: tuple[str, ...] = ("The ",)
    max_new_tokens: PositiveInt = 100
    temperature: NonNegativeFloat = 0.8
    """0 is greedy."""
    top_k: NonNegativeInt = 50
    """0 is all."""
    top_p: Fraction = 1.0


class GptConfig(RunConfig):
    """Train a decoder to predict the next token."""

    axes: ClassVar[tuple[str, ...]] = ("tensor", "pipeline", "sequence", "expert")
    recipe: Literal["gpt"] = "gpt"
    model: DecoderSection = DecoderSection()
    data: TokenDataSection
    sample: SampleSection = SampleSection()


Config = GptConfig
