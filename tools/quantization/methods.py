"""The ways to quantize a model after training: what each does to a layer, and what runs the result.

Imports nothing, since two environments share it.
"""

from typing import Any, NamedTuple

GROUP_SIZES = (128, 64, 32)
"""Weights of a row that share a scale, the largest that divides all rows; vLLM's kernels know these."""

NF4_BLOCK = 64
"""bitsandbytes' own for those; its CPU kernel takes no block that goes on in the next row (0.50.2)."""

Numbers = dict[str, Any]  # compressed-tensors' QuantizationArgs
INT8_TOKEN: Numbers = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_TOKEN: Numbers = {**INT8_TOKEN, "type": "float"}
INT8: Numbers = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8: Numbers = {**INT8, "type": "float"}
INT4: Numbers = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


class Method(NamedTuple):
    """A way to quantize the linear layers."""

    library: str
    """Who writes it: torchao, bitsandbytes, compressed-tensors, or llmcompressor in an environment of its own."""
    summary: str
    weights: Numbers | None
    """None: bitsandbytes' 4-bit normal floats, 64 weights a scale."""
    activations: Numbers | None = None
    smooths: str | None = None
    """Which scales go over from activations into weights first: "awq" or "smoothquant"."""
    rounds_by: str = "nearest"
    """How weights are rounded; "gptq" lets later weights of a row make up for the errors of earlier ones."""

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs samples."""
        return self.library == "llmcompressor"


METHODS = {
    "int8_dynamic": Method("torchao", "8-bit weights, activations rounded to 8 bits as they come", INT8, INT8_TOKEN),
    "int8_weight": Method("torchao", "8-bit weights", INT8),
    "int4_weight": Method("compressed-tensors", "4-bit weights, rounded to the nearest", INT4),
    "nf4": Method("bitsandbytes", "4-bit normal floats", None),
    "gptq_w4a16": Method("llmcompressor", "4-bit weights by GPTQ", INT4, rounds_by="gptq"),
    "awq_w4a16": Method("llmcompressor", "4-bit weights by AWQ", INT4, smooths="awq"),
    "smoothquant_w8a8": Method(
        "llmcompressor",
        "8-bit weights and activations by SmoothQuant and GPTQ",
        INT8,
        INT8_TOKEN,
        "smoothquant",
        "gptq",
    ),
    "fp8": Method("compressed-tensors", "8-bit floats, weights and activations", FP8, FP8_TOKEN),
}


def scheme(method: Method, group_size: int | None) -> dict[str, Numbers | None]:
    """Return compressed-tensors' scheme of a linear layer."""
    assert method.weights is not None
    grouped = {"group_size": group_size} if method.weights["strategy"] == "group" else {}
    return {"weights": {**method.weights, **grouped}, "input_activations": method.activations}


def runs_here(method: Method, capability: tuple[int, int] | None) -> str | None:
    """Return what this hardware cannot do with the result, and what to take instead; None where it does all.

    `capability` is the GPU's compute capability, None without a GPU.
    """
    place = "this CPU" if capability is None else f"this GPU (compute capability {capability[0]}.{capability[1]})"
    best = "bigbatch export --format onnx --dtype int8"
    if method.weights is FP8 and (capability is None or capability < (8, 9)):
        return (
            f"{place} cannot multiply 8-bit floats (NVIDIA's from 8.9 on can: L4, L40, H100): they are only simulated "
            f"here, so quality is measured rightly and latency is not; what is fast here: {best}"
        )
    if capability is None and method.library in ("compressed-tensors", "llmcompressor"):
        return (
            "made for vLLM on GPUs; transformers unpacks the weights at their first use on this CPU, so disk is saved "
            f"here, not time and memory; what is fast here: {best}"
        )
    if capability is None:
        return f"on this CPU disk and memory are saved, not always time (torchao's pays for large models); else: {best}"
    return None
