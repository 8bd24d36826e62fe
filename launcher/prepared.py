"""Whether a run's data are prepared, and still those of its sources: read from manifests, without torch or NumPy."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.data.identity import fingerprint
from bigbatch.recipes.core.data.sources import HUGGING_FACE, as_table, list_files, locate
from bigbatch.recipes.core.errors import UserError

TOKEN_BYTES = {"uint16": 2, "uint32": 4}
SPLITS = ("train", "validation", "test")


class Prepared(NamedTuple):
    """A prepared folder of a run's settings."""

    folder: Path
    content_id: str
    stale: str
    """What has changed since, or ""."""
    damage: str
    """The first file that is missing or has another size, or ""."""
    size_bytes: int


def find_prepared(data: Any, start: Path | None = None, is_offline: bool = False) -> Prepared | None:
    """Return the newest prepared folder made for these settings (a document's `data`), or None.

    `start` is the folder whose tokenizer counts where a model starts from one. An offline run takes data as they were
    prepared, whatever became of their sources.
    """
    found = []
    for path in Path(data.prepared_dir).expanduser().glob("*/manifest.json"):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if _is_of(manifest["data"], data, start):
                found.append((path.stat().st_mtime_ns, path.parent, manifest))
        except (OSError, ValueError, KeyError, TypeError):  # preparing anew says what is wrong with it
            continue
    if not found:
        return None
    fresh = [item for item in found if is_offline or not _changes(item[2], data)]
    _, folder, manifest = max(fresh or found, key=lambda item: item[0])
    files = dict(_files(manifest))
    damage = next((str(folder / name) for name, size in files.items() if _size(folder / name) != size), "")
    stale = "" if is_offline else _changes(manifest, data)
    return Prepared(folder, manifest["content_id"], stale, damage, sum(files.values()))


def all_sources(data: Any) -> dict[str, Sequence[Any]]:
    """Return the sources of a document's `data` by their settings: splits, and what belongs to none of them."""
    return {split: getattr(data, split, ()) for split in SPLITS} | getattr(data, "further_sources", {})


def _is_of(settings: dict[str, Any], data: Any, start: Path | None) -> bool:
    """Tell whether recorded settings, those that shape the content, are these."""
    now = data.model_dump(mode="json")
    if start:
        now["tokenizer"] = settings.get("tokenizer")  # of the model to start from
    return all(key in now and now[key] == value for key, value in settings.items())


def _changes(manifest: dict[str, Any], data: Any) -> str:
    """Name the first source, or the tokenizer, that is not what it was when the data were prepared."""
    recorded = {(item["path"], item["split"], item["size_bytes"], item["modified_ns"]) for item in manifest["sources"]}
    try:
        now = set(_sources(data))
    except UserError as error:
        return error.message
    # Of other sources nothing can be said without a library or a network.
    known = {item for item in recorded if not item[0].startswith(HUGGING_FACE)}
    if changed := now ^ known:
        return f"{min(changed)[0]} is not what it was"
    path = data.tokenizer.path if hasattr(data, "tokenizer") else None
    if path and "tokenizer_fingerprint" in manifest:
        folder = locate(path)
        if fingerprint(folder / "tokenizer.json" if folder.is_dir() else folder) != manifest["tokenizer_fingerprint"]:
            return f"the tokenizer {path} is not what it was"
    return ""


def _sources(data: Any) -> Iterator[tuple[str, str, int, int]]:
    for name, sources in all_sources(data).items():
        for source in sources:
            if not as_table(source).path.startswith(HUGGING_FACE):
                for file in list_files([source], f"data.{name}"):
                    yield (file.path, name, file.size_bytes, file.modified_ns)


def _files(manifest: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the files that a manifest of either kind names, with their sizes."""
    for name, facts in manifest.get("files", {}).items():
        yield name, facts["size_bytes"]
    for split in manifest["splits"].values():
        for shard in split.get("shards", ()):
            yield f"{shard['name']}.bin", shard["num_tokens"] * TOKEN_BYTES[manifest["dtype"]]
            yield f"{shard['name']}.idx", shard["num_documents"] * 8


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
