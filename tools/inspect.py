"""`bigbatch checkpoint ls | verify RUN_DIR`: what there is, and whether it is whole."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.checkpoint import CheckpointDamagedError, Reader, checkpoint_dirs, step_of
from bigbatch.recipes.core.errors import EXIT_DONE, UserError

EXIT_DAMAGED = 1


def main(argv: list[str]) -> int:
    """Run the verb `checkpoint`."""
    parser = Parser(prog="bigbatch checkpoint", description="List or verify a run's checkpoints.")
    parser.add_argument("action", choices=("ls", "verify"))
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    rows = ls(arguments.run_dir) if arguments.action == "ls" else verify(arguments.run_dir)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows, "whole" if arguments.action == "verify" else "committed")
    return EXIT_DAMAGED if arguments.action == "verify" and any(row["problem"] for row in rows) else EXIT_DONE


def ls(run_dir: Path) -> list[dict[str, Any]]:
    """Describe each checkpoint folder, oldest first, from its manifest alone."""
    return [_describe(folder, verify_shards=False) for folder in _folders(run_dir)]


def verify(run_dir: Path) -> list[dict[str, Any]]:
    """Describe each checkpoint folder after reading every byte of it; `problem` says what is wrong."""
    return [_describe(folder, verify_shards=True) for folder in _folders(run_dir)]


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
