"""What one rank finds out about its node before a run: device, arithmetic, checkpoint folder, links to other nodes.

torch is imported where it is used: a node on which it cannot be is to be told of, not to fail in silence.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CPU_SIZE, GPU_SIZE = 384, 4096  # of the matrices, which are square
PRODUCT_SECONDS = 0.5
FILE_BYTES = 2**23
CPU_MESSAGE_BYTES, GPU_MESSAGE_BYTES = 2**22, 2**26
MESSAGES = 4
CLOCK_SAMPLES, CLOCK_PAUSE_SECONDS = 5, 0.1


class Needs(NamedTuple):
    """What the run's checkpoints take."""

    checkpoint_bytes: int = 0
    """One of them."""
    retained_bytes: int = 0
    """The most at once."""
    retained_files: int = 0


class Defect(NamedTuple):
    """Something wrong on a node."""

    check: str
    """device, product, folder, shared, space, clock, bandwidth or answer."""
    severity: str
    """error or warning."""
    message: str


def expects_gpu() -> bool:
    """Tell whether this process was given a GPU, and not told to leave it alone."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    return given not in ("", "-1", "NoDevFiles") and os.environ.get("DS_ACCELERATOR") != "cpu"


def find_device() -> tuple[str, str, list[Defect]]:
    """Return the device as torch calls it, what tells it from others of its node, and what is wrong with it."""
    import torch  # noqa: PLC0415

    number = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number < count:
        return f"cuda:{number}", str(torch.cuda.get_device_properties(number).uuid), []
    if count or expects_gpu():
        message = f"local rank {number} has no GPU: torch sees {count} (CUDA_VISIBLE_DEVICES={_visible()})"
        return "cpu", "", [Defect("device", "error", message)]
    return "cpu", "", []


def multiply(device: str) -> tuple[float, list[Defect]]:
    """Multiply matrices for half a second; return the operations a second, and a defect where a result is wrong.

    Of -1, 0 and 1, so that all sums are whole numbers that half precision holds: results are exact or wrong. They are
    checked by their product with a vector (Freivalds 1977).
    """
    import torch  # noqa: PLC0415

    on_gpu = device != "cpu"
    size, dtype = (GPU_SIZE, torch.float16) if on_gpu else (CPU_SIZE, torch.float32)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(-1, 2, (size, size), generator=generator).to(device, dtype) for _ in range(2))
    vector = torch.randint(-1, 2, (size,), generator=generator).to(device, torch.float64)
    result = first @ second
    is_right = torch.equal(result.double() @ vector, first.double() @ (second.double() @ vector))
    _wait_for(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < PRODUCT_SECONDS:
        again = first @ second
        count += 1
        if count % 8 == 0:  # enough to keep a GPU busy, few enough to end in time
            _wait_for(device)
    _wait_for(device)
    rate = 2 * size**3 * count / (time.perf_counter() - begin)
    if is_right and torch.equal(again, result):
        return rate, []
    return rate, [Defect("product", "error", f"the product of two matrices on {device} is wrong")]


class Written(NamedTuple):
    """A file left for others to read."""

    path: str
    sha256: str
    write_rate: float
    """Bytes a second."""
    read_rate: float


def write_and_read(folder: Path, name: str) -> tuple[Written | None, list[Defect]]:
    """Write a file into the checkpoint folder, past the cache as far as it goes, and compare what is read back."""
    path = folder / f".node_check_{name}"
    content = os.urandom(FILE_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read = path.read_bytes()
        done = time.perf_counter()
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None, [Defect("folder", "error", f"{folder} cannot be written to: {error.strerror}")]
    if read != content:
        return None, [Defect("folder", "error", f"what was written to {path} is not what is read back")]
    digest = hashlib.sha256(content).hexdigest()
    return Written(str(path), digest, FILE_BYTES / (written - begin), FILE_BYTES / (done - written)), []


def find_space(folder: Path, needs: Needs) -> list[Defect]:
    """Compare the free bytes and inodes with what the run's checkpoints take."""
    try:
        facts = os.statvfs(folder)
    except OSError:  # told when it was written to
        return []
    free = facts.f_bavail * facts.f_frsize
    defects = []
    if free < needs.retained_bytes:
        severity = "error" if free < needs.checkpoint_bytes else "warning"
        found = f"{free / 1e9:.3g} GB are free in {folder}; the checkpoints take {needs.retained_bytes / 1e9:.3g}"
        defects.append(Defect("space", severity, found))
    if facts.f_files and facts.f_favail < needs.retained_files:
        found = f"{facts.f_favail} files may still be made in {folder}; the checkpoints are {needs.retained_files}"
        defects.append(Defect("space", "error", found))
    return defects


