"""A process's first moments, before anything slow is imported: it dies with its launcher, and signals end it in order.

Standard library alone: torch takes seconds, and a signal may come in any of them.
"""

import ctypes
import io
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """A signal asked a part that has nothing to save to end."""


class StopFlag:
    """Remembers that a signal asked to save and end; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.signal_name = ""

    def install(self) -> None:
        """Catch the signals that ask to stop."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


def raise_on_stop(stop: StopFlag) -> None:
    """Raise Stopped wherever the process is when a signal asks to stop, or now if one has."""
    for number in STOP_SIGNALS:
        signal.signal(number, _raise_stopped)
    if stop.signal_name:
        raise Stopped


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped


class _Forgiving(io.FileIO):
    """Standard error of a process whose work matters more than its words."""

    def write(self, data: Any) -> int:
        """Write, or let it go: the reader of a pipe may end, a terminal may close, its disk may be full."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def quiet_libraries() -> None:
    """Keep off standard error the bars of libraries, and what torchao says wherever transformers imports it.

    Which is that it has no GPU kernels here. To be called before tqdm is imported, as torch does.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_streams_open() -> None:
    """Let nothing fail for want of standard streams: closed ones lead nowhere, and standard error never raises."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr in (None, sys.__stderr__):  # and not what somebody has put in its place
        raw: Any = _Forgiving(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)


def die_with_parent() -> None:
    """Have the kernel end this process when the launcher that started it is gone (Linux)."""
    parent = os.environ.get("BIGBATCH_PARENT_PID")
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # prctl(2), PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise SystemExit(1)  # it was gone before we asked
