"""The run document of extractive question answering."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import (
    Fraction,
    NonNegativeInt,
    PositiveInt,
    RunConfig,
    Section,
    SplitDataSection,
    TableSource,
    TokenizerSection,
)
from bigbatch.recipes.core.models.config import EncoderSection

Source = str | TableSource
SPECIAL_TOKENS = 3  # [CLS] question [SEP] context [SEP]


class QuestionDataSection(SplitDataSection):
    """Questions, the contexts that hold their answers, and where the answers stand there."""

    not_content: ClassVar[frozenset[str]] = frozenset(
        {"sequence_length", "question_tokens", "stride_tokens", "null_windows_kept", "packing"}
    )

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of questions: SQuAD documents (.json, also .gz), tables (.jsonl, .parquet, folders, globs,
    `hf:NAME[:CONFIG[:SPLIT]]`), `python:questions`, or an object that says how to read one. A relative path is looked
    for here, then under $BIGBATCH_DATA."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Cut from the training questions when there are no validation sources; those on a context stay together."""
    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    """A list of objects: {"text", "answer_start"}, or {"start", "end"} with or without "text", in characters; or one
    object of lists, as Hugging Face's SQuAD has it. Empty where the context does not hold the answer."""
    group_column: str | None = None
    """The kind of a question (`slot`, `title`): the span F1 is also told for each, and averaged over them."""
    on_error: Literal["fail", "skip"] = "fail"
    """A question or a context without a token; an answer that does not stand where the row says, or that has none.
    Told with its file and line, or left out and counted. `--on-error` sets it."""
    on_leak: Literal["report", "drop", "fail"] = "report"
    """Contexts of validation and test rows that stand in an earlier split too; `drop` leaves them out of the later."""
    tokenizer: TokenizerSection = TokenizerSection(kind="wordpiece")
    """Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt
    """Tokens of a window: special ones, the question and a part of the context."""
    question_tokens: PositiveInt = 64
    """A longer question is cut."""
    stride_tokens: PositiveInt = 128
    """A longer context is read in windows; each begins so many tokens behind the one before, but leaves none out."""
    null_windows_kept: Fraction = 1.0
    """Share of the training windows without an answer that is trained on, always the same ones. Where they are many,
    each teaches little (https://arxiv.org/abs/1901.08634)."""
    packing: bool = True
    """Several windows share a row of `sequence_length` tokens, none sees another; otherwise rows are padded."""

    @model_validator(mode="after")
    def _question_leaves_room(self) -> Self:
        if self.question_tokens + SPECIAL_TOKENS >= self.sequence_length:
            found = f"question_tokens {self.question_tokens} and {SPECIAL_TOKENS} special ones"
            raise ValueError(f"{found} leave no room for a context in sequence_length {self.sequence_length}")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are read, each with the setting that asks for it."""
        names = ("question_column", "context_column", "answers_column", "group_column")
        return {column: f"data.{name}" for name in names if (column := getattr(self, name))}


class SpanModelSection(Section):
    """A BERT with a head for the first and the last token of an answer."""

    backbone: Literal["encoder"] = "encoder"
    initialize_from: str | None = None
    """A run folder or checkpoint of an encoder, such as bert_pretrain's, or a Hugging Face BERT folder; its tokenizer
    and shape come with it."""
    encoder: EncoderSection | None = None
    """The shape, where nothing is given to start from."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of all layers; by default as in the shape."""
    keep_head: bool = False
    """Start with the head of what is started from, which answers questions already, instead of drawing one."""
    redraw_layers: NonNegativeInt = 0
    """Draw the last so many layers anew (https://arxiv.org/abs/2006.05987)."""
    freeze_embeddings: bool = False
    freeze_layers: NonNegativeInt = 0
    """The first so many layers keep their weights, and the embeddings with them."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer learns at this times the rate of the one above (https://arxiv.org/abs/1801.06146, section 3.2)."""


class ObjectiveSection(Section):
    """What is minimized."""

    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a training token is replaced by the unknown one, drawn anew in every epoch."""


class AnswerSection(Section):
    """How an answer is chosen."""

    most_tokens: PositiveInt = 30
    """The longest answer."""
    candidates: PositiveInt = 20
    """Best answers that share the probability with having none, in predict."""
    null_threshold: float | None = None
    """No answer is given where its score exceeds the best answer's by more than this; by default what gives the best
    F1 on the validation split, 0 without one. Of no effect where every training question has an answer."""


class QuestionAnsweringConfig(RunConfig):
    """Find the answer to a question in a text, or tell that it is not there."""

    num_outputs: ClassVar[int] = 2

    recipe: Literal["question_answering"] = "question_answering"
    model: SpanModelSection
    data: QuestionDataSection
    objective: ObjectiveSection = ObjectiveSection()
    answers: AnswerSection = AnswerSection()


Config = QuestionAnsweringConfig
