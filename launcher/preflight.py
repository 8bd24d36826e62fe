"""Everything that can be known before the queue, in under a second and without torch."""

import csv
import gzip
import importlib.util
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from bigbatch.launcher.predict import (
    OUTER_BYTES,
    Start,
    checkpoint_bytes,
    count_active_parameters,
    count_parameters,
    count_speech_parameters,
    count_vision_parameters,
    look_at_start,
    vocabulary_of,
    vocabulary_size,
)
from bigbatch.launcher.prepared import all_sources
from bigbatch.launcher.problems import InvalidDocumentError, Problem, shown
from bigbatch.launcher.resolve import Resolved, resolve
from bigbatch.recipes.core.config import RunConfig, TokenDataSection
from bigbatch.recipes.core.data.sources import (
    AUDIO_FORMATS,
    IMAGE_FORMATS,
    SourceFile,
    archive_and_member,
    is_local,
    list_files,
)
from bigbatch.recipes.core.engine_config import complete, count_data_ranks
from bigbatch.recipes.core.errors import UserError, one_line
from bigbatch.recipes.core.models.config import DecoderSection, SpeechSection, VisionSection

# Whose rows are not lines.
DOCUMENTS = ("parquet", "squad", "slots", "sgd", "smart", "conll", "semeval", *IMAGE_FORMATS, *AUDIO_FORMATS)
SPLITS = ("train", "validation", "test")
ASSUMED_UNITS = 28  # of an alphabet that the transcripts will tell
BYTES_PER_TOKEN = 4  # of English text under a byte-pair encoding, roughly
COUNTED_BYTES = 2**26  # rows of more are not counted: that would be seconds
HEAD_BYTES = 2**20
_BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
RUNS = Path("runs")
NEEDS_GPU = "gpu"  # the rule of what cannot work on a CPU at all, which the machine that checks may be


class Finding(NamedTuple):
    """One thing that preflight has to say."""

    rule: str
    severity: Literal["error", "warning", "info"]
    path: str
    """JSON path, file or folder."""
    message: str
    advice: str = ""
    """What to do."""


def check_run(run: str, overrides: Sequence[str], ranks: int, run_dir: Path = RUNS) -> list[Finding]:
    """Resolve a run and check it; a document that does not resolve gives its problems as findings."""
    try:
        resolved = resolve(run, overrides)
    except InvalidDocumentError as error:
        return [_document_finding(problem) for problem in error.problems]
    except UserError as error:
        return [_document_finding(Problem(error.where, error.message))]
    return check(resolved, ranks, run_dir)


