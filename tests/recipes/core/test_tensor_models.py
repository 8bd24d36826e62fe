"""Native models over two tensor ranks: equal to the same model on one rank, gradient for gradient."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bigbatch.recipes.core.layout import split

EXACT = ("gpt2", "llama", "recompute", "encoder")
SPREAD = ("spread_gpt2", "spread_llama", "spread_recompute", "spread_encoder", "spread_rotary")
DROPPING = ("gpt2", "recompute", "dropout", "dropout_recompute")
REPLICATED = ("norm", "positions", "segments", "out.bias", "down.bias", "transform", "pooler", "pair_head")


@pytest.fixture(scope="module")
def results(run_program, tmp_path_factory):
    """Return what one rank alone has, and what each of the two has."""
    out = tmp_path_factory.mktemp("tensor_models")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=101,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(out / "folder")
    run_program("tensor_models.py", out)
    return [load_file(out / f"{name}.safetensors") for name in ("whole", "0", "1")]


def expected_part(name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
    """Cut by the rules of Megatron: heads, inner units and vocabulary are divided, all else is whole on each rank."""
    if any(word in name for word in REPLICATED):
        return whole
    if "qkv" in name:
        keys = 16 if "llama" in name or "from_logits" in name else 32
        blocks = (32, keys, keys)
    elif "gate_up" in name:
        blocks = (48, 48)
    else:
        blocks = (whole.shape[0],)
    if name.endswith(("out.weight", "down.weight")):
        return split(tuple(whole.shape), 1, (whole.shape[1],), rank, 2).cut(whole)
    return split(tuple(whole.shape), 0, blocks, rank, 2).cut(whole)


@pytest.mark.parametrize("case", [*EXACT, "from_logits", "dropout"])
def test_each_rank_draws_its_share_of_the_weights_of_one_rank(results, case):
    whole, *ranks = results
    names = [name for name in whole if name.startswith(f"{case}/weight")]
    assert len(names) > 10
    for rank, found in enumerate(ranks):
        assert all(torch.equal(found[name], expected_part(name, whole[name], rank)) for name in names)


@pytest.mark.parametrize("case", [*EXACT, *SPREAD, "from_logits"])
def test_each_rank_has_its_share_of_the_gradients_of_one_rank(results, case):
    whole, *ranks = results
    for name in (name for name in whole if name.startswith(f"{case}/grad")):
        for rank, found in enumerate(ranks):
            expected = expected_part(name, whole[name], rank)
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("case", [*EXACT, *SPREAD])
def test_loss_and_logits_are_whole_on_every_rank_and_those_of_one_rank(results, case):
    whole, *ranks = results
    for found in ranks:
        assert found[f"{case}/loss"].item() == pytest.approx(whole[f"{case}/loss"].item(), rel=1e-6)
        assert found[f"{case}/logits"].shape == (3, 16, 101)
        torch.testing.assert_close(found[f"{case}/logits"], whole[f"{case}/logits"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", [f"{how}{name}" for how in ("", "spread_") for name in DROPPING])
def test_what_is_replicated_gets_the_same_gradient_on_all_ranks_bit_for_bit(results, case):
    _, first, second = results
    names = [name for name in first if name.startswith(f"{case}/grad") and any(word in name for word in REPLICATED)]
    assert len(names) == 15
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_what_is_divided_is_dropped_by_numbers_of_each_ranks_own(results):
    first, second = (found["random/inside"] for found in results[1:])
    assert not torch.isclose(first, second).any()


@pytest.mark.parametrize("how", ["", "spread_"])
def test_what_is_spread_is_dropped_by_each_rank_on_its_own(results, how):
    _, first, second = (found[f"{how}dropout/dropped"] for found in results)
    assert first.float().mean() == pytest.approx(0.2, abs=0.06)
    assert first.shape == ((24, 32) if how else (3, 16, 32))  # of 3 rows of 16 tokens
    assert torch.equal(first, second) == (how == "")


@pytest.mark.parametrize("how", ["", "spread_"])
def test_dropout_leaves_the_generators_of_all_ranks_at_the_same_place(results, how):
    _, first, second = results
    assert torch.equal(first[f"{how}dropout/after"], second[f"{how}dropout/after"])
    assert torch.equal(first[f"{how}dropout/loss"], second[f"{how}dropout/loss"])
    assert not torch.equal(first[f"{how}dropout/loss"], first["gpt2/loss"])


@pytest.mark.parametrize("how", ["", "spread_"])
def test_a_recomputed_layer_drops_the_same_again(results, how):
    for found in results[1:]:
        again = {name: value for name, value in found.items() if name.startswith(f"{how}dropout_recompute/")}
        for name, value in again.items():
            torch.testing.assert_close(value, found[name.replace("_recompute", "", 1)], rtol=1e-6, atol=1e-6)


def test_a_model_starts_from_a_hugging_face_folder_with_its_shares(results):
    whole, *ranks = results
    for found in ranks:
        torch.testing.assert_close(found["started/logits"], whole["started/logits"], rtol=1e-5, atol=2e-6)
    assert not torch.allclose(whole["started/logits"], whole["llama/logits"])


def test_the_loss_over_a_divided_vocabulary_is_exact_in_chunks_and_blocks(results):
    whole, *ranks = results
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (240, 256))
    bias, labels = torch.randn(256, generator=generator, dtype=torch.float64), torch.arange(-100, 140)
    labels[:100] = -100
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    logits = (hidden @ weight.T + bias)[:, :250]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (3 * expected).backward()
    for rank, found in enumerate([whole, *ranks]):
        assert found["cross_entropy/loss"].item() == pytest.approx(expected.item(), rel=1e-14)
        for index, leaf in enumerate(leaves):
            gradient = leaf.grad if rank == 0 or index == 0 else leaf.grad.chunk(2)[rank - 1]
            torch.testing.assert_close(found[f"cross_entropy/grad/{index}"], gradient, rtol=1e-11, atol=1e-13)
