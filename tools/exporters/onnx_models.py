"""The native families of models as ONNX graphs, operator by operator, from a folder's config.json and weights.

How wide a layer is follows from its weights, so that pruned heads and units need nothing said. Inputs and outputs have
the names that transformers and onnxruntime-genai give them.

Shapes: B rows, T tokens (targets of an encoder-decoder), P tokens before them, S of both or of the source, D hidden
size, H heads, K heads of keys and values, E size of a head, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.decoder import section_from_hugging_face as decoder_section
from bigbatch.tools.exporters.onnx_graph import FUSED_OPSET, MASKED, Graph

POSITION_OFFSET = 2  # of BART's table
NORM_EPSILON = 1e-5  # of BART's norms


class Heads(NamedTuple):
    """Queries, keys and values [B, T or S, heads * E], and how many heads of each."""

    query: str
    key: str
    value: str
    num_heads: int
    num_key_values: int
    size: int


# ------------------------------------------------------------------------------------------- encoders


def bert(graph: Graph, config: dict[str, Any]) -> None:
    """Add a BERT with the head that its class has: inputs input_ids, attention_mask, token_type_ids."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    tokens, mask, segments = (graph.input(name, np.int64, "batch", "length") for name in names)
    kind = (config.get("architectures") or ["BertModel"])[0]
    root = "bert." if "bert.embeddings.word_embeddings.weight" in graph.weights else ""
    epsilon = config.get("layer_norm_eps", 1e-12)
    states = _bert_states(graph, config, root, (tokens, segments), _hide(graph, mask))
    if kind.endswith("ForQuestionAnswering"):
        scores = graph.linear(states, "qa_outputs")
        for name, half in zip(("start_logits", "end_logits"), graph.split(scores, (1, 1)), strict=True):
            graph.output(name, graph.reshape(half, 0, 0), "batch", "length")
    elif kind.endswith("ForTokenClassification"):
        graph.output("logits", graph.linear(states, "classifier"), "batch", "length", "labels")
    elif kind.endswith("ForSequenceClassification"):
        first = graph.add("Gather", states, graph.constant(0), axis=1)  # [B, D]
        pooled = graph.add("Tanh", graph.linear(first, f"{root}pooler.dense"))
        graph.output("logits", graph.linear(pooled, "classifier"), "batch", "labels")
    elif kind.endswith(("ForMaskedLM", "ForPreTraining")):
        inner = graph.add("Gelu", graph.linear(states, "cls.predictions.transform.dense"))
        inner = graph.norm(inner, "cls.predictions.transform.LayerNorm", epsilon)
        scores = graph.head(inner, f"{root}embeddings.word_embeddings.weight")
        scores = graph.add("Add", scores, graph.weight("cls.predictions.bias"))
        graph.output("logits", scores, "batch", "length", "vocabulary")
    elif kind == "BertModel":
        graph.output("last_hidden_state", states, "batch", "length", "hidden")
    else:
        raise UserError("config.json", f"holds {kind}, for which there is no ONNX graph")


def _bert_states(graph: Graph, config: dict[str, Any], root: str, inputs: Sequence[str], hidden: str) -> str:
    tokens, segments = inputs
    epsilon, head_size = config.get("layer_norm_eps", 1e-12), config["hidden_size"] // config["num_attention_heads"]
    places = graph.weight(f"{root}embeddings.position_embeddings.weight")
    places = graph.add("Slice", places, graph.constant([0]), graph.size(tokens, 1), graph.constant([0]))
    states = graph.table(tokens, f"{root}embeddings.word_embeddings.weight")
    states = graph.add("Add", states, graph.table(segments, f"{root}embeddings.token_type_embeddings.weight"))
    states = graph.norm(graph.add("Add", states, places), f"{root}embeddings.LayerNorm", epsilon)
    for index in range(config["num_hidden_layers"]):
        name = f"{root}encoder.layer.{index}"
        mixed = _attend_alone(graph, states, f"{name}.attention.self.", ("query", "key", "value"), head_size, hidden)
        mixed = graph.add("Add", graph.linear(mixed, f"{name}.attention.output.dense"), states)
        states = graph.norm(mixed, f"{name}.attention.output.LayerNorm", epsilon)
        inner = graph.add("Gelu", graph.linear(states, f"{name}.intermediate.dense"))
        inner = graph.add("Add", graph.linear(inner, f"{name}.output.dense"), states)
        states = graph.norm(inner, f"{name}.output.LayerNorm", epsilon)
    return states


