"""Models in ONNX form, run by onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from bigbatch.recipes.core.errors import UserError, one_line

MODEL, ENCODER = "model.onnx", "encoder_model.onnx"
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
DTYPES |= {"tensor(int16)": np.int16}


def open_session(folder: Path, threads: int | None = None) -> "OnnxSession":
    """Open model.onnx, and of an encoder-decoder encoder_model.onnx; raise UserError where that fails."""
    model = _open(folder / MODEL, threads)
    return OnnxSession(model, _open(folder / ENCODER, threads) if (folder / ENCODER).exists() else None)


class OnnxSession:
    """A model in ONNX form as a `core.foreign.DecoderSession`."""

    def __init__(self, model: "_Model", encoder: "_Model | None") -> None:
        self.model, self.encoder = model, encoder
        self.writes = any(name.startswith("past_key_values.") for name in model.inputs)

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model on a batch."""
        device = next(iter(inputs.values())).device
        if self.encoder:
            cache = self.open_cache(**inputs)
            found = self._write(cache, {"input_ids": inputs["decoder_input_ids"]})
        elif self.writes:
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            found = self._write(OnnxCache({}), {**inputs, "attention_mask": mask, "position_ids": positions})
        else:
            found = self.model.run(self._complete(inputs))
        return {name: torch.from_numpy(value.numpy()).to(device) for name, value in found.items()}

    def open_cache(self, **inputs: torch.Tensor) -> "OnnxCache":
        """Return an empty cache, of an encoder-decoder with its sources encoded."""
        if self.encoder is None:
            return OnnxCache({})
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        kept = self.encoder.run({"input_ids": inputs["input_ids"], "attention_mask": mask})
        return OnnxCache({**kept, "encoder_attention_mask": _value(mask, np.int64)})

    def decode(self, cache: "OnnxCache", **inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, 1, V] behind the last of the next tokens."""
        if "decoder_input_ids" in inputs:
            inputs = {"input_ids": inputs["decoder_input_ids"]}
        logits = self._write(cache, inputs)["logits"].numpy()
        return torch.from_numpy(logits[:, -1:]).to(inputs["input_ids"].device)

    def _write(self, cache: "OnnxCache", inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the decoder behind a cache, and keep what it is to remember."""
        tokens = inputs["input_ids"]
        if self.encoder:
            inputs = {**inputs, "position_ids": torch.arange(cache.length, cache.length + tokens.shape[1])}
        if not cache.length:
            cache.values |= self.model.empty(len(tokens))
        found = self.model.run({**cache.values, **inputs})
        present = [name for name in found if name.startswith("present.")]
        cache.values |= {name.replace("present", "past_key_values"): found.pop(name) for name in present}
        cache.length += tokens.shape[1]
        return found

    def _complete(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add what the model needs and did not get: no padding, and segments of the first kind."""
        tokens = inputs.get("input_ids")
        if tokens is None:
            return inputs
        return {"attention_mask": torch.ones_like(tokens), "token_type_ids": torch.zeros_like(tokens), **inputs}


class OnnxCache:
    """Keys and values as onnxruntime holds them, by the names of inputs; those of the sources too."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values, self.length = values, 0

    def select(self, rows: torch.Tensor) -> None:
        """Let each row go on as another one has begun."""
        chosen = rows.cpu().numpy()
        self.values = {name: _value(value.numpy()[chosen]) for name, value in self.values.items()}


class _Model:
    """One graph: inputs and outputs by name."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.inputs = {value.name: (DTYPES[value.type], value.shape) for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run it on tensors or on what it has given; those that it does not know are ignored."""
        values = {
            name: value if isinstance(value, onnxruntime.OrtValue) else _value(value, self.inputs[name][0])
            for name, value in inputs.items()
            if name in self.inputs
        }
        return dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, values), strict=True))

    def empty(self, num_rows: int) -> dict[str, Any]:
        """Return a cache [B, K, 0, E] of a layer's keys or values by the names of inputs."""
        return {
            name: _value(np.zeros((num_rows, shape[1], 0, shape[3]), dtype))
            for name, (dtype, shape) in self.inputs.items()
            if name.startswith("past_key_values.")
        }


def _value(tensor: Any, dtype: Any = None) -> Any:
    array = tensor.cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype))


def _open(path: Path, threads: int | None) -> _Model:
    if not path.is_file():
        raise UserError(str(path.parent), f"has no {path.name}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4
    try:
        there = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
        return _Model(onnxruntime.InferenceSession(str(path), options, providers=there))
    except Exception as error:  # onnxruntime's own have no common class
        raise UserError(str(path), f"cannot be opened by onnxruntime: {one_line(str(error))}") from None
