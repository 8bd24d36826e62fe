"""One process of a run: `python -m bigbatch.recipes.core.worker prepare|train|evaluate[:SPLIT] RUN_DIR [LOG_DIR]`.

It reads the resolved documents in the run folder and nothing else, and tells of a failure in LOG_DIR, else there too.
"""

import os
import sys
from pathlib import Path

from bigbatch.recipes.core.errors import EXIT_USER_ERROR, UserError
from bigbatch.recipes.core.offline import forbid_network
from bigbatch.recipes.core.process import StopFlag, die_with_parent, keep_streams_open, quiet_libraries
from bigbatch.recipes.core.slurm_ranks import join_step


def main(argv: list[str]) -> int:
    """Run one part of a run; return the exit status."""
    die_with_parent()
    keep_streams_open()
    quiet_libraries()
    stop = StopFlag()
    stop.install()
    try:
        join_step()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    forbid_network()
    # On a CPU in bf16 every new length of a batch gets kernels of its own, some MB each; oneDNN would keep 1024.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    from bigbatch.recipes.core.parts import run_part  # noqa: PLC0415 - takes seconds, in which a signal may come

    return run_part(argv[0], Path(argv[1]), stop, Path(argv[-1]))


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread of torch's that outlives gloo now and then aborts the interpreter's own end.
    os._exit(exit_status)
