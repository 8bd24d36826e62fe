"""Write safetensors files in a stream: each byte passes once, is hashed on the way and synced at the end.

The library writes from tensors that are all in memory; this writes from whatever parts come, so that a file's size does
not matter. Reading is the library's.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

CHUNK_BYTES = 16 * 2**20
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
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
