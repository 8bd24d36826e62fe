"""Where raw data are: files, folders, globs, archives, Hugging Face data sets and Python's own documentation.

Every source is a list of files with an identity. Importing this needs no more than the base install, so that the
launcher can find files; rows.py reads them.
"""

import difflib
import glob
import logging
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.config import AudioSource, ImageSource, ParallelSource, TableSource
from bigbatch.recipes.core.data.stdlib_text import stdlib_files
from bigbatch.recipes.core.errors import UserError

# source -> format
_TEXT_ROWS = ("docstrings", "questions", "dialogues", "summaries", "functions", "modules", "imports")
_STDLIB_ROWS = (*_TEXT_ROWS, "entities", "relations")
PYTHON = {f"python:{kind}": kind for kind in ("stdlib", *_STDLIB_ROWS)}
HUGGING_FACE = "hf:"
DATA_ROOT_VARIABLE = "BIGBATCH_DATA"
EXTENSIONS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
_KINDS = ".txt, .jsonl, .csv, .tsv (each also .gz) or .parquet file"
_JSON = re.compile(r"\.json(\.gz)?$", re.IGNORECASE)  # a document where it is named; in a folder it may be anything
_ARCHIVE_MEMBER = re.compile(r"(.+\.zip)!(.+)", re.IGNORECASE)

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LABEL_EXTENSIONS = (".csv", ".tsv", ".jsonl")
SHAPES, NUMBERS = "python:shapes", "python:numbers"

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64")
AUDIO_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
TONES = "python:tones"

Source = str | TableSource | ImageSource | AudioSource


class SourceFile(NamedTuple):
    """A file, what tells it from an edited one without reading it, and how to read it."""

    path: str
    """Absolute; of an archive, ARCHIVE!MEMBER; or `hf:NAME:CONFIG:SPLIT`, with size and time of its Arrow files."""
    size_bytes: int
    modified_ns: int
    format: str
    """One of TableSource.format, IMAGE_FORMATS or AUDIO_FORMATS, `hf`, `parallel`, `numbers`, or a kind of PYTHON."""
    table: Any
    """The TableSource that names it; of images the ImageSource, of recordings the AudioSource."""

    @property
    def identity(self) -> tuple[str, int, int]:
        """Path, size and time."""
        return self[:3]


def list_files(sources: Sequence[Source], where: str = "data.train") -> list[SourceFile]:
    """Find the files that the sources name, folders and globs sorted; `where` is the JSON path for messages."""
    files = []
    for position, source in enumerate(sources):
        find: Any = _FINDERS.get(type(source), _files_of)
        files += find(as_table(source), f"{where}[{position}]")
    return files


def local_files(source: Source) -> list[Path]:
    """Find the files of a source on this machine, an archive for its member; none where it names no files or nothing.

    A relative path is looked for here, then under $BIGBATCH_DATA.
    """
    table = as_table(source)
    if not is_local(source):
        return []
    if find := _FINDERS.get(type(table)):
        return [path for file in find(table, table.path) for path in parts_of(file) if path.is_file()]
    path = locate(archive_and_member(table.path)[0])
    if path.is_dir():
        found = [item for item in path.rglob("*") if item.is_file() and (table.format or format_of(item.name))]
        return sorted(item for item in found if not any(part[0] == "." for part in item.relative_to(path).parts))
    return [path] if path.is_file() else _glob(str(path))


def is_local(source: Source) -> bool:
    """Tell whether a source names files."""
    return not as_table(source).path.startswith((HUGGING_FACE, "python:"))


def as_table(source: Source) -> Any:
    """Return the TableSource, ImageSource or AudioSource that a source is, or a plain string stands for."""
    return TableSource(path=source) if isinstance(source, str) else source


def format_of(name: str) -> str | None:
    """Return the format that a file's name ends with."""
    plain = name.lower().removesuffix(".gz")
    extension = Path(plain).suffix
    known = extension in EXTENSIONS and (extension != ".parquet" or plain == name.lower())
    return extension[1:] if known else None


