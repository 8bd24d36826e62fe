"""The run document of matching: pairs of texts, documents for queries, items for users."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import (
    NonNegativeFloat,
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
Split = Literal["train", "validation", "test"]


class CollectionSection(Section):
    """Texts with ids, which rows name: documents that are searched, and queries."""

    documents: Annotated[tuple[Source, ...], Field(min_length=1)]
    document_id_column: str = "id"
    document_columns: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """Several are put together with a line end between them."""
    queries: tuple[Source, ...] = ()
    """Without any, a judgement holds the query itself, or a list of documents' ids, the newest last: what a user has
    had. Such documents are no candidates for this query."""
    query_id_column: str = "id"
    query_columns: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    judged: Annotated[tuple[Split, ...], Field(min_length=1)] = ("train", "validation", "test")
    """Splits whose rows are judgements, with ids; those of the others hold texts."""
    query_column: str = "query"
    document_column: str = "document"
    grade_column: str | None = None
    """How relevant the document is; without it 1. A grade of 0 is not relevant; others are no training pairs."""
    grades: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """What grades are worth, where they are not numbers that grow with relevance."""

    @property
    def judgement_columns(self) -> dict[str, str]:
        """Columns of rows that are judgements, each with the setting that asks for it."""
        names = ("query_column", "document_column", "grade_column")
        return {column: f"data.collection.{name}" for name in names if (column := getattr(self, name))}


class MiningSection(Section):
    """Hard negatives: documents of the training pairs that are near a query but not its own."""

    count: PositiveInt = 1
    """For each pair."""
    by: str = "bm25"
    """`bm25`, or the folder of a run or checkpoint of this recipe's bi-encoder."""
    skip: NonNegativeInt = 0
    """The nearest so many are left out: they may well be right."""


Stemming = Literal["none", "english"]


class MatchDataSection(SplitDataSection):
    """Pairs of texts."""

    not_content: ClassVar[frozenset[str]] = frozenset({"sequence_length", "group_size", "rerank", "packing"})

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of pairs: tables (.csv, .tsv, .jsonl, .parquet, folders, globs, `hf:NAME[:CONFIG[:SPLIT]]`),
    `python:functions`, `python:imports`, or an object that says how to read one. A relative path is looked for here,
    then under $BIGBATCH_DATA."""
    left_column: str = "left"
    """A sentence, a query."""
    right_column: str = "right"
    """Another sentence, a document."""
    score_column: str | None = None
    """How alike both are. Without it every pair belongs together, and no text belongs to one that it has no pair with.
    """
    score_range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest score."""
    negatives_column: str | None = None
    """A text, or a list of texts, that do not belong to the left one; rows have equally many."""
    group_column: str | None = None
    """Rows equal in this one come into the same split (a user); by default those with the same left text."""
    collection: CollectionSection | None = None
    mining: MiningSection | None = None
    tokenizer: TokenizerSection = TokenizerSection(kind="wordpiece")
    """Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt
    """Longest text in tokens; of a cross-encoder, both texts together, which are cut to equal lengths."""
    group_size: PositiveInt = 1
    """Pairs in a training sample, drawn anew in every epoch. The others' texts are a pair's negatives, and scores are
    compared within a group: it is the same whatever the ranks and micro-batches."""
    depth: PositiveInt = 1000
    """Documents that BM25 finds for each query of validation and test: by which its figures are computed."""
    rerank: PositiveInt = 50
    """How many of these a cross-encoder orders."""
    stemming: Stemming = "none"
    """What BM25 counts as one word: `english` all that have a stem in common, as flow, flows and flowing (Snowball)."""
    packing: bool = True
    """Several texts share a row of `sequence_length` tokens, none sees another; otherwise rows are padded."""

    @model_validator(mode="after")
    def _scores_have_a_range(self) -> Self:
        if self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range {list(self.score_range)} is empty; right is the lowest, then the highest")
        if self.score_column and (self.collection or self.mining or self.negatives_column):
            raise ValueError(
                "score_column has no use beside collection, mining or negatives_column: they are of pairs "
                "that belong together"
            )
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Columns that all splits' rows have, each with the setting that asks for it."""
        return {} if self.collection else self.pair_columns | self.group_columns

    @property
    def further_sources(self) -> dict[str, tuple[Source, ...]]:
        """The collection's sources, which belong to no split."""
        names = ("documents", "queries") if self.collection else ()
        return {f"collection.{name}": getattr(self.collection, name) for name in names}

    @property
    def group_columns(self) -> dict[str, str]:
        """The column that keeps rows together, where there is one."""
        return {self.group_column: "data.group_column"} if self.group_column else {}

    @property
    def pair_columns(self) -> dict[str, str]:
        """Columns of rows that hold texts."""
        names = ("left_column", "right_column", "score_column", "negatives_column")
        return {column: f"data.{name}" for name in names if (column := getattr(self, name))}


