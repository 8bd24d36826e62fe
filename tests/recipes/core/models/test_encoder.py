import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import (
    Encoder,
    MaskedLanguageModel,
    Pooler,
    encoder_tensors,
    hugging_face_config,
    hugging_face_state,
    hugging_face_tensors,
    load_encoder,
    load_hugging_face,
    pooler_tensors,
    section_from_hugging_face,
)

VOCABULARY_SIZE = 101  # no multiple of anything: the embedding is padded to 128
FORMS = [{"norm": norm, "positions": positions} for norm in ("post", "pre") for positions in ("absolute", "rotary")]
all_forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))


def section_of(**changes):
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 24, "dropout": 0.0}
    return EncoderSection(**(shape | changes))


def model_of(**changes):
    torch.manual_seed(7)
    model = MaskedLanguageModel(section_of(**changes), VOCABULARY_SIZE)
    with torch.no_grad():  # larger than at the start of training, so that every part shows in the result
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name or "bias" in name else 0.1))
    return model


def tokens_of(num_rows=3, length=24):
    return torch.randint(0, VOCABULARY_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(3))


def targets_of(num_rows=3):
    targets = torch.tensor([[0, 5, 23, 7], [1, 2, 3, 0], [20, 4, 9, 11]])[:num_rows]
    labels = torch.tensor([[4, 100, 0, 8], [7, 7, 1, -100], [2, 55, 60, -100]])[:num_rows]
    return targets, labels


@all_forms
def test_the_loss_is_the_summed_cross_entropy_of_the_logits_at_the_targets(form):
    model, tokens, (targets, labels) = model_of(**form), tokens_of(), targets_of()
    logits = model(tokens)
    assert logits.shape == (3, 24, VOCABULARY_SIZE)
    chosen = torch.stack([row[places] for row, places in zip(logits, targets, strict=True)])
    torch.testing.assert_close(model(tokens, targets), chosen)
    expected = F.cross_entropy(chosen.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets, labels), expected)


