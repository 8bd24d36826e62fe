"""Models exported for ExecuTorch, run by it in its own environment."""

from pathlib import Path

from bigbatch.tools.engines.worker_session import WorkerSession


def open_session(folder: Path, threads: int | None = None) -> WorkerSession:
    """Open a model folder whose format is executorch."""
    return WorkerSession("executorch", folder, threads)
