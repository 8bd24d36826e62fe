"""Model folders as ONNX graphs: fp32, fp16, int8 or int4, with dynamic batch and length, compared before they count."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.decoder import section_from_hugging_face
from bigbatch.recipes.core.models.hugging_face import WeightFolder, conversion_record, read_json
from bigbatch.tools.convert import write_text
from bigbatch.tools.engines import onnx_engine, transformers_engine
from bigbatch.tools.exporters import onnx_models, onnx_speech
from bigbatch.tools.exporters.onnx_graph import FUSED_OPSET, LEAST_OPSET, Graph, write_models

PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""What weights are stored in; the first is the default."""
FAMILIES = {
    "bert": onnx_models.bert,
    "vit": onnx_models.vit,
    "gpt2": onnx_models.gpt2,
    "llama": onnx_models.llama,
    "bart": onnx_models.bart,
    "mbart": onnx_models.bart,
    "marian": onnx_models.bart,
}
GENAI_FILE = "genai_config.json"
SPEECH = "bigbatch_transcribe"
WRITERS, PAIRS = ("gpt2", "llama"), ("bart", "mbart", "marian")
GREATEST_OPSET = 24
LARGEST_DIFFERENCE = {"fp32": 1e-4, "fp16": 0.02, "int8": 1.0, "int4": 1.0}
"""Of two outputs, as a part of the largest; coarser ones are measured on the task."""
LENGTHS = (24, 9, 1)  # tokens of the rows that are compared, padded to the longest
NEXT_TOKENS = 3


class Weights(Mapping[str, np.ndarray]):
    """A folder's tensors in float32 by name, read when asked for; those of BERT's first release by today's names."""

    def __init__(self, folder: Path) -> None:
        self.folder = WeightFolder(folder)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read a tensor."""
        if name not in self.folder.files:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if name not in self.folder.files:
            raise UserError(str(self.folder.folder), f"lacks the tensor {name!r}")
        return self.folder.read(name).float().numpy()

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor."""
        first = str(name).replace("LayerNorm.bias", "LayerNorm.beta")
        return name in self.folder.files or first in self.folder.files

    def __iter__(self) -> Iterator[str]:
        """List the names."""
        return iter(self.folder.files)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.folder.files)


def make(source: Any, partial: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the folder `source.path` as model.onnx in `options.precision`; compare it with transformers' own.

    Raises UserError for a model for which there is no graph, or where the two differ.
    """
    config = read_json(source.path / "config.json")
    kind = config.get("model_type")
    opset = _opset(kind, options.opset)
    write_onnx(source.path, partial, options.precision, opset)
    record = compare(source.path, partial, options.threads)
    difference, largest = record["largest_difference"], record["largest_output"]
    if not difference <= LARGEST_DIFFERENCE[options.precision] * largest:
        message = (
            f"not written: outputs differ from transformers' own by {difference:.3g}, the largest is {largest:.3g}"
        )
        raise UserError(str(source.path), message)
    if kind in WRITERS:
        write_text(partial / GENAI_FILE, genai_config(source.path))
    files = sorted(path.name for path in partial.glob("*.onnx*"))
    made = {"format": "onnx", "precision": options.precision, "opset": opset, "files": files}
    return made | {"record": {"name": f"onnx {options.precision}", **record}}


def write_onnx(folder: Path, out: Path, precision: str, opset: int | None = None) -> None:
    """Write a Hugging Face folder's graphs: model.onnx, for encoder-decoders encoder_model.onnx, and their weights."""
    config, weights = read_json(folder / "config.json"), Weights(folder)
    kind = config["model_type"]
    opset = opset or _opset(kind, None)
    graph = Graph(weights, precision, opset, writes=kind in WRITERS + PAIRS)
    if kind in PAIRS:
        encoder = Graph(weights, precision, opset, writes=True)  # as the decoder, for they share the embedding
        onnx_models.bart(encoder, graph, config)
        write_models(out, {onnx_engine.ENCODER: encoder, onnx_engine.MODEL: graph})
        return
    if kind == SPEECH:
        run: Any = recipes.find_config("transcribe").model_validate_json(json.dumps(conversion_record(folder)["run"]))
        onnx_speech.speech(graph, run.model, run.data.sample_rate)
    else:
        FAMILIES[kind](graph, config)
    write_models(out, {onnx_engine.MODEL: graph})


def genai_config(folder: Path) -> dict[str, Any]:
    """Describe a decoder for onnxruntime-genai, which then opens the exported folder as it is."""
    config = read_json(folder / "config.json")
    section = section_from_hugging_face(config)
    layers = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": onnx_engine.MODEL,
        "head_size": section.head_size,
        "hidden_size": section.hidden_size,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.key_value_heads,
        "num_hidden_layers": section.num_layers,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")} | layers,
        "outputs": {"logits": "logits", **present},
    }
    end = config.get("eos_token_id") or 0
    model = {"type": "llama", "vocab_size": config["vocab_size"], "context_length": section.max_positions}
    model |= {"bos_token_id": config.get("bos_token_id") or 0, "eos_token_id": end, "pad_token_id": end}
    search = {"max_length": section.max_positions, "do_sample": False, "past_present_share_buffer": False}
    return {"model": {**model, "decoder": decoder}, "search": search}


