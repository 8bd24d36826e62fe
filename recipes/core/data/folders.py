"""Where prepared data lie: prepared_dir/<content id>/, one process building at a time, and which was made last."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigbatch.recipes.core.data.manifest import write_atomically
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.offline import is_offline

VERIFIED_BYTES = 2**30  # more is not read whole at every start; sizes are compared


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for another process that does."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process prepares {path.with_suffix('')}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def point_to(root: Path, settings_id: str, content_id: str) -> None:
    """Remember which folder was made last for these settings."""
    write_atomically(_pointer(root, settings_id), content_id)


def is_latest(root: Path, settings_id: str, content_id: str) -> bool:
    """Tell whether this folder was made last for these settings."""
    pointer = _pointer(root, settings_id)
    return pointer.exists() and pointer.read_text() == content_id


def latest(root: Path, settings_id: str) -> Path:
    """Return the folder that was made last for these settings; the sources may be gone by now."""
    pointer = _pointer(root, settings_id)
    if not pointer.exists():
        raise UserError("data.prepared_dir", f"{root.absolute()} holds no data for these settings; prepare them first")
    return root / pointer.read_text()


def bundled(root: Path, settings_id: str) -> Path | None:
    """Return what `latest` does where the run is offline: then data are taken as they were prepared elsewhere.

    Their sources, if they are here at all, are copies with other paths and times.
    """
    return latest(root, settings_id) if is_offline() and _pointer(root, settings_id).exists() else None


def _pointer(root: Path, settings_id: str) -> Path:
    return root / f"{settings_id}.latest"