def check(resolved: Resolved, ranks: int, run_dir: Path = RUNS, is_here: bool = True) -> list[Finding]:
    """Check a resolved run for this many ranks (processes): errors first, derived numbers last.

    `is_here`: it is going to run on this machine, so that its devices count.
    """
    config: Any = resolved.config
    findings = [
        *_batch(resolved, ranks),
        *_sync(config),
        *_data(config),
        *_model_files(config),
        *(_devices(config, resolved.deepspeed) if is_here else ()),
    ]
    # The numbers begin with the size of the vocabulary and of the model to start from.
    known = all(finding.rule not in ("tokenizer", "weights") for finding in findings)
    parameters = parameters_of(config) if known else None
    if parameters:
        needs = checkpoint_needs(config, parameters, ranks)
        here = _host_memory(config, needs) if is_here else ()
        findings += [*_disk(run_dir, needs), *here, *_numbers(config, parameters)]
    return in_order(findings)


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings, the gravest first."""
    order = ("error", "warning", "info")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def has_errors(findings: Sequence[Finding]) -> bool:
    """Tell whether the run cannot work."""
    return any(finding.severity == "error" for finding in findings)


def render(findings: Sequence[Finding]) -> str:
    """Return the findings as lines of text, with a last line that sums them up."""
    widths = [max((len(finding[column]) for finding in findings), default=0) for column in (1, 2)]
    lines = []
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        lines.append(f"{finding.severity:{widths[0]}}  {finding.path:{widths[1]}}  {finding.message}{advice}")
    counts = [sum(finding.severity == severity for finding in findings) for severity in ("error", "warning")]
    lines.append(f"{'will not run' if counts[0] else 'ready'}: {counts[0]} errors, {counts[1]} warnings")
    return "\n".join(lines)


def to_json(findings: Sequence[Finding]) -> str:
    """Return the findings as a JSON list of objects."""
    return json.dumps([finding._asdict() for finding in findings], indent=2, ensure_ascii=False)


def _document_finding(problem: Problem) -> Finding:
    return Finding("document", "error", one_line(problem.where), one_line(problem.message))


def _batch(resolved: Resolved, ranks: int) -> Iterator[Finding]:
    try:
        plan = complete(resolved.config, resolved.deepspeed, ranks)
    except UserError as error:
        yield Finding("batch", "error", error.where, error.message)
        return
    size, micro_size, accumulated = resolved.config.batch.global_size, *(plan[key] for key in _BATCH_KEYS)
    data_ranks = size // (micro_size * accumulated)
    shared = "ranks" if data_ranks == ranks else f"data ranks ({ranks} ranks)"
    algebra = f"{micro_size} a forward pass x {accumulated} accumulated x {data_ranks} {shared}"
    yield Finding("batch", "info", "batch.global_size", f"{size} samples = {algebra}")
    stages = resolved.config.parallel.pipeline
    if accumulated < stages:
        busy = f"{accumulated} micro-batches keep {stages} stages busy {accumulated / (accumulated + stages - 1):.0%}"
        advice = f"a batch.micro_size of which {stages} or more are accumulated" if size // data_ranks >= stages else ""
        yield Finding("batch", "warning", "batch.micro_size", f"{busy} of the time", advice)


def _sync(config: RunConfig) -> Iterator[Finding]:
    if config.parallel.sync == "ring":
        message = "NCCL gets NCCL_ALGO=Ring; on CPUs gloo's all-reduce is a ring by itself"
        yield Finding("sync", "info", "parallel.sync", message)


def _data(config: Any) -> Iterator[Finding]:
    data = getattr(config, "data", None)
    for name, sources in all_sources(data).items():
        for number, source in enumerate(sources):
            if is_local(source):
                yield from _source(data, source, f"data.{name}[{number}]")


def _source(data: Any, source: Any, where: str) -> Iterator[Finding]:
    try:
        files = list_files([source], "")
    except UserError as error:
        yield Finding("data", "error", error.where.replace("[0]", where, 1), error.message)
        return
    wanted = _wanted_columns(data, files[0])
    columns = _columns(files[0]) if wanted else None
    for name, setting in wanted.items():
        if columns is not None and name not in columns:
            there = ", ".join(map(shown, columns)) or "none"
            message = f"{files[0].path} ({where}) has no column {shown(name)}; there are: {there}"
            advice = "where the first row is no header, give `columns`" if files[0].format in ("csv", "tsv") else ""
            yield Finding("columns", "error", setting, message, advice)


def _wanted_columns(data: Any, file: SourceFile) -> dict[str, str]:
    """Return each column that is going to be read, and the setting that asks for it."""
    if hasattr(data, "columns"):
        wanted = data.columns
    elif hasattr(data, "columns_of"):
        wanted = data.columns_of(file.format)
    else:  # texts without columns are taken whatever the key is
        has_columns = file.format != "txt" and (file.format != "lines" or file.table.pattern)
        wanted = {data.text_key: "data.text_key"} if has_columns else {}
    return {name: setting for name, setting in wanted.items() if name not in file.table.constants}


def _columns(file: SourceFile) -> list[str] | None:
    """Return the columns that a file's first line names; None where it takes more than a line to know."""
    if file.format in ("txt", "lines"):
        return list(re.compile(file.table.pattern or "(?P<text>)").groupindex)
    if known := ("source", "target") if file.format == "parallel" else file.table.columns:
        return list(known)
    if file.format in DOCUMENTS:
        return None
    try:
        with _opened(file) as stream:
            line = stream.readline(HEAD_BYTES).decode(file.table.encoding).removeprefix("\ufeff")
        if file.format == "jsonl":
            row = json.loads(line)
            return list(row) if isinstance(row, dict) else None
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.format == "tsv" else {}
        return next(csv.reader([line], **style), [])
    except (ValueError, csv.Error, OSError, EOFError, zlib.error, zipfile.BadZipFile):
        return None  # reading it in earnest says what is wrong, and in which line


