import pytest
import torch
from safetensors.torch import load_file

from bigbatch.tools.quantization import layers
from bigbatch.tools.quantization.writers import Job, write

TOKENS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
KEPT = ["lm_head", "model.layers.0.mlp.down_proj"]
ERRORS = {"int8_dynamic": 0.09, "int8_weight": 0.07, "int4_weight": 0.7, "nf4": 0.7, "fp8": 0.25}
"""Largest differences of logits, as parts of the largest: of weights drawn at random, which have the largest errors."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Give the original, and folders by method."""
    import transformers

    out = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, initializer_range=0.1, **shape)
    folder = out / "original"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for method in ERRORS:
        write(Job(folder, out / method, method, 32 if method == "int4_weight" else None, KEPT))
    return folder, out


def num_bytes(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("method", ERRORS)
def test_the_written_folder_gives_nearly_the_same_logits_in_transformers(quantized, method):
    folder, out = quantized
    with torch.no_grad():
        right, found = (layers.open_model(one)(TOKENS).logits for one in (folder, out / method))
    error = (right - found).abs().max() / right.abs().max()
    assert 0 < error < ERRORS[method]
    assert num_bytes(out / method) < 0.8 * num_bytes(folder)


@pytest.mark.parametrize("method", ERRORS)
def test_layers_that_are_kept_have_the_same_bits(quantized, method):
    folder, out = quantized
    before, after = layers.open_model(folder), layers.open_model(out / method)
    for name in KEPT:
        assert torch.equal(before.get_submodule(name).weight, after.get_submodule(name).weight)


def test_four_bits_are_two_weights_a_byte_and_each_the_nearest_of_sixteen(quantized):
    folder, out = quantized
    name = "model.layers.1.mlp.up_proj"
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"]
    stored = load_file(out / "int4_weight" / "model.safetensors")
    packed, scales = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
    assert packed.nbytes == weight.numel() // 2
    nibbles = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15  # eight to an integer, the first lowest
    found = (nibbles.flatten(1) - 8).unflatten(1, (-1, 32)) * scales.unsqueeze(-1)
    groups = weight.unflatten(1, (-1, 32))
    assert torch.allclose(scales, groups.abs().amax(-1) / 7.5, rtol=1e-5)
    # Half a step, but where the largest is positive: 7.5 steps of 7 that there are.
    assert (found - groups).abs().amax(-1).le(scales * 0.5001).all()


def test_a_tensor_outside_any_module_does_not_keep_torchaos_folder_from_being_read(tiny_folder, tmp_path):
    folder = tiny_folder("summarize_written")[1]
    assert "final_logits_bias" in load_file(folder / "model.safetensors")
    write(Job(folder, tmp_path / "out", "int8_weight", None, ["lm_head"]))
    sources = {"input_ids": TOKENS % 50, "decoder_input_ids": TOKENS[:, :9] % 50}
    with torch.no_grad():
        right, found = (layers.open_model(one)(**sources).logits for one in (folder, tmp_path / "out"))
    assert (right - found).abs().max() < 0.05 * right.abs().max()


def test_an_image_models_kept_layer_is_found_by_its_name_in_memory(tiny_folder, tmp_path):
    folder = tiny_folder("classify_images")[1]
    model = layers.open_model(folder)
    kept = layers.with_fused(layers.linear_layers(model), ["vit.layers.0.attention.q_proj"])
    assert len(kept) == 3
    write(Job(folder, tmp_path / "out", "int4_weight", 32, [*layers.heads(model), *kept]))
    pixels = torch.randn(2, model.config.num_channels, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        both = (model, layers.open_model(tmp_path / "out"))
        right, found = (one(pixel_values=pixels, output_hidden_states=True).hidden_states[-1] for one in both)
    assert 0 < (right - found).abs().max() < 0.5 * right.abs().max()
