import pytest
import torch

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.quantization import layers
from bigbatch.tools.quantization.methods import METHODS, runs_here

NAMES = [f"model.layers.{index}.{part}" for index in (0, 1) for part in ("self_attn.q_proj", "self_attn.k_proj", "up")]


def test_a_gpt2_written_as_an_opt_gives_the_same_logits(tiny_folder, tmp_path):
    folder = tiny_folder("gpt_gpt2")[1]
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 25:] = 0
    expected, twin = layers.open_model(folder), layers.open_model(layers.unfolded_gpt2(folder, tmp_path / "twin"))
    assert type(twin).__name__ == "OPTForCausalLM"
    with torch.no_grad():
        right, found = (model(tokens, attention_mask=mask).logits[mask.bool()] for model in (expected, twin))
    assert (found - right).abs().max() < 1e-5 * right.abs().max()


def test_what_a_model_ends_in_is_no_layer_to_quantize(tiny_folder):
    model = layers.open_model(tiny_folder("classify")[1])
    assert layers.heads(model) == ["classifier"]
    assert all(name.startswith("bert.") for name in layers.linear_layers(model))


def test_layers_are_kept_by_name_and_by_pattern_and_those_fused_with_them_too():
    assert layers.chosen(NAMES, "*.0.*,up") == [*NAMES[:3], NAMES[2], NAMES[5]]
    assert layers.with_fused(NAMES, [NAMES[1]]) == NAMES[:2]
    with pytest.raises(
        UserError, match=r"^--keep: 'down' names no layer .* such as model\.layers\.0\.self_attn\.q_proj"
    ):
        layers.chosen(NAMES, "down")


def test_a_model_of_experts_is_refused():
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **shape)
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(UserError, match=r"only 1.% of the weights .* right is bigbatch export --format gguf"):
        layers.check_share(model, layers.linear_layers(model), "m")


@pytest.mark.parametrize(
    ("method", "capability", "said"),
    [
        ("fp8", None, "this CPU cannot multiply 8-bit floats"),
        ("fp8", (8, 0), r"this GPU \(compute capability 8\.0\) cannot"),
        ("gptq_w4a16", None, "made for vLLM on GPUs"),
        ("nf4", None, r"not always time .* bigbatch export --format onnx"),
    ],
)
def test_what_the_hardware_cannot_do_is_said_with_what_it_can(method, capability, said):
    import re

    assert re.search(said, runs_here(METHODS[method], capability) or "")
    assert runs_here(METHODS[method], (9, 0)) is None
