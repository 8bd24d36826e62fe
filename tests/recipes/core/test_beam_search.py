"""Beam search against transformers' own generate, and sampling with an encoder-decoder."""

import pytest
import torch
import transformers

from bigbatch.recipes.core.beam_search import Search, beam_search
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.recipes.core.models import decoder, seq2seq
from bigbatch.recipes.core.models.config import DecoderSection, Seq2SeqSection

VOCABULARY_SIZE, START, END = 61, 3, 2
SOURCES = [[5, 6, 7, 8, 9, 10, 11], [50, 51], [20, 30, 40, 20, 30, 40, 20, 30, 40, 4], [60]]
SETTINGS = {
    "wide": {"num_beams": 5},
    "short texts": {"num_beams": 4, "length_penalty": 0.0},
    "long texts": {"num_beams": 4, "length_penalty": 2.5},
    "penalized": {"num_beams": 3, "length_penalty": -1.0},
    "first to end": {"num_beams": 4, "length_penalty": 1.5, "early_stopping": True},
    "no repeats": {"num_beams": 4, "no_repeat_tokens": 2, "min_new_tokens": 6, "forbidden_tokens": (7,)},
    "greedy": {"num_beams": 1},
}
THEIRS = {"no_repeat_tokens": "no_repeat_ngram_size", "min_new_tokens": "min_new_tokens"}


@pytest.fixture(scope="module")
def writer():
    """Return an encoder-decoder that ends texts after a few tokens, and transformers' twin."""
    shape = {"num_encoder_layers": 2, "num_decoder_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32}
    section = Seq2SeqSection(family="bart", **shape, initializer_range=0.25, scale_embeddings=False)
    torch.manual_seed(4)
    model = seq2seq.Seq2Seq(section, VOCABULARY_SIZE)
    with torch.no_grad():
        model.head.bias[:VOCABULARY_SIZE].normal_()
        model.head.bias[END] = 3.5
    config = seq2seq.hugging_face_config(section, VOCABULARY_SIZE, START, END)
    twin = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**config))
    twin.load_state_dict(seq2seq.hugging_face_state(model), strict=False)
    return model, twin.eval()


@pytest.fixture(scope="module")
def decoding():
    """Return a decoder, and transformers' twin."""
    section = DecoderSection(
        num_layers=2, hidden_size=32, num_heads=4, max_positions=32, initializer_range=0.25, tie_embeddings=False
    )
    torch.manual_seed(8)
    model = decoder.Decoder(section, VOCABULARY_SIZE)
    with torch.no_grad():
        model.head.weight[END] += 0.15
    config = decoder.hugging_face_config(section, VOCABULARY_SIZE)
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    twin.load_state_dict(decoder.hugging_face_state(model), strict=False)
    return model, twin.eval()


def expected(twin, settings, count, **inputs):
    """Return texts and scores that transformers finds."""
    options = {THEIRS.get(name, name): value for name, value in settings.items() if name != "forbidden_tokens"}
    if "forbidden_tokens" in settings:
        options["bad_words_ids"] = [[token] for token in settings["forbidden_tokens"]]
    out = twin.generate(
        **inputs, **options, max_new_tokens=12, num_return_sequences=count, do_sample=False, eos_token_id=END,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    scores = None if settings["num_beams"] == 1 else out.sequences_scores.tolist()
    return out.sequences.tolist(), scores


def until_the_end(tokens):
    return tokens[: tokens.index(END)] if END in tokens else tokens


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_texts_and_scores_of_an_encoder_decoder_are_those_of_transformers(writer, settings):
    model, twin = writer
    count = settings["num_beams"]
    search = Search(max_new_tokens=12, stop_tokens=(END,), **settings)
    together = beam_search(model, [[START]] * len(SOURCES), search, SOURCES, num_texts=count)
    lengths = set()
    for source, found in zip(SOURCES, together, strict=True):
        texts, scores = expected(twin, settings, count, input_ids=torch.tensor([source]))
        assert [one.tokens for one in found] == [until_the_end(text[1:]) for text in texts]
        if scores:
            assert [one.score for one in found] == pytest.approx(scores, rel=1e-6, abs=1e-5)
        lengths.update(len(one.tokens) for one in found)
    assert len(lengths) > 1


@pytest.mark.parametrize("name", ["wide", "long texts", "no repeats"])
def test_texts_of_a_decoder_are_those_of_transformers(decoding, name):
    model, twin = decoding
    search = Search(max_new_tokens=12, stop_tokens=(END,), **SETTINGS[name])
    together = beam_search(model, SOURCES, search)
    for prompt, (found,) in zip(SOURCES, together, strict=True):
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
        ((text,), (score,)) = expected(twin, SETTINGS[name], 1, **inputs)
        assert found.tokens == until_the_end(text[len(prompt) :])
        assert found.score == pytest.approx(score, abs=1e-5)


def test_greedy_and_drawn_texts_of_an_encoder_decoder_do_not_depend_on_the_batch(writer):
    model, _ = writer
    starts = [[START]] * len(SOURCES)
    greedy = Sampling(temperature=0.0, max_new_tokens=12, stop_tokens=(END,))
    found = [row.tokens for (row,) in generate(model, starts, greedy, SOURCES)]
    beams = beam_search(model, starts, Search(1, 12, stop_tokens=(END,)), SOURCES)
    assert found == [one.tokens for (one,) in beams]
    drawn = Sampling(temperature=1.0, max_new_tokens=12, num_samples=3, seed=2)
    together = generate(model, starts, drawn, SOURCES)
    assert together == [generate(model, [[START]], drawn, [source])[0] for source in SOURCES]
    assert len({tuple(row.tokens) for rows in together for row in rows}) > len(SOURCES)


def test_what_cannot_be_gone_on_from_is_refused(writer, decoding):
    with pytest.raises(UserError, match="source: is missing or empty"):
        beam_search(writer[0], [[START]], Search(), [[]])
    with pytest.raises(UserError, match="prompt: found 32 to 32 tokens; right is one or more, and less than 32"):
        beam_search(decoding[0], [[5] * 32], Search())
    assert beam_search(decoding[0], [], Search()) == []
