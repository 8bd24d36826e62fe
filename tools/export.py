"""`bigbatch export MODEL OUT --format F`: a model in the form of another engine, compared, measured, and committed."""

import importlib
import importlib.util
from typing import Any

from bigbatch.recipes.core.arguments import count
from bigbatch.recipes.core.errors import UserError
from bigbatch.tools import ladder

FORMATS = ("onnx", "litert", "executorch", "gguf")
"""Each a module under tools/exporters with `make` and PRECISIONS, the first of which is its default."""


def main(argv: list[str]) -> int:
    """Run the verb `export`."""
    parser = ladder.rung_parser("export", "Write a model for another engine: ONNX, LiteRT, ExecuTorch or llama.cpp.")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    precision = "fp32, fp16, int8, int4, for gguf f16, q8_0, q4_k_m: what weights are stored in (default: the first)"
    parser.add_argument("--dtype", "--precision", dest="precision", metavar="DTYPE", help=precision)
    parser.add_argument(
        "--opset", type=int, metavar="N", help="onnx: the operator set (default: the least that will do)"
    )
    lengths = "litert, executorch: texts are padded to the next of these (litert: 32, 128 and 512, executorch: any)"
    parser.add_argument("--lengths", type=count, nargs="+", metavar="TOKENS", help=lengths)
    arguments = parser.parse_args(argv)
    if arguments.opset is not None and arguments.format != "onnx":
        raise UserError("--opset", f"says nothing of {arguments.format}; it is of onnx")
    if arguments.lengths and arguments.format not in ("litert", "executorch"):
        raise UserError("--lengths", f"says nothing of {arguments.format}, which takes any")
    exporter = open_exporter(arguments.format)
    arguments.precision = arguments.precision or exporter.PRECISIONS[0]
    if arguments.precision not in exporter.PRECISIONS:
        known = ", ".join(exporter.PRECISIONS)
        raise UserError("--dtype", f"found {arguments.precision!r}; right for {arguments.format} is one of {known}")
    return ladder.climb("export", arguments, lambda source, folder: exporter.make(source, folder, arguments))


def open_exporter(name: str) -> Any:
    """Return a format's module; raise UserError where what it needs is not installed."""
    try:
        return importlib.import_module(f"bigbatch.tools.exporters.{name}_export")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bigbatch"):
            raise
        raise UserError("--format", f"{name} needs {error.name}; right is: pip install 'bigbatch[deploy]'") from None
