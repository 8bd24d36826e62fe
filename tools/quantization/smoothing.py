"""Where AWQ and SmoothQuant can move scales from activations into weights: between a layer and those it alone feeds.

Imports nothing, since two environments share it.
"""

from typing import Any, NamedTuple


class Step(NamedTuple):
    """A module whose outputs are divided, and the linear layers whose weights are multiplied, as patterns of names."""

    source: str
    layers: list[str]
    is_norm: bool = True


_QKV = ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
_LLAMA = [
    Step("re:.*input_layernorm$", _QKV),
    Step("re:.*v_proj$", ["re:.*o_proj$"], is_norm=False),
    Step("re:.*post_attention_layernorm$", ["re:.*gate_proj$", "re:.*up_proj$"]),
    Step("re:.*up_proj$", ["re:.*down_proj$"], is_norm=False),
]
STEPS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "opt": [
        Step("re:.*self_attn_layer_norm$", _QKV),
        Step("re:.*v_proj$", ["re:.*out_proj$"], is_norm=False),
        Step(r"re:.*layers\.\d+\.final_layer_norm$", ["re:.*fc1$"]),
    ],
    "vit": [
        Step("re:.*layernorm_before$", _QKV),
        Step("re:.*v_proj$", ["re:.*o_proj$"], is_norm=False),
        Step("re:.*layernorm_after$", ["re:.*fc1$"]),
    ],
}
"""By model_type. A model with norms behind its layers (BERT, BART) is not here: its norms feed the residual too."""


def steps_of(settings: dict[str, Any]) -> list[Step] | None:
    """Return the steps of a model's config.json, None where there are none."""
    is_behind = settings.get("model_type") == "opt" and not settings.get("do_layer_norm_before", True)
    return None if is_behind else STEPS.get(settings.get("model_type", ""))
