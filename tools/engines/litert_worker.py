"""LiteRT's interpreter, in its own environment: answers the calls of worker_session.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.engines.rows import Call
from bigbatch.tools.engines.worker_side import answer
from bigbatch.tools.worker import serve


def open_call(file: str, layout: Mapping[str, Any], threads: int | None) -> Call:
    """Open a .tflite file, which has a signature for each length; its integers have 32 bits."""
    try:
        interpreter = Interpreter(model_path=file, num_threads=threads)
        signatures = interpreter.get_signature_list()
        runners = {length: interpreter.get_signature_runner(f"length_{length}") for length in layout["lengths"] or [0]}
    except (ValueError, RuntimeError) as error:
        raise UserError(file, f"is no model that LiteRT can load: {error}") from None
    names = {length: signatures[f"length_{length}"] for length in runners}

    def call(length: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        narrow = [array.astype(np.int32) if array.dtype.kind == "i" else array for array in inputs]
        found = runners[length](**dict(zip(names[length]["inputs"], narrow, strict=True)))
        return [found[name] for name in names[length]["outputs"]]

    return call


if __name__ == "__main__":
    serve(answer(open_call))