@contextmanager
def _opened(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open a file, compressed, in an archive or neither."""
    name, member = archive_and_member(file.path)
    with ExitStack() as stack:
        stream: Any = stack.enter_context(Path(name).open("rb"))
        if member:
            stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(stream)).open(member))
        unpacked: Any = gzip.GzipFile(fileobj=stream) if file.path.lower().endswith(".gz") else stream
        yield unpacked


def _model_files(config: Any) -> Iterator[Finding]:
    data: Any = getattr(config, "data", None)
    model: Any = getattr(config, "model", None)
    folder = getattr(model, "initialize_from", None)
    brings_all = hasattr(model, "backbone") or config.start_brings_tokenizer
    if hasattr(data, "tokenizer") and not (brings_all and folder):
        try:
            vocabulary_size(data.tokenizer)
        except UserError as error:
            yield Finding("tokenizer", "error", error.where, error.message)
    if folder is not None and brings_all:
        yield from _start(config)
    elif folder is not None and not (Path(folder).expanduser() / "config.json").is_file():
        advice = "give a folder that transformers has saved"
        yield Finding("weights", "error", "model.initialize_from", f"there is no config.json in {folder}", advice)


def _start(config: Any) -> Iterator[Finding]:
    """Compare settings with the model that is started from."""
    model, folder = config.model, config.model.initialize_from
    try:
        start = look_at_start(Path(folder).expanduser(), is_decoder=config.start_brings_tokenizer)
    except UserError as error:
        yield Finding("weights", "error", error.where, error.message)
        return
    if config.start_brings_tokenizer:  # its shape is compared when it is read
        return
    length = config.data.sequence_length
    if start.max_positions and length > start.max_positions:
        message = f"found {length}; the model in {folder} has {start.max_positions} positions"
        yield Finding("weights", "error", "data.sequence_length", message)
    if model.backbone == "seq2seq":
        return
    if start.foreign:
        yield from _foreign(model, start)
    elif start.num_layers and model.freeze_layers + model.redraw_layers > start.num_layers:
        asked = f"{model.freeze_layers} frozen and {model.redraw_layers} redrawn layers"
        message = f"{asked} are more than the {start.num_layers} of the model in {folder}"
        yield Finding(
            "weights", "error", "model.redraw_layers" if model.redraw_layers else "model.freeze_layers", message
        )


def _foreign(model: Any, start: Start) -> Iterator[Finding]:
    """Name the settings that only our own encoder follows."""
    for name, field in type(model).model_fields.items():
        if name not in ("backbone", "initialize_from", "keep_head") and getattr(model, name) != field.default:
            message = f"found {getattr(model, name)!r}, which has no effect on a {start.foreign}, run by transformers"
            yield Finding("weights", "error", f"model.{name}", message, "leave it out")


def _devices(config: RunConfig, deepspeed: dict[str, Any]) -> Iterator[Finding]:
    zero = deepspeed.get("zero_optimization", {})
    for name in ("offload_param", "offload_optimizer"):
        folder = (zero.get(name) or {}).get("nvme_path")
        if folder and not os.access(folder, os.W_OK):
            where = f"zero_optimization.{name}.nvme_path"
            yield Finding(
                "nvme", "warning", where, f"{folder} cannot be written to here", "name a folder of every node"
            )
    if config.optimizer.name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        advice = "install bigbatch[low-bit], or take adamw"
        yield Finding("optimizer", "error", "optimizer.name", "adamw_8bit needs bitsandbytes", advice)
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        yield from without_gpu(config, deepspeed)


def without_gpu(config: RunConfig, deepspeed: dict[str, Any]) -> Iterator[Finding]:
    """Name what needs a GPU, or does better on one."""
    zero = deepspeed.get("zero_optimization", {})
    if config.precision.dtype == "fp16":
        message = "there is no NVIDIA GPU here, and few CPUs can do fp16"
        yield Finding("device", "warning", "precision.dtype", message, "take bf16")
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(name):
            yield Finding(NEEDS_GPU, "warning", f"zero_optimization.{name}", "needs a GPU; there is none here")


class Needs(NamedTuple):
    """What a run's checkpoints take."""

    checkpoint_bytes: int
    """One of them."""
    retained_bytes: int
    """The most at once."""
    retained_files: int


def checkpoint_needs(config: Any, parameters: "Parameters", ranks: int) -> Needs:
    """Return what the checkpoints of a run on so many ranks take."""
    keeps = config.checkpoint
    size = checkpoint_bytes(parameters.count, config.optimizer)
    if config.parallel.sync == "local_sgd":  # each rank's own, and once what belongs to all
        size = size * count_data_ranks(config, ranks) + OUTER_BYTES * parameters.count
    stay = config.schedule.total_steps // keeps.keep_every_steps if keeps.keep_every_steps else 0
    count = keeps.keep + 1 + stay  # the next one is whole before the oldest goes
    return Needs(size, size * count, count * (2 * ranks + 2))  # while it is written, each rank describes its file


def existing_folder(run_dir: Path) -> Path:
    """Return a run folder that exists, else the nearest one above that it would be made in."""
    return next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())


