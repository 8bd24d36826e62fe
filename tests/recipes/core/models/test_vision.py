"""The Vision Transformer against transformers' own, both ways."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bigbatch.launcher.predict import count_vision_parameters
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import VisionSection
from bigbatch.recipes.core.models.hugging_face import to_hugging_face
from bigbatch.recipes.core.models.vision import VisionTransformer, load_vision, vision_config, vision_tensors

SECTION = VisionSection(patch_size=4, num_layers=3, hidden_size=32, num_heads=4, feed_forward_size=48)
LABELS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def folder(tmp_path):
    """Save transformers' own model with random weights."""
    torch.manual_seed(1)
    table = dict(enumerate(LABELS))
    config = transformers.ViTConfig(
        image_size=12, patch_size=4, num_channels=3, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, id2label=table, label2id={label: number for number, label in table.items()},
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    return tmp_path


def test_logits_and_gradients_are_those_of_transformers_own_model(folder):
    theirs = transformers.ViTForImageClassification.from_pretrained(folder)
    ours = VisionTransformer(SECTION, 12, 3, 5)
    assert load_vision(ours, folder, LABELS)
    pixels = torch.rand(7, 3, 12, 12, requires_grad=True)
    expected = theirs(pixels).logits
    (their_gradient,) = torch.autograd.grad(expected.square().sum(), pixels)
    found = ours(pixels)
    (gradient,) = torch.autograd.grad(found.square().sum(), pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, their_gradient, atol=1e-4, rtol=1e-4)


def test_a_folder_read_and_written_again_is_the_same_bit_for_bit(folder):
    ours = VisionTransformer(SECTION, 12, 3, 5)
    load_vision(ours, folder, LABELS)
    parameters = dict(ours.named_parameters())
    table = vision_tensors(SECTION, 5)
    assert table.keys() == parameters.keys()
    written = {piece.name: to_hugging_face(parameters[name].detach(), piece) for name in table for piece in table[name]}
    stored = load_file(folder / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in vision_config(SECTION, 12, 3)} == vision_config(SECTION, 12, 3)


def test_a_model_without_a_head_is_read_and_starts_with_a_head_of_zeros(folder):
    stored = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("vit."): tensor for name, tensor in stored.items() if name.startswith("vit.")}
    bare |= {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}
    save_file(bare, folder / "model.safetensors")
    ours = VisionTransformer(SECTION, 12, 3, 5)
    assert not load_vision(ours, folder, LABELS)
    assert torch.equal(ours.embed.positions, bare["embeddings.position_embeddings"])
    assert not ours(torch.rand(2, 3, 12, 12)).any()


def test_a_folder_of_another_image_size_is_refused(folder):
    with pytest.raises(UserError, match=r"'vit.embeddings.position_embeddings' is \(1, 10, 32\), the model needs"):
        load_vision(VisionTransformer(SECTION, 16, 3, 5), folder, LABELS)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_parameters_are_counted_as_they_are_built(pooling):
    section = SECTION.model_copy(update={"pooling": pooling})
    model = VisionTransformer(section, 12, 3, 5)
    assert count_vision_parameters(section, 12, 3, 5) == sum(parameter.numel() for parameter in model.parameters())


def test_the_mean_over_patches_learns_everywhere_and_transformers_has_none():
    section = SECTION.model_copy(update={"pooling": "mean", "recompute_activations": True})
    model = VisionTransformer(section, 12, 1, 5)
    torch.nn.init.normal_(model.head.weight)
    model(torch.rand(2, 1, 12, 12)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    with pytest.raises(UserError, match="transformers' ViT has only 'class'"):
        vision_config(section, 12, 1)
