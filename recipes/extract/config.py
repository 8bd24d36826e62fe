"""The run document of extraction: entities in sentences, or the relation between two marked ones."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    RunConfig,
    Section,
    SplitDataSection,
    TokenizerSection,
)
from bigbatch.recipes.core.models.config import EncoderSection

MOST_PIECES = 16  # tokens of a word that an encoder looks at
SPECIAL_TOKENS = 2  # [CLS] sentence [SEP]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class ExtractDataSection(SplitDataSection):
    """Sentences whose entities are known, or the relation of two of them.

    Sources are CoNLL columns (format `conll`), SemEval-2010 task 8 (format `semeval`), tables (.jsonl, .parquet, ...)
    and `python:entities` or `python:relations`, signatures in Python's own library.
    """

    not_content: ClassVar[frozenset[str]] = frozenset({"sequence_length", "packing"})

    task: Literal["entities", "relations"]
    """entities: where they are, and of which type. relations: how two that are marked are related."""
    text_column: str = "text"
    """Of tables without `tokens_column`."""
    entities_column: str | None = None
    """A list of {"start", "end", "type"}, in characters; of relations two, without a type. By default `entities`; where
    the task is relations the text has <e1>...</e1> and <e2>...</e2> in it."""
    tokens_column: str | None = None
    """entities: a list of words, instead of a text; `tags_column` has a list of as many tags."""
    tags_column: str = "tags"
    scheme: Literal["iob2", "iob1"] = "iob2"
    """Of tags. iob2: every entity begins with B-. iob1: only one that stands right behind another of its type does."""
    relation_column: str = "relation"
    """relations: a name; with (e1,e2) or (e2,e1) behind it one that has a direction."""
    no_relation: str = "Other"
    """relations: the name for none of the others; it has no part in the macro-F1."""
    tokenizer: TokenizerSection = TokenizerSection(kind="word", words="spaces")
    """Of each word by itself. Left out where the model is `initialize_from` another: it brings its own."""
    sequence_length: PositiveInt
    """Tokens of a sentence that an encoder sees at once, special ones counted; words, where there is no encoder. What
    is longer is read in parts, each by itself; of relations the part that holds both entities."""
    packing: bool = True
    """encoder: several sentences share a row of `sequence_length` tokens, none sees another."""

    @model_validator(mode="after")
    def _reads_one_form(self) -> Self:
        if self.tokens_column and (self.task == "relations" or self.entities_column):
            raise ValueError("tokens_column is for entities in tags, without entities_column; relations are in texts")
        return self

    def columns_of(self, form: str) -> dict[str, str]:
        """Return the columns that are read of a file of this format, each with the setting that asks for it."""
        if form == "conll":
            return {"lines": "data.task"}
        names = {"text_column": self.text_column, "entities_column": self.entities_column}
        if self.task == "relations":
            names["relation_column"] = self.relation_column
        elif self.tokens_column:
            names = {"tokens_column": self.tokens_column, "tags_column": self.tags_column}
        else:
            names["entities_column"] = self.entities_column or "entities"
        return {name: f"data.{setting}" for setting, name in names.items() if name}


class EncoderBackboneSection(Section):
    """A BERT with a head: fine-tuned, or from first weights."""

    backbone: Literal["encoder"]
    initialize_from: str | None = None
    """A run folder or checkpoint of an encoder, such as bert_pretrain's, or a Hugging Face BERT folder; its tokenizer
    and shape come with it."""
    encoder: EncoderSection | None = None
    """The shape, where nothing is given to start from."""
    dropout: Dropout | None = None
    """Of all layers; by default as in the shape."""
    head_dropout: Dropout = 0.1
    crf: bool = False
    """entities: tags of neighbours depend on each other (https://arxiv.org/abs/1603.01360, section 2.2)."""
    keep_head: bool = False
    """Start with the head of what is started from, whose labels must be these, instead of drawing one."""
    redraw_layers: NonNegativeInt = 0
    """Draw the last so many layers anew (https://arxiv.org/abs/2006.05987)."""
    freeze_embeddings: bool = False
    freeze_layers: NonNegativeInt = 0
    """The first so many layers keep their weights, and the embeddings with them."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer learns at this times the rate of the one above (https://arxiv.org/abs/1801.06146, section 3.2)."""


class WordBackboneSection(Section):
    """Words by their vectors, their letters and hashed features; LSTM or GRU layers over them. From first weights."""

    backbone: Literal["words"]
    cell: Literal["lstm", "gru"] = "lstm"
    hidden_size: PositiveInt = 100
    """Of each direction."""
    num_layers: NonNegativeInt = 1
    """0: each word is judged by its features alone."""
    embedding_size: PositiveInt = 100
    """Of a word; one that its tokenizer cuts into several tokens has their sum."""
    character_size: NonNegativeInt = 30
    """Of a letter; 0: no letters are looked at."""
    character_filters: PositiveInt = 50
    """Patterns of three letters that are looked for, largest match each (https://arxiv.org/abs/1603.01354)."""
    position_size: NonNegativeInt = 25
    """relations: of the distance to each of the entities (https://aclanthology.org/C14-1220)."""
    feature_buckets: NonNegativeInt = 0
    """Words, their beginnings, ends and shapes, and short sequences of them around what is judged, hashed into so many
    weights for each label, as in linear models; 0: none."""
    feature_dropout: Dropout = 0.0
    """Chance that a feature is left out while training."""
    dropout: Dropout = 0.5
    """Ahead of and behind the layers, the same features for all words of a sentence."""
    crf: bool = True
    """entities: tags of neighbours depend on each other (https://arxiv.org/abs/1603.01360, section 2.2)."""


ModelSection = Annotated[EncoderBackboneSection | WordBackboneSection, Field(discriminator="backbone")]


class ObjectiveSection(Section):
    """What is minimized."""

    token_dropout: Dropout = 0.0
    """Chance that a training word's tokens are replaced by the unknown one, drawn anew in every epoch."""
    label_smoothing: Dropout = 0.0
    """Without a CRF."""
    outside_margin: NonNegativeFloat = 0.0
    """entities: added to the score of O while training, so that more is found where entities are rare
    (https://aclanthology.org/E12-1017, section 3.2)."""


class ExtractConfig(RunConfig):
    """Find entities in a text, or tell how two of them are related."""

    recipe: Literal["extract"] = "extract"
    model: ModelSection
    data: ExtractDataSection
    objective: ObjectiveSection = ObjectiveSection()

    @model_validator(mode="after")
    def _data_fit_an_encoder(self) -> Self:
        if not isinstance(self.model, EncoderBackboneSection):
            return self
        least, kind = MOST_PIECES + SPECIAL_TOKENS, self.data.tokenizer.kind
        if self.model.initialize_from is None and kind not in ("wordpiece", "pretrained"):
            raise ValueError(f"data.tokenizer.kind is {kind!r}; right for an encoder is 'wordpiece' or 'pretrained'")
        if self.data.sequence_length < least:
            found = f"data.sequence_length is {self.data.sequence_length}; an encoder's is {least} or more"
            raise ValueError(f"{found}: a word may have {MOST_PIECES} tokens")
        return self


Config = ExtractConfig
