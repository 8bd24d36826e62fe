"""Which layers of a model can be quantized, which stay, and a model of transformers opened for it."""

import fnmatch
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigbatch.recipes.core.errors import UserError, one_line
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.tools.convert import TOLERANCE
from bigbatch.tools.opened import OPENING_ERRORS

Inputs = dict[str, torch.Tensor]  # what a model of transformers is called with
FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Layers that vLLM makes one of: all of them are quantized, or none."""
LEAST_SHARE = 0.5
"""Of the weights outside embeddings: where less can be quantized, the method is not for this model."""


def model_class(folder: Path) -> Any:
    """Return the class of transformers that config.json names."""
    import transformers

    name = (read_json(folder / "config.json").get("architectures") or [""])[0]
    found = getattr(transformers, name, None)
    if not inspect.isclass(found):
        message = f"is a {name!r}, which transformers has no class for, so that nothing here can quantize it"
        raise UserError(str(folder), f"{message}; right is bigbatch export --format onnx --dtype int8")
    return found


def open_model(folder: Path, **options: Any) -> Any:
    """Open a folder with transformers' own class, in evaluation mode."""
    kind = model_class(folder)
    if kind.__name__ == "BertModel":  # recipes convert the states alone; a pooler would be drawn at random, and kept
        options["add_pooling_layer"] = False
    try:
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except OPENING_ERRORS as error:
        raise UserError(str(folder), f"cannot be opened by transformers: {one_line(str(error))}") from error
    if found["missing_keys"] and "quantization_config" not in options:  # transformers would draw them at random
        name, count = min(found["missing_keys"]), len(found["missing_keys"])
        raise UserError(str(folder), f"lacks {name!r}, one of {count} tensors that the model needs")
    return model.eval()


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers inside the base model; those outside are heads, small and sensitive, and stay."""
    base = getattr(model, model.base_model_prefix, None)
    prefix = "" if base is None else f"{model.base_model_prefix}."
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    }


def heads(model: Any) -> list[str]:
    """Name the linear layers that stay as they are in any case."""
    inside = linear_layers(model)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in inside]


def check_share(model: Any, layers: dict[str, nn.Linear], where: str) -> None:
    """Raise UserError where the layers hold a small share of the weights outside embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    share = sum(module.weight.numel() for module in layers.values()) / max(1, rest)
    if share < LEAST_SHARE:
        message = f"only {share:.0%} of the weights outside embeddings lie in linear layers that can be quantized"
        raise UserError(where, f"{message} (experts do not); right is bigbatch export --format gguf")


def indivisible(layers: dict[str, nn.Linear], group_size: int | None) -> list[str]:
    """Name the layers whose rows no whole number of groups fills; None is a row."""
    if group_size is None:
        return []
    return [name for name, module in layers.items() if module.in_features % group_size]


def chosen(layers: Iterable[str], patterns: str) -> list[str]:
    """Return the layers that patterns, comma-separated, name; raise UserError for one that names none."""
    names, found = list(layers), []
    for pattern in patterns.split(","):
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")]
        if not matching:
            example = f"{names[0]}, *.{names[0].split('.')[-1]}"
            raise UserError("--keep", f"{pattern!r} names no layer that would be quantized; right is such as {example}")
        found += matching
    return found


def with_fused(layers: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Return the layers that are kept together with those that vLLM fuses with them, in the model's order."""
    wanted = set()
    for name in kept:
        stem, _, last = name.rpartition(".")
        group = next((group for group in FUSED if last in group), (last,))
        wanted |= {f"{stem}.{one}" if stem else one for one in group}
    return [name for name in layers if name in wanted]


def unfolded_gpt2(folder: Path, out: Path) -> Path:
    """Write a GPT-2 as an OPT, which computes the same by linear layers, for tools that know no other; return `out`.

    GPT-2 has its weights transposed in a layer of its own (Conv1D), queries, keys and values in one; OPT counts its
    positions from 2 on. Logits are compared.
    """
    import transformers

    kept_dtype = read_json(folder / "config.json").get("dtype", "float32")
    model: Any = open_model(folder, dtype=torch.float32)
    old = model.config
    if old.layer_norm_epsilon != 1e-5 or old.scale_attn_by_inverse_layer_idx or not old.scale_attn_weights:
        raise UserError(str(folder), "is a GPT-2 with settings that OPT lacks; right is bigbatch export --format gguf")
    config = transformers.OPTConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.n_embd,
        word_embed_proj_dim=old.n_embd,
        num_hidden_layers=old.n_layer,
        num_attention_heads=old.n_head,
        ffn_dim=old.n_inner or 4 * old.n_embd,
        max_position_embeddings=old.n_positions,
        activation_function=old.activation_function,
        tie_word_embeddings=old.tie_word_embeddings,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    twin: Any = transformers.OPTForCausalLM(config).eval()
    twin.load_state_dict(_opt_tensors(model))
    twin.generation_config = model.generation_config
    tokens = torch.arange(min(old.n_positions, 16)).unsqueeze(0) % old.vocab_size
    with torch.inference_mode():
        expected, found = model(input_ids=tokens).logits, twin(input_ids=tokens).logits
    if not (expected - found).abs().max() <= TOLERANCE * expected.abs().max():
        raise UserError(str(folder), "as an OPT gives other logits; right is bigbatch export --format gguf")
    twin.to(getattr(torch, kept_dtype)).save_pretrained(out)
    return out


def _opt_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return a GPT-2's weights by OPT's names."""
    body = model.transformer
    offset = torch.zeros(2, model.config.n_embd)
    tensors = {
        "lm_head.weight": model.lm_head.weight,
        "model.decoder.embed_tokens.weight": body.wte.weight,
        "model.decoder.embed_positions.weight": torch.cat([offset, body.wpe.weight]),
    }
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]] = {"final_layer_norm": (body.ln_f.weight, body.ln_f.bias)}
    for index, block in enumerate(body.h):
        stem = f"layers.{index}"
        weights, biases = block.attn.c_attn.weight.T.chunk(3), block.attn.c_attn.bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            modules[f"{stem}.self_attn.{name}"] = weight, bias
        modules[f"{stem}.self_attn.out_proj"] = block.attn.c_proj.weight.T, block.attn.c_proj.bias
        modules[f"{stem}.self_attn_layer_norm"] = block.ln_1.weight, block.ln_1.bias
        modules[f"{stem}.fc1"] = block.mlp.c_fc.weight.T, block.mlp.c_fc.bias
        modules[f"{stem}.fc2"] = block.mlp.c_proj.weight.T, block.mlp.c_proj.bias
        modules[f"{stem}.final_layer_norm"] = block.ln_2.weight, block.ln_2.bias
    for name, (weight, bias) in modules.items():
        tensors |= {f"model.decoder.{name}.weight": weight, f"model.decoder.{name}.bias": bias}
    return tensors