def read_witness(witness: Written, limit_seconds: float) -> list[Defect]:
    """Read the file that another node has written; a network file system may take a while to show it."""
    end = time.monotonic() + limit_seconds
    while True:
        with contextlib.suppress(OSError):
            os.listdir(Path(witness.path).parent)  # noqa: PTH208 - has NFS look anew
            if hashlib.sha256(Path(witness.path).read_bytes()).hexdigest() == witness.sha256:
                return []
        if time.monotonic() > end:
            folder = Path(witness.path).parent
            message = f"{folder} is not the folder that the other nodes see: a file written by one is not in it"
            return [Defect("shared", "error", message)]
        time.sleep(0.2)


def measure_skew(clock: Any) -> float:
    """Return how many seconds this node's clock is ahead of rank 0's, which `clock()` tells with some delay."""
    samples = []
    for _ in range(CLOCK_SAMPLES):
        samples.append(time.time() - clock())
        time.sleep(CLOCK_PAUSE_SECONDS)
    return min(samples, key=abs)


def exchange_in_pairs(device: str, ranks_a_node: int) -> Iterator[float]:
    """Yield the bytes a second to the next node and to the one before, all ranks of a node at once.

    Two rounds: nodes 0-1, 2-3, ..., then 1-2, 3-4, ...; where the number of nodes is odd, one is left out in each, and
    its rate is 0. Collective: every rank must call it.
    """
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    node, rank, nodes = dist.get_rank() // ranks_a_node, dist.get_rank(), dist.get_world_size() // ranks_a_node
    message = torch.ones(_message_bytes(device) // 4, device=device)
    for turn in range(2 if nodes > 2 else 1):
        is_first = node % 2 == turn
        other = node + 1 if is_first else node - 1
        if not 0 <= other < nodes:
            yield 0.0
            continue
        peer = rank + (other - node) * ranks_a_node
        seconds = []
        for _ in range(MESSAGES):
            _wait_for(device)
            begin = time.perf_counter()
            for is_sender in (is_first, not is_first):
                (dist.send if is_sender else dist.recv)(message, peer)
            _wait_for(device)
            seconds.append(time.perf_counter() - begin)
        yield 2 * _message_bytes(device) / min(seconds)


def reduce_over_all(device: str) -> tuple[float, list[Defect]]:
    """Return the bus bandwidth of an all-reduce over all ranks, bytes a second: 2 (n - 1) / n x size / time.

    Collective: every rank must call it.
    """
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    ranks, seconds, is_right = dist.get_world_size(), [], True
    for _ in range(MESSAGES):
        message = torch.full((_message_bytes(device) // 4,), float(dist.get_rank() + 1), device=device)
        _wait_for(device)
        begin = time.perf_counter()
        dist.all_reduce(message)
        _wait_for(device)
        seconds.append(time.perf_counter() - begin)
        is_right = is_right and bool((message == ranks * (ranks + 1) / 2).all())
    rate = 2 * (ranks - 1) / ranks * _message_bytes(device) / min(seconds)
    return rate, [] if is_right else [Defect("bandwidth", "error", "the sum over all ranks is wrong")]


def _message_bytes(device: str) -> int:
    return CPU_MESSAGE_BYTES if device == "cpu" else GPU_MESSAGE_BYTES


def _visible() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "not set")


def _wait_for(device: str) -> None:
    if device != "cpu":
        import torch  # noqa: PLC0415

        torch.cuda.synchronize(device)