class MatchModelSection(Section):
    """What turns texts into vectors, or pairs into scores."""

    kind: Literal["bi", "cross"] = "bi"
    """bi: each text gets a vector by itself, and the cosine of two is their score (https://arxiv.org/abs/1908.10084).
    cross: both texts are read together, which sees more and cannot be looked up in an index."""
    backbone: Literal["encoder", "words"] = "encoder"
    """words: the sum of a vector for each token, drawn as long as the token is rare in the training texts."""
    pooling: Literal["mean", "first"] = "mean"
    """bi, encoder: what becomes of the tokens' states. A cross-encoder takes BERT's summary of the first."""
    embedding_size: PositiveInt = 256
    """words: numbers a token."""
    initialize_from: str | None = None
    """encoder: a run folder or checkpoint of an encoder, such as bert_pretrain's, or a Hugging Face BERT folder; its
    tokenizer and shape come with it."""
    encoder: EncoderSection | None = None
    """The shape, where nothing is given to start from."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of all layers; by default as in the shape."""
    keep_head: bool = False
    """cross: start with the head of what is started from, which scores pairs already, instead of drawing one."""
    redraw_layers: NonNegativeInt = 0
    """Draw the last so many layers anew (https://arxiv.org/abs/2006.05987)."""
    freeze_embeddings: bool = False
    freeze_layers: NonNegativeInt = 0
    """The first so many layers keep their weights, and the embeddings with them."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer learns at this times the rate of the one above (https://arxiv.org/abs/1801.06146, section 3.2)."""


class ObjectiveSection(Section):
    """What is minimized."""

    loss: Literal["contrastive", "cosine", "ranking", "binary"] = "contrastive"
    """contrastive: find the right text among those of the group and the negatives (InfoNCE,
    https://arxiv.org/abs/1807.03748). cosine: the squared difference of cosine and score. ranking: of each two pairs of
    a group the one with the higher score has the higher cosine (CoSENT, https://kexue.fm/archives/8847). binary:
    cross-entropy of a cross-encoder's score; of pairs without scores, against the left text with its negatives and with
    another right one of its group."""
    temperature: PositiveFloat = 0.05
    """contrastive and ranking: what cosines are divided by."""
    symmetric: bool = True
    """contrastive: also find the left text of the right one."""
    popularity: bool = False
    """contrastive: let scores learn how often a right text is right, which they do not against rivals that stand in a
    group as often as they are (the correction of https://doi.org/10.1145/3298689.3346996). For items."""
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a training token is replaced by the unknown one, drawn anew in every epoch."""


class SearchSection(Section):
    """How `bigbatch search` finds documents, and how BM25's and the model's answers are put together (hybrid)."""

    by: Literal["hybrid", "model", "words"] = "hybrid"
    """By both, by the model's vectors, or by BM25. Evaluation tells of all three."""

    fusion: Literal["reciprocal", "sum"] = "reciprocal"
    """reciprocal: the sum of 1 / (60 + rank), as in https://doi.org/10.1145/1571941.1572114. sum: of both scores,
    each brought to 0..1 for the query."""
    bm25_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of BM25 in the sum; the model has the rest."""


class MatchConfig(RunConfig):
    """Tell how well texts match: sentences alike, documents for queries, items for users."""

    recipe: Literal["match"] = "match"
    model: MatchModelSection
    data: MatchDataSection
    objective: ObjectiveSection = ObjectiveSection()
    search: SearchSection = SearchSection()

    @property
    def num_outputs(self) -> int:
        """Numbers that a head gives; a bi-encoder has none."""
        return int(self.model.kind == "cross")

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        loss, data = self.objective.loss, self.data
        if (self.model.kind == "cross") != (loss == "binary"):
            right = "binary" if self.model.kind == "cross" else "contrastive, cosine or ranking"
            raise ValueError(f"objective.loss is {loss!r}; right for model.kind {self.model.kind!r} is {right}")
        if self.model.kind == "cross" and self.model.backbone == "words":
            raise ValueError("model.backbone is 'words'; right for model.kind 'cross' is 'encoder'")
        if self.model.backbone == "words" and (self.model.encoder or self.model.initialize_from):
            raise ValueError("model.backbone 'words' has no use for model.encoder and model.initialize_from")
        if loss in ("cosine", "ranking") and not data.score_column:
            raise ValueError(f"objective.loss {loss!r} needs data.score_column")
        if loss == "contrastive" and data.score_column:
            raise ValueError("objective.loss 'contrastive' takes pairs without scores; leave data.score_column out")
        has_others = data.group_size > 1 or data.negatives_column or data.mining
        if not has_others and (loss in ("contrastive", "ranking") or (loss == "binary" and not data.score_column)):
            raise ValueError(f"objective.loss {loss!r} has nothing to compare with; right is a data.group_size above 1")
        return self


Config = MatchConfig
