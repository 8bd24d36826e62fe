"""Run llmcompressor on a Hugging Face folder: `python -m bigbatch.tools.quantization.compressor REQUEST.json`.

It runs in llmcompressor's own environment, and imports only what that has.
"""
# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bigbatch.tools.quantization.methods import METHODS, scheme
from bigbatch.tools.quantization.smoothing import Step

SMOOTHING_STRENGTH = 0.8
"""How much of the outliers goes over into the weights (arXiv 2211.10438, section 5 has 0.8 for Llama, 0.5 for OPT)."""


def main(argv: list[str]) -> int:
    """Quantize as the request says."""
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    if not torch.accelerator.is_available():
        # AWQ pins its samples' memory, which torch can only beside an accelerator (llmcompressor 0.14.0.1).
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    compress(**request)
    return 0


def compress(
    folder: str,
    out: str,
    method: str,
    group_size: int | None,
    ignored: list[str],
    inputs: str,
    steps: list[dict[str, Any]],
    dtype: str,
) -> None:
    """Calibrate, round and write."""
    import transformers
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kind: Any = getattr(transformers, settings["architectures"][0])
    model = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=dtype).eval()
    unknown = sorted(set(ignored) - {name for name, _ in model.named_modules()})
    if unknown:
        raise ValueError(f"transformers {transformers.__version__} has no layer {unknown[0]}")
    samples = read_samples(Path(inputs))
    oneshot(
        model=model,
        processor=object(),  # else one is looked for, and nothing here needs it
        dataset=DataLoader(samples, batch_size=None),  # type: ignore[arg-type]
        num_calibration_samples=len(samples),
        recipe=_modifiers(method, group_size, ignored, [Step(**step) for step in steps]),
        # Layer by layer, each sees what the quantized ones before it give; this cannot follow two stacks of layers.
        pipeline="basic" if getattr(model.config, "is_encoder_decoder", False) else "sequential",
    )
    model.save_pretrained(out, save_compressed=True)


def read_samples(path: Path) -> list[dict[str, torch.Tensor]]:
    """Read the inputs of each call, whose names begin with its number."""
    from safetensors.torch import load_file

    samples: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(load_file(path).items()):
        number, _, key = name.partition(".")
        samples.setdefault(number, {})[key] = tensor
    return list(samples.values())


def _modifiers(name: str, group_size: int | None, ignored: list[str], steps: list[Step]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.awq.mappings import AWQMapping
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    method = METHODS[name]
    groups = {"linear": {"targets": ["Linear"], **scheme(method, group_size)}}
    rounding = GPTQModifier if method.rounds_by == "gptq" else QuantizationModifier
    found: list[Any] = [rounding(config_groups=groups, ignore=ignored)]
    if method.smooths == "awq":
        found.insert(0, AWQModifier(mappings=[AWQMapping(step.source, step.layers) for step in steps]))
    if method.smooths == "smoothquant":
        mappings = [(step.layers, step.source) for step in steps if step.is_norm]
        found.insert(0, SmoothQuantModifier(smoothing_strength=SMOOTHING_STRENGTH, mappings=mappings))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
