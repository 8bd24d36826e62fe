import json

import pytest
import torch
import transformers

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools import ladder
from bigbatch.tools.opened import open_model
from bigbatch.tools.prune import Plan, prune
from bigbatch.tools.pruning.structured import without_units

TOKENS = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))


def pruned(folder, out, *plan):
    source = ladder.open_source(folder, out)
    (out / "made").mkdir()
    record = prune(Plan(plan[0], importance="magnitude", score_steps=1), source, out / "made", plan[1])
    return source, record, out / "made"


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_without_units_transformers_computes_what_it_does_with_these_units_at_zero(tiny_folder, tmp_path):
    source, record, made = pruned(tiny_folder("gpt_llama")[1], tmp_path, "feed_forward", 0.5)
    smaller, whole = opened(made), opened(source.path)
    assert smaller.config.intermediate_size * 2 == whole.config.intermediate_size
    assert sum(p.numel() for p in smaller.parameters()) == record["parameters"] < record["parameters_before"]
    for own, theirs in zip(smaller.model.layers, whole.model.layers, strict=True):
        weights = (theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight, theirs.mlp.down_proj.weight.T)
        norms = sum(weight.square().sum(1) for weight in weights)
        least = norms.argsort()[: len(norms) // 2]
        assert own.mlp.down_proj.weight.shape[1] == len(norms) - len(least)
        theirs.mlp.down_proj.weight.data[:, least] = 0
    assert torch.allclose(logits(smaller), logits(whole), atol=1e-5)


def test_without_heads_transformers_computes_what_it_does_with_these_heads_at_zero(tiny_folder, tmp_path):
    source, record, made = pruned(tiny_folder("gpt_llama")[1], tmp_path, "heads", 0.5)
    smaller, whole = opened(made), opened(source.path)
    assert record["heads"] == "4 -> 2"
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads, smaller.config.head_dim) == (
        2,
        1,
        8,
    )
    for own, theirs in zip(smaller.model.layers, whole.model.layers, strict=True):
        assert own.self_attn.q_proj.weight.shape == (16, 32)
        out = theirs.self_attn.o_proj.weight
        least = out.square().sum(0).view(2, 16).sum(1).argmin()  # of two key heads with two queries each
        out.data[:, 16 * least : 16 * (least + 1)] = 0
    assert torch.allclose(logits(smaller), logits(whole), atol=1e-5)
    ladder.carry(source.path, made)
    native = open_model(made).model
    with torch.no_grad():
        assert torch.allclose(native(TOKENS), logits(smaller), atol=1e-5)


def test_heads_are_not_taken_where_config_json_could_not_say_so(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="--method: heads takes a llama"):
        pruned(tiny_folder("gpt_gpt2")[1], tmp_path, "heads", 0.5)


def test_what_chooses_sentences_loses_layers_of_its_encoder(tiny_folder, tmp_path):
    _, record, made = pruned(tiny_folder("summarize")[1], tmp_path, "layers", 0.5)
    assert list(record["removed_layers"]) == ["encoder.blocks"]
    assert json.loads((made / "config.json").read_text())["num_hidden_layers"] == 1


def test_without_layers_transformers_computes_what_it_does_with_them_taken_out(tiny_folder, tmp_path):
    source, record, made = pruned(tiny_folder("gpt_gpt2")[1], tmp_path, "layers", 0.5)
    smaller, whole = opened(made), opened(source.path)
    ((gone,),) = record["removed_layers"].values()
    assert smaller.config.n_layer == 1
    del whole.transformer.h[gone]
    assert torch.allclose(logits(smaller), logits(whole), atol=1e-5)


def test_a_unit_that_changes_no_loss_goes_first(tiny_folder, tmp_path):
    source = ladder.open_source(tiny_folder("gpt_gpt2")[1], tmp_path)
    model = source.recipe.build_model(source.config, source.facts).eval()
    size = model.blocks[0].feed_forward.down.weight.shape[1]
    idle = torch.arange(0, size, 2)
    for block in model.blocks:
        block.feed_forward.up.weight.data *= 10
        block.feed_forward.up.weight.data[idle] *= 100  # large, and of no use: nothing reads it
        block.feed_forward.down.weight.data[:, idle] = 0
    batch = {"tokens": TOKENS, "labels": TOKENS}
    left = without_units(source.recipe, model, [batch], 0.5).state
    for index, block in enumerate(model.blocks):
        assert torch.equal(left[f"blocks.{index}.feed_forward.down.weight"], block.feed_forward.down.weight[:, 1::2])


def test_an_encoder_decoder_loses_units_on_both_sides(tiny_folder, tmp_path):
    source, _, made = pruned(tiny_folder("translate")[1], tmp_path, "feed_forward", 0.5)
    smaller = transformers.AutoModelForSeq2SeqLM.from_pretrained(made)
    whole = transformers.AutoConfig.from_pretrained(source.path)
    assert smaller.config.encoder_ffn_dim * 2 == smaller.config.decoder_ffn_dim * 2 == whole.encoder_ffn_dim


def test_more_than_there_is_is_not_taken(tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"--ratio: found 0\.9; of 2 layers that takes 2"):
        pruned(tiny_folder("gpt_gpt2")[1], tmp_path, "layers", 0.9)