def vit(graph: Graph, config: dict[str, Any]) -> None:
    """Add a ViT for image classification: input pixel_values [B, C, S, S], output logits."""
    side, patch, size = config["image_size"], config["patch_size"], config["hidden_size"]
    epsilon, head_size = config.get("layer_norm_eps", 1e-12), size // config["num_attention_heads"]
    pixels = graph.input("pixel_values", np.float32, "batch", config["num_channels"], side, side)
    pixels = graph.cast(pixels) if graph.float != np.float32 else pixels
    root = "vit.embeddings"
    projection = f"{root}.patch_embeddings.projection"
    kernel, bias = graph.weight(f"{projection}.weight"), graph.weight(f"{projection}.bias")
    patches = graph.add("Conv", pixels, kernel, bias, strides=(patch, patch))  # [B, D, S / P, S / P]
    patches = graph.add("Transpose", graph.reshape(patches, 0, size, -1), perm=(0, 2, 1))
    shape = graph.add("Concat", graph.size(pixels, 0), graph.constant([1, size]), axis=0)
    first = graph.add("Expand", graph.weight(f"{root}.cls_token"), shape)
    states = graph.add("Concat", first, patches, axis=1)
    states = graph.add("Add", states, graph.weight(f"{root}.position_embeddings"))
    for index in range(config["num_hidden_layers"]):
        name = f"vit.encoder.layer.{index}"
        normed = graph.norm(states, f"{name}.layernorm_before", epsilon)
        mixed = _attend_alone(graph, normed, f"{name}.attention.attention.", ("query", "key", "value"), head_size, "")
        states = graph.add("Add", states, graph.linear(mixed, f"{name}.attention.output.dense"))
        normed = graph.norm(states, f"{name}.layernorm_after", epsilon)
        inner = graph.add("Gelu", graph.linear(normed, f"{name}.intermediate.dense"))
        states = graph.add("Add", states, graph.linear(inner, f"{name}.output.dense"))
    first = graph.add("Gather", graph.norm(states, "vit.layernorm", epsilon), graph.constant(0), axis=1)
    graph.output("logits", graph.linear(first, "classifier"), "batch", "labels")


# ------------------------------------------------------------------------------------------- decoders


def gpt2(graph: Graph, config: dict[str, Any]) -> None:
    """Add a GPT-2 with its cache; inputs and outputs as `_Writer` declares them."""
    root = "transformer." if "transformer.wte.weight" in graph.weights else ""
    epsilon, head_size = config.get("layer_norm_epsilon", 1e-5), config["n_embd"] // config["n_head"]
    writer = _Writer(graph)
    states = graph.table(writer.tokens, f"{root}wte.weight")
    states = graph.add("Add", states, graph.add("Gather", graph.weight(f"{root}wpe.weight"), writer.positions))
    for index in range(config["n_layer"]):
        name = f"{root}h.{index}"
        normed = graph.norm(states, f"{name}.ln_1", epsilon)
        width = graph.weights[f"{name}.attn.c_attn.weight"].shape[1] // 3
        mixed = graph.linear(normed, f"{name}.attn.c_attn", is_turned=True)
        mixed = writer.attend(index, _split(graph, mixed, width, head_size))
        states = graph.add("Add", states, graph.linear(mixed, f"{name}.attn.c_proj", is_turned=True))
        inner = graph.linear(graph.norm(states, f"{name}.ln_2", epsilon), f"{name}.mlp.c_fc", is_turned=True)
        inner = graph.add("Gelu", inner, approximate="tanh")
        states = graph.add("Add", states, graph.linear(inner, f"{name}.mlp.c_proj", is_turned=True))
    states = graph.norm(states, f"{root}ln_f", epsilon)
    head = f"{root}wte.weight" if config.get("tie_word_embeddings", True) else "lm_head.weight"
    graph.output("logits", graph.head(states, head), "batch", "length", "vocabulary")


