import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import (
    Decoder,
    hugging_face_config,
    hugging_face_state,
    hugging_face_tensors,
    load_hugging_face,
    section_from_hugging_face,
)
from bigbatch.recipes.core.models.hugging_face import from_hugging_face, to_hugging_face

VOCABULARY_SIZE = 101
FAMILIES = {
    "gpt2": {"family": "gpt2", "feed_forward_size": 48},
    "gpt2 untied": {"family": "gpt2", "tie_embeddings": False},
    "llama": {"family": "llama", "num_key_value_heads": 1, "rope_theta": 500.0, "tie_embeddings": False},
    "llama grouped, tied": {"family": "llama", "num_key_value_heads": 2, "norm_epsilon": 1e-6},
}
all_families = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES.keys())


def section_of(changes):
    return DecoderSection(**({"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 64} | changes))


def transformers_model(section):
    """Build transformers' own model with weights in which every tensor shows."""
    torch.manual_seed(5)
    config = hugging_face_config(section, VOCABULARY_SIZE)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(section, folder, **options):
    model = transformers_model(section)
    model.save_pretrained(folder, **options)
    return model


def tokens():
    return torch.randint(0, VOCABULARY_SIZE, (2, 64), generator=torch.Generator().manual_seed(1))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@all_families
def test_transformers_builds_the_model_that_the_config_names(changes):
    section = section_of(changes)
    expected = "GPT2LMHeadModel" if section.family == "gpt2" else "LlamaForCausalLM"
    assert type(transformers_model(section)).__name__ == expected
    assert hugging_face_config(section, VOCABULARY_SIZE)["architectures"] == [expected]


@all_families
def test_logits_of_loaded_weights_equal_transformers_own(changes, tmp_path):
    section = section_of(changes)
    reference = saved(section, tmp_path)
    model = Decoder(section, VOCABULARY_SIZE).eval()
    load_hugging_face(model, tmp_path)
    expected = reference(tokens()).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=1e-5)


@all_families
def test_transformers_reads_our_weights_with_the_same_logits(changes, tmp_path):
    section = section_of(changes)
    torch.manual_seed(2)
    model = Decoder(section, VOCABULARY_SIZE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert hugging_face_tensors(section, VOCABULARY_SIZE).keys() == dict(model.named_parameters()).keys()
    save_file(hugging_face_state(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(section, VOCABULARY_SIZE)))
    reference, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(reference.eval()(tokens()).logits, model(tokens()), rtol=0, atol=1e-5)


@all_families
def test_weights_make_the_round_trip_bit_for_bit(changes, tmp_path):
    section = section_of(changes)
    saved(section, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = Decoder(section, VOCABULARY_SIZE)
    load_hugging_face(model, tmp_path)
    parameters = dict(model.named_parameters())
    pieces = hugging_face_tensors(section, VOCABULARY_SIZE)
    back = {piece.name: to_hugging_face(parameters[name], piece) for name in pieces for piece in pieces[name]}
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(back[name], tensor), name
    for name, parameter in parameters.items():
        assert torch.equal(from_hugging_face(pieces[name], stored.__getitem__, parameter.shape), parameter)


@all_families
def test_a_section_makes_the_round_trip(changes):
    section = section_of(changes)
    found = section_from_hugging_face(hugging_face_config(section, VOCABULARY_SIZE))
    for name in ("family", "num_layers", "hidden_size", "num_heads", "key_value_heads", "inner_size", "max_positions"):
        assert getattr(found, name) == getattr(section, name)
    for name in ("tie_embeddings", "norm_epsilon", "initializer_range", "rope_theta"):
        assert getattr(found, name) == getattr(section, name)


def test_config_files_of_both_generations_give_the_rotary_base():
    config = hugging_face_config(section_of(FAMILIES["llama"]), VOCABULARY_SIZE)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    newer = {key: value for key, value in config.items() if key != "rope_theta"}
    assert section_from_hugging_face(older).rope_theta == section_from_hugging_face(newer).rope_theta == 500.0


def test_a_folder_of_several_files_is_read(tmp_path):
    section = section_of(FAMILIES["gpt2"])
    reference = saved(section, tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    model = Decoder(section, VOCABULARY_SIZE).eval()
    load_hugging_face(model, tmp_path)
    torch.testing.assert_close(model(tokens()), reference(tokens()).logits, rtol=0, atol=1e-5)


def test_the_names_and_buffers_of_the_first_gpt2_folders_are_understood(tmp_path):
    section = section_of(FAMILIES["gpt2"])
    reference = saved(section, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(stored, tmp_path / "model.safetensors")
    model = Decoder(section, VOCABULARY_SIZE).eval()
    load_hugging_face(model, tmp_path)
    torch.testing.assert_close(model(tokens()), reference(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "type 'llama3'; the native llama"),
        ("llama", {"attention_bias": True}, "attention_bias is True; the native llama has False"),
        ("llama", {"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_key_value_heads 3"),
        ("llama", {"hidden_size": "32"}, "hidden_size: Input should be a valid integer"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'; the native gpt2 has 'gelu_new'"),
        ("gpt2", {"vocab_size": None}, "vocab_size is None; right is a number of tokens"),
        ("gpt2", {"model_type": "opt"}, "model_type is 'opt'; the native ones are gpt2, llama, mixtral"),
    ],
)
def test_a_config_that_the_native_families_cannot_follow_is_refused(family, changes, message):
    config = hugging_face_config(section_of(FAMILIES[family]), VOCABULARY_SIZE)
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        section_from_hugging_face(config | changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "model.num_layers: 3, but the model in "),
        ({"feed_forward_size": 64}, "model.feed_forward_size: 64, but the model in "),
        ({"num_key_value_heads": 4}, "model.num_key_value_heads: 4, but the model in "),
        ({"rope_theta": 10000.0}, "model.rope_theta: 10000.0, but the model in "),
        ({"max_positions": 128}, "model.max_positions: 128, but the model in "),
    ],
)
def test_a_section_of_another_shape_than_the_folder_is_refused_by_its_path(changes, message, tmp_path):
    saved(section_of(FAMILIES["llama"]), tmp_path)
    model = Decoder(section_of(FAMILIES["llama"] | changes), VOCABULARY_SIZE)
    with pytest.raises(UserError) as error:
        load_hugging_face(model, tmp_path)
    assert str(error.value).startswith(message)


def test_another_vocabulary_than_the_folders_is_refused(tmp_path):
    saved(section_of(FAMILIES["gpt2"]), tmp_path)
    with pytest.raises(UserError, match=r"the model has 200 tokens, the one in .* 101"):
        load_hugging_face(Decoder(section_of(FAMILIES["gpt2"]), 200), tmp_path)


def test_weights_that_are_missing_left_over_or_misshaped_are_refused_by_name(tmp_path):
    section = section_of(FAMILIES["gpt2"])
    saved(section, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.bias"
    for stored, message in (
        ({key: value for key, value in whole.items() if key != name}, f"lacks '{name}', one of 1"),
        (whole | {"transformer.h.7.ln_1.bias": torch.zeros(32)}, "holds 'transformer.h.7.ln_1.bias', one of 1"),
        (whole | {name: torch.zeros(47)}, rf"tensor '{name}' is \(47,\), the model needs \(48,\)"),
    ):
        save_file(stored, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_hugging_face(Decoder(section, VOCABULARY_SIZE), tmp_path)


def test_a_folder_without_readable_safetensors_is_refused(tmp_path):
    section = section_of(FAMILIES["gpt2"])
    saved(section, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: is not a safetensors file"):
        load_hugging_face(Decoder(section, VOCABULARY_SIZE), tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors; weights in other formats are not read"):
        load_hugging_face(Decoder(section, VOCABULARY_SIZE), tmp_path)


def test_a_larger_padding_than_the_folders_leaves_the_logits_alone(tmp_path):
    section = section_of(FAMILIES["llama"])
    reference = saved(section, tmp_path)
    model = Decoder(section_of(FAMILIES["llama"] | {"vocabulary_multiple": 512}), VOCABULARY_SIZE).eval()
    load_hugging_face(model, tmp_path)
    assert len(model.head.weight) == 512
    torch.testing.assert_close(model(tokens()), reference(tokens()).logits, rtol=0, atol=1e-5)


def test_a_change_of_the_config_alone_is_noticed(tmp_path):
    section = section_of(FAMILIES["gpt2"])
    saved(section, tmp_path)
    change_config(tmp_path, n_head=8)
    with pytest.raises(UserError, match=r"model\.num_heads: 4, but the model in .* has 8"):
        load_hugging_face(Decoder(section, VOCABULARY_SIZE), tmp_path)
