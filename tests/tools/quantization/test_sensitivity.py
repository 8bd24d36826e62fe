import pytest
import torch
from scipy.special import rel_entr

from bigbatch.tools.quantization import layers
from bigbatch.tools.quantization.calibration import windows
from bigbatch.tools.quantization.sensitivity import divergence, measure_layers

WORST = "model.layers.1.self_attn.v_proj"


def spoiled(folder):
    """Open a model one of whose layers has such large weights for an input, always 0, that others are rounded away."""
    model = layers.open_model(folder, dtype=torch.float32)
    model.get_submodule("model.layers.1.input_layernorm").weight.data[0] = 0
    model.get_submodule(WORST).weight.data[:, 0] = 1000
    return model


@pytest.mark.parametrize(("method", "group_size"), [("int4_weight", 32), ("int8_dynamic", None), ("nf4", None)])
def test_the_layer_that_rounding_spoils_is_found_and_the_model_is_otherwise_exact(tiny_folder, method, group_size):
    tokens = torch.randint(300, (1, 30), generator=torch.Generator().manual_seed(0))
    table = measure_layers(
        spoiled(tiny_folder("gpt_llama")[1]), method, group_size, ["lm_head"], [{"input_ids": tokens}]
    )
    assert table[0].layer == WORST
    assert table[0].divergence > 3 * table[1].divergence > 0
    assert len(table) == 14


def test_the_divergence_is_scipys_over_the_tokens_that_are_there():
    expected, found = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    each = rel_entr(expected.softmax(-1).numpy(), found.softmax(-1).numpy()).sum(-1)
    right = each[mask.bool().numpy()].mean()
    result = divergence({"logits": expected}, {"logits": found}, {"attention_mask": mask})
    assert result == pytest.approx(right, rel=1e-5)


def test_windows_are_taken_apart_without_their_padding():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = {"input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]), "attention_mask": mask, "decoder_input_ids": mask}
    first, second = windows(inputs)
    assert first["input_ids"].tolist() == [[5, 6]] and first["decoder_input_ids"].tolist() == [[1, 1, 0]]
    assert second["input_ids"].tolist() == [[7, 8, 9]]
