"""The run document: one frozen section a concern, closed to unknown keys. Imports pydantic alone, never torch."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

DOCUMENT_VERSION = 1


class Section(BaseModel):
    """A group of settings: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class AboutSection(Section):
    """What a reader of a run document wants to know before running it."""

    purpose: str
    """What it trains and what for, in one sentence."""
    needs: str
    """Hardware, data and disk."""
    expect: str
    """The figure that it reaches and the time it takes."""
    source: str | None = None
    """Where the settings come from."""


class CleanSection(Section):
    """What happens to a text before it is tokenized."""

    unicode_form: Literal["NFC", "NFKC", "none"] = "NFC"
    strip_control_characters: bool = True
    min_characters: NonNegativeInt = 1
    """Shorter documents are left out."""
    deduplicate: bool = False
    """Leave out a document whose text has been seen before (exact, by hash)."""


class TokenizerSection(Section):
    """Where the tokenizer comes from."""

    kind: Literal["bpe", "wordpiece", "word", "character", "pretrained"] = "bpe"
    """bpe: on bytes, as GPT-2's. wordpiece: as BERT's, each document between [CLS] and [SEP]. word: whole words and
    line ends; a word not known is <unk>."""
    path: str | None = None
    """A tokenizer.json, or a folder that holds one; for kind `pretrained` alone."""
    vocabulary_size: PositiveInt | None = None
    """How many tokens a `bpe` or `wordpiece` trained here may have; a `word`: the commonest, by default all words."""
    lowercase: bool = True
    """wordpiece: small letters without accents. word: small letters."""
    words: Literal["punctuation", "spaces"] = "punctuation"
    """word: what a word ends at. `spaces` alone where the text has been cut into words already."""
    train_characters: PositiveInt = 200_000_000
    """A `bpe`, `wordpiece` or `word` is trained on the first this many characters of the training texts."""


class TableSource(Section):
    """Files of rows, and what their names do not say about them."""

    path: str
    """A file, folder, glob or `hf:NAME[:CONFIG[:SPLIT]]`; `ARCHIVE.zip!MEMBER` is a file in an archive."""
    format: (
        Literal["txt", "lines", "csv", "tsv", "jsonl", "parquet", "squad", "slots", "sgd", "smart", "conll", "semeval"]
        | None
    ) = None
    """By default what the file's name ends with. `lines`: a row is a line of text, in the column `text`. `squad`: a
    .json document of questions; `slots`: one of utterances and the spans of their slots, each slot a question;
    `sgd`: one of Schema-Guided Dialogues, each in the column `messages`. `smart`: records that begin with
    `.I ID`, with fields behind `.T` and the like as columns of those letters; `number` counts the records. `conll`: a
    word and its tag a line, a blank line behind each sentence. `semeval`: sentences with two marked entities and their
    relation, as SemEval-2010 task 8 has them."""
    encoding: str = "utf-8"
    columns: tuple[str, ...] = ()
    """csv and tsv: the columns' names, where the first row does not hold them."""
    pattern: str | None = None
    """lines: a regular expression that each whole line matches; its named groups are the columns."""
    constants: dict[str, str] = {}
    """Further columns, with the same value in every row: {"label": "positive"} for a file of one class."""
    take_every: Annotated[int, Field(gt=1)] | None = None
    """Of each file, only the rows n, 2n, 3n, ... of its 1, 2, 3, ..."""
    skip_every: Annotated[int, Field(gt=1)] | None = None
    """Of each file, all rows but these."""


class ParallelSource(TableSource):
    """Two files of lines, also .gz, of which those with the same number belong together: columns `source`, `target`."""

    target: str
    """The file of the targets; `path` is that of the sources."""


class SplitSection(Section):
    """How examples come into three splits, and what is done with those that are not as they should be."""

    not_content: ClassVar[frozenset[str]] = frozenset()
    """Settings that change nothing in the prepared folder: they say what is done where a split is opened."""

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Cut from the training rows when there are no validation sources."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same for the test split, cut first."""
    split_seed: NonNegativeInt = 0
    """Which rows are cut is a function of this and of their content, not of the run's seed."""
    on_error: Literal["fail", "skip"] = "fail"
    """A row that cannot be taken as it is: told with its file and line, or left out and counted. `--on-error` sets it.
    What is no row at all, such as a line that is no JSON, is always told."""
    on_leak: Literal["report", "drop", "fail"] = "report"
    """Rows of validation and test that stand in an earlier split too; `drop` leaves them out of the later."""
    prepared_dir: str = "prepared"
    """Prepared data go into a folder of this one, named by their content id."""

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are read, each with the setting that asks for it; empty where that can't be told ahead."""
        return {}

    @property
    def further_sources(self) -> dict[str, "tuple[str | TableSource, ...]"]:
        """Sources that belong to no split, by the setting below `data` that names them."""
        return {}


