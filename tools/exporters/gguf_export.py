"""GPT-2, Llama and Mixtral folders as GGUF files, the format of llama.cpp, with their tokenizers in them.

Names and layouts are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and of llama.cpp's loader. Each
tensor is read, turned, quantized by llama.cpp's own functions and written before the next.

Shapes: D hidden size, H heads, E size of a head, T tokens, V vocabulary.
"""

import argparse
import errno
import json
import os
from collections.abc import Callable, Iterator
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from bigbatch.recipes.core.data.tokenizing import read_settings, token_name
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import section_from_hugging_face
from bigbatch.recipes.core.models.hugging_face import WeightFolder, read_json
from bigbatch.tools.convert import open_lazily
from bigbatch.tools.engines.llama_cpp_engine import LlamaSession, open_library

FILE = "model.gguf"
KINDS = ("gpt2", "llama", "mixtral")
PRECISIONS = ("f16", "q8_0", "q4_k_m", "f32")
"""What weights are stored in; the first is the default."""
LARGEST_DIFFERENCE = {"f32": 0.01, "f16": 0.02}
"""Of two logits, as a part of the largest logit; llama.cpp keeps keys and values in float16. Coarser ones are measured
on the task."""
PARITY_TOKENS = 64
K_BLOCK, BLOCK = 256, 32  # numbers that share a scale; a row that does not divide takes the next finer format
PROBES = (
    "The quick brown fox, 1234 + 56 = 1290!",
    "  two  spaces\n\nand lines\t",
    "it's naïve — 東京 🙂",
    "O, ROMEO:\nOH",
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text into words, which llama.cpp calls llama-bpe."""


def make(source: Any, partial: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write model.gguf of the folder `source.path` in `options.precision`; compare its logits with transformers'.

    Raises UserError for a model or a tokenizer that it cannot hold.
    """
    kind = read_json(source.path / "config.json").get("model_type")
    if kind not in KINDS:
        found = f"is a {kind!r}; of llama.cpp's models this writes {', '.join(KINDS)}"
        raise UserError(str(source.path), f"{found}; right is --format onnx")
    file = partial / FILE
    write_gguf(source.path, file, options.precision)
    session = LlamaSession(file, getattr(options, "threads", None))
    record = compare(source.path, session) | {"tokenizer_agrees": _check_tokenizer(source.path, session)}
    record["name"] = f"gguf {options.precision}"
    session.close()
    # A token on the edge between two experts may get the other one, whose logits are far off.
    has_experts = "num_local_experts" in read_json(source.path / "config.json")
    difference = record["median_difference" if has_experts else "largest_difference"]
    if not difference <= LARGEST_DIFFERENCE.get(options.precision, np.inf) * max(record["largest_logit"], 1e-9):
        message = f"not written: logits differ from transformers' own by {difference:.3g}"
        raise UserError(str(source.path), message)
    return {"format": "gguf", "file": FILE, "precision": options.precision, "record": record}


def write_gguf(folder: Path, file: Path, precision: str) -> None:
    """Write a Hugging Face folder as a GGUF file."""
    import gguf

    config = read_json(folder / "config.json")
    section = section_from_hugging_face(config)
    weights = WeightFolder(folder)
    if "wte.weight" in weights.files:
        weights.prefix = "transformer."
    tensors = [tensor._replace(kind=_kind(tensor, section, precision)) for tensor in _tensors(section, weights)]
    writer = gguf.GGUFWriter(file, "gpt2" if section.family == "gpt2" else "llama")
    _add_section(writer, section, config)
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15}[precision])
    _add_tokenizer(writer, folder, config)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        num_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind)))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        stored = _stored(tensor.read().float().numpy(), gguf.GGMLQuantizationType[tensor.kind])
        try:
            writer.write_tensor_data(stored)
        except OSError as error:
            if error.errno is None:  # numpy's, which has written a part and does not say why no more
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
            raise
    writer.close()


