"""An ONNX graph as it grows: operators, weights in one of four forms, and the files.

Weights of a linear layer lie [N, K], a row an output, so that an embedding's table and the layer tied to it are stored
once: what is equal is written once, also over the graphs of one folder.

Shapes: N outputs and K inputs of a layer, G blocks of a row.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CONTRIB = "com.microsoft"
LEAST_OPSET = 20
FUSED_OPSET = 23
"""From here on attention, the root-mean-square norm and rotary positions are operators."""
IR_VERSION = 10
BLOCK_SIZE = 32
LARGE_ELEMENTS = 2**14
"""Smaller tables stay as they are."""
INLINE_BYTES = 1024
MOST_STEPS = 64
"""Of int8 weights that are multiplied: without VNNI onnxruntime adds two products with states of 8 bits in 16 bits.

They hold 2 * 255 * 64, and not 2 * 255 * 127. What it costs is little beside the rounding of the states.
"""
MASKED = -1e4
"""What is added to a score that must not count: representable in float16, and e to it is 0."""


class Graph:
    """A graph that takes a model's weights by name, and brings them into the form `dtype`."""

    def __init__(self, weights: Mapping[str, np.ndarray], dtype: str, opset: int, writes: bool = False) -> None:
        """Begin; in a model that `writes`, a token at a time, int8 is by blocks as int4 is, else with a scale a row."""
        self.weights, self.dtype, self.opset, self.writes = weights, dtype, opset, writes
        self.float = np.float16 if dtype == "fp16" else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: Any, *shape: int | str) -> str:
        """Declare an input."""
        self.inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, value: str, *shape: int | str, dtype: Any = None) -> None:
        """Declare an output; without `dtype` it is as the floating-point numbers of the graph are."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(_value(name, dtype or self.float, shape))

    def add(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add an operator of one output; return its name."""
        return self.add_many(operator, *inputs, count=1, domain=domain, **attributes)[0]

    def add_many(self, operator: str, *inputs: str, count: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add an operator of several outputs; return their names."""
        outputs = [f"{operator}_{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))
        return outputs

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Return the name of a constant; numbers with a fraction are as the graph's are, others int64."""
        array = np.asarray(value)
        array = array.astype(dtype or (self.float if array.dtype.kind == "f" else np.int64), copy=False)
        name = f"{array.dtype}_{'x'.join(map(str, array.shape))}_{_digest(array)}"
        self.constants[name] = array
        return name

    def weight(self, name: str) -> str:
        """Return a tensor of the model's as a constant."""
        return self.constant(self.weights[name].astype(self.float))

    def cast(self, value: str, dtype: Any = None) -> str:
        """Bring values into a type, without `dtype` the graph's floating-point numbers."""
        return self.add("Cast", value, to=_proto_type(dtype or self.float))

    def size(self, value: str, dim: int) -> str:
        """Return the length [1] of a dimension."""
        return self.add("Shape", value, start=dim, end=dim + 1)

    def range(self, length: str) -> str:
        """Count from 0 to a length [1]."""
        return self.add("Range", self.constant(0), self.add("Squeeze", length), self.constant(1))

    def reshape(self, value: str, *shape: int) -> str:
        """Give values a shape; 0 keeps a dimension, -1 is what remains."""
        return self.add("Reshape", value, self.constant(shape))

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Divide the last dimension."""
        return self.add_many("Split", value, self.constant(sizes), count=len(sizes), axis=-1)

    def norm(self, states: str, name: str, epsilon: float) -> str:
        """Layer norm by the weights of a name, or the root-mean-square norm where it has no bias."""
        scale = self.weight(f"{name}.weight")
        if f"{name}.bias" in self.weights:
            return self.add("LayerNormalization", states, scale, self.weight(f"{name}.bias"), axis=-1, epsilon=epsilon)
        return self.add("RMSNormalization", states, scale, axis=-1, epsilon=epsilon)

    def linear(self, states: str, *names: str, is_turned: bool = False) -> str:
        """Apply a linear layer, or several to the same states side by side; weights of one `is_turned` lie [K, N]."""
        weights = [self.weights[f"{name}.weight"] for name in names]
        weight = np.concatenate([array.T if is_turned else array for array in weights])
        found = self.product(states, weight)
        if f"{names[0]}.bias" not in self.weights:
            return found
        bias = np.concatenate([self.weights[f"{name}.bias"] for name in names])
        return self.add("Add", found, self.constant(bias.astype(self.float)))

    def head(self, states: str, name: str) -> str:
        """Return scores of states by the rows of a table, which keeps 8 bits where others have 4."""
        return self.product(states, self.weights[name], least_bits=8)

    def product(self, states: str, weight: np.ndarray, least_bits: int = 4) -> str:
        """Multiply states [..., K] with rows of weights [N, K]: [..., N]."""
        if self.dtype in ("fp32", "fp16") or weight.size < LARGE_ELEMENTS:
            turned = self.add("Transpose", self.constant(weight.astype(self.float)), perm=(1, 0))
            return self.add("MatMul", states, turned)
        if self.dtype == "int4" or self.writes:
            return self._by_blocks(states, weight, max(least_bits, 8 if self.dtype == "int8" else 4))
        values, scales = quantize_rows(weight)
        turned = self.add("Transpose", self.constant(values, np.int8), perm=(1, 0))
        quantized, scale, zero = self.add_many("DynamicQuantizeLinear", states, count=3)
        whole = self.cast(self.add("MatMulInteger", quantized, turned, zero))
        return self.add("Mul", whole, self.add("Mul", scale, self.constant(scales)))

    def table(self, numbers: str, name: str) -> str:
        """Look rows of an embedding's table up."""
        weight = self.weights[name]
        if self.dtype in ("fp32", "fp16") or weight.size < LARGE_ELEMENTS:
            return self.add("Gather", self.constant(weight.astype(self.float)), numbers)
        if self.dtype == "int4" or self.writes:
            values, scales = quantize_blocks(weight, 8)
            found = self.add("Gather", self.constant(values, np.uint8), numbers)  # [..., G, block]
            shifted = self.add("Sub", self.cast(found), self.constant(128.0))
            factor = self.add("Unsqueeze", self.add("Gather", self.constant(scales), numbers), self.constant([-1]))
            whole = self.add("Reshape", self.add("Mul", shifted, factor), self.constant([0, 0, -1]))
            end = self.constant([weight.shape[1]])
            return self.add("Slice", whole, self.constant([0]), end, self.constant([2]))
        values, scales = quantize_rows(weight)
        found = self.cast(self.add("Gather", self.constant(values, np.int8), numbers))
        return self.add("Mul", found, self.add("Gather", self.constant(scales[:, None]), numbers))

    def unpacked(self, weight: np.ndarray) -> str:
        """Return weights [..., K] in float32 for an operator that takes no other; int8 and int4 store 8 bits."""
        if self.dtype in ("fp32", "fp16"):
            return self.cast(self.constant(weight.astype(self.float)), np.float32)
        values, scales = quantize_rows(weight.reshape(-1, weight.shape[-1]), most=127)
        factor = self.constant(scales.reshape(*weight.shape[:-1], 1))
        return self.add("Mul", self.cast(self.constant(values.reshape(weight.shape), np.int8), np.float32), factor)

    def model(self) -> onnx.ModelProto:
        """Return the graph; its weights are in `constants` alone."""
        graph = helper.make_graph(self.nodes, "bigbatch", self.inputs, self.outputs)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="bigbatch")

    def _by_blocks(self, states: str, weight: np.ndarray, bits: int) -> str:
        values, scales = quantize_blocks(weight, bits)
        rows, size = weight.shape
        sizes = {"K": size, "N": rows, "bits": bits, "block_size": BLOCK_SIZE, "accuracy_level": 4}
        inputs = (states, self.constant(values, np.uint8), self.constant(scales))
        return self.add("MatMulNBits", *inputs, domain=CONTRIB, **sizes)


