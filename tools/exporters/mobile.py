"""Encoders and models of images for phones: what the exports to LiteRT and to ExecuTorch share."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.tools.worker import Worker

KINDS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForImageClassification",
    "BertModel",
)
LENGTHS = (32, 128, 512)
"""That models of texts are exported for where nobody says; rows are padded to the next."""
LARGEST_DIFFERENCE = 1e-3
"""Of two outputs in fp32, as a part of the largest; coarser ones are measured on the task."""


def export(
    name: str, file: str, source: Path, partial: Path, options: argparse.Namespace, static: bool
) -> dict[str, Any]:
    """Have a worker of the environment `name` write a folder's model and compare it with transformers' own.

    A model of texts is for options.lengths; without them for LENGTHS where `static`, else for any.
    Raises UserError for a model that is neither an encoder nor one of images.
    """
    settings = read_json(source / "config.json")
    architecture = (settings.get("architectures") or [""])[0]
    if not architecture.endswith(KINDS):
        found = f"holds {architecture or 'a model of no class'}, which does not go to {name}"
        right = "an encoder with a head, or a model of images; models that write go to onnx or gguf"
        raise UserError(str(source), f"{found}; right is {right}")
    lengths = _lengths(settings, options, static)
    message = {"folder": str(source), "file": str(partial / file), "precision": options.precision}
    message |= {"lengths": lengths, "max_length": max(lengths, default=settings.get("max_position_embeddings", 0))}
    with Worker(name, f"bigbatch.tools.exporters.{name}_worker") as worker:
        answer, _ = worker.call(message | {"threads": getattr(options, "threads", None)})
    layout, record = answer["layout"], answer["record"]
    difference, largest = record["largest_difference"], record["largest_output"]
    if not difference <= (LARGEST_DIFFERENCE * largest if options.precision == "fp32" else np.inf):
        message = (
            f"not exported: outputs differ from transformers' own by {difference:.3g}, the largest is {largest:.3g}"
        )
        raise UserError(str(source), message)
    del layout["settings"]
    return {
        "format": name,
        "file": file,
        "precision": options.precision,
        **layout,
        "record": {"name": f"{name} {options.precision}", **record},
    }


def _lengths(settings: dict[str, Any], options: argparse.Namespace, static: bool) -> list[int]:
    """Return the lengths to export for, in order; none for images, and for any length."""
    asked = getattr(options, "lengths", None)
    if "image_size" in settings:
        if asked:
            raise UserError("--lengths", "says nothing of a model of images")
        return []
    most = settings["max_position_embeddings"]
    if asked:
        if max(asked) > most or min(asked) < 2:
            raise UserError("--lengths", f"found {', '.join(map(str, asked))}; the model takes from 2 to {most} tokens")
        return sorted(set(asked))
    return sorted({min(length, most) for length in LENGTHS}) if static else []