class Tensor(NamedTuple):
    """A tensor of the file, how it is read, and the format of its numbers."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    kind: str = ""


def _add_section(writer: Any, section: DecoderSection, config: dict[str, Any]) -> None:
    writer.add_context_length(section.max_positions)
    writer.add_embedding_length(section.hidden_size)
    writer.add_block_count(section.num_layers)
    writer.add_feed_forward_length(section.inner_size)
    writer.add_head_count(section.num_heads)
    writer.add_vocab_size(config["vocab_size"])
    if section.family == "gpt2":
        writer.add_layer_norm_eps(section.norm_epsilon)
        return
    writer.add_head_count_kv(section.key_value_heads)
    writer.add_layer_norm_rms_eps(section.norm_epsilon)
    writer.add_rope_freq_base(section.rope_theta)
    writer.add_rope_dimension_count(section.head_size)
    writer.add_key_length(section.head_size)
    writer.add_value_length(section.head_size)
    if section.num_experts > 1:
        writer.add_expert_count(section.num_experts)
        writer.add_expert_used_count(section.experts_per_token)


# ------------------------------------------------------------------------------------------------------------ weights

GPT2_LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
LLAMA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
LLAMA_FEED_FORWARD = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
MIXTURE = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def _tensors(section: DecoderSection, weights: WeightFolder) -> Iterator[Tensor]:
    """Yield the tensors that a model of the section has."""
    is_gpt2 = section.family == "gpt2"
    names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
    names = names if is_gpt2 else {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {} if section.tie_embeddings else {"lm_head": "output"}
    for index in range(section.num_layers):
        layer = GPT2_LAYER if is_gpt2 else LLAMA_LAYER | ({} if section.has_experts(index) else LLAMA_FEED_FORWARD)
        prefix = f"transformer.h.{index}" if is_gpt2 else f"model.layers.{index}"
        names |= {f"{prefix}.{theirs}": f"blk.{index}.{ours}" for theirs, ours in layer.items()}
        if section.has_experts(index):
            mixture = f"{prefix}.block_sparse_moe"
            names[f"{mixture}.gate"] = f"blk.{index}.ffn_gate_inp"
            yield from _experts(section, weights, mixture, index)
    for theirs, ours in names.items():
        yield _tensor(section, weights, f"{theirs}.weight", f"{ours}.weight")
        if f"{theirs}.bias".removeprefix(weights.prefix) in weights.files:
            yield _tensor(section, weights, f"{theirs}.bias", f"{ours}.bias")


def _tensor(section: DecoderSection, weights: WeightFolder, theirs: str, ours: str) -> Tensor:
    if theirs.removeprefix(weights.prefix) not in weights.files:
        raise UserError(str(weights.folder), f"lacks {theirs!r}, which the model needs")
    kept: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731 - one of three below
    shape = weights.shape(theirs)
    if section.family == "gpt2" and ".h." in theirs and len(shape) == 2:
        kept, shape = (lambda tensor: tensor.T), shape[::-1]
    elif "q_proj" in theirs or "k_proj" in theirs:
        kept = bind(_interleaved, head_size=section.head_size)
    return Tensor(ours, shape, lambda: kept(weights.read(theirs)).contiguous())


def _interleaved(tensor: torch.Tensor, head_size: int) -> torch.Tensor:
    """Put the rows of a head that rotary positions turn together side by side; transformers has them a half apart."""
    return tensor.view(-1, 2, head_size // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _experts(section: DecoderSection, weights: WeightFolder, mixture: str, index: int) -> Iterator[Tensor]:
    """Yield the experts' tensors, those of one kind on top of each other."""
    for theirs, ours in MIXTURE.items():
        names = [f"{mixture}.experts.{expert}.{theirs}.weight" for expert in range(section.num_experts)]
        shape = (section.num_experts, *weights.shape(names[0]))
        read = bind(_stacked, weights, names)
        yield Tensor(f"blk.{index}.{ours}.weight", shape, read)


def _stacked(weights: WeightFolder, names: list[str]) -> torch.Tensor:
    return torch.stack([weights.read(name) for name in names])