def _host_memory(config: Any, needs: Needs) -> Iterator[Finding]:
    if not config.checkpoint.asynchronous:
        return
    size, there = needs.checkpoint_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    message = f"the ranks keep a copy of their state, {amount(size, 'B')} in all; {amount(there, 'B')} are here"
    severity, advice = ("warning", "spread the ranks, or set it to false") if size > there else ("info", "")
    yield Finding("host-memory", severity, "checkpoint.asynchronous", message, advice)


def _disk(run_dir: Path, needs: Needs) -> Iterator[Finding]:
    existing = existing_folder(run_dir)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "run-folder", "error", str(run_dir), f"{existing} cannot be written to", "choose another --run-dir"
        )
    size, needed, free = needs.checkpoint_bytes, needs.retained_bytes, shutil.disk_usage(existing).free
    # A run that goes on has some of its checkpoints already, so only a disk without room for one is an error.
    severity = "error" if size > free else "warning" if needed > free else "info"
    advice = f"lower checkpoint.keep or keep_every_steps, or free {amount(needed - free, 'B')}" if needed > free else ""
    message = f"{amount(size, 'B')} a checkpoint, {amount(needed, 'B')} at most; {amount(free, 'B')} are free"
    yield Finding("disk", severity, str(run_dir), message, advice)


def _numbers(config: Any, parameters: "Parameters") -> Iterator[Finding]:
    data: Any = config.data
    about = "" if parameters.is_exact else "about "
    yield Finding("numbers", "info", "model", f"{about}{amount(parameters.count, '')} parameters{_active(config)}")
    total = config.batch.global_size * config.schedule.total_steps
    if isinstance(data, TokenDataSection) or isinstance(config.model, DecoderSection):
        tokens = config.batch.global_size * data.sequence_length
        message = f"{tokens:,} tokens a step, {amount(total * data.sequence_length, '')} in all"
        yield Finding("numbers", "info", "schedule.total_steps", message)
        samples, rows = (_corpus_tokens(data) or 0) / data.sequence_length, ""
    else:
        samples = 0 if getattr(data, "shares_rows", False) else _corpus_rows(data) or 0
        rows = f"{samples:,.0f} rows, "
    if samples:
        steps, epochs = max(1, int(samples / config.batch.global_size)), total / samples
        message = f"about {rows}{steps:,} steps an epoch, {epochs:.3g} epochs in all"
        yield Finding("numbers", "info", "data.train", message)