def shared_file(first: Sequence[SourceFile], second: Sequence[SourceFile]) -> str | None:
    """Return the path of a file that both lists hold with a row in common, the smallest."""
    both = [a.path for a in first for b in second if a.path == b.path and _has_rows(a.table, b.table)]
    return min(both, default=None)


def locate(path: str) -> Path:
    """Return the path as it is, or under $BIGBATCH_DATA where only that exists."""
    here = Path(path).expanduser()
    below = Path(os.environ.get(DATA_ROOT_VARIABLE, ".")) / here
    return below if not here.exists() and below.exists() else here


def _files_of(table: TableSource, where: str) -> list[SourceFile]:
    if table.path == NUMBERS:
        _check_options(table, "numbers", where)
        return [SourceFile(NUMBERS, 0, 0, "numbers", table)]
    if form := PYTHON.get(table.path):
        found = [SourceFile(*identify(str(path), where), form, table) for path in stdlib_files()]
        found = [file for file in found if file.size_bytes]
    elif table.path.startswith(HUGGING_FACE):
        found = [SourceFile(*hugging_face_files(table.path, where)[1], "hf", table)]
    else:
        found = [SourceFile(*identify(path, where), form, table) for path, form in _paths_of(table, where)]
    for form in sorted({file.format for file in found}):
        _check_options(table, form, where)
    for file in found:
        if file.size_bytes == 0:
            raise UserError(where, f"{file.path} is empty")
    return found


def _parallel_files(source: ParallelSource, where: str) -> list[SourceFile]:
    """Return the file of the sources, which stands for that of the targets too."""
    for key in ("path", "target"):
        if not locate(getattr(source, key)).is_file():
            found = f"{getattr(source, key)!r} is no file here, nor in $BIGBATCH_DATA"
            raise UserError(f"{where}.{key}", found)
    _check_options(source, "parallel", where)
    return [identify_parts(SourceFile(str(locate(source.path).absolute()), 0, 0, "parallel", source), where)]


def _paths_of(table: TableSource, where: str) -> list[tuple[str, str]]:
    """Return each file's path and format."""
    found = local_files(table)
    if not found and (folder := locate(table.path)).is_dir():
        raise UserError(where, f"the folder {folder} holds no {_KINDS}")
    if not found:
        root = os.environ.get(DATA_ROOT_VARIABLE, "not set")
        searched = f"in {Path.cwd()}, nor in $BIGBATCH_DATA ({root})"
        raise UserError(where, f"{table.path!r} is no file, folder or glob {searched}")
    member = archive_and_member(table.path)[1]
    paths = []
    for path in found:
        name = member or path.name
        form = table.format or format_of(name) or ("squad" if _JSON.search(name) else None)
        if form is None or (member and form == "parquet"):
            hint = "unpack it" if form else "`format` says how to read another"
            raise UserError(where, f"{member or path} is no {_KINDS}; {hint}")
        paths.append((f"{path}!{member}" if member else str(path), form))
    return paths


