"""Write safetensors files in a stream: each byte passes once, is hashed on the way and synced at the end.

The library writes from tensors that are all in memory; this writes from whatever parts come, so that a file's size does
not matter. It reads ranges straight into the tensors they are for: the library maps files, and what it has read of them
stays in the process's memory.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

CHUNK_BYTES = 2**20  # stays in a core's cache from hashing to writing: one pass over memory
READ_BYTES = 4 * 2**20
WINDOW_ELEMENTS = 4 * 2**20  # of what is cast or sent to a device while it is read
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Entry(NamedTuple):
    """A tensor that the file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, entries: list[Entry], parts: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Write a safetensors file; return its name, bytes and xxh3-128.

    `parts` are the entries' elements in order, in the entries' dtypes, cut anywhere.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data begin at a multiple of 8
    digest, written = xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as file:
        for chunk in _chunks(len(head).to_bytes(8, "little") + head, parts):
            digest.update(chunk)
            _write_all(file, chunk)
            written += len(chunk)
        os.fsync(file.fileno())
    assert written == 8 + len(head) + offset, f"{path}: {written} bytes written, {8 + len(head) + offset} announced"
    return {"name": path.name, "bytes": written, "xxh3_128": digest.hexdigest()}


class TensorFile:
    """An open safetensors file, for one thread: ranges of its tensors, with nothing unpickled and nothing mapped."""

    def __init__(self, path: Path) -> None:
        """Read the header; raise ValueError if it is not one of safetensors, or not of the bytes that follow it."""
        self._file = path.open("rb", buffering=0)
        num_bytes = path.stat().st_size
        length = int.from_bytes(self._file.read(8), "little")
        if num_bytes < 8 or length > num_bytes - 8:
            raise ValueError(f"{path.name} is no safetensors file")
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            self._tensors = {name: _located(entry, 8 + length, num_bytes) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} is no safetensors file ({error!r})") from None

    def __del__(self) -> None:
        """Close the file, if it could be opened."""
        if hasattr(self, "_file"):
            self._file.close()

    def read_into(self, name: str, start: int, target: torch.Tensor) -> None:
        """Fill `target` [n] with elements start..start+n of the flattened tensor, cast to its dtype.

        Raise ValueError where the file does not have them.
        """
        if name not in self._tensors:
            raise ValueError(f"{Path(self._file.name).name} has no tensor {name!r}")
        dtype, begin, end = self._tensors[name]
        position = begin + start * dtype.itemsize
        if position + target.numel() * dtype.itemsize > end:
            raise ValueError(f"{Path(self._file.name).name}: tensor {name!r} ends before element {start + len(target)}")
        self._file.seek(position)
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            self._fill(target)
            return
        for window in target.split(WINDOW_ELEMENTS):
            staged = torch.empty(window.shape, dtype=dtype)
            self._fill(staged)
            window.copy_(staged)

    def _fill(self, target: torch.Tensor) -> None:
        view = target.detach().view(torch.uint8).numpy().data
        while view:
            count = self._file.readinto(view)
            if not count:
                raise ValueError(f"{Path(self._file.name).name} ends too early")
            view = view[count:]


def _located(entry: dict[str, Any], data_start: int, num_bytes: int) -> tuple[torch.dtype, int, int]:
    """Return a tensor's dtype and where its bytes begin and end in the file."""
    dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
    if end - begin != torch.Size(entry["shape"]).numel() * dtype.itemsize or not 0 <= begin <= end:
        raise ValueError(f"a tensor of {entry['shape']} at {begin}..{end}")
    if data_start + end > num_bytes:
        raise ValueError(f"data until {end}, the file has {num_bytes - data_start}")
    return dtype, data_start + begin, data_start + end


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Have the folder's own entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(head: bytes, parts: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for part in parts:
        data = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), CHUNK_BYTES):
            yield data[begin : begin + CHUNK_BYTES]


def _write_all(file: Any, chunk: memoryview) -> None:
    while len(chunk):
        chunk = chunk[file.write(chunk) :]
