"""`bigbatch checkpoint ls | verify | gc RUN_DIR`, `diff A B`: what there is, whether it is whole, what may go."""

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.checkpoint import (
    MANIFEST,
    CheckpointDamagedError,
    Reader,
    checkpoint_dirs,
    clear_unread,
    committed,
    newest,
    retired,
    step_of,
)
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.tools.checkpoint_diff import diff

EXIT_DAMAGED = 1
LOCK = "run.lock"  # what a run in progress holds


def main(argv: list[str]) -> int:
    """Run the verb `checkpoint`."""
    arguments = _parser().parse_args(argv)
    if arguments.action == "diff":
        return diff(arguments.a, arguments.b, arguments.json)
    if arguments.action == "gc":
        rows = gc(arguments.run_dir, arguments.keep, arguments.keep_every, arguments.dry_run)
        print(json.dumps(rows, indent=2)) if arguments.json else _print_removed(rows, arguments.dry_run)
        return EXIT_DONE
    rows = ls(arguments.run_dir) if arguments.action == "ls" else verify(arguments.run_dir)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows, "whole" if arguments.action == "verify" else "committed")
    return EXIT_DAMAGED if arguments.action == "verify" and any(row["problem"] for row in rows) else EXIT_DONE


def _parser() -> Parser:
    parser = Parser(prog="bigbatch checkpoint", description="Look at the checkpoints of runs, or remove some.")
    actions = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    summaries = {
        "ls": "list a run's checkpoints",
        "verify": "read every byte of them; exit with 1 if any is damaged",
        "gc": "remove what interrupted saves left, and all but the newest, the best and the permanent ones",
        "diff": "tell which tensors of two checkpoints differ, and by how much; exit with 1 if any does",
    }
    for name, summary in summaries.items():
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == "diff":
            for side in ("a", "b"):
                action.add_argument(side, type=Path, metavar=side.upper(), help="a run folder or a checkpoint in one")
        else:
            action.add_argument("run_dir", type=Path, metavar="RUN_DIR")
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "gc":
            action.add_argument("--keep", type=_positive, metavar="N", help="default: the run's checkpoint.keep")
            every = "the permanent ones: of steps that N divides; default: the run's checkpoint.keep_every_steps"
            action.add_argument("--keep-every", type=_positive, metavar="N", help=every)
            action.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number from 1 on")
    return int(text)


def ls(run_dir: Path) -> list[dict[str, Any]]:
    """Describe each checkpoint folder, oldest first, from its manifest alone."""
    return [_describe(folder, verify_shards=False) for folder in _folders(run_dir)]


def verify(run_dir: Path) -> list[dict[str, Any]]:
    """Describe each checkpoint folder after reading every byte of it; `problem` says what is wrong."""
    return [_describe(folder, verify_shards=True) for folder in _folders(run_dir)]


def gc(
    run_dir: Path, keep: int | None = None, keep_every: int | None = None, dry_run: bool = False
) -> list[dict[str, Any]]:
    """Apply a run's retention, or a stricter or wider one; return what went, with its bytes and why.

    The newest sound checkpoint and the best by `evaluate.best_by` always stay, and what is newer than the newest sound
    one and does not verify is left to look at. Raise UserError, and remove nothing, where a run is in progress or no
    checkpoint verifies.
    """
    _folders(run_dir)
    with _held(run_dir):
        settings = json.loads((run_dir / "run.json").read_text())["checkpoint"]
        keep = keep or int(settings["keep"])
        keep_every = keep_every or settings["keep_every_steps"]
        step = best_step = 0
        if committed(run_dir):
            reader = newest(run_dir)
            step, best_step = step_of(reader.folder), reader.manifest.get("best_step", 0)
        rows = []
        for folder in retired(run_dir, keep, keep_every, step, best_step):
            why = "retention" if (folder / MANIFEST).exists() else "interrupted save"
            num_bytes = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
            rows.append({"checkpoint": folder.name, "step": step_of(folder), "bytes": num_bytes, "why": why})
            if not dry_run and not clear_unread(folder):
                print(f"{folder.name} is being read, and stays", file=sys.stderr, flush=True)
                rows.pop()
    return rows


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Keep runs out of the folder, in whose eyes a save in progress is no debris."""
    with (run_dir / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "a run is in progress here, and keeps to its own retention; wait until it has ended"
            raise UserError(str(run_dir), message) from None
        yield


def _print_removed(rows: list[dict[str, Any]], dry_run: bool) -> None:
    for row in rows:
        print(f"{row['checkpoint']}  {row['bytes'] / 1e6:,.1f} MB  {row['why']}")
    total = sum(row["bytes"] for row in rows)
    print(f"{'would be' if dry_run else 'were'} removed: {len(rows)}, {total / 1e6:,.1f} MB ({total:,} bytes)")


def _folders(run_dir: Path) -> list[Path]:
    if not (run_dir / "run.json").exists():
        raise UserError(str(run_dir), "is not a run folder: it has no run.json")
    return checkpoint_dirs(run_dir)[::-1]


def _describe(folder: Path, verify_shards: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"checkpoint": folder.name, "step": step_of(folder), "problem": ""}
    try:
        reader = Reader(folder)
        if verify_shards:
            reader.verify()
    except (CheckpointDamagedError, OSError) as error:
        return row | {"problem": str(error)}
    manifest = reader.manifest
    age_seconds = time.time() - (folder / "manifest.json").stat().st_mtime
    return row | {
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        "ranks": manifest["ranks"],
        "zero_stage": manifest["zero_stage"],
        "consumed_samples": manifest.get("consumed_samples"),
        "tensors": len(reader.tensors),
        "content_id": manifest.get("content_id"),
        "age_seconds": round(age_seconds),
    }


def _print_table(rows: list[dict[str, Any]], sound: str) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("checkpoint", "size", "ranks", "ZeRO", "samples seen", "age", "state"):
        table.add_column(title, justify="left" if title in ("checkpoint", "state") else "right")
    for row in rows:
        if "bytes" not in row:
            table.add_row(row["checkpoint"], "", "", "", "", "", row["problem"])
            continue
        table.add_row(
            row["checkpoint"],
            f"{row['bytes'] / 1e6:,.1f} MB",
            str(row["ranks"]),
            str(row["zero_stage"]),
            "" if row["consumed_samples"] is None else f"{row['consumed_samples']:,}",
            _age(row["age_seconds"]),
            sound,
        )
    Console().print(table if rows else "no checkpoints")


def _age(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
