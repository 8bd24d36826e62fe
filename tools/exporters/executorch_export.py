"""Encoders and models of images as a .pte file for XNNPACK, which ExecuTorch runs."""

import argparse
from pathlib import Path
from typing import Any

from bigbatch.tools.exporters import mobile

FILE = "model.pte"
PRECISIONS = ("fp32", "int4")
"""What weights are stored in; the first is the default."""


def make(source: Any, partial: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write model.pte of the folder `source.path` in `options.precision`; see mobile.export."""
    return mobile.export("executorch", FILE, source.path, partial, options, static=False)
