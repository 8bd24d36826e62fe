import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder, KeyValueCache, padded_vocabulary

VOCABULARY_SIZE = 101  # no multiple of anything: the embedding is padded to 128


def section_of(family, **changes):
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 24}
    if family == "llama":
        shape["num_key_value_heads"] = 2
    return DecoderSection(family=family, **(shape | changes))


def model_of(family, **changes):
    torch.manual_seed(7)
    model = Decoder(section_of(family, **changes), VOCABULARY_SIZE)
    with torch.no_grad():  # larger than at the start of training, so that every part shows in the result
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name or "bias" in name else 0.1))
    return model


def tokens_of(num_rows=3, length=24):
    return torch.randint(0, VOCABULARY_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(3))


both_families = pytest.mark.parametrize("family", ["gpt2", "llama"])


@both_families
def test_the_loss_is_the_summed_cross_entropy_of_the_logits(family):
    model, tokens, labels = model_of(family), tokens_of(), tokens_of().roll(-1, 1)
    labels[0, :5] = -100
    logits = model(tokens)
    assert logits.shape == (3, 24, VOCABULARY_SIZE)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels), expected)


@both_families
def test_gradients_of_the_loss_equal_those_through_plain_logits(family):
    model, tokens = model_of(family), tokens_of()
    logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@both_families
def test_no_token_sees_what_follows(family):
    model, tokens = model_of(family), tokens_of()
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % VOCABULARY_SIZE
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@both_families
def test_packed_documents_give_the_logits_that_each_has_alone(family):
    model, tokens = model_of(family), tokens_of(num_rows=1)
    documents = torch.tensor([[4] * 9 + [5] * 1 + [6] * 14], dtype=torch.int32)
    packed = model(tokens, documents=documents)
    alone = torch.cat([model(part) for part in tokens.split((9, 1, 14), dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)
    positions = torch.tensor([[*range(9), 0, *range(14)]])
    torch.testing.assert_close(model(tokens, documents=documents, positions=positions), packed, rtol=0, atol=0)
    assert not torch.allclose(model(tokens), alone, atol=1e-2)


@both_families
def test_packed_documents_give_the_gradients_that_each_has_alone_in_bfloat16(family):
    model, tokens = model_of(family).bfloat16(), tokens_of(num_rows=2)
    documents = torch.tensor([[0] * 9 + [1] * 15, [0] * 24], dtype=torch.int32)
    model(tokens, tokens, documents=documents).backward()
    packed = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    model.zero_grad()
    exact = model.float()
    for part in (tokens[:1, :9], tokens[:1, 9:], tokens[1:]):
        exact(part, part).backward()
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - packed[name]).norm() / parameter.grad.norm()
        assert difference < 0.03, (name, difference)


@both_families
def test_the_cache_gives_the_logits_of_the_whole_text(family):
    model, tokens = model_of(family).eval(), tokens_of()
    whole = model(tokens)
    cache = KeyValueCache(model, num_rows=3, max_length=24)
    parts = [model(part, cache=cache) for part in tokens.split((7, 1, 1, 5, 10), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=5e-6)
    assert cache.length == 24


@both_families
def test_a_padded_row_in_the_cache_is_as_it_would_be_alone(family):
    model, tokens = model_of(family).eval(), tokens_of(num_rows=2)
    padding = torch.tensor([0, 6])
    cache = KeyValueCache(model, num_rows=2, max_length=24, padding=padding)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split((10, 1, 3, 10), dim=1)], dim=1)
    torch.testing.assert_close(logits[0], model(tokens[:1])[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(logits[1, 6:], model(tokens[1:, 6:])[0], rtol=0, atol=5e-6)


def test_last_only_keeps_the_last_logits():
    model, tokens = model_of("gpt2"), tokens_of()
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


@both_families
def test_recomputing_activations_changes_no_gradient_even_with_dropout(family):
    gradients = []
    for recompute in (False, True):
        model = model_of(family, recompute_activations=recompute, dropout=0.1)
        torch.manual_seed(1)
        model(tokens_of(), tokens_of()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_dropout_acts_in_training_alone():
    model, tokens = model_of("gpt2", dropout=0.2), tokens_of()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@both_families
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_one_parameter_and_stays_one_in_another_dtype(family, tied):
    model = model_of(family, tie_embeddings=tied).bfloat16()
    assert (model.head.weight is model.embed.tokens.weight) == tied
    assert ("head.weight" in dict(model.named_parameters())) != tied
    assert model(tokens_of()).dtype == torch.bfloat16


def test_bfloat16_training_gradients_are_near_those_in_float32():
    tokens = tokens_of()
    exact, rounded = model_of("gpt2"), model_of("gpt2").bfloat16()
    exact(tokens, tokens).backward()
    rounded(tokens, tokens).backward()
    for (name, reference), parameter in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        difference = (parameter.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert difference < 0.03, (name, difference)


def test_first_weights_are_drawn_as_gpt2s():
    torch.manual_seed(0)
    model = Decoder(DecoderSection(num_layers=8, hidden_size=128, num_heads=4), 1000)
    block = model.blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attention.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert block.feed_forward.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert model.embed.tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8).view(1, 8)).item() / 8 == pytest.approx(
        math.log(1000), abs=0.2
    )


def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient():
    model, tokens = model_of("gpt2", tie_embeddings=False), tokens_of()
    assert padded_vocabulary(VOCABULARY_SIZE, model.section) == len(model.head.weight) == 128
    model(tokens, tokens).backward()
    assert not model.head.weight.grad[VOCABULARY_SIZE:].any()
    before = model(tokens, tokens)
    with torch.no_grad():
        model.head.weight[VOCABULARY_SIZE:] = 10.0
    assert model(tokens, tokens) == before


def test_a_sequence_longer_than_the_positions_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"model\.max_positions: 24, but a sequence has 25 tokens"):
        model_of("llama")(tokens_of(length=25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"family": "llama", "num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is for the llama family"),
        ({"family": "llama", "hidden_size": 12}, "heads of an even size, not 12 / 4"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_with_its_numbers(changes, message):
    with pytest.raises(ValidationError, match=message):
        DecoderSection(**({"hidden_size": 32, "num_heads": 4} | changes))


def test_the_default_feed_forward_is_the_familys():
    assert section_of("gpt2").inner_size == 128
    assert section_of("llama", hidden_size=512).inner_size == 1408  # 8 / 3 of 512 is 1365.3
