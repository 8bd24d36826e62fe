"""`bigbatch bundle` and `unbundle`: all that a run needs in one folder or archive, for nodes without a network.

A bundle holds document.json, whose paths lead into the bundle; data/ (sources, tokenizer, model to start from);
prepared/; code/ (this one); wheels/ where asked for; and bundle.json, which names every file with its size and SHA-256.
"""

import copy
import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bigbatch.launcher.documents import read_json
from bigbatch.launcher.prepared import all_sources, find_prepared
from bigbatch.launcher.resolve import Resolved
from bigbatch.launcher.run_dir import write_json
from bigbatch.launcher.snapshot import freeze
from bigbatch.recipes.core.data.identity import short_hash
from bigbatch.recipes.core.data.sources import HUGGING_FACE, archive_and_member, is_local, local_files, locate
from bigbatch.recipes.core.errors import UserError

DOCUMENT, CONTENTS, DATA, PREPARED, WHEELS = "document.json", "bundle.json", "data", "prepared", "wheels"
ARCHIVES = (".tar", ".tgz", ".tar.gz")
SPLITS = ("train", "validation", "test")
NOT_OF_A_START = ("log", "tensorboard", "code", "job_events.jsonl")
"""What of a run folder is not needed to start from its model."""


def bundle(resolved: Resolved, out: Path, with_wheels: bool = False) -> int:
    """Gather a run into a folder, or an archive by the name's ending; return the number of files."""
    ending = next((ending for ending in ARCHIVES if out.name.endswith(ending)), None)
    folder = out.with_name(out.name.removesuffix(ending)) if ending else out
    for path in {folder, out}:
        if path.exists() and (path.is_file() or any(path.iterdir())):
            raise UserError(str(path), "is there already; give a new name")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DOCUMENT, gather(resolved, folder))
    freeze(folder)
    if with_wheels:
        download_wheels(folder / WHEELS, *requirements())
    files = [_describe(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    contents = {"version": 1, "content_id": resolved.content_id, "recipe": resolved.config.recipe, "files": files}
    write_json(folder / CONTENTS, contents)
    if ending:
        with tarfile.open(out, "w:" if ending == ".tar" else "w:gz") as archive:
            archive.add(folder, arcname=folder.name)
        shutil.rmtree(folder)
    return len(files)


def gather(resolved: Resolved, folder: Path) -> dict[str, Any]:
    """Copy sources, tokenizer, model and prepared data; return the run document that leads to the copies."""
    document: dict[str, Any] = copy.deepcopy(resolved.document)
    data, start = document.get("data", {}), document.get("model", {}).get("initialize_from")
    settings: Any = getattr(resolved.config, "data", None)
    found = find_prepared(settings, Path(start) if start else None) if hasattr(settings, "prepared_dir") else None
    moved = {}
    for source in [source for sources in _source_lists(data) for source in sources]:
        path = _path_of(source)
        if is_local(path):
            moved[path] = _copy_source(path, local_files(_table(settings, path)), folder)
            if target := _target_of(source):
                moved[target] = _copy_source(target, (), folder)  # copied just now
        elif path.startswith(HUGGING_FACE) and (found is None or found.stale):
            raise UserError("data.train", f"{path} is taken from what is prepared; run `bigbatch prepare` first")
    for path in filter(None, (data.get("tokenizer", {}).get("path"), start)):
        moved[path] = _copy_whole(path, folder)
    if found and not found.stale and not found.damage:
        _copy_prepared(found.folder, folder / PREPARED, moved)
    if data:
        document["data"] = {**_led_to_copies(data, moved), "prepared_dir": PREPARED}
    if start:
        document["model"]["initialize_from"] = moved[start]
    if str(document.get("deepspeed")).endswith(".json"):
        shutil.copy(document["deepspeed"], folder / "deepspeed.json")
        document["deepspeed"] = "deepspeed.json"
    return document


def _table(settings: Any, path: str) -> Any:
    """Return the source of this path as the settings have it, with its format."""
    sources = [source for named in all_sources(settings).values() for source in named]
    return next(source for source in sources if (source if isinstance(source, str) else source.path) == path)


def _source_lists(data: dict[str, Any]) -> Iterator[list[Any]]:
    """Yield the lists of sources in a document's `data`."""
    for section, names in ((data, SPLITS), (data.get("collection") or {}, ("documents", "queries"))):
        yield from (section[name] for name in names if section.get(name))


def _path_of(source: Any) -> str:
    return source if isinstance(source, str) else source["path"]


def _target_of(source: Any) -> str | None:
    """Return the second file of a parallel source."""
    return None if isinstance(source, str) else source.get("target")


def _copy_source(path: str, files: Sequence[Path], folder: Path) -> str:
    """Copy a source's files to where its path, a glob too, finds them below data/; return that path."""
    is_absolute = Path(path).expanduser().is_absolute() or ".." in Path(path).parts
    for file in files:
        inside = _below(file.absolute(), is_absolute)
        (folder / DATA / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, folder / DATA / inside)
    name, member = archive_and_member(path)
    plain = os.path.abspath(Path(name).expanduser()) if is_absolute else os.path.normpath(name)  # noqa: PTH100 - a glob
    return f"{DATA}/{plain.lstrip('/')}" + (f"!{member}" if member else "")


def _below(file: Path, is_absolute: bool) -> Path:
    """Return a file's place below data/: what a relative path says from here or $BIGBATCH_DATA, else all of it."""
    for root in () if is_absolute else (Path.cwd(), Path(os.environ.get("BIGBATCH_DATA", ".")).absolute()):
        if file.is_relative_to(root):
            return file.relative_to(root)
    return Path(os.path.normpath(file)).relative_to("/")


def _copy_whole(path: str, folder: Path) -> str:
    """Copy a file or folder that a setting names."""
    source = locate(path)
    target = Path(DATA) / re.sub(r"[^\w.-]+", "_", str(source).strip("/"))
    if source.is_dir():
        shutil.copytree(source, folder / target, ignore=shutil.ignore_patterns(*NOT_OF_A_START), dirs_exist_ok=True)
    elif source.is_file():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / target)
    else:
        raise UserError(path, "is not there, and the run needs it")
    return str(target)


def _copy_prepared(prepared: Path, target: Path, moved: dict[str, str]) -> None:
    """Copy a prepared folder as one of the settings that the bundle has, and point to it by them."""
    shutil.copytree(prepared, target / prepared.name)
    manifest = read_json(prepared / "manifest.json")
    manifest["data"] = _led_to_copies(manifest["data"], moved)
    write_json(target / prepared.name / "manifest.json", manifest)
    (target / f"{short_hash(manifest['data'])}.latest").write_text(prepared.name)


def _led_to_copies(data: dict[str, Any], moved: dict[str, str]) -> dict[str, Any]:
    """Return settings of data whose paths are those of the copies."""
    led = copy.deepcopy(data)
    for sources in _source_lists(led):
        for number, source in enumerate(sources):
            new = moved.get(_path_of(source), _path_of(source))
            sources[number] = new if isinstance(source, str) else {**source, "path": new}
            if target := _target_of(source):
                sources[number]["target"] = moved.get(target, target)
    path = led.get("tokenizer", {}).get("path")
    for old, new in moved.items():  # of a start the tokenizer is a folder in it
        if path and (path == old or path.startswith(old.rstrip("/") + "/")):
            led["tokenizer"]["path"] = new + path.removeprefix(old)
            break
    return led


def requirements() -> tuple[list[str], list[str]]:
    """Return what bigbatch needs for training, and the versions that are installed here."""
    needed = []
    for line in importlib.metadata.requires("bigbatch") or ():
        requirement, _, marker = line.partition(";")
        if not marker or "train" in marker:
            needed.append(requirement.strip())
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    # A version with a local part, as torch 2.13.0+cpu, is on an index of its own, which the user's pip knows or not.
    return needed, [f"{name}=={version}" for name, version in sorted(installed.items()) if name != "bigbatch"]


def download_wheels(folder: Path, needed: Sequence[str], installed: Sequence[str]) -> None:
    """Have pip fetch wheels of these versions, and write requirements.txt that holds them to their hashes."""
    folder.mkdir()
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in installed))
    command = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--dest", str(folder)]
    ended = subprocess.run(
        [*command, "--constraint", str(constraints), *needed], capture_output=True, text=True, check=False
    )
    constraints.unlink()
    if ended.returncode:
        raise UserError("--wheels", f"pip: {(ended.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        lines.append(f"{name}=={version} --hash=sha256:{_sha256(wheel)}\n")
    (folder / "requirements.txt").write_text("".join(lines))


def unbundle(archive: Path, folder: Path) -> int:
    """Unpack a bundle's archive into a new folder, and verify it; return the number of files."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(str(folder), "is there already; give a new name")
    try:
        with tarfile.open(archive) as opened:
            members = opened.getmembers()
            for member in members:
                _check_member(archive, member)
            top = {Path(member.name).parts[0] for member in members}
            if len(top) != 1:
                raise UserError(str(archive), f"is no bundle: it holds {len(top)} folders, right is one")
            opened.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(str(archive), f"cannot be unpacked: {error}") from None
    inside = folder / top.pop()
    for path in list(inside.iterdir()):
        path.rename(folder / path.name)
    inside.rmdir()
    return verify(folder)


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    """Refuse whatever would be written outside of the folder, or is neither file nor folder."""
    path = Path(member.name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(str(archive), f"holds {member.name!r}, a path that leaves the folder; nothing was unpacked")
    if not (member.isfile() or member.isdir()):
        raise UserError(str(archive), f"holds {member.name!r}, which is no file; nothing was unpacked")


def verify(folder: Path) -> int:
    """Compare a bundle's files with bundle.json; raise UserError for the first that differs; return their number."""
    files = read_json(folder / CONTENTS)["files"]
    for file in files:
        path = folder / file["path"]
        if not path.is_file():
            raise UserError(str(path), "is missing from the bundle; unpack it again")
        if path.stat().st_size != file["size_bytes"] or _sha256(path) != file["sha256"]:
            raise UserError(str(path), "is not what was bundled; unpack it again")
    return len(files)


def missing(folder: Path) -> Iterator[str]:
    """Name the files of a bundle that are not there, or have another size; none where the folder is no bundle."""
    if (folder / CONTENTS).is_file():
        for file in read_json(folder / CONTENTS)["files"]:
            path = folder / file["path"]
            if not path.is_file() or path.stat().st_size != file["size_bytes"]:
                yield file["path"]


def how_to_train(folder: Path) -> str:
    """Return the command that trains from a bundle."""
    if not folder.is_dir():
        return f"bigbatch unbundle {shlex.quote(str(folder))} FOLDER"
    return f"cd {shlex.quote(str(folder))} && PYTHONPATH=$PWD/code BIGBATCH_OFFLINE=1 bigbatch train {DOCUMENT}"


def _describe(path: Path, folder: Path) -> dict[str, Any]:
    return {"path": str(path.relative_to(folder)), "size_bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
