"""The run document of next-word prediction."""

from typing import Annotated, Literal

from pydantic import Field

from bigbatch.recipes.core.config import (
    NonNegativeInt,
    PositiveInt,
    RunConfig,
    Section,
    TokenDataSection,
    TokenizerSection,
)

Dropout = Annotated[float, Field(ge=0, lt=1)]


class TextSection(TokenDataSection):
    """Running text, word by word."""

    tokenizer: TokenizerSection = TokenizerSection(kind="word")
    sequence_length: PositiveInt = 64
    """Words a sample; a recurrent model begins each with a state of zero."""
    context_length: NonNegativeInt = 64
    """Where a recurrent model is validated, it first reads this many words ahead of each sample's."""


class NgramSection(Section):
    """Kneser-Ney n-grams; preparing counts them, training fits the discounts."""

    kind: Literal["ngram"]
    order: Annotated[int, Field(ge=1, le=10)] = 5
    """Words of the longest n-gram."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The last part of the training text, which the discounts are fitted to against the counts of the rest; whatever is
    evaluated or predicted afterwards goes by the counts of all of it."""


class RecurrentSection(Section):
    """LSTM or GRU layers with tied embeddings."""

    kind: Literal["rnn"]
    cell: Literal["lstm", "gru"] = "lstm"
    embedding_size: PositiveInt = 256
    """Also the width of the last layer."""
    hidden_size: PositiveInt = 512
    """Width of the layers before the last."""
    num_layers: PositiveInt = 1
    embedding_dropout: Dropout = 0.1
    """Of whole words, everywhere in a batch."""
    input_dropout: Dropout = 0.4
    """Of features, the same at all times of a sample; so are the next two."""
    hidden_dropout: Dropout = 0.3
    """Between layers."""
    output_dropout: Dropout = 0.4
    weight_dropout: Dropout = 0.3
    """Of the weights from state to state."""


class SampleSection(Section):
    """What is shown in the report while training."""

    prompts: tuple[str, ...] = ()
    num_words: PositiveInt = 5
    """The likeliest so many words behind each."""


class NextWordConfig(RunConfig):
    """Predict the next word."""

    recipe: Literal["next_word"] = "next_word"
    model: Annotated[NgramSection | RecurrentSection, Field(discriminator="kind")]
    data: TextSection
    sample: SampleSection = SampleSection()


Config = NextWordConfig