@all_forms
def test_gradients_of_the_loss_equal_those_through_plain_logits(form):
    model, tokens, (targets, labels) = model_of(**form), tokens_of(), targets_of()
    F.cross_entropy(model(tokens, targets).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(tokens, targets, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@all_forms
def test_packed_documents_give_the_logits_that_each_has_alone(form):
    model, tokens = model_of(**form), tokens_of(num_rows=1)
    documents = torch.tensor([[4] * 9 + [5] * 1 + [6] * 14], dtype=torch.int32)
    packed = model(tokens, documents=documents)
    alone = torch.cat([model(part) for part in tokens.split((9, 1, 14), dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=5e-6)
    positions = torch.tensor([[*range(9), 0, *range(14)]])
    torch.testing.assert_close(model(tokens, documents=documents, positions=positions), packed, rtol=0, atol=0)
    assert not torch.allclose(model(tokens), alone, atol=1e-2)


@all_forms
def test_a_token_sees_both_directions_its_place_and_its_segment(form):
    model, tokens = model_of(**form), tokens_of(num_rows=1)
    for place in (0, 23):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 1) % VOCABULARY_SIZE
        assert not torch.allclose(model(tokens)[0, 12], model(other)[0, 12], atol=1e-3)
    swapped = tokens[:, [0, 2, 1, *range(3, 24)]]
    assert not torch.allclose(model(tokens)[0, 12], model(swapped)[0, 12], atol=1e-3)
    segments = (torch.arange(24) > 10).long().unsqueeze(0)
    assert not torch.allclose(model(tokens), model(tokens, segments=segments), atol=1e-2)


@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_training_gradients_are_near_those_in_float32(packed):
    tokens, (targets, labels) = tokens_of(), targets_of()
    documents = (torch.arange(24) // 7).int().expand(3, 24) if packed else None
    exact, rounded = model_of(), model_of().bfloat16()
    exact(tokens, targets, labels, documents=documents).backward()
    rounded(tokens, targets, labels, documents=documents).backward()
    for (name, reference), parameter in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        difference = (parameter.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert difference < 0.05, (name, difference)


@all_forms
def test_recomputing_activations_changes_no_gradient_even_with_dropout(form):
    gradients = []
    for recompute in (False, True):
        model = model_of(recompute_activations=recompute, dropout=0.1, **form)
        torch.manual_seed(1)
        model(tokens_of(), *targets_of()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient():
    model, tokens = model_of(), tokens_of()
    before = model(tokens, *targets_of())
    before.backward()
    assert not model.head.weight.grad[VOCABULARY_SIZE:].any()
    assert not model.head.bias.grad[VOCABULARY_SIZE:].any()
    with torch.no_grad():
        model.head.bias[VOCABULARY_SIZE:] = 10.0
    assert model(tokens, *targets_of()) == before


def test_a_sequence_longer_than_the_positions_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"model\.max_positions: 24, but a sequence has 25 tokens"):
        model_of()(tokens_of(length=25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"positions": "rotary", "hidden_size": 12}, "heads of an even size, not 12 / 4"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_with_its_numbers(changes, message):
    with pytest.raises(ValidationError, match=message):
        section_of(**changes)


# ------------------------------------------------------------------------------------ transformers' BERT


def saved(folder, kind=transformers.BertForMaskedLM, **changes):
    """Let transformers build and save its own model, with weights in which every tensor shows."""
    torch.manual_seed(5)
    config = hugging_face_config(section_of(**changes), VOCABULARY_SIZE)
    model = kind(transformers.AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def test_logits_of_loaded_weights_equal_transformers_own(tmp_path):
    reference = saved(tmp_path, feed_forward_size=48, norm_epsilon=1e-6)
    model = MaskedLanguageModel(section_of(feed_forward_size=48, norm_epsilon=1e-6), VOCABULARY_SIZE).eval()
    load_hugging_face(model, tmp_path)
    segments = (torch.arange(24) > 10).long().expand(3, 24)
    expected = reference(input_ids=tokens_of(), token_type_ids=segments).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model(tokens_of(), segments=segments), expected, rtol=0, atol=1e-5)


def test_transformers_reads_our_weights_with_the_same_logits(tmp_path):
    model = model_of().eval()
    table = hugging_face_tensors(model.section, VOCABULARY_SIZE)
    assert table.keys() == dict(model.named_parameters()).keys()
    save_file(hugging_face_state(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(model.section, VOCABULARY_SIZE)))
    reference, loading = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(reference.eval()(tokens_of()).logits, model(tokens_of()), rtol=0, atol=1e-5)


def test_weights_make_the_round_trip_bit_for_bit(tmp_path):
    saved(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = MaskedLanguageModel(section_of(), VOCABULARY_SIZE)
    load_hugging_face(model, tmp_path)
    back = hugging_face_state(model)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(back[name], tensor), name


def test_a_folder_of_berts_first_release_is_read(tmp_path):
    reference = saved(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored.items()
    }
    stored["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    stored["cls.seq_relationship.bias"] = torch.zeros(2)
    save_file(stored, tmp_path / "model.safetensors")
    model = MaskedLanguageModel(section_of(), VOCABULARY_SIZE).eval()
    load_hugging_face(model, tmp_path)
    torch.testing.assert_close(model(tokens_of()), reference(tokens_of()).logits, rtol=0, atol=1e-5)


def test_both_heads_of_pretraining_equal_transformers_own_and_make_the_round_trip(tmp_path):
    reference = saved(tmp_path, transformers.BertForPreTraining)
    model = MaskedLanguageModel(section_of(), VOCABULARY_SIZE, has_pairs=True).eval()
    load_hugging_face(model, tmp_path)
    segments, padding = (torch.arange(24) > 10).long().expand(3, 24), (torch.arange(24) > 20).int().expand(3, 24)
    expected = reference(input_ids=tokens_of(), token_type_ids=segments, attention_mask=1 - padding)
    logits, pairs = model(tokens_of(), documents=padding, segments=segments, with_pairs=True)
    assert expected.seq_relationship_logits.std() > 0.1
    torch.testing.assert_close(logits[:, :21], expected.prediction_logits[:, :21], rtol=0, atol=1e-5)
    torch.testing.assert_close(pairs, expected.seq_relationship_logits, rtol=0, atol=1e-5)
    stored, back = load_file(tmp_path / "model.safetensors"), hugging_face_state(model)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(back[name], tensor), name


def test_a_folder_without_the_pair_head_does_not_start_a_model_with_one(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match=r"lacks 'bert\.pooler\.dense\.bias', one of 4 tensors that the model needs"):
        load_hugging_face(MaskedLanguageModel(section_of(), VOCABULARY_SIZE, has_pairs=True), tmp_path)


def test_a_section_makes_the_round_trip():
    section = section_of(feed_forward_size=48, num_segments=3, norm_epsilon=1e-6, dropout=0.3)
    assert section_from_hugging_face(hugging_face_config(section, VOCABULARY_SIZE)) == section.model_copy(
        update={"vocabulary_multiple": 64}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "pre"}, "model.norm: is 'pre'; transformers' BERT has only 'post'"),
        ({"positions": "rotary"}, "model.positions: is 'rotary'; transformers' BERT has only 'absolute'"),
    ],
)
def test_a_form_that_transformers_does_not_have_is_not_exported(changes, message):
    with pytest.raises(UserError) as error:
        hugging_face_config(section_of(**changes), VOCABULARY_SIZE)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; the native BERT has 'gelu'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'; the native BERT has 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"vocab_size": None}, "vocab_size is None; right is a number of tokens"),
        ({"num_attention_heads": 3}, "hidden_size 32 is not a multiple of num_heads 3"),
        ({"hidden_size": "32"}, "hidden_size: Input should be a valid integer"),
    ],
)
def test_a_config_that_the_native_encoder_cannot_follow_is_refused(changes, message):
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        section_from_hugging_face(hugging_face_config(section_of(), VOCABULARY_SIZE) | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "model.num_layers: 3, but the model in "),
        ({"feed_forward_size": 64}, "model.feed_forward_size: 64, but the model in "),
        ({"norm": "pre"}, "model.norm: pre, but the model in "),
        ({"positions": "rotary"}, "model.positions: rotary, but the model in "),
    ],
)
def test_a_section_of_another_shape_than_the_folder_is_refused_by_its_path(changes, message, tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError) as error:
        load_hugging_face(MaskedLanguageModel(section_of(**changes), VOCABULARY_SIZE), tmp_path)
    assert str(error.value).startswith(message)


def test_another_vocabulary_than_the_folders_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer has 100 tokens, the model in .* 101"):
        load_hugging_face(MaskedLanguageModel(section_of(), 100), tmp_path)


# ------------------------------------------------------------------------------------ the encoder by itself


def loaded_from(folder, **changes):
    """Return an encoder and a pooler with a folder's weights, and whether it had some for the pooler."""
    section = section_of(**changes)
    encoder, pooler = Encoder(section, VOCABULARY_SIZE).eval(), Pooler(section)
    return encoder, pooler, load_encoder(encoder, folder, VOCABULARY_SIZE, pooler)


def test_pooled_output_and_logits_equal_transformers_own_whatever_the_padding(tmp_path):
    reference = saved(tmp_path, transformers.BertForSequenceClassification)
    encoder, pooler, has_pooler = loaded_from(tmp_path)
    assert has_pooler
    useful = torch.arange(24) < torch.tensor([[24], [9], [1]])
    expected = reference.bert(input_ids=tokens_of(), attention_mask=useful.long()).pooler_output
    assert expected.std() > 0.3
    pooled = pooler(encoder(tokens_of(), documents=(~useful).int())[:, 0])
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    head = torch.nn.Linear(32, 2)
    head.load_state_dict(reference.classifier.state_dict())
    logits = reference(input_ids=tokens_of(), attention_mask=useful.long()).logits
    torch.testing.assert_close(head(pooled), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first_names", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertModel", True),
        ("BertForMaskedLM", False),
        ("BertForSequenceClassification", True),
        ("BertForPreTraining", True),
        ("BertForTokenClassification", False),
    ],
)
def test_an_encoder_is_read_from_the_folder_of_any_bert(name, expected, first_names, tmp_path):
    reference = saved(tmp_path, getattr(transformers, name))
    if first_names:
        stored = load_file(tmp_path / "model.safetensors")
        for ours, theirs in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            stored = {key.replace(ours, theirs): tensor for key, tensor in stored.items()}
        save_file(stored, tmp_path / "model.safetensors")
    encoder, pooler, has_pooler = loaded_from(tmp_path)
    assert has_pooler == expected
    base = getattr(reference, "bert", reference)
    states = base(input_ids=tokens_of()).last_hidden_state
    torch.testing.assert_close(encoder(tokens_of()), states, rtol=0, atol=1e-5)
    if expected:
        torch.testing.assert_close(pooler(states[:, 0]), base.pooler(states), rtol=0, atol=1e-6)
        alone = Encoder(section_of(), VOCABULARY_SIZE).eval()
        assert load_encoder(alone, tmp_path, VOCABULARY_SIZE)  # the pooler is told of, and stays unread
        torch.testing.assert_close(alone(tokens_of()), states, rtol=0, atol=1e-5)


