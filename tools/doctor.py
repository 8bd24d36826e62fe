"""Say which fused parts are in use on this machine, and why not the others: `bigbatch doctor`."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bigbatch.recipes.core.arguments import Parser

if TYPE_CHECKING:
    import torch

OK, ABSENT, WARNING = "ok", "absent", "warning"
LOW_DISK_BYTES = 5 * 10**9
# Each op of DeepSpeed that concerns these recipes -> what it is for, and what does its work here.
OPS = {
    "cpu_adam": ("the optimizer under offload", "torch's own fused AdamW does its work"),
    "fused_adam": ("the optimizer", "torch's own fused AdamW does its work"),
    "cpu_lion": ("Lion", "an implementation in torch does its work"),
    "cpu_adagrad": ("Adagrad", "an implementation in torch does its work"),
    "async_io": ("offload to a fast disk", "offload to memory does without"),
}


class Part(NamedTuple):
    """One line of the diagnosis."""

    name: str
    state: str
    """ok, absent (and something else does its work), or warning (something to mend)."""
    detail: str


def main(argv: list[str]) -> int:
    """Print the diagnosis; the exit status is 1 when there is something to mend."""
    parser = Parser(prog="bigbatch doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON")
    as_json = parser.parse_args(argv).as_json
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet on standard output when imported
        parts = diagnose()
    if as_json:
        print(json.dumps([part._asdict() for part in parts], indent=2))
    else:
        width = max(len(part.name) for part in parts)
        for name, state, detail in parts:
            print(f"{name:{width}}  {state:7}  {detail}")
    return int(any(part.state == WARNING for part in parts))


def diagnose() -> list[Part]:
    """Look at everything that decides how fast training goes here, or whether it goes at all."""
    looks: tuple[Callable[[], Iterator[Part]], ...] = (
        _machine,
        _torch,
        _number_formats,
        _deepspeed,
        _apex,
        _bitsandbytes,
        _build_tools,
        _build_locks,
        _disk,
    )
    return [part for look in looks for part in look()]


def _machine() -> Iterator[Part]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Part(
        "machine", OK, f"Python {platform.python_version()}, {platform.machine()}, {usable} cores, {memory:.0f} GB"
    )


def _torch() -> Iterator[Part]:
    if not _is_installed("torch"):
        yield Part("torch", WARNING, "not installed: pip install 'bigbatch[train]'")
        return
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield Part("torch", OK, f"{torch.__version__}, {build}, {threads}")
    yield _gpu(torch.cuda.is_available())


def _gpu(usable: bool) -> Part:
    import torch

    if usable:
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Part("GPU", OK, ", ".join(names))
    if not shutil.which("nvidia-smi") and not Path("/dev/nvidia0").exists():
        return Part("GPU", ABSENT, "no NVIDIA GPU: training runs on the CPU")
    if not torch.version.cuda:
        return Part("GPU", WARNING, "there is one, but torch is the CPU build: delete .venv and install again here")
    return Part("GPU", WARNING, f"there is one, but torch for CUDA {torch.version.cuda} cannot use it: see nvidia-smi")


def _number_formats() -> Iterator[Part]:
    """Measure what the number formats bring: a library's word on support says nothing about speed."""
    if not _is_installed("torch"):
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = _product_seconds(torch.float32, device)
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        ratio = base / _product_seconds(dtype, device)
        detail = f"a matrix product runs at {ratio:.1f} times the speed of fp32"
        yield Part(f"precision {name}", OK if ratio > 1 else ABSENT, detail)


def _product_seconds(dtype: "torch.dtype", device: str) -> float:
    """Return the best time of a matrix product of 1024 x 1024; the first pass warms up."""
    import torch

    matrix = torch.ones(1024, 1024, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times)


def _deepspeed() -> Iterator[Part]:
    if not _is_installed("deepspeed"):
        yield Part("DeepSpeed", WARNING, "not installed: pip install 'bigbatch[train]'")
        return
    from bigbatch.recipes.core.engine import import_deepspeed

    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
    import_deepspeed()
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops import __compatible_ops__ as compatible

    yield Part("DeepSpeed", OK, importlib.metadata.version("deepspeed"))
    for op, (purpose, instead) in OPS.items():
        if op not in compatible:
            continue
        if installed_ops.get(op) or any(_extensions_folder().rglob(f"{op}.so")):
            found = "compiled"
        else:
            found = "could be compiled" if compatible[op] else "cannot be compiled here"
        yield Part(f"DeepSpeed {op}", ABSENT, f"for {purpose}: {found}, not used; {instead}")


def _apex() -> Iterator[Part]:
    if not _is_installed("apex"):
        yield Part("NVIDIA apex", ABSENT, "not installed: torch's own fused optimizers do its work")
    elif _has_fused_adam():
        yield Part("NVIDIA apex", OK, "installed")
    else:
        detail = "a package named apex is installed, but not NVIDIA's (PyPI's is unrelated): pip uninstall apex"
        yield Part("NVIDIA apex", WARNING, detail)


def _has_fused_adam() -> bool:
    try:
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except Exception:  # a foreign package of this name may fail in any way
        return False


def _bitsandbytes() -> Iterator[Part]:
    if not _is_installed("bitsandbytes"):
        yield Part(
            "bitsandbytes", ABSENT, "not installed, needed by optimizer adamw_8bit: pip install 'bigbatch[low-bit]'"
        )
        return
    try:
        importlib.import_module("bigbatch.recipes.core.low_bit").import_bitsandbytes()
    except Exception as error:  # it loads compiled libraries, which fail in many ways
        yield Part("bitsandbytes", WARNING, f"installed, but does not load: {' '.join(str(error).split())}")
    else:
        yield Part("bitsandbytes", OK, importlib.metadata.version("bitsandbytes"))


def _build_tools() -> Iterator[Part]:
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        yield Part("C++ compiler", ABSENT, f"no {compiler}: only DeepSpeed's ops and torch.compile would need it")
    else:
        banner = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        yield Part("C++ compiler", OK, (banner.splitlines() or [compiler])[0])
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    yield Part("ninja", OK if ninja else ABSENT, ninja or "not found: only DeepSpeed's ops would need it")


def _build_locks() -> Iterator[Part]:
    """A build that was killed leaves its lock, and every later one waits for it without a word."""
    for lock in sorted(_extensions_folder().rglob("lock")):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        detail = (
            f"held for {minutes:.0f} min; unless a build is running now, it died, and others wait for ever: rm {lock}"
        )
        yield Part(f"build lock {lock.parent.name}", WARNING, detail)


def _extensions_folder() -> Path:
    """Return where torch compiles extensions (torch.utils.cpp_extension.get_default_build_root, without torch)."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(chosen) if chosen else cache / "torch_extensions"


def _disk() -> Iterator[Part]:
    for name, folder in {
        "disk here": Path.cwd(),
        "disk for temporary files": Path(tempfile.gettempdir()),
    }.items():
        free = shutil.disk_usage(folder).free
        yield Part(name, OK if free > LOW_DISK_BYTES else WARNING, f"{free / 1e9:.0f} GB free in {folder}")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