def _kind(tensor: Tensor, section: DecoderSection, precision: str) -> str:
    """Choose the format of a tensor's numbers, as llama.cpp's mixture Q4_K_M does for q4_k_m."""
    name, columns = tensor.name, tensor.shape[-1]
    if precision == "f32" or len(tensor.shape) == 1 or name == "position_embd.weight" or "gate_inp" in name:
        return "F32"
    if precision == "f16" or columns % BLOCK:
        return "F16"
    if precision == "q8_0":
        return "Q8_0"
    kind = "Q4_K"
    is_output = name.startswith("output") or (name.startswith("token_embd") and section.tie_embeddings)
    is_mixing = "attn_v" in name or "ffn_down" in name
    if is_output or (is_mixing and _is_sensitive(int(name.split(".")[1]), section.num_layers)):
        kind = "Q6_K"
    elif "attn_qkv" in name:
        kind = "Q5_K"
    return kind if columns % K_BLOCK == 0 else {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[kind]


def _is_sensitive(layer: int, num_layers: int) -> bool:
    """Tell the layers that Q4_K_M keeps finer: the first and the last eighth, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _stored(values: np.ndarray, kind: Any) -> np.ndarray:
    """Return the bytes of float32 numbers in a format."""
    import gguf

    if kind.name == "F32":
        return values
    if kind.name == "F16":
        return values.astype(np.float16)
    values = np.ascontiguousarray(values)
    stored = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    rows = values.size // values.shape[-1]
    quantize = open_library().functions.ggml_quantize_chunk
    quantize(kind.value, values.ctypes.data, stored.ctypes.data, 0, rows, values.shape[-1], None)
    return stored


# ---------------------------------------------------------------------------------------------------------- tokenizer


def _add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    """Add a byte-level BPE, or a tokenizer of single characters as one whose merges are the bytes of each."""
    import gguf

    path = folder / "tokenizer.json"
    document = read_json(path)
    settings, kind = read_settings(folder), document["model"].get("type")
    tokenizer = Tokenizer.from_file(str(path))
    texts = {token: text for text, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    special = {token["id"] for token in document.get("added_tokens", []) if token.get("special")}
    if kind == "WordLevel" and all(len(text) == 1 for token, text in texts.items() if token not in special):
        texts = {token: text if token in special else _spelled(text) for token, text in texts.items()}
        merges, words = _merges_of_characters(text for token, text in texts.items() if token not in special), "gpt-2"
    elif kind == "BPE" and (words := _words_of(document)):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    else:
        raise UserError(str(path), f"is a {kind} that llama.cpp does not have; right is byte-level BPE, or characters")
    size = config["vocab_size"]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list([texts.get(token, f"[UNUSED{token}]") for token in range(size)])
    types = [kinds.CONTROL if token in special else kinds.NORMAL for token in sorted(texts)]
    writer.add_token_types(types + [kinds.UNUSED] * (size - len(types)))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    ids = {name: tokenizer.token_to_id(token_name(settings, f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    end = config.get("eos_token_id")
    ids["eos"] = (end[0] if isinstance(end, list) else end) if end is not None else ids["eos"]
    for name, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if template := settings.get("chat_template"):
        writer.add_chat_template(template)


def _words_of(document: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the way in which a byte-level BPE cuts words; None where it has none."""
    steps = document.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if document.get("normalizer") or not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return "gpt-2" if steps[0].get("use_regex", True) else None
    return "llama-bpe" if len(steps) == 2 and steps[0].get("pattern") == {"Regex": LLAMA_3} else None


def _spelled(text: str) -> str:
    """Spell a text's bytes with the characters of a byte-level BPE (Radford et al., 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}
    return "".join(table[byte] for byte in text.encode())


def _merges_of_characters(spelled: Iterator[str]) -> list[str]:
    """Return merges by which the bytes of each character come together, from the first on, and nothing else does."""
    long = [text for text in spelled if len(text) > 1]
    return list(dict.fromkeys(f"{text[:end]} {text[end]}" for end in (1, 2, 3) for text in long if len(text) > end))


def _check_tokenizer(folder: Path, session: LlamaSession) -> bool:
    """Raise UserError where llama.cpp cuts a text otherwise than the folder's tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    vocabulary = tokenizer.get_vocab()
    by_characters = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "WordLevel"
    for probe in PROBES:
        text = "".join(c for c in probe if c in vocabulary) if by_characters else probe
        expected, found = tokenizer.encode(text, add_special_tokens=False).ids, session.tokenize(text)
        if expected != found:
            message = f"gives {text!r} other tokens than llama.cpp: {expected}, {found}"
            raise UserError(str(folder / "tokenizer.json"), message)
    return True


# ------------------------------------------------------------------------------------------------------------- parity


def compare(folder: Path, session: LlamaSession) -> dict[str, Any]:
    """Compare logits with those of transformers' own model, in float32, on two rows of random tokens, one shorter."""
    theirs = open_lazily(folder, "AutoModelForCausalLM")
    length = min(PARITY_TOKENS, session.max_positions)
    tokens = torch.randint(session.vocabulary_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, length // 2 :] = 0
    with torch.inference_mode():
        expected = theirs(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
    found = session(input_ids=tokens, attention_mask=mask)["logits"][mask.bool()]
    differences = (expected - found).abs().amax(-1)
    return {
        "largest_difference": float(differences.max()),
        "median_difference": float(differences.median()),
        "largest_logit": float(expected.abs().max()),
        "agreement": float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
        "num_tokens": len(expected),
    }