def test_the_pooler_and_the_encoder_make_the_round_trip_bit_for_bit(tmp_path):
    stored = saved(tmp_path, transformers.BertModel).state_dict()
    encoder, pooler, _ = loaded_from(tmp_path)
    table = encoder_tensors(encoder.section, VOCABULARY_SIZE) | pooler_tensors(encoder.section)
    parameters = dict(encoder.named_parameters()) | dict(pooler.named_parameters())
    assert table.keys() == parameters.keys()
    back = {
        piece.name: parameters[name][piece.start : piece.stop] for name, pieces in table.items() for piece in pieces
    }
    assert back.keys() == {f"bert.{name}" for name in stored if not name.endswith("_ids")}
    for name, tensor in back.items():
        assert torch.equal(tensor, stored[name.removeprefix("bert.")]), name


def test_an_encoder_of_another_shape_or_vocabulary_than_the_folder_is_refused(tmp_path):
    saved(tmp_path, transformers.BertModel)
    with pytest.raises(UserError, match=r"^model\.num_layers: 3, but the model in .* has 2$"):
        loaded_from(tmp_path, num_layers=3)
    with pytest.raises(UserError, match=r"^model\.initialize_from: the tokenizer has 100 tokens, the model in .* 101$"):
        load_encoder(Encoder(section_of(), 100), tmp_path, 100)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["encoder.layer.1.output.dense.bias"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 'encoder\.layer\.1\.output\.dense\.bias', one of 1 tensors"):
        loaded_from(tmp_path)
