"""The encoder-decoder against transformers' Marian, BART and mBART, both ways."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bigbatch.launcher.predict import count_parameters
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import Seq2SeqSection
from bigbatch.recipes.core.models.seq2seq import (
    Seq2Seq,
    hugging_face_config,
    hugging_face_state,
    load_hugging_face,
    section_from_hugging_face,
)
from bigbatch.recipes.translate.config import TranslateModelSection
from bigbatch.recipes.translate.model import QualityModel

VOCABULARY_SIZE = 101
SHAPE = {"num_encoder_layers": 2, "num_decoder_layers": 3, "hidden_size": 32, "num_heads": 4, "feed_forward_size": 48}
FAMILIES = {
    "marian": {"family": "marian", "activation": "swish"},
    "bart": {"family": "bart", "activation": "gelu", "scale_embeddings": False},
    "mbart": {"family": "mbart", "activation": "relu"},
}
all_families = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES.keys())


def section_of(changes):
    return Seq2SeqSection(**SHAPE, max_positions=24, dropout=0.0, **changes)


def config_of(changes):
    return hugging_face_config(section_of(changes), VOCABULARY_SIZE, begin_of_target=3, end_of_text=2)


def save_theirs(changes, folder):
    """Save transformers' own model with weights in which every tensor shows."""
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(**config_of(changes))
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    return model


def ours_with_numbers(changes):
    torch.manual_seed(2)
    model = Seq2Seq(section_of(changes), VOCABULARY_SIZE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(length, seed):
    return torch.randint(4, VOCABULARY_SIZE, (2, length), generator=torch.Generator().manual_seed(seed))


@all_families
def test_logits_of_loaded_weights_equal_transformers_own(changes, tmp_path):
    theirs = save_theirs(changes, tmp_path)
    model = Seq2Seq(section_of(changes), VOCABULARY_SIZE).eval()
    load_hugging_face(model, tmp_path)
    expected = theirs(input_ids=tokens(24, 1), decoder_input_ids=tokens(17, 2)).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens(24, 1), tokens(17, 2)), expected, rtol=0, atol=1e-5)
    stored = load_file(tmp_path / "model.safetensors")
    back = hugging_face_state(model)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


@all_families
def test_transformers_reads_our_weights_with_the_same_logits(changes, tmp_path):
    model = ours_with_numbers(changes)
    save_file(hugging_face_state(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config_of(changes)))
    theirs, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not loading["unexpected_keys"]
    assert all(name.endswith("embed_positions.weight") for name in loading["missing_keys"])
    expected = theirs.eval()(input_ids=tokens(24, 1), decoder_input_ids=tokens(17, 2)).logits
    torch.testing.assert_close(model(tokens(24, 1), tokens(17, 2)), expected, rtol=0, atol=1e-5)
    assert type(theirs).__name__ == config_of(changes)["architectures"][0]
    assert section_from_hugging_face(config_of(changes)) == section_of(changes)


@all_families
def test_pairs_packed_into_a_row_have_the_logits_and_loss_that_each_has_alone(changes):
    model = ours_with_numbers(changes)
    sources, targets = [tokens(7, 1)[:1], tokens(9, 2)[:1]], [tokens(6, 3)[:1], tokens(11, 4)[:1]]
    pad = torch.zeros(1, 3, dtype=torch.long)
    row, row_targets = torch.cat([*sources, pad], 1), torch.cat([*targets, pad], 1)
    numbers = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 3]), torch.tensor([[0] * 6 + [1] * 11 + [-1] * 3])
    found = model(row, row_targets, documents=numbers[0], target_documents=numbers[1])
    alone = [model(source, target) for source, target in zip(sources, targets, strict=True)]
    torch.testing.assert_close(found[:, :17], torch.cat(alone, 1), rtol=0, atol=1e-5)
    labels = torch.where(numbers[1] < 0, -100, tokens(20, 5)[:1])
    loss = model(row, row_targets, labels, *numbers)
    expected = torch.nn.functional.cross_entropy(found[0], labels[0], reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@all_families
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_target(changes):
    model = ours_with_numbers(changes)
    sources, target = [[5, 6, 7, 8, 9, 10], [50, 60]], tokens(8, 3)
    alone = torch.cat([model(torch.tensor([source]), target[row : row + 1]) for row, source in enumerate(sources)])
    cache = model.open_cache(sources, 8)
    steps = [model.decode(part, cache) for part in target.split([1, 3, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), alone[:, [0, 3, 4, 5, 6, 7]], rtol=0, atol=1e-5)


@all_families
@pytest.mark.parametrize("head", ["translation", "quality"])
def test_parameters_are_counted_as_they_are_built(changes, head):
    model = Seq2Seq(section_of(changes), VOCABULARY_SIZE)
    model = QualityModel(model, 0.0, 1.0) if head == "quality" else model
    section = TranslateModelSection(head=head, shape=section_of(changes))
    assert count_parameters(section, VOCABULARY_SIZE) == sum(parameter.numel() for parameter in model.parameters())


def test_smoothed_labels_and_recomputed_activations_are_for_training_alone():
    section = section_of(FAMILIES["bart"]).model_copy(update={"recompute_activations": True})
    torch.manual_seed(1)
    model = Seq2Seq(section, VOCABULARY_SIZE, label_smoothing=0.2)
    source, target, labels = tokens(9, 1), tokens(8, 2), tokens(8, 3)
    logits = model(source, target).flatten(0, 1)
    for is_training, smoothing in ((True, 0.2), (False, 0.0)):
        model.train(is_training)
        expected = torch.nn.functional.cross_entropy(
            logits, labels.flatten(), reduction="sum", label_smoothing=smoothing
        )
        torch.testing.assert_close(model(source, target, labels), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'; the native ones are marian, bart, mbart"),
        ({"decoder_ffn_dim": 64}, "decoder_ffn_dim is 64; the native bart has 48"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings is False; the native bart"),
        ({"activation_function": "tanh"}, "activation_function: Input should be 'relu', 'gelu' or 'swish'"),
    ],
)
def test_a_config_that_the_native_families_cannot_follow_is_refused(changes, message):
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        section_from_hugging_face(config_of(FAMILIES["bart"]) | changes)
    assert message in str(error.value)


def test_a_folder_of_another_shape_and_a_text_too_long_are_refused(tmp_path):
    save_theirs(FAMILIES["bart"], tmp_path)
    other = section_of(FAMILIES["bart"]).model_copy(update={"feed_forward_size": 64})
    with pytest.raises(UserError, match=r"^model\.shape\.feed_forward_size: 64, but .* has 48"):
        load_hugging_face(Seq2Seq(other, VOCABULARY_SIZE), tmp_path)
    with pytest.raises(UserError, match=r"the model has 99 tokens, the one in .* 101"):
        load_hugging_face(Seq2Seq(section_of(FAMILIES["bart"]), 99), tmp_path)
    with pytest.raises(UserError, match="24, but a target has 25 tokens"):
        Seq2Seq(other, VOCABULARY_SIZE)(tokens(3, 1), tokens(25, 1))
