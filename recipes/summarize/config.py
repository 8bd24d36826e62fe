"""The run document of summarization, by sentences of the document or in words of the model's own."""

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
from bigbatch.recipes.core.models.config import EncoderSection, Seq2SeqSection

Source = str | TableSource
SPECIAL_TOKENS = 2  # [CLS] sentence [SEP]


class DocumentDataSection(SplitDataSection):
    """Documents, and what people have written as their summaries."""

    not_content: ClassVar[frozenset[str]] = frozenset(
        {"sequence_length", "summary_tokens", "window_sentences", "packing"}
    )

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
    summary_tokens: PositiveInt = 128
    """A `seq2seq` learns to write the first so many tokens of a summary."""
    on_error: Literal["fail", "skip"] = "fail"
    """A document without a sentence, or without a summary that has a word. Told with its file and line, or left out and
    counted. `--on-error` sets it."""
    oracle_sentences: PositiveInt = 3
    """At most so many sentences of a document are labeled: greedily those that together have the best mean of ROUGE-1
    and ROUGE-2 against a reference, as long as it rises."""
    tokenizer: TokenizerSection = TokenizerSection(kind="wordpiece")
    """Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt
    """encoder: tokens of a window, whole sentences in their order, each between its own special ones. A longer document
    has several windows, and no sentence is left out; one that is longer is cut. seq2seq: tokens of a document; a longer
    one is cut."""
    window_sentences: PositiveInt = 64
    """encoder: a window holds no more sentences."""
    packing: bool = True
    """encoder: several windows share a row of `sequence_length` tokens, none sees another; otherwise rows are
    padded."""

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

    backbone: Literal["encoder"]
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


class WriterModelSection(Section):
    """An encoder-decoder that reads the document and writes the summary."""

    backbone: Literal["seq2seq"]
    initialize_from: str | None = None
    """A run folder or checkpoint of an encoder-decoder, or a Hugging Face folder of a BART, an mBART or a Marian; its
    tokenizer and shape come with it."""
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


ModelSection = Annotated[SentenceModelSection | WriterModelSection, Field(discriminator="backbone")]


class ObjectiveSection(Section):
    """What is minimized."""

    loss: Literal["binary", "listwise"] = "binary"
    """Of an encoder. binary: cross-entropy of each sentence against its oracle label, as in BertSum. listwise:
    cross-entropy of a window's sentences against a softmax of their ROUGE, for summaries of one sentence
    (https://doi.org/10.1145/1273496.1273513)."""
    temperature: PositiveFloat = 0.1
    """listwise: what ROUGE, from 0 to 1, is divided by ahead of the softmax."""
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a training token of a document is replaced by the unknown one, drawn anew in every epoch."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """seq2seq: share of the target that is spread over the whole vocabulary (https://arxiv.org/abs/1512.00567, section
    7); the validation loss is without it."""


class SummarySection(Section):
    """encoder: which sentences are chosen."""

    sentences: PositiveInt = 3
    """How many are chosen; fewer where the document has no more."""
    block_trigrams: bool = False
    """Leave out a sentence that shares three words in a row with a better one (https://arxiv.org/abs/1705.04304)."""


class SearchSection(Section):
    """seq2seq: how a summary is looked for."""

    num_beams: PositiveInt = 4
    """1 is greedy."""
    length_penalty: float = 1.0
    """A summary's score is its log-probability over its number of tokens to this power."""
    min_new_tokens: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 128
    """The longest summary."""
    no_repeat_tokens: NonNegativeInt = 3
    """No run of so many tokens stands twice in a summary (https://arxiv.org/abs/1705.04304); 0 lets it."""


class SummarizeConfig(RunConfig):
    """Summarize a document: choose sentences of it, or write."""

    num_outputs: ClassVar[int] = 1

    recipe: Literal["summarize"] = "summarize"
    model: ModelSection
    data: DocumentDataSection
    objective: ObjectiveSection = ObjectiveSection()
    summary: SummarySection = SummarySection()
    search: SearchSection = SearchSection()

    @model_validator(mode="after")
    def _all_has_an_effect(self) -> Self:
        useless = ("search", "objective.label_smoothing", "data.summary_tokens")
        if self.model.backbone == "seq2seq":
            useless = ("summary", "objective.loss", "objective.temperature", "data.oracle_sentences")
            useless += ("data.window_sentences", "data.packing")
        for path in useless:
            section, _, name = path.partition(".")
            found = getattr(self, section)
            if not name and found != type(found)():
                raise ValueError(f"{path} has no effect on model.backbone {self.model.backbone!r}; leave it out")
            if name and getattr(found, name) != type(found).model_fields[name].default:
                raise ValueError(f"{path} has no effect on model.backbone {self.model.backbone!r}; leave it out")
        shape = getattr(self.model, "shape", None)
        if shape and max(self.data.sequence_length, self.data.summary_tokens) > shape.max_positions:
            longest = "data.sequence_length or data.summary_tokens"
            raise ValueError(f"{longest} is more than model.shape.max_positions ({shape.max_positions})")
        return self


Config = SummarizeConfig
