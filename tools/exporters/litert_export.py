"""Encoders and models of images as a .tflite file, which LiteRT runs."""

import argparse
from pathlib import Path
from typing import Any

from bigbatch.tools.exporters import mobile

FILE = "model.tflite"
PRECISIONS = ("fp32", "int8", "int4")
"""What weights are stored in; the first is the default."""


def make(source: Any, partial: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write model.tflite of the folder `source.path` in `options.precision`; see mobile.export."""
    return mobile.export("litert", FILE, source.path, partial, options, static=True)