class SplitDataSection(SplitSection):
    """Rows in three splits; a recipe's own section says what stands in them."""

    train: Annotated[tuple[str | TableSource, ...], Field(min_length=1)]
    """Sources of rows: a file, folder or glob, `hf:NAME[:CONFIG[:SPLIT]]`, or an object that says how to read one. A
    relative path is looked for here, then under $BIGBATCH_DATA."""
    validation: tuple[str | TableSource, ...] = ()
    test: tuple[str | TableSource, ...] = ()


class ImageSource(Section):
    """Images, each with a label."""

    path: str
    """A folder that holds a folder of images a class; idx images (.gz too); an .npz file; a Hugging Face data set,
    `hf:NAME[:CONFIG[:SPLIT]]`; or `python:shapes`, drawn here. A relative path is looked for here, then under
    $BIGBATCH_DATA."""
    labels: str | None = None
    """Of a folder: a .csv, .tsv or .jsonl file of images, as paths below the folder, and their labels. Of idx images:
    the file of labels, by default the one of the same name but for `labels` and `idx1`."""
    start: NonNegativeInt = 0
    """idx, npz and Hugging Face: the first image that is taken, counted from 0."""
    stop: PositiveInt | None = None
    """The one behind the last."""


class AudioSource(Section):
    """Recordings, each with its transcript."""

    path: str
    """A manifest (.jsonl, .csv, .tsv) with the columns `audio`, a path from the manifest on, and `text`, and where it
    has them `start` and `duration` in seconds; a folder or an archive (.zip, .tar, .tar.gz) of recordings; or
    `python:tones`, made here. A relative path is looked for here, then under $BIGBATCH_DATA."""
    pattern: str | None = None
    """Of a folder or archive: a regular expression; only files are taken whose whole path below it, without the ending,
    it matches. Its group `text` is the transcript; without one that is in a .txt file of the same name."""
    words: dict[str, str] = {}
    """What is written for some words of the transcripts: {"0": "zero"}."""


