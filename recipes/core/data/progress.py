"""How far a long preparation is: a bar on a terminal, else a line now and then, on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


@contextmanager
def shown_progress(label: str, total_bytes: int, enabled: bool = True) -> Iterator[Callable[[float, str], None]]:
    """Give a function (bytes done, what to say) to call as often as one likes."""
    if not enabled:
        yield lambda done_bytes, note: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn(label),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total_bytes, note="")
            yield lambda done_bytes, note: bar.update(task, completed=done_bytes, note=note)
    else:
        last_seconds = time.monotonic()

        def say(done_bytes: float, note: str) -> None:
            nonlocal last_seconds
            if time.monotonic() - last_seconds >= LINE_SECONDS:
                last_seconds = time.monotonic()
                print(f"{label}: {done_bytes / total_bytes:.0%}, {note}", file=sys.stderr, flush=True)

        yield say
