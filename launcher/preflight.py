"""Everything that can be known before the queue, in under a second and without torch."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bigbatch.launcher.predict import checkpoint_bytes, count_parameters, locate, vocabulary_size
from bigbatch.launcher.problems import InvalidDocumentError, Problem
from bigbatch.launcher.resolve import Resolved, resolve
from bigbatch.recipes.core.batch import check_batch
from bigbatch.recipes.core.config import RunConfig, TokenDataSection
from bigbatch.recipes.core.errors import UserError, one_line
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection

EXTENSIONS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
BYTES_PER_TOKEN = 4  # of English text under a byte-pair encoding, roughly
RUNS = Path("runs")


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


def check(resolved: Resolved, ranks: int, run_dir: Path = RUNS) -> list[Finding]:
    """Check a resolved run for this many data ranks against this machine: errors first, derived numbers last."""
    config: Any = resolved.config
    findings = [*_batch(config, ranks), *_data(config), *_model_files(config), *_devices(config, resolved.deepspeed)]
    if all(finding.rule != "tokenizer" for finding in findings):  # the numbers begin with the size of the vocabulary
        findings += [*_disk(config, run_dir), *_numbers(config)]
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


def _batch(config: RunConfig, ranks: int) -> Iterator[Finding]:
    try:
        plan = check_batch(config.batch, ranks)
    except UserError as error:
        yield Finding("batch", "error", error.where, error.message)
        return
    algebra = f"{plan.micro_size} a forward pass x {plan.accumulation_steps} accumulated x {ranks} ranks"
    yield Finding("batch", "info", "batch.global_size", f"{plan.global_size} samples = {algebra}")


def _data(config: Any) -> Iterator[Finding]:
    if not isinstance(getattr(config, "data", None), TokenDataSection):
        return
    for key in ("train", "validation"):
        for number, source in enumerate(getattr(config.data, key)):
            yield from _source(source, f"data.{key}[{number}]")


def _source(source: str, where: str) -> Iterator[Finding]:
    if _is_elsewhere(source):
        return
    files = source_files(source)
    if not files:
        searched = f"neither in {Path.cwd()} nor in $BIGBATCH_DATA ({os.environ.get('BIGBATCH_DATA', 'not set')})"
        advice = f"give a file, folder or glob with {', '.join(EXTENSIONS)}"
        yield Finding("data-missing", "error", where, f"{source!r} is {searched}", advice)
    for file in files:
        if not _is_text(file):
            yield Finding("data-kind", "error", where, f"{file} is none of {', '.join(EXTENSIONS)}", "convert it")
        elif file.stat().st_size == 0:
            yield Finding("data-empty", "error", where, f"{file} is empty", "fill it or take it out of the sources")


def source_files(source: str) -> list[Path]:
    """Return the files of a local source, looked for here, then under $BIGBATCH_DATA."""
    path = locate(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _is_text(file))
    for root in (".", os.environ.get("BIGBATCH_DATA", ".")):
        found = glob(str(path), root_dir=root, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
        matches = (Path(root) / match for match in found)
        if files := sorted(match for match in matches if match.is_file()):
            return files
    return []


def _is_text(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(EXTENSIONS)


def _is_elsewhere(source: str) -> bool:
    return source.startswith(("hf:", "python:"))


def _model_files(config: Any) -> Iterator[Finding]:
    data, model = getattr(config, "data", None), getattr(config, "model", None)
    if isinstance(data, TokenDataSection):
        try:
            vocabulary_size(data.tokenizer)
        except UserError as error:
            yield Finding("tokenizer", "error", error.where, error.message)
    folder = getattr(model, "initialize_from", None)
    if folder is not None and not (Path(folder).expanduser() / "config.json").is_file():
        advice = "give a folder that transformers has saved"
        yield Finding("weights", "error", "model.initialize_from", f"there is no config.json in {folder}", advice)


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
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return
    if config.precision.dtype == "fp16":
        message = "there is no NVIDIA GPU here, and few CPUs can do fp16"
        yield Finding("device", "warning", "precision.dtype", message, "take bf16")
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(name):
            yield Finding("device", "warning", f"zero_optimization.{name}", "needs a GPU; there is none here")


def _disk(config: Any, run_dir: Path) -> Iterator[Finding]:
    existing = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "run-folder", "error", str(run_dir), f"{existing} cannot be written to", "choose another --run-dir"
        )
    if not isinstance(getattr(config, "model", None), DecoderSection | EncoderSection):
        return
    size, keeps = _checkpoint_bytes(config), config.checkpoint
    stay = config.schedule.total_steps // keeps.keep_every_steps if keeps.keep_every_steps else 0
    # The next one is whole before the oldest goes.
    needed, free = size * (keeps.keep + 1 + stay), shutil.disk_usage(existing).free
    # A run that goes on has some of its checkpoints already, so only a disk without room for one is an error.
    severity = "error" if size > free else "warning" if needed > free else "info"
    advice = (
        f"lower checkpoint.keep or keep_every_steps, or free {_amount(needed - free, 'B')}" if needed > free else ""
    )
    message = f"{_amount(size, 'B')} a checkpoint, {_amount(needed, 'B')} at most; {_amount(free, 'B')} are free"
    yield Finding("disk", severity, str(run_dir), message, advice)


def _numbers(config: Any) -> Iterator[Finding]:
    model, data = getattr(config, "model", None), getattr(config, "data", None)
    if not isinstance(model, DecoderSection | EncoderSection) or not isinstance(data, TokenDataSection):
        return
    parameters = _amount(count_parameters(model, vocabulary_size(data.tokenizer)), "")
    about = "about " if data.tokenizer.kind == "character" else ""
    yield Finding("numbers", "info", "model", f"{about}{parameters} parameters")
    tokens = config.batch.global_size * data.sequence_length
    total = tokens * config.schedule.total_steps
    yield Finding("numbers", "info", "schedule.total_steps", f"{tokens:,} tokens a step, {_amount(total, '')} in all")
    corpus = _corpus_tokens(data)
    if corpus:
        steps, epochs = max(1, corpus // tokens), total / corpus
        yield Finding("numbers", "info", "data.train", f"about {steps:,} steps an epoch, {epochs:.3g} epochs in all")


def _corpus_tokens(data: TokenDataSection) -> int | None:
    """Estimate the training tokens by the size of the files; None where that says nothing."""
    if any(_is_elsewhere(source) for source in data.train):
        return None
    files = [file for source in data.train for file in source_files(source)]
    if any(file.suffix in (".gz", ".parquet") for file in files):
        return None
    size = sum(file.stat().st_size for file in files) * (1 - data.validation_fraction)
    return int(size / (1 if data.tokenizer.kind == "character" else BYTES_PER_TOKEN))


def _checkpoint_bytes(config: Any) -> int:
    return checkpoint_bytes(count_parameters(config.model, vocabulary_size(config.data.tokenizer)), config.optimizer)


def _amount(number: float, unit: str) -> str:
    """Return a number with a decimal prefix: 124 M, 1.5 GB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:.3g} E{unit}"
