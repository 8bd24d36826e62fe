"""The run document of text classification."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bigbatch.recipes.core.config import (
    CleanSection,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    Section,
    SplitDataSection,
    TableSource,
    TokenizerSection,
)
from bigbatch.recipes.core.models.config import EncoderSection

Source = str | TableSource


class LabeledDataSection(SplitDataSection):
    """Texts with one label each, or several."""

    not_content: ClassVar[frozenset[str]] = frozenset({"sequence_length", "packing", "on_long_text"})

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of rows: a file, folder or glob (.csv, .tsv, .jsonl, .parquet, also .gz), `hf:NAME[:CONFIG[:SPLIT]]`,
    `python:docstrings` (columns text and kind), or an object that says how to read one. A relative path is looked for
    here, then under $BIGBATCH_DATA."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Cut from the training rows, of each label the same share, when there are no validation sources."""
    text_columns: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """Columns that hold the text, joined by a space."""
    label_column: str = "label"
    multi_label: bool = False
    """A row may have any number of labels: a list in .jsonl, .parquet and Hugging Face data."""
    label_separator: str = ","
    """multi_label: what stands between the labels of a row where they are one text."""
    labels: tuple[str, ...] = ()
    """All labels, in the order of the model's outputs; by default those of the training rows, sorted."""
    clean: CleanSection = CleanSection()
    """`deduplicate` leaves out rows whose text has been seen before, ahead of any split."""
    tokenizer: TokenizerSection = TokenizerSection(kind="wordpiece")
    """Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt
    """Tokens of a text at most, the first and the last special ones counted."""
    on_long_text: Literal["truncate", "window", "refuse"] = "truncate"
    """A longer text is cut; or read in windows that overlap by half, whose logits are averaged; or an error."""
    packing: bool = True
    """Several texts share a row of `sequence_length` tokens, none sees another; otherwise rows are padded. Recurrent
    layers have no padding either way."""

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are read, each with the setting that asks for it."""
        texts = {name: f"data.text_columns[{place}]" for place, name in enumerate(self.text_columns)}
        return {**texts, self.label_column: "data.label_column"}


class EncoderBackboneSection(Section):
    """A BERT with a head: fine-tuned, or from first weights."""

    backbone: Literal["encoder"]
    initialize_from: str | None = None
    """A run folder or checkpoint of bert_pretrain, or a Hugging Face folder; its tokenizer and shape come with it."""
    encoder: EncoderSection | None = None
    """The shape, where nothing is given to start from."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of all layers; by default as in the shape."""
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    pooling: Literal["first", "mean"] = "first"
    """first: the first token's state through a layer with tanh, as BERT does. mean: over the text's tokens."""
    keep_head: bool = False
    """Start with the folder's own head instead of drawing one; its labels must be these."""
    redraw_layers: NonNegativeInt = 0
    """Draw the last so many layers anew (https://arxiv.org/abs/2006.05987)."""
    freeze_embeddings: bool = False
    freeze_layers: NonNegativeInt = 0
    """The first so many layers keep their weights, and the embeddings with them."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer learns at this times the rate of the one above (https://arxiv.org/abs/1801.06146, section 3.2)."""


class AttentionBackboneSection(Section):
    """Multi-head attention over embeddings, from first weights; learned queries gather each text's states."""

    backbone: Literal["attention"]
    embedding_size: PositiveInt = 128
    """Also the width of the layers."""
    bigram_buckets: NonNegativeInt = 0
    """Vectors for pairs of neighbouring tokens, which share so many by a hash; 0: none."""
    num_layers: NonNegativeInt = 1
    """Layers of self-attention; with 0 and no bigrams the order of the tokens does not count."""
    num_heads: PositiveInt = 4
    """Of each layer, and of the queries that gather a text."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """In the layers and ahead of the head."""
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3


class RecurrentBackboneSection(Section):
    """LSTM or GRU layers over embeddings, from first weights, without a step on padding."""

    backbone: Literal["rnn"]
    cell: Literal["lstm", "gru"] = "lstm"
    bidirectional: bool = True
    embedding_size: PositiveInt = 128
    bigram_buckets: NonNegativeInt = 0
    """Vectors for pairs of neighbouring tokens, which share so many by a hash; 0: none."""
    hidden_size: PositiveInt = 128
    """Of each direction."""
    num_layers: PositiveInt = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Between the layers and ahead of the head."""
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    pooling: Literal["last", "mean", "max"] = "max"
    """last: the state after a text's last token, and of the backward direction after its first."""


ModelSection = Annotated[
    EncoderBackboneSection | AttentionBackboneSection | RecurrentBackboneSection, Field(discriminator="backbone")
]


class ObjectiveSection(Section):
    """What is minimized."""

    class_weights: Literal["none", "balanced"] | dict[str, PositiveFloat] = "none"
    """balanced: inversely to how many training rows a label has; scaled so that their mean over the rows is 1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a training token is replaced by the unknown one, drawn anew in every epoch."""
    threshold: Fraction = 0.5
    """multi_label: a label is given from this probability on."""


class ClassifyConfig(RunConfig):
    """Tell of which kind a text is."""

    recipe: Literal["classify"] = "classify"
    model: ModelSection
    data: LabeledDataSection
    objective: ObjectiveSection = ObjectiveSection()


Config = ClassifyConfig