def compare(folder: Path, exported: Path, threads: int | None = None) -> dict[str, Any]:
    """Run transformers' own model and the exported one on rows of several lengths: how far outputs differ at most.

    Padding stands behind the tokens, and where a decoder writes ahead of them.
    """
    config = read_json(folder / "config.json")
    ours, generator = onnx_engine.open_session(exported, threads), torch.Generator().manual_seed(0)
    if config["model_type"] == SPEECH:
        return _compare_speech(folder, ours, generator)
    theirs = transformers_engine.open_session(folder, threads)
    batch = _batch(config, generator)
    expected, found = theirs(**batch), ours(**batch)
    is_padding = batch.get("attention_mask", torch.ones(1)) == 0
    pairs = [(expected[name], found[name]) for name in found]
    if config["model_type"] not in PAIRS:
        pairs = [tuple(_kept(array, is_padding) for array in pair) for pair in pairs]
    if ours.writes:
        steps = _steps(config, generator)
        pairs += zip(_written(theirs, config, steps, batch), _written(ours, config, steps, batch), strict=True)
    return _differences(pairs)


def _compare_speech(folder: Path, ours: onnx_engine.OnnxSession, generator: torch.Generator) -> dict[str, Any]:
    """Do the same with noise and the native model."""
    config, _, model = recipes.open_folder(recipes.find("transcribe"), folder)
    lengths = torch.tensor([config.data.sample_rate * part // 10 for part in (10, 6, 3)])
    samples = torch.randint(-(2**15), 2**15, (3, int(lengths.max())), generator=generator).short()
    with torch.no_grad():
        expected, frames = model(samples=samples, lengths=lengths)
    found = ours(samples=samples, lengths=lengths)
    rows = enumerate(frames.tolist())
    pairs = [(expected[row, :count], found["log_probabilities"][row, :count]) for row, count in rows]
    return _differences([*pairs, (frames, found["frames"])])


def _differences(pairs: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """Return how far outputs differ at most, and the largest of the first."""
    differences = torch.stack([(theirs.float() - ours.float()).abs().max() for theirs, ours in pairs])
    return {
        "largest_difference": float(differences.max()),  # not a number where one of them is none
        "largest_output": max(float(theirs.abs().max()) for theirs, _ in pairs),
    }


def _opset(kind: Any, asked: int | None) -> int:
    """Return the operator set to write: the least that has all that a model needs, if none is asked for."""
    if kind not in (*FAMILIES, SPEECH):
        raise UserError("config.json", f"model_type is {kind!r}; right is one of {', '.join(FAMILIES)}")
    default = FUSED_OPSET if kind in WRITERS else LEAST_OPSET
    least = FUSED_OPSET if kind == "llama" else LEAST_OPSET
    if asked is not None and not least <= asked <= GREATEST_OPSET:
        raise UserError("--opset", f"found {asked}; right for a {kind} is {least} to {GREATEST_OPSET}")
    return asked or default


def _batch(config: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return inputs to compare on: rows of LENGTHS tokens, or images."""
    if config["model_type"] == "vit":
        side = config["image_size"]
        return {"pixel_values": torch.randn(3, config["num_channels"], side, side, generator=generator)}
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = torch.randint(config["vocab_size"], shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    batch = {"input_ids": tokens, "attention_mask": mask}
    if config["model_type"] == "bert":
        kinds = config.get("type_vocab_size", 2)
        batch["token_type_ids"] = torch.randint(kinds, shape, generator=generator)
    if config["model_type"] in PAIRS:
        batch["decoder_input_ids"] = torch.randint(config["vocab_size"], (len(LENGTHS), 7), generator=generator)
    return batch


def _kept(output: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """Set what stands at padding to 0."""
    if output.shape[:2] != is_padding.shape:
        return output
    return output.masked_fill(is_padding.view(*is_padding.shape, *(output.dim() - 2) * (1,)), 0)


def _steps(config: dict[str, Any], generator: torch.Generator) -> list[torch.Tensor]:
    """Return the tokens of a first call [B, T], and of some that follow [B, 1]."""
    sizes = [max(LENGTHS) // 2, *NEXT_TOKENS * (1,)]
    return [torch.randint(config["vocab_size"], (len(LENGTHS), size), generator=generator) for size in sizes]


def _written(
    session: Any, config: dict[str, Any], steps: list[torch.Tensor], batch: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Return the logits [B, 1, V] behind each step, with padding ahead of a decoder's tokens."""
    if config["model_type"] in PAIRS:
        cache = session.open_cache(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return [session.decode(cache, decoder_input_ids=tokens) for tokens in steps]
    cache, logits, total = session.open_cache(), [], 0
    padding = torch.arange(len(LENGTHS)) * 4  # of 12 tokens the first 0, 4 and 8
    for tokens in steps:
        total += tokens.shape[1]
        places = torch.arange(total) - padding.unsqueeze(1)
        inputs = {"attention_mask": (places >= 0).long(), "position_ids": places[:, -tokens.shape[1] :].clamp(min=0)}
        logits.append(session.decode(cache, input_ids=tokens, **inputs))
    return logits