def _glob(pattern: str) -> list[Path]:
    for root in (".", os.environ.get(DATA_ROOT_VARIABLE, ".")):
        # Path.glob takes no absolute pattern.
        matches = sorted(glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
        if files := [path for match in matches if (path := Path(root) / match).is_file()]:
            return files
    return []


def archive_and_member(path: str) -> tuple[str, str]:
    """Cut ARCHIVE!MEMBER; the member of a plain file is ""."""
    found = _ARCHIVE_MEMBER.fullmatch(path)
    return (found[1], found[2]) if found else (path, "")


def identify(path: str, where: str) -> tuple[str, int, int]:
    """Return the identity of a file, or of one in an archive; `where` is for messages."""
    name, member = archive_and_member(path)
    facts = Path(name).stat()
    absolute = str(Path(name).absolute())
    if not member:
        return absolute, facts.st_size, facts.st_mtime_ns
    return f"{absolute}!{member}", _member_bytes(name, member, where), facts.st_mtime_ns


def _member_bytes(archive: str, member: str, where: str) -> int:
    """Return how long a file in an archive is; raise UserError unless it can be opened."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [item.filename for item in opened.infolist() if not item.is_dir()]
            if member not in names:
                near = ", ".join(difflib.get_close_matches(member, names, cutoff=0.0)) or "nothing"
                raise UserError(where, f"{archive} holds no {member!r}; nearest: {near}")
            opened.open(member).close()
            return opened.getinfo(member).file_size
    except (zipfile.BadZipFile, RuntimeError, OSError) as error:  # RuntimeError: encrypted, or an unknown compression
        raise UserError(where, f"{archive}!{member} cannot be read: {first_line(error)}") from None


_ROW_OPTIONS = {"constants", "take_every", "skip_every"}
_OPTIONS = {
    "txt": {"format", "encoding", "constants"},
    "lines": {"format", "encoding", "pattern", *_ROW_OPTIONS},
    "csv": {"format", "encoding", "columns", *_ROW_OPTIONS},
    "tsv": {"format", "encoding", "columns", *_ROW_OPTIONS},
    "jsonl": {"format", "encoding", *_ROW_OPTIONS},
    "parquet": {"format", *_ROW_OPTIONS},
    "squad": {"format", "encoding", *_ROW_OPTIONS},
    "slots": {"format", "encoding", *_ROW_OPTIONS},
    "sgd": {"format", "encoding", *_ROW_OPTIONS},
    "parallel": {"target", "encoding", *_ROW_OPTIONS},
    "numbers": _ROW_OPTIONS,
    "conll": {"format", "encoding", *_ROW_OPTIONS},
    "semeval": {"format", "encoding", *_ROW_OPTIONS},
    "smart": {"format", "encoding", *_ROW_OPTIONS},
    "hf": _ROW_OPTIONS,
    "stdlib": {"constants"},
    **dict.fromkeys(_STDLIB_ROWS, _ROW_OPTIONS),
}


def _check_options(table: TableSource, form: str, where: str) -> None:
    given = table.model_dump(exclude_defaults=True, exclude={"path"})
    if useless := sorted(set(given) - _OPTIONS[form]):
        raise UserError(f"{where}.{useless[0]}", f"has no effect on format {form!r}; remove it")
    if not _has_rows(table):
        raise UserError(f"{where}.skip_every", f"is {table.skip_every}: it leaves out all that take_every takes")
    try:
        is_fit = "\n\n".encode(table.encoding).endswith(b"\n\n")
    except (LookupError, UnicodeError):
        raise UserError(f"{where}.encoding", f"{table.encoding!r} is no encoding that Python knows") from None
    if not is_fit:
        raise UserError(f"{where}.encoding", f"{table.encoding!r} has line ends of several bytes; convert it to UTF-8")
    try:
        has_groups = table.pattern is None or re.compile(table.pattern).groupindex
    except re.error as error:
        raise UserError(f"{where}.pattern", f"{table.pattern!r} is no regular expression: {error}") from None
    if not has_groups:
        raise UserError(f"{where}.pattern", f"{table.pattern!r} names no column; write one as (?P<text>.*)")


def _has_rows(*tables: Any) -> bool:
    """Tell whether a row of a long file is taken by all.

    The first row that every `take_every` takes is their least common multiple; what is left out there is left out of
    all its multiples.
    """
    if isinstance(tables[0], AudioSource):
        return len({table.pattern for table in tables}) == 1  # of two patterns reading the file tells
    if isinstance(tables[0], ImageSource):
        return max(table.start for table in tables) < min(table.stop or math.inf for table in tables)
    first = math.lcm(*(table.take_every or 1 for table in tables))
    return all(table.skip_every is None or first % table.skip_every for table in tables)


def hugging_face_files(source: str, where: str) -> tuple[list[Path], tuple[str, int, int]]:
    """Return the Arrow files of a data set, and its identity."""
    dataset = load_hugging_face(source, where)
    if not dataset.num_rows:
        raise UserError(where, f"{source} is empty")
    paths = [Path(file["filename"]) for file in dataset.cache_files]
    facts = [path.stat() for path in paths]
    return paths, (source, sum(f.st_size for f in facts), max(f.st_mtime_ns for f in facts))


def load_hugging_face(source: str, where: str) -> Any:
    """Return a memory-mapped `datasets.Dataset`, from a local folder, the cache or the hub."""
    import datasets  # noqa: PLC0415 - takes a second, and most runs read plain files

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry without a network is two warnings

    name, config, split, *_ = [*source.removeprefix(HUGGING_FACE).split(":", 2), "", ""]  # a split may be train[1:9]
    folder = locate(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if not saved:
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else name, config or None, split=split or "train"
            )
        dataset = datasets.load_from_disk(str(folder))
        return dataset[split or "train"] if isinstance(dataset, datasets.DatasetDict) else dataset
    except (OSError, ValueError, KeyError) as error:
        hint = "" if folder.is_dir() else "; without a network it must be in the cache, or be a local folder"
        raise UserError(where, f"the data set {source!r} cannot be loaded: {first_line(error)}{hint}") from None


# ------------------------------------------------------------------------------------------------------------ images

IMAGE_FORMATS = ("image_folder", "image_list", "idx", "npz", "hf_images", "shapes")
"""A folder that holds images itself, a file of labels for those of a folder, and what the others are named after."""


def _image_files(source: ImageSource, where: str) -> list[SourceFile]:
    """Return the folders that hold images themselves, or the one file that holds all."""
    if source.path == SHAPES:
        found = [("shapes", SHAPES)]
    elif source.path.startswith(HUGGING_FACE):
        found = [("hf_images", source.path)]
    elif (path := locate(source.path)).is_dir():
        labels = locate(source.labels).absolute() if source.labels else None
        if labels and (not labels.is_file() or labels.suffix.lower() not in LABEL_EXTENSIONS):
            raise UserError(f"{where}.labels", f"{labels} is no {', '.join(LABEL_EXTENSIONS)} file")
        images = _images_below(path)
        if not images:
            raise UserError(where, f"the folder {path} holds no image ({', '.join(IMAGE_EXTENSIONS)})")
        folders = sorted({str(image.parent.absolute()) for image in images})
        found = [("image_list", str(labels))] if labels else [("image_folder", folder) for folder in folders]
    elif path.is_file():
        form = "npz" if path.suffix.lower() == ".npz" else "idx"
        if form == "idx" and not idx_labels(source).is_file():
            hint = "name the file of labels in `labels`"
            raise UserError(f"{where}.labels", f"there is no {idx_labels(source)}; {hint}")
        found = [(form, str(path.absolute()))]
    else:
        raise UserError(where, f"{source.path!r} is no file or folder here, nor in $BIGBATCH_DATA")
    has_rows = found[0][0] in ("idx", "npz", "hf_images")
    if (source.start or source.stop) and not has_rows:
        raise UserError(f"{where}.start", f"and stop have no effect on {source.path}; remove them")
    if not _has_rows(source):
        raise UserError(f"{where}.stop", f"is {source.stop}; right is more than start ({source.start})")
    if source.labels and found[0][0] not in ("idx", "image_list"):
        raise UserError(f"{where}.labels", f"has no effect on {source.path}, which has labels itself; remove it")
    return [identify_parts(SourceFile(name, 0, 0, form, source), where) for form, name in found]


def parts_of(file: SourceFile) -> list[Path]:
    """Return the files and folders of which a source of images, recordings or parallel files consists."""
    path = Path(file.path)
    if file.format in ("shapes", "tones", "numbers"):
        return []
    if file.format == "audio_folder":
        return [path, *recordings_below(path)]
    if file.format == "hf_images":
        return hugging_face_files(file.path, file.path)[0]
    if file.format == "image_folder":
        return [path, *sorted(item for item in path.iterdir() if _is_image(item))]
    if file.format == "image_list":
        return [path, *_images_below(locate(file.table.path))]
    beside = {"idx": lambda: idx_labels(file.table), "parallel": lambda: locate(file.table.target)}
    return [path, beside[file.format]()] if file.format in beside else [path]


def identify_parts(file: SourceFile, where: str) -> SourceFile:
    """Return the source with the size of all its parts and the time of the newest."""
    if file.format == "hf_images":
        _, size_bytes, modified_ns = hugging_face_files(file.path, where)[1]
        return file._replace(size_bytes=size_bytes, modified_ns=modified_ns)
    facts = [path.stat() for path in parts_of(file)]
    size_bytes = sum(fact.st_size for fact in facts)
    return file._replace(size_bytes=size_bytes, modified_ns=max((fact.st_mtime_ns for fact in facts), default=0))


def idx_labels(source: ImageSource) -> Path:
    """Return the file of labels that belongs to one of idx images."""
    if source.labels:
        return locate(source.labels).absolute()
    path = locate(source.path).absolute()
    return path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1"))


def _images_below(folder: Path) -> list[Path]:
    return _shown(folder, [item for item in folder.rglob("*") if _is_image(item)])


def _shown(folder: Path, found: list[Path]) -> list[Path]:
    """Return what does not lie in a hidden place, sorted."""
    return sorted(item for item in found if not any(part[0] == "." for part in item.relative_to(folder).parts))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


# -------------------------------------------------------------------------------------------------------- recordings

AUDIO_FORMATS = ("audio_list", "audio_folder", "audio_archive", "tones")
"""A manifest, whose recordings may change unnoticed; a folder; an archive; and what is made here."""


def _audio_files(source: AudioSource, where: str) -> list[SourceFile]:
    path, name = locate(source.path), source.path.lower()
    if source.path == TONES:
        form = "tones"
    elif path.is_dir():
        form = "audio_folder"
        if not any(map(is_recording, recordings_below(path))):
            raise UserError(where, f"the folder {path} holds no recording ({', '.join(AUDIO_EXTENSIONS)})")
    elif not path.is_file():
        raise UserError(where, f"{source.path!r} is no file or folder here, nor in $BIGBATCH_DATA")
    elif name.endswith(AUDIO_ARCHIVES):
        form = "audio_archive"
    elif path.suffix.lower() in LABEL_EXTENSIONS:
        form = "audio_list"
    else:
        kinds = f"a manifest ({', '.join(LABEL_EXTENSIONS)}), a folder or an archive ({', '.join(AUDIO_ARCHIVES)})"
        raise UserError(where, f"{path} is none of what is read here: {kinds}")
    if source.pattern and form not in ("audio_folder", "audio_archive"):
        raise UserError(f"{where}.pattern", f"has no effect on {source.path}, which has texts itself; remove it")
    try:
        re.compile(source.pattern or "")
    except re.error as error:
        raise UserError(f"{where}.pattern", f"{source.pattern!r} is no regular expression: {error}") from None
    file = SourceFile(TONES if form == "tones" else str(path.absolute()), 0, 0, form, source)
    return [identify_parts(file, where)]


def recordings_below(folder: Path) -> list[Path]:
    """Return the recordings below a folder, and the texts that may belong to them."""
    return _shown(folder, [item for item in folder.rglob("*") if is_recording(item) or item.suffix == ".txt"])


def is_recording(path: Path) -> bool:
    """Tell by its name whether a file is a recording."""
    return path.suffix.lower() in AUDIO_EXTENSIONS


_FINDERS: dict[type, Any] = {
    ImageSource: _image_files,
    AudioSource: _audio_files,
    ParallelSource: _parallel_files,
}