def llama(graph: Graph, config: dict[str, Any]) -> None:
    """Add a Llama with its cache; inputs and outputs as `_Writer` declares them."""
    section = decoder_section(config)
    head_size, epsilon = section.head_size, section.norm_epsilon
    writer = _Writer(graph)
    angles = np.outer(np.arange(section.max_positions), section.rope_theta ** -(np.arange(0, 1, 2 / head_size)))
    waves = [graph.constant(wave(angles).astype(graph.float)) for wave in (np.cos, np.sin)]  # [positions, E / 2]

    def turned(states: str, count: int) -> str:
        return graph.add("RotaryEmbedding", states, *waves, writer.positions, num_heads=count)

    states = graph.table(writer.tokens, "model.embed_tokens.weight")
    for index in range(section.num_layers):
        name = f"model.layers.{index}"
        normed = graph.norm(states, f"{name}.input_layernorm", epsilon)
        names = [f"{name}.self_attn.{letter}_proj" for letter in "qkv"]
        widths = [len(graph.weights[f"{part}.weight"]) for part in names]
        query, key, value = graph.split(graph.linear(normed, *names), widths)
        count, num_key_values, _ = (width // head_size for width in widths)
        heads = Heads(turned(query, count), turned(key, num_key_values), value, count, num_key_values, head_size)
        mixed = writer.attend(index, heads)
        states = graph.add("Add", states, graph.linear(mixed, f"{name}.self_attn.o_proj"))
        normed = graph.norm(states, f"{name}.post_attention_layernorm", epsilon)
        width = len(graph.weights[f"{name}.mlp.gate_proj.weight"])
        both = graph.linear(normed, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        gate, up = graph.split(both, (width, width))
        inner = graph.add("Mul", graph.add("Mul", gate, graph.add("Sigmoid", gate)), up)
        states = graph.add("Add", states, graph.linear(inner, f"{name}.mlp.down_proj"))
    states = graph.norm(states, "model.norm", epsilon)
    head = "model.embed_tokens.weight" if section.tie_embeddings else "lm_head.weight"
    graph.output("logits", graph.head(states, head), "batch", "length", "vocabulary")


class _Writer:
    """Inputs of a decoder, what its tokens may see, and the cache, which is empty at the first tokens.

    Inputs: input_ids [B, T], attention_mask [B, P + T], position_ids [B, T], past_key_values.{layer}.key and .value
    [B, K, P, E]; outputs: logits [B, T, V], present.{layer}.key and .value [B, K, P + T, E].
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tokens = graph.input("input_ids", np.int64, "batch", "length")
        mask = graph.input("attention_mask", np.int64, "batch", "total_length")
        self.positions = graph.input("position_ids", np.int64, "batch", "length")
        keys = graph.range(graph.size(mask, 1))
        own = graph.add("Slice", keys, graph.add("Neg", graph.size(self.tokens, 1)), graph.constant([2**62]))
        self.mask = _hide(graph, mask, _causal(graph, keys, own))

    def attend(self, layer: int, heads: Heads) -> str:
        """Mix values behind the cache of a layer."""
        return _attend_cached(self.graph, layer, heads, self.mask)


# ------------------------------------------------------------------------------------------- encoder-decoders


def bart(encoder: Graph, decoder: Graph, config: dict[str, Any]) -> None:
    """Add Marian's, BART's or mBART's two graphs.

    The encoder's outputs are the keys and values that the decoder's layers see of the source, so that they are made
    once: input_ids and attention_mask [B, S] -> encoder.{layer}.key and .value [B, H, S, E]. The decoder's inputs are
    input_ids [B, T], position_ids [T], encoder_attention_mask [B, S], those, and past_key_values.{layer}.key and .value
    [B, H, P, E]; its outputs logits [B, T, V] and present.{layer}.key and .value [B, H, P + T, E].
    """
    states = _bart_encoder(encoder, config)
    head_size = config["d_model"] // config["decoder_attention_heads"]
    tokens = decoder.input("input_ids", np.int64, "batch", "length")
    positions = decoder.input("position_ids", np.int64, "length")
    seen = _hide(decoder, decoder.input("encoder_attention_mask", np.int64, "batch", "source_length"))
    last = decoder.add("Slice", positions, decoder.constant([-1]), decoder.constant([2**62]))
    keys = decoder.range(decoder.add("Add", last, decoder.constant([1])))
    own = decoder.add("Where", _causal(decoder, keys, positions), decoder.constant(0.0), decoder.constant(MASKED))
    hidden = _bart_vectors(decoder, config, "decoder", tokens, positions)
    for index in range(config["decoder_layers"]):
        name = f"model.decoder.layers.{index}"
        count = len(encoder.weights[f"{name}.encoder_attn.k_proj.weight"]) // head_size
        shape, source = ("batch", count, "source_length", head_size), [seen]
        for kind in ("key", "value"):
            made = encoder.linear(states, f"{name}.encoder_attn.{kind[0]}_proj")
            encoder.output(f"encoder.{index}.{kind}", _heads(encoder, made, count, head_size), *shape)
            source.append(decoder.input(f"encoder.{index}.{kind}", decoder.float, *shape))
        hidden = _bart_layer(decoder, config, index, hidden, own, source)
    hidden = _bart_end(decoder, config, "decoder", hidden)
    scores = decoder.head(hidden, "model.shared.weight")
    bias = decoder.constant(decoder.weights["final_logits_bias"][0].astype(decoder.float))
    decoder.output("logits", decoder.add("Add", scores, bias), "batch", "length", "vocabulary")


def _bart_encoder(graph: Graph, config: dict[str, Any]) -> str:
    tokens, mask = (graph.input(name, np.int64, "batch", "source_length") for name in ("input_ids", "attention_mask"))
    hidden, head_size = _hide(graph, mask), config["d_model"] // config["encoder_attention_heads"]
    states = _bart_vectors(graph, config, "encoder", tokens, graph.range(graph.size(tokens, 1)))
    for index in range(config["encoder_layers"]):
        name = f"model.encoder.layers.{index}"

        def attention(inner: str, name: str = name) -> str:
            names = ("q_proj", "k_proj", "v_proj")
            mixed = _attend_alone(graph, inner, f"{name}.self_attn.", names, head_size, hidden)
            return graph.linear(mixed, f"{name}.self_attn.out_proj")

        states = _bart_add(graph, config, states, f"{name}.self_attn_layer_norm", attention)
        states = _bart_inner(graph, config, states, name)
    return _bart_end(graph, config, "encoder", states)


def _bart_layer(graph: Graph, config: dict[str, Any], index: int, states: str, mask: str, source: Sequence[str]) -> str:
    name, head_size = f"model.decoder.layers.{index}", config["d_model"] // config["decoder_attention_heads"]
    seen, keys, values = source

    def attention(inner: str) -> str:
        names = [f"{name}.self_attn.{letter}_proj" for letter in "qkv"]
        width = len(graph.weights[f"{names[0]}.weight"])
        mixed = _attend_cached(graph, index, _split(graph, graph.linear(inner, *names), width, head_size), mask)
        return graph.linear(mixed, f"{name}.self_attn.out_proj")

    def source_attention(inner: str) -> str:
        query = graph.linear(inner, f"{name}.encoder_attn.q_proj")
        count = len(graph.weights[f"{name}.encoder_attn.q_proj.weight"]) // head_size
        mixed = _scores(graph, _heads(graph, query, count, head_size), keys, values, seen, head_size)
        return graph.linear(_together(graph, mixed), f"{name}.encoder_attn.out_proj")

    states = _bart_add(graph, config, states, f"{name}.self_attn_layer_norm", attention)
    states = _bart_add(graph, config, states, f"{name}.encoder_attn_layer_norm", source_attention)
    return _bart_inner(graph, config, states, name)


def _bart_vectors(graph: Graph, config: dict[str, Any], side: str, tokens: str, positions: str) -> str:
    """Return the first states of one side at positions [T]."""
    vectors, size = graph.table(tokens, "model.shared.weight"), config["d_model"]
    if config.get("scale_embedding"):
        vectors = graph.add("Mul", vectors, graph.constant(math.sqrt(size)))
    if config["model_type"] == "marian":
        angles = np.outer(np.arange(config["max_position_embeddings"]), 10000.0 ** -(np.arange(0, size, 2) / size))
        table = graph.constant(np.concatenate((np.sin(angles), np.cos(angles)), 1).astype(graph.float))
        return graph.add("Add", vectors, graph.add("Gather", table, positions))
    table = graph.weight(f"model.{side}.embed_positions.weight")
    places = graph.add("Gather", table, graph.add("Add", positions, graph.constant(POSITION_OFFSET)))
    return graph.norm(graph.add("Add", vectors, places), f"model.{side}.layernorm_embedding", NORM_EPSILON)


def _bart_inner(graph: Graph, config: dict[str, Any], states: str, name: str) -> str:
    def feed_forward(inner: str) -> str:
        return graph.linear(_activate(graph, graph.linear(inner, f"{name}.fc1"), config), f"{name}.fc2")

    return _bart_add(graph, config, states, f"{name}.final_layer_norm", feed_forward)


def _bart_add(graph: Graph, config: dict[str, Any], states: str, norm: str, layer: Any) -> str:
    if config["model_type"] == "mbart":
        return graph.add("Add", states, layer(graph.norm(states, norm, NORM_EPSILON)))
    return graph.norm(graph.add("Add", states, layer(states)), norm, NORM_EPSILON)


def _bart_end(graph: Graph, config: dict[str, Any], side: str, states: str) -> str:
    is_normed = config["model_type"] == "mbart"
    return graph.norm(states, f"model.{side}.layer_norm", NORM_EPSILON) if is_normed else states


def _activate(graph: Graph, states: str, config: dict[str, Any]) -> str:
    kind = config.get("activation_function", "gelu")
    if kind in ("silu", "swish"):
        return graph.add("Mul", states, graph.add("Sigmoid", states))
    return graph.add("Relu" if kind == "relu" else "Gelu", states)


# ------------------------------------------------------------------------------------------- attention


def _attend_alone(graph: Graph, states: str, root: str, names: Sequence[str], head_size: int, hidden: str) -> str:
    """Mix states with each other: the layers `names` below `root` make queries, keys and values."""
    names = [root + name for name in names]
    width = len(graph.weights[f"{names[0]}.weight"])
    return _attend(graph, _split(graph, graph.linear(states, *names), width, head_size), hidden, [])[0]


def _split(graph: Graph, states: str, width: int, size: int) -> Heads:
    """Take queries, keys and values, as many heads of each, apart."""
    query, key, value = graph.split(states, 3 * (width,))
    return Heads(query, key, value, width // size, width // size, size)


def _attend_cached(graph: Graph, layer: int, heads: Heads, hidden: str) -> str:
    """Mix values behind the cache of a layer: past_key_values.{layer}.key and .value [B, K, P, E]."""
    shape = ("batch", heads.num_key_values, "past_length", heads.size)
    names = [f"{layer}.{kind}" for kind in ("key", "value")]
    past = [graph.input(f"past_key_values.{name}", graph.float, *shape) for name in names]
    mixed, *present = _attend(graph, heads, hidden, past)
    for name, value in zip(names, present, strict=True):
        graph.output(f"present.{name}", value, *shape[:2], "total_length", heads.size)
    return mixed


def _attend(graph: Graph, heads: Heads, hidden: str, past: Sequence[str]) -> list[str]:
    """Return mixed values [B, T, H * E]; with a past also all keys and values [B, K, P + T, E]."""
    query, key, value, count, num_key_values, size = heads
    if past and graph.opset >= FUSED_OPSET:
        sizes = {"q_num_heads": count, "kv_num_heads": num_key_values, "scale": 1 / math.sqrt(size)}
        return graph.add_many("Attention", query, key, value, hidden, *past, count=3, **sizes)
    key, value = (_heads(graph, states, num_key_values, size) for states in (key, value))
    if past:
        key, value = (graph.add("Concat", *pair, axis=2) for pair in zip(past, (key, value), strict=True))
    mixed = _scores(graph, _heads(graph, query, count, size), key, value, hidden, size)
    return [_together(graph, mixed), *((key, value) if past else ())]


def _scores(graph: Graph, query: str, key: str, value: str, hidden: str, size: int) -> str:
    """Mix values by the products of queries with keys, all [B, H, T or S, E]."""
    query = graph.add("Mul", query, graph.constant(1 / math.sqrt(size)))
    scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=(0, 1, 3, 2)))
    scores = graph.add("Add", scores, hidden) if hidden else scores
    return graph.add("MatMul", graph.add("Softmax", scores, axis=-1), value)


def _heads(graph: Graph, states: str, count: int, size: int) -> str:
    """Bring [B, T, H * E] into the form [B, H, T, E]."""
    return graph.add("Transpose", graph.reshape(states, 0, 0, count, size), perm=(0, 2, 1, 3))


def _together(graph: Graph, states: str) -> str:
    return graph.reshape(graph.add("Transpose", states, perm=(0, 2, 1, 3)), 0, 0, -1)


def _hide(graph: Graph, mask: str, allowed: str = "") -> str:
    """Return what is added to scores [B, 1, 1 or T, S] so that a mask [B, S] and `allowed` [T, S] are followed."""
    counts = graph.add("Unsqueeze", graph.cast(mask, np.bool_), graph.constant([1, 2]))
    counts = graph.add("And", counts, allowed) if allowed else counts
    return graph.add("Where", counts, graph.constant(0.0), graph.constant(MASKED))


def _causal(graph: Graph, keys: str, own: str) -> str:
    """Tell which keys' places [S] tokens at their own places [T] may see: [T, S]."""
    return graph.add("LessOrEqual", keys, graph.add("Unsqueeze", own, graph.constant([1])))
