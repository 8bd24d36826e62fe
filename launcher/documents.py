"""Documents on disk: found by name or path, read strictly, migrated, and merged along `extends`."""

import json
import math
import re
from pathlib import Path
from typing import Any

import bigbatch.ds_configs
from bigbatch.launcher.problems import meant
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.migrations import migrate

SHIPPED = Path(bigbatch.ds_configs.__file__).parent
DEEPSPEED_FOLDER = "deepspeed"
NOT_RUNS = (DEEPSPEED_FOLDER, "schema")


def load_run(run: str) -> dict[str, Any]:
    """Return the run document of this name or path in the current version, merged with all that it extends."""
    return _load_chain(find_document(run, Path()), ())


def find_document(name: str, beside: Path, folder: str = "") -> Path:
    """Return the file of a path relative to `beside`, or of a name under ds_configs: its newest version, or NAME.vN."""
    if name.endswith(".json"):
        path = beside / Path(name).expanduser()
        if not path.is_file():
            raise UserError(name, f"there is no file {path}")
        return path
    versions = {path: number for path, number in _versions(folder) if name in _names_of(path, folder)}
    if not versions:
        raise UserError(name or "RUN", f"no document of this name; {meant(name, document_names(folder))}")
    return max(versions, key=versions.__getitem__)


def document_names(folder: str = "") -> list[str]:
    """List the names of the shipped run documents, or of the documents in one folder of ds_configs."""
    return sorted({_names_of(path, folder)[0] for path, _ in _versions(folder)})


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; a duplicate key, NaN or a slip of the pen is refused with its place."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from None
    try:
        document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=finite)
    except json.JSONDecodeError as error:
        raise UserError(str(path), f"not JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise UserError(str(path), str(error)) from None
    if not isinstance(document, dict):
        raise UserError(str(path), "holds no JSON object; a document begins with {")
    return document


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return `base` changed by `change`: objects merge, everything else replaces."""
    merged = dict(base)
    for key, value in change.items():
        both_objects = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_objects else value
    return merged


def fix_deepspeed_path(document: dict[str, Any], beside: Path) -> None:
    """Make the path of the user's own DeepSpeed document absolute, so that a copy elsewhere still means the same."""
    if str(document.get("deepspeed")).endswith(".json"):
        document["deepspeed"] = str((beside / Path(document["deepspeed"]).expanduser()).resolve())


def finite(number: str) -> float:
    """Read a JSON number that is no integer; raise ValueError for one too large to hold."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large for a number")
    return value


def _load_chain(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in below:
        circle = " -> ".join(step.name for step in (*below, path))
        raise UserError(str(path), f"extends itself: {circle}")
    document = migrate(read_json(path), str(path))
    fix_deepspeed_path(document, path.parent)
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise UserError(f"{path} extends", f"found {json.dumps(base)}; right is one name or path")
    return merge(_load_chain(find_document(base, path.parent), (*below, path.resolve())), document)


def _versions(folder: str) -> list[tuple[Path, int]]:
    found = []
    for path in (SHIPPED / folder).rglob("*.v*.json"):
        match = re.search(r"\.v(\d+)\.json$", path.name)
        if match and (folder or path.relative_to(SHIPPED).parts[0] not in NOT_RUNS):
            found.append((path, int(match[1])))
    return found


def _names_of(path: Path, folder: str) -> tuple[str, str]:
    """Return the name without the version, and with it."""
    with_version = path.relative_to(SHIPPED / folder).as_posix().removesuffix(".json")
    return with_version.rpartition(".")[0], with_version


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object; keep one")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write a number or null")
