"""ExecuTorch's runtime, in its own environment: answers the calls of worker_session.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]
from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.engines.rows import Call
from bigbatch.tools.engines.worker_side import answer
from bigbatch.tools.worker import serve


def open_call(file: str, layout: Mapping[str, Any], threads: int | None) -> Call:
    """Open a .pte file, which has a method for each length, or one for all."""
    if threads:
        portable_lib._unsafe_reset_threadpool(threads)
    try:
        program = Runtime.get().load_program(file)
        methods = {length: program.load_method(f"length_{length}") for length in layout["lengths"] or [0]}
    except (ValueError, RuntimeError) as error:
        raise UserError(file, f"is no model that ExecuTorch can load: {error}") from None

    def call(length: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        method = methods.get(length) or methods[0]
        return [array.numpy().copy() for array in method.execute([torch.from_numpy(array) for array in inputs])]

    return call


if __name__ == "__main__":
    serve(answer(open_call))
