"""The native speech model as an ONNX graph, from samples on: the log-mel features are in it.

Shapes: B utterances of S samples, F frames of features, M mel bands, T frames of output, C channels, H hidden size, K
units and none.
"""

import math
from typing import Any

import numpy as np

from bigbatch.recipes.core.models.config import ConvolutionSection, SpeechSection
from bigbatch.recipes.core.models.speech import FULL_SCALE, QUIETEST, LogMel
from bigbatch.tools.exporters.onnx_graph import Graph

NORM_EPSILON = 1e-5
CEILING = 20.0  # of the rectifier
GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
"""Where ONNX's gates lie among PyTorch's."""


def speech(graph: Graph, section: SpeechSection, sample_rate: int) -> None:
    """Add a model that `bigbatch convert` has written.

    Inputs: samples int16 [B, S], lengths [B]; outputs: log_probabilities float32 [B, T, K], frames [B]. What is said of
    frames behind an utterance's end means nothing.
    """
    samples = graph.input("samples", np.int16, "batch", "samples")
    lengths = graph.input("lengths", np.int64, "batch")
    states, frames = _features(graph, LogMel(section, sample_rate), samples, lengths)
    states = graph.add("Unsqueeze", states, graph.constant([1]))  # [B, 1, F, M]
    for index, convolution in enumerate(section.convolutions):
        states, frames = _convolution(graph, f"model.convolutions.{index}", convolution, states, frames)
    states = graph.reshape(graph.add("Transpose", states, perm=(0, 2, 1, 3)), 0, 0, -1)  # [B, T, C * bands]
    states = graph.add("Transpose", states, perm=(1, 0, 2))
    counts = graph.cast(frames, np.int32)
    for index in range(section.num_layers):
        states = _recurrent(graph, f"model.recurrent.{index}", section, states, counts)
    states = graph.norm(graph.add("Transpose", states, perm=(1, 0, 2)), "model.norm", NORM_EPSILON)
    scores = graph.cast(graph.linear(states, "model.head"), np.float32)
    found = graph.add("LogSoftmax", scores, axis=-1)
    graph.output("log_probabilities", found, "batch", "frames", "units", dtype=np.float32)
    graph.output("frames", frames, "batch", dtype=np.int64)


def _features(graph: Graph, features: LogMel, samples: str, lengths: str) -> tuple[str, str]:
    """Return features [B, F, M] in the graph's numbers, made in float32, and the frames [B] that count."""
    size, num_waves = features.waves.shape
    number = np.float32
    is_sample = graph.cast(_is_within(graph, lengths, graph.size(samples, 1)), number)
    scaled = graph.add("Mul", graph.cast(samples, number), graph.constant(1 / FULL_SCALE, number))
    pads = graph.constant([0, 0, (size - features.hop) // 2, 0, 0, size])
    heard = graph.add("Unsqueeze", graph.add("Mul", scaled, is_sample), graph.constant([1]))  # [B, 1, S]
    kernel = graph.constant(features.waves.T[:, None], number)
    spectrum = graph.add("Conv", graph.add("Pad", heard, pads), kernel, strides=(features.hop,))
    count = graph.add("Div", graph.size(samples, 1), graph.constant([features.hop]))
    spectrum = graph.add("Slice", spectrum, graph.constant([0]), count, graph.constant([2]))  # [B, 2 * bins, F]
    parts = graph.reshape(graph.add("Mul", spectrum, spectrum), 0, 2, num_waves // 2, -1)
    power = graph.add("ReduceSum", parts, graph.constant([1]), keepdims=0)
    bands = graph.add("MatMul", graph.add("Transpose", power, perm=(0, 2, 1)), graph.constant(features.bands, number))
    logarithm = graph.add("Log", graph.add("Max", bands, graph.constant(QUIETEST, number)))
    level = graph.add("Mul", logarithm, graph.constant(0.5 / math.log(10), number))
    level = graph.add("Add", level, graph.constant(2.0, number))
    frames = graph.add("Div", lengths, graph.constant(features.hop))
    return graph.cast(_cut(graph, level, frames, count, (2,), number)), frames


def _convolution(graph: Graph, name: str, section: ConvolutionSection, states: str, frames: str) -> tuple[str, str]:
    """Map states [B, C, F, bands] to the next; return also the frames [B] that count of them."""
    count = graph.add("Div", graph.size(states, 2), graph.constant([section.frame_stride]))
    frames = graph.add("Div", frames, graph.constant(section.frame_stride))
    sides = (section.frames // 2, section.bands // 2)
    weights = (graph.weight(f"{name}.layer.weight"), graph.weight(f"{name}.layer.bias"))
    strides = (section.frame_stride, section.band_stride)
    found = graph.add("Conv", states, *weights, strides=strides, pads=(*sides, *sides))
    found = graph.add("Slice", found, graph.constant([0]), count, graph.constant([2]))
    found = graph.add("Clip", found, graph.constant(0.0), graph.constant(CEILING))
    found = graph.add("Transpose", found, perm=(0, 2, 1, 3))  # [B, F, C, bands]
    norm = (graph.weight(f"{name}.norm.weight"), graph.weight(f"{name}.norm.bias"))
    found = graph.add("LayerNormalization", found, *norm, axis=-2, epsilon=NORM_EPSILON)
    found = _cut(graph, found, frames, count, (2, 3), graph.float)
    return graph.add("Transpose", found, perm=(0, 2, 1, 3)), frames


def _recurrent(graph: Graph, name: str, section: SpeechSection, states: str, counts: str) -> str:
    """Map states [T, B, D] to those of one direction or both, side by side; each row is as long as its count."""
    sides = [f"{name}.{side}" for side in (("onward", "back") if section.bidirectional else ("onward",))]
    order = GATES[section.cell]

    def gates(kind: str) -> np.ndarray:
        rows = (np.split(graph.weights[f"{side}.{kind}_l0"], len(order)) for side in sides)
        return np.stack([np.concatenate([parts[place] for place in order]) for parts in rows])

    inputs = [graph.unpacked(gates(f"weight_{kind}")) for kind in ("ih", "hh")]
    bias = np.concatenate([gates("bias_ih"), gates("bias_hh")], 1)
    attributes: dict[str, Any] = {"hidden_size": section.hidden_size}
    attributes |= {"direction": "bidirectional" if section.bidirectional else "forward"}
    attributes |= {"linear_before_reset": 1} if section.cell == "gru" else {}
    # In float32 whatever the graph's numbers are: onnxruntime has no other on a CPU.
    states = graph.cast(states, np.float32)
    found = graph.add(section.cell.upper(), states, *inputs, graph.constant(bias, np.float32), counts, **attributes)
    found = graph.reshape(graph.add("Transpose", found, perm=(0, 2, 1, 3)), 0, 0, -1)  # [T, B, H * directions]
    return graph.cast(found)


def _cut(graph: Graph, states: str, frames: str, count: str, dims: tuple[int, ...], number: type) -> str:
    """Set states [B, F, ...] behind the frames [B] that count to 0."""
    kept = graph.cast(_is_within(graph, frames, count), number)
    return graph.add("Mul", states, graph.add("Unsqueeze", kept, graph.constant(dims)))


def _is_within(graph: Graph, lengths: str, count: str) -> str:
    """Tell which of `count` places come before an end: [B, count]."""
    return graph.add("Less", graph.range(count), graph.add("Unsqueeze", lengths, graph.constant([1])))