class TokenDataSection(Section):
    """Running text for language models."""

    train: Annotated[tuple[str | TableSource, ...], Field(min_length=1)]
    """Sources: a file, folder or glob (.txt, .jsonl, .csv, .tsv, .parquet, also .gz), `hf:NAME[:CONFIG[:SPLIT]]`, or
    `python:stdlib`. A relative path is looked for here, then under $BIGBATCH_DATA."""
    validation: tuple[str | TableSource, ...] = ()
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Cut from the training texts when there are no validation sources."""
    validation_split: Literal["document", "tail"] = "document"
    """`document`: whole documents, chosen by hash. `tail`: the last part of each document."""
    test: tuple[str | TableSource, ...] = ()
    """Looked at by `bigbatch evaluate --split test` alone."""
    text_key: str = "text"
    """Column that holds the text in .jsonl, .csv, .tsv, .parquet and Hugging Face data."""
    clean: CleanSection = CleanSection()
    unit: Literal["text", "line", "sentence"] = "text"
    """What becomes a document of its own: a whole text, each line of it, or each sentence."""
    tokenizer: TokenizerSection = TokenizerSection()
    sequence_length: PositiveInt
    """Tokens a sample."""
    packing: Literal["concatenate", "isolate"] = "concatenate"
    """`isolate`: attention and positions start anew at each document, so that neighbours in a sample never mix."""
    shard_tokens: PositiveInt = 2**27
    prepared_dir: str = "prepared"
    """Prepared data go into a folder of this one, named by their content id."""


class RampStage(Section):
    """A smaller batch for the beginning of a run."""

    until_step: PositiveInt
    global_size: PositiveInt


class BatchSection(Section):
    """Sizes in samples."""

    global_size: PositiveInt
    """Samples an optimizer step, over all ranks."""
    micro_size: PositiveInt | None = None
    """Samples a forward pass on one rank; by default the whole share of the rank."""
    ramp: tuple[RampStage, ...] = ()


class LocalSgdSection(Section):
    """How ranks that train alone meet (DiLoCo, https://arxiv.org/abs/2311.08105); for `sync` local_sgd."""

    every_steps: PositiveInt = 500
    """Each rank steps alone for so long; the ranks also meet at the last step of the schedule."""
    outer_learning_rate: PositiveFloat = 0.7
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov's; 0 with an outer learning rate of 1 takes the plain mean of the ranks' parameters."""


class ParallelSection(Section):
    """How the work is divided. The number of data ranks follows: the processes started over the others here."""

    tensor: PositiveInt = 1
    """Ranks that share each layer of one model: its heads, inner units and vocabulary are divided over them."""
    tensor_sequence: bool = False
    """Divide over the tensor ranks, along tokens, what lies between the layers too: norms, dropout, residual stream
    (https://arxiv.org/abs/2205.05198, section 4.2.2). Off by default: it saves activations, but of what a layer takes
    in each rank then keeps its own tokens alone and gathers the others again in the backward pass, a quarter more
    bytes. Not with a pipeline."""
    pipeline: PositiveInt = 1
    """Stages that consecutive layers are divided into; micro-batches pass through one after another. ZeRO stage 1."""
    expert: PositiveInt = 1
    """Data ranks that share out a mixture's experts (https://arxiv.org/abs/2006.16668): tokens travel to the rank that
    has their expert. Divides the data ranks and `model.num_experts`. ZeRO stages 0 to 2."""
    sequence: PositiveInt = 1
    """Ranks that share the tokens of each row; attention exchanges them for shares of the heads (DeepSpeed Ulysses).
    For rows too long for the activations of one rank."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage; by default the DeepSpeed document's, else 0 or 1 as `sync` asks."""
    sync: Literal["all_reduce", "ring", "sharded", "local_sgd"] | None = None
    """What the data ranks exchange. all_reduce: gradients, all to all ranks (stage 0). ring: the same, and NCCL has to
    take its ring. sharded: each rank is the server of its shard (stages 1 to 3). local_sgd: parameters, every so many
    steps (stage 0). By default the stage's."""
    local_sgd: LocalSgdSection = LocalSgdSection()


class PrecisionSection(Section):
    """Number formats of weights and gradients; masters and optimizer state are always float32."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    initial_scale_power: NonNegativeInt = 16
    """fp16: the first loss scale is 2 to this power."""
    scale_window: PositiveInt = 1000
    """fp16: good steps before the loss scale doubles."""
    static_loss_scale: PositiveFloat | None = None
    """fp16: a fixed loss scale."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose gradient is not finite (fp16 lowers its scale first)."""
    max_skipped_steps: PositiveInt = 10
    """With `skip`: stop after this many in a row."""


class OptimizerSection(Section):
    """The update rule."""

    name: Literal["adamw", "adam", "sgd", "adagrad", "lion", "lamb", "adamw_8bit"] = "adamw"
    learning_rate: PositiveFloat
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Not applied to biases, norms and other vectors."""
    momentum: Fraction = 0.0
    """sgd only."""
    gradient_clipping: PositiveFloat | None = 1.0
    """Largest global 2-norm of the gradient."""
    keep_zeros: bool = False
    """Weights of matrices that are 0 at the first step stay 0, so that a pruned model recovers and stays pruned."""


class ScheduleSection(Section):
    """Learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd", "polynomial"] = "cosine"
    total_steps: PositiveInt
    warmup_steps: NonNegativeInt = 0
    final_ratio: Fraction = 0.1
    """Learning rate at the end over the peak."""
    decay_steps: PositiveInt | None = None
    """wsd: steps of the final decay, by default a tenth of the total."""
    power: PositiveFloat = 1.0
    """polynomial."""
    stop_step: PositiveInt | None = None
    """End the run here, saved, without changing the schedule."""


class CheckpointSection(Section):
    """When to save and what to keep."""

    every_steps: PositiveInt = 1000
    keep: PositiveInt = 2
    """The newest this many stay."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this stay for ever."""
    asynchronous: bool = True
    """Steps go on while a checkpoint is written, from a copy in host memory that stays: 12 bytes for each weight a rank
    holds the master of (with AdamW). false spares that memory, and each save's whole time is then waited for."""


class EvaluateSection(Section):
    """Validation during training."""

    every_steps: PositiveInt = 500
    max_samples: PositiveInt | None = None
    """Evaluate on the first this many samples; by default on all."""
    best_by: str | None = None
    """A validation figure (`loss`, `accuracy`, ...): the checkpoint that is best by it is kept, whatever
    `checkpoint.keep` says, and is the one that evaluate, predict and convert take."""
    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row that did not better `best_by`."""

    @model_validator(mode="after")
    def _patience_has_a_figure(self) -> Self:
        if self.patience and not self.best_by:
            raise ValueError("patience needs best_by, the validation figure that is to get better")
        return self


class ReportSection(Section):
    """What is written down while training."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True


class WatchdogSection(Section):
    """When to give up on ranks that stand still."""

    limit_seconds: PositiveFloat | None = 1800.0
    """End all ranks, with their stacks in log/, when one has not moved on for so long; null: never. A step, a batch of
    an evaluation, a save, and at the start the data, the model and the restoring each begin the count anew: the longest
    of them has to be shorter."""


class SamplingSection(Section):
    """How the next token of a text is chosen, and when to stop."""

    max_new_tokens: PositiveInt = 100
    temperature: NonNegativeFloat = 0.8
    """0 is greedy."""
    top_k: NonNegativeInt = 50
    """0 is all."""
    top_p: Fraction = 1.0


class RunConfig(Section):
    """A run document; each recipe adds its own sections in a class of its own."""

    axes: ClassVar[tuple[str, ...]] = ()
    """Keys of `parallel` that the recipe's model can be divided along, beside the data ranks."""
    start_brings_tokenizer: ClassVar[bool] = False
    """A decoder's `model.initialize_from` may be a run, and its tokenizer is the one that counts."""

    version: Literal[1]
    recipe: str
    about: AboutSection | None = None
    deepspeed: str | None = None
    """Name of a DeepSpeed document under ds_configs/deepspeed, or the path of your own."""
    batch: BatchSection
    parallel: ParallelSection = ParallelSection()
    precision: PrecisionSection = PrecisionSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    report: ReportSection = ReportSection()
    watchdog: WatchdogSection = WatchdogSection()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