def quantize_rows(weight: np.ndarray, most: int = MOST_STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [N, K] as int8 from -most to most, and the scale [N] of each row."""
    scales = np.maximum(np.abs(weight).max(1), 1e-12) / most
    return np.rint(weight / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def quantize_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [N, K] as blocks of bits in uint8 [N, G, 32 * bits / 8], and scales [N, G].

    As the operator MatMulNBits has them: 2^(bits - 1) is zero, of two numbers of 4 bits the first is the lower. The
    largest number of a block is the one that is exact, for there is one step more below zero than above.
    """
    rows, size = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -size % BLOCK_SIZE))).reshape(rows, -1, BLOCK_SIZE).astype(np.float32)
    half = 2 ** (bits - 1)
    places = np.abs(blocks).argmax(-1, keepdims=True)
    scales = np.take_along_axis(blocks, places, -1) / -half
    steps = blocks / np.where(scales == 0, 1, scales)
    values = np.clip(np.rint(steps) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    return values, scales[..., 0]


def write_models(folder: Path, graphs: dict[str, Graph]) -> None:
    """Write graphs by the names of their files; their weights lie in one file, each once."""
    data, places = "model.onnx.data", {}
    with (folder / data).open("wb") as file:
        for name, graph in graphs.items():
            model = graph.model()
            for key, array in graph.constants.items():
                model.graph.initializer.append(_stored(key, array, file, places, data))
            (folder / name).write_bytes(model.SerializeToString())


def _stored(name: str, array: np.ndarray, file: Any, places: dict[str, int], data: str) -> TensorProto:
    if array.nbytes < INLINE_BYTES:
        return numpy_helper.from_array(array.copy(), name)
    tensor = TensorProto(name=name, dims=array.shape, data_type=_proto_type(array.dtype))
    tensor.data_location = TensorProto.EXTERNAL
    key = _digest(array)
    if key not in places:
        file.write(b"\0" * (-file.tell() % 4096))  # pages, so that an engine can map them
        places[key] = file.tell()
        file.write(np.ascontiguousarray(array).data)
    for field, value in (("location", data), ("offset", places[key]), ("length", array.nbytes)):
        tensor.external_data.add(key=field, value=str(value))
    return tensor


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=12).hexdigest()


def _value(name: str, dtype: Any, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _proto_type(dtype), shape)


def _proto_type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
