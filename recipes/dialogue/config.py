"""The run document of chat fine-tuning."""

from typing import ClassVar, Literal

from bigbatch.recipes.core.config import PositiveInt, RunConfig, SamplingSection, SplitDataSection, TokenizerSection
from bigbatch.recipes.core.models.config import DecoderSection


class DialogueModelSection(DecoderSection):
    """A decoder that replies."""

    initialize_from: str | None = None
    """What to start from: a run or checkpoint of a decoder, such as gpt's, or a Hugging Face GPT-2 or Llama folder. Its
    tokenizer comes with it, its shape must equal this section's."""


class DialogueDataSection(SplitDataSection):
    """Dialogues, each a row with its messages."""

    not_content: ClassVar[frozenset[str]] = frozenset({"packing"})

    messages_column: str = "messages"
    """A list of objects with `role` (system, user or assistant) and `content`."""
    template: Literal["chatml", "text", "own"] = "chatml"
    """How messages become one text. chatml: between two special tokens, which are added to the vocabulary. text: behind
    the role as a plain word; each ends as a text does. own: as the chat template says of the model to start from."""
    tokenizer: TokenizerSection = TokenizerSection()
    """Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt
    """Tokens of a row. A longer dialogue is cut between its turns into several, each with as many of the turns before
    as half a row holds, and with the system message; each reply is learned from once."""
    packing: bool = True
    """Several dialogues share a row, and none sees another; otherwise each has a row of its own."""

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are read, each with the setting that asks for it."""
        return {self.messages_column: "data.messages_column"}


class SampleSection(SamplingSection):
    """How replies are generated: in the report while training, by evaluate, predict and chat."""

    prompts: tuple[str, ...] = ("Hello!",)
    """What a user says; the replies stand in the report."""
    evaluated_replies: PositiveInt = 200
    """`bigbatch evaluate` writes so many replies of the split, likeliest token by token, and compares them."""


class DialogueConfig(RunConfig):
    """Train a decoder to reply."""

    axes: ClassVar[tuple[str, ...]] = ("tensor", "pipeline", "sequence", "expert")
    start_brings_tokenizer: ClassVar[bool] = True
    recipe: Literal["dialogue"] = "dialogue"
    model: DialogueModelSection = DialogueModelSection()
    data: DialogueDataSection
    sample: SampleSection = SampleSection()


Config = DialogueConfig
