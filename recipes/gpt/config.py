"""The run document of the GPT recipe."""

from typing import ClassVar, Literal

from bigbatch.recipes.core.config import RunConfig, SamplingSection, TokenDataSection
from bigbatch.recipes.core.models.config import DecoderSection


class SampleSection(SamplingSection):
    """How text is generated: in the report while training, and by `bigbatch generate`."""

    prompts: tuple[str, ...] = ("The ",)


class GptConfig(RunConfig):
    """Train a decoder to predict the next token."""

    axes: ClassVar[tuple[str, ...]] = ("tensor", "pipeline", "sequence", "expert")
    recipe: Literal["gpt"] = "gpt"
    model: DecoderSection = DecoderSection()
    data: TokenDataSection
    sample: SampleSection = SampleSection()


Config = GptConfig