def _active(config: Any) -> str:
    """Say of a mixture of experts how many parameters each token meets."""
    if getattr(config.model, "num_experts", 1) == 1:
        return ""
    count = count_active_parameters(config.model, vocabulary_of(config))
    return f", of which {amount(count, '')} are active for a token"


class Parameters(NamedTuple):
    """How many a model has."""

    count: int
    is_exact: bool


def parameters_of(config: Any) -> Parameters | None:
    """Count the model's parameters; None where the document does not say enough."""
    data: Any = getattr(config, "data", None)
    model: Any = getattr(config, "model", None)
    if isinstance(model, VisionSection):
        labels = len(data.labels)
        return Parameters(count_vision_parameters(model, data.image_size, data.num_channels, labels), labels > 0)
    if isinstance(model, SpeechSection):
        units = data.alphabet if data.unit == "character" else (data.alphabet or "").split()
        return Parameters(count_speech_parameters(model, len(set(units or ())) or ASSUMED_UNITS), bool(units))
    if not hasattr(data, "tokenizer"):
        return None
    if hasattr(model, "backbone") and getattr(model, "initialize_from", None):
        return Parameters(look_at_start(Path(model.initialize_from).expanduser()).parameters, False)
    labels = len(getattr(data, "labels", ())) or getattr(config, "num_outputs", 0)
    labels = labels or 2 * (getattr(config, "sentence_task", "none") != "none")
    is_exact = data.tokenizer.kind not in ("character", "word") and (labels > 0 or not hasattr(model, "backbone"))
    is_exact = is_exact and not config.start_brings_tokenizer  # a chat template may add tokens
    return Parameters(count_parameters(model, vocabulary_of(config), labels), is_exact)


def _training_files(data: Any) -> list[SourceFile]:
    """List the files to train on; none where they are not all here."""
    try:
        return list_files(data.train) if all(map(is_local, data.train)) else []
    except UserError:  # told already
        return []


def _corpus_tokens(data: Any) -> int | None:
    """Estimate the training tokens by the size of the files; None where that says nothing."""
    files = _training_files(data)
    if any(file.path.endswith(".gz") or file.format in DOCUMENTS for file in files):
        return None
    size = sum(file.size_bytes * _taken(file) for file in files) * (1 - data.validation_fraction)
    return int(size / (1 if data.tokenizer.kind == "character" else BYTES_PER_TOKEN))


def _corpus_rows(data: Any) -> float | None:
    """Count the lines to train on, before any is left out; None where that takes long or says nothing."""
    files = _training_files(data)
    if sum(file.size_bytes for file in files) > COUNTED_BYTES or any(file.format in DOCUMENTS for file in files):
        return None
    rows = sum(_count_rows(file) * _taken(file) for file in files)
    held_out = [0.0 if getattr(data, split) else getattr(data, f"{split}_fraction") for split in SPLITS[1:]]
    return rows * (1 - held_out[0]) * (1 - held_out[1])


def _count_rows(file: SourceFile) -> int:
    try:
        with _opened(file) as stream:
            lines = sum(1 for _ in stream)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):  # told when it is read in earnest
        return 0
    return lines - (file.format in ("csv", "tsv") and not file.table.columns)


def _taken(file: SourceFile) -> float:
    """Return the share of a file's rows that its source takes."""
    return (1 / (file.table.take_every or 1)) * (1 - 1 / file.table.skip_every if file.table.skip_every else 1)


def amount(number: float, unit: str) -> str:
    """Return a number with a decimal prefix: 124 M, 1.5 GB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:.3g} E{unit}"
