"""Quantize a Hugging Face folder into another one: by torchao, bitsandbytes, compressed-tensors or llmcompressor."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.tools.convert import write_text
from bigbatch.tools.quantization.layers import Inputs, open_model
from bigbatch.tools.quantization.methods import METHODS, Method, scheme
from bigbatch.tools.quantization.smoothing import Step

MODULES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}
LAST_LINES = 20


class Job(NamedTuple):
    """What is to be written."""

    folder: Path
    out: Path
    method: str
    group_size: int | None
    ignored: list[str]
    """Linear layers that stay as they are."""
    dtype: str = "auto"
    """What the rest is stored and computed in, by torch's name; "auto": as in the folder."""


def write(job: Job, inputs: Sequence[Inputs] = (), steps: Sequence[Step] = ()) -> None:
    """Write a folder's model, quantized.

    A method that is calibrated gets what the model is called with; one that smooths, where it can.
    """
    method = METHODS[job.method]
    if method.library == "llmcompressor":
        _by_llmcompressor(job, inputs, steps)
    elif method.library == "compressed-tensors":
        model = open_model(job.folder, dtype=job.dtype)
        attach(model, method, job.group_size, job.ignored)
        _compress(model, job.out)
    else:
        open_model(job.folder, dtype=job.dtype, quantization_config=_config(job)).save_pretrained(job.out)
        if method.library == "torchao":
            _forget_lone_tensors(job.out)
    _name_ignored(job.out, job.ignored)


def _forget_lone_tensors(folder: Path) -> None:
    """Take tensors outside any module (BART's final_logits_bias) from torchao's list, which it cannot read then.

    Nothing else reads that list (torchao 0.18.0, prototype/safetensors).
    """
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        names = json.loads(metadata["tensor_names"])
        lone = [name for name in names if "." not in name]
        if lone:
            rest = {key: value for key, value in metadata.items() if key not in lone}
            rest["tensor_names"] = json.dumps([name for name in names if name not in lone])
            save_file(load_file(path), path, metadata=rest)


def _name_ignored(folder: Path, ignored: list[str]) -> None:
    """List layers that stay also by the names in memory: save_pretrained writes those in the file, others in a ViT."""
    settings = read_json(folder / "config.json")
    config = settings["quantization_config"]
    if "ignore" in config:
        config["ignore"] += [name for name in ignored if name not in config["ignore"]]
        write_text(folder / "config.json", settings)


def check_installed(method: Method) -> None:
    """Raise UserError where a method's library is missing."""
    import importlib.util

    module = MODULES.get(method.library, "compressed_tensors")  # which sensitivity is measured with, and results read
    if importlib.util.find_spec(module) is None:
        raise UserError(
            "--method", f"needs {method.library}, which is not installed; right is: pip install 'bigbatch[deploy]'"
        )


def _config(job: Job) -> Any:
    import transformers

    if job.method == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=None if job.dtype == "auto" else job.dtype,
            llm_int8_skip_modules=job.ignored,
        )
    from torchao import quantization

    kinds = {
        "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "int8_weight": quantization.Int8WeightOnlyConfig,
    }
    return transformers.TorchAoConfig(kinds[job.method](), modules_to_not_convert=job.ignored)


def attach(model: nn.Module, method: Method, group_size: int | None, ignored: list[str]) -> list[Any]:
    """Let linear layers compute as they will when they are quantized, rounded to the nearest; return these layers."""
    from compressed_tensors import quantization

    linear = quantization.QuantizationScheme.model_validate({"targets": ["Linear"], **scheme(method, group_size)})
    config = quantization.QuantizationConfig(
        config_groups={"linear": linear},
        ignore=ignored,
        quantization_status=quantization.QuantizationStatus.INITIALIZED,
    )
    quantization.apply_quantization_config(model, config, show_progress=False)
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "quantization_scheme")]
    for layer in layers:
        layer.weight_scale.data.copy_(_scales(layer.weight.detach(), linear.weights))
        layer.quantization_status = quantization.QuantizationStatus.FROZEN
    return layers


def _scales(weight: torch.Tensor, arguments: Any) -> torch.Tensor:
    """Return the scales [rows, groups] of a weight [rows, columns]."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.unflatten(1, (-1, arguments.group_size or weight.shape[1]))
    return calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)[0]


def _compress(model: Any, out: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))


def _by_llmcompressor(job: Job, inputs: Sequence[Inputs], steps: Sequence[Step]) -> None:
    """Run llmcompressor in its own environment."""
    from bigbatch.tools.environments import code_folder, environment

    python = environment("llmcompressor")
    tensors = {f"{index:06d}.{key}": value for index, one in enumerate(inputs) for key, value in one.items()}
    with tempfile.TemporaryDirectory(dir=job.out.parent) as scratch:
        place = Path(scratch)
        save_file(tensors, place / "inputs.safetensors")
        request = {**job._asdict(), "inputs": place / "inputs.safetensors", "steps": [step._asdict() for step in steps]}
        (place / "request.json").write_text(json.dumps(request, default=str))
        command = [python, "-m", "bigbatch.tools.quantization.compressor", place / "request.json"]
        variables = os.environ | {"PYTHONPATH": str(code_folder(python)), "TOKENIZERS_PARALLELISM": "false"}
        log = place / "log.txt"
        with log.open("w") as file:
            done = subprocess.run(command, cwd=place, env=variables, stdout=file, stderr=file, check=False)
        if done.returncode:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise RuntimeError(f"llmcompressor ended with status {done.returncode}:\n{last}")
