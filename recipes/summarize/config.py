"""The run document of summarization."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import (
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
SPECIAL_TOKENS = 2  # [CLS] sentence [SEP]


class DocumentDataSection(SplitDataSection):
    """Documents, and what people have written as their summaries."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of documents: tables (.jsonl, .parquet, .csv, .tsv, folders, globs, `hf:NAME[:CONFIG[:SPLIT]]`),
    `python:summaries`, or an object that says how to read one. A relative path is looked for here, then under
    $BIGBATCH_DATA."""
    document_column: str = "document"
    """A text, which is cut into sentences behind . ! ? and at empty lines; or a list of sentences, taken as they are.
    Space inside a sentence becomes a single one."""
    summary_column: str = "summary"
    """A text, or a list as `summary_list` says. Of a list of lists each inner one is a reference's sentences."""
    summary_list: Literal["references", "sentences"] = "references"
    """What a list in the summary column holds: several summaries of the same document, each of which is right, or the
    sentences of one."""
    on_error: Literal["fail", "skip"] = "fail"
    """A document without a sentence, or without a summary that has a word. Told with its file and line, or left out and
    counted. `--on-error` sets it."""
    oracle_sentences: PositiveInt = 3
    """At most so many sentences of a document are labeled: greedily those that together have the best mean of ROUGE-1
    and ROUGE-2 against a reference, as long as it rises."""
    tokenizer: TokenizerSection = TokenizerSection(kind="wordpiece")
    """Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt
    """Tokens of a window: whole sentences in their order, each between its own special ones. A longer document has
    several windows, and no sentence is left out; one that is longer is cut."""
    window_sentences: PositiveInt = 64
    """A window holds no more sentences."""
    packing: bool = True
    """Several windows share a row of `sequence_length` tokens, none sees another; otherwise rows are padded."""

    @model_validator(mode="after")
    def _sentence_has_room(self) -> Self:
        if self.sequence_length <= SPECIAL_TOKENS:
            raise ValueError(
                f"sequence_length {self.sequence_length} has no room but for {SPECIAL_TOKENS} special ones"
            )
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are read, each with the setting that asks for it."""
        return {getattr(self, name): f"data.{name}" for name in ("document_column", "summary_column")}


class SentenceModelSection(Section):
    """A BERT over a whole window with a score for each sentence (https://arxiv.org/abs/1903.10318)."""

    backbone: Literal["encoder"] = "encoder"
    initialize_from: str | None = None
    """A run folder or checkpoint of an encoder, such as bert_pretrain's, or a Hugging Face BERT folder; its tokenizer
    and shape come with it."""
    encoder: EncoderSection | None = None
    """The shape, where nothing is given to start from."""
    sentence_layers: NonNegativeInt = 0
    """Layers in which the sentences of a window see each other, ahead of the score. transformers has no class for
    these."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of all layers; by default as in the shape."""
    keep_head: bool = False
    """Start with the head of what is started from, which scores sentences already, instead of drawing one."""
    redraw_layers: NonNegativeInt = 0
    """Draw the last so many layers anew (https://arxiv.org/abs/2006.05987)."""
    freeze_embeddings: bool = False
    freeze_layers: NonNegativeInt = 0
    """The first so many layers keep their weights, and the embeddings with them."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer learns at this times the rate of the one above (https://arxiv.org/abs/1801.06146, section 3.2)."""


class ObjectiveSection(Section):
    """What is minimized."""

    loss: Literal["binary", "listwise"] = "binary"
    """binary: cross-entropy of each sentence against its oracle label, as in BertSum. listwise: cross-entropy of a
    window's sentences against a softmax of their ROUGE, for summaries of one sentence
    (https://doi.org/10.1145/1273496.1273513)."""
    temperature: PositiveFloat = 0.1
    """listwise: what ROUGE, from 0 to 1, is divided by ahead of the softmax."""
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a training token is replaced by the unknown one, drawn anew in every epoch."""


class SummarySection(Section):
    """How a summary is made."""

    sentences: PositiveInt = 3
    """How many are chosen; fewer where the document has no more."""
    block_trigrams: bool = False
    """Leave out a sentence that shares three words in a row with a better one (https://arxiv.org/abs/1705.04304)."""


class SummarizeConfig(RunConfig):
    """Choose the sentences of a document that summarize it."""

    num_outputs: ClassVar[int] = 1

    recipe: Literal["summarize"] = "summarize"
    model: SentenceModelSection
    data: DocumentDataSection
    objective: ObjectiveSection = ObjectiveSection()
    summary: SummarySection = SummarySection()


Config = SummarizeConfig
