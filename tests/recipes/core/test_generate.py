import json

import numpy as np
import pytest
import torch
import transformers

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Completion, Sampling, choose, generate, load_model, stream
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder, hugging_face_config, hugging_face_state
from bigbatch.recipes.core.tensor_file import Entry, write_tensors

VOCABULARY_SIZE = 101
PROMPTS = [[5, 6, 7, 8, 9], [3], [50, 60, 70, 80, 90, 100, 1, 2, 3, 4, 5, 6]]
both_families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def model_of(family, max_positions=64):
    torch.manual_seed(11)
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_key_value_heads": 2 if family == "llama" else None,
    }
    # Untied: a tied random model says one token over and over, which many a wrong cache would do too.
    shape |= {"max_positions": max_positions, "initializer_range": 0.2, "tie_embeddings": False}
    section = DecoderSection(family=family, **shape)
    return Decoder(section, VOCABULARY_SIZE)


def transformers_model(model):
    config = hugging_face_config(model.section, VOCABULARY_SIZE)
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    twin.load_state_dict(hugging_face_state(model), strict=False)
    return twin.eval()


def greedy(**changes):
    return Sampling(**({"temperature": 0.0, "max_new_tokens": 40} | changes))


@both_families
def test_greedy_text_equals_transformers_token_for_token(family):
    model = model_of(family)
    twin = transformers_model(model)
    for prompt in PROMPTS:
        expected = twin.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
        )
        ((found,),) = generate(model, [prompt], greedy())
        assert found == Completion(expected[0, len(prompt) :].tolist(), "length")
        assert len(set(found.tokens)) > 5


@both_families
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_different_lengths_go_on_as_each_would_alone(family, temperature):
    model = model_of(family)
    sampling = Sampling(temperature=temperature, max_new_tokens=30, seed=4, num_samples=2)
    together = generate(model, PROMPTS, sampling)
    assert together == [generate(model, [prompt], sampling)[0] for prompt in PROMPTS]


@both_families
def test_a_row_goes_on_to_its_own_last_position_beside_longer_ones(family):
    model = model_of(family, max_positions=16)
    completions = generate(model, PROMPTS, greedy(max_new_tokens=14))
    assert [(len(row.tokens), row.stopped) for (row,) in completions] == [
        (11, "context"),
        (14, "length"),
        (4, "context"),
    ]
    assert completions == [generate(model, [prompt], greedy(max_new_tokens=14))[0] for prompt in PROMPTS]


def test_text_ends_before_a_stop_token_and_the_other_rows_go_on():
    model = model_of("gpt2")
    free = [row.tokens for (row,) in generate(model, PROMPTS, greedy())]
    stop = free[0][10]
    cut = [row for (row,) in generate(model, PROMPTS, greedy(stop_tokens=(stop, VOCABULARY_SIZE + 5)))]
    for whole, row in zip(free, cut, strict=True):
        ends = stop in whole
        assert row == Completion(whole[: whole.index(stop)] if ends else whole, "end" if ends else "length")
    assert len(cut[0].tokens) <= 10


def test_the_stream_yields_a_token_a_step_and_none_behind_the_end():
    model = model_of("llama")
    ((whole,),) = generate(model, PROMPTS[:1], greedy(max_new_tokens=8))
    steps = list(stream(model, PROMPTS[:1], greedy(max_new_tokens=8)))
    assert steps == [[token] for token in whole.tokens]
    both = list(stream(model, PROMPTS[:2], greedy(max_new_tokens=8, stop_tokens=(whole.tokens[3],))))
    first = whole.tokens.index(whole.tokens[3])
    assert [step[0] for step in both] == whole.tokens[:first] + [None] * (len(both) - first)


def test_the_same_seed_gives_the_same_text_and_another_another():
    model = model_of("gpt2")
    draw = [generate(model, PROMPTS, Sampling(temperature=1.0, seed=seed, num_samples=3)) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    assert len({tuple(row.tokens) for row in draw[0][0]}) == 3


def test_the_models_mode_and_its_gradients_are_left_alone():
    model = model_of("gpt2").train()
    generate(model, PROMPTS, greedy())
    assert model.training
    next(stream(model, PROMPTS, greedy()))
    assert model.training  # the abandoned stream is closed
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def shares(logits, sampling, draws=20_000):
    uniforms = (np.arange(draws) + 0.5) / draws
    tokens = choose(torch.tensor(logits).repeat(draws, 1), sampling, uniforms)
    return torch.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.6), (0.7, 4, 0.9), (1.0, 0, 0.0)],
)
def test_tokens_are_drawn_in_transformers_proportions(temperature, top_k, top_p):
    logits = [0.3, 2.0, -1.0, 1.1, 0.0, 1.5]
    scores = torch.tensor([logits])
    scores = transformers.TemperatureLogitsWarper(temperature)(None, scores) if temperature != 1 else scores
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    found = shares(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(found, scores.softmax(-1)[0], rtol=0, atol=2e-4)


def test_temperature_zero_takes_the_likeliest():
    assert shares([0.3, 2.0, -1.0], Sampling(temperature=0), draws=10)[1] == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt: is empty"), ([1] * 64, "prompt: has 64 tokens; the model has 64 positions, one must be free")],
)
def test_a_prompt_that_leaves_no_room_is_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        generate(model_of("gpt2"), [prompt], greedy())


def test_no_prompts_give_no_text():
    assert generate(model_of("gpt2"), [], greedy()) == []


def test_bfloat16_text_comes_from_the_same_cache():
    model = model_of("llama").bfloat16()
    assert all(len(row.tokens) == 40 for (row,) in generate(model, PROMPTS, greedy()))


@both_families
def test_a_hugging_face_folder_is_opened(family, tmp_path):
    model = model_of(family)
    transformers_model(model).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.section.family == family
    assert loaded.tokenizer is None
    assert generate(loaded.model, PROMPTS, greedy()) == generate(model, PROMPTS, greedy())


def saved_run(folder, decoder, **changes):
    """Write a run folder with one checkpoint, in the checkpoint's own format."""
    step = checkpoint.checkpoint_dir(folder, 30)
    step.mkdir(parents=True)
    parameters = {name: parameter.detach().flatten() for name, parameter in decoder.named_parameters()}
    entries = [Entry(f"master/{name}", flat.dtype, tuple(flat.shape)) for name, flat in parameters.items()]
    shard = write_tensors(step / "rank_00000.safetensors", entries, parameters.values())
    pieces = [
        [name, list(parameter.shape), [shard["name"], "master", 0, parameter.numel()]]
        for name, parameter in decoder.named_parameters()
    ]
    (step / "rank_00000.json").write_text(json.dumps({"file": shard, "pieces": pieces}))
    run = {"recipe": "gpt", "model": decoder.section.model_dump(mode="json")} | changes
    facts = {"vocabulary_size": VOCABULARY_SIZE, "tokenizer": str(folder / "tokenizer")}
    checkpoint._commit(step, 1, {"step": 30, "run": run, "facts": facts})
    (folder / "run.json").write_text(json.dumps(run))
    return step


def test_a_run_folder_and_a_checkpoint_are_opened(tmp_path):
    model = model_of("gpt2")
    step = saved_run(tmp_path, model)
    expected = generate(model, PROMPTS, greedy())
    for path in (tmp_path, step):
        loaded = load_model(path)
        assert generate(loaded.model, PROMPTS, greedy()) == expected
        assert loaded.document["recipe"] == "gpt"


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    step = saved_run(tmp_path, model_of("gpt2"))
    shard = step / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 16
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"rank_00000\.safetensors does not match its hash"):
        load_model(step)
    with pytest.raises(UserError, match="no checkpoint that verifies"):
        load_model(tmp_path)


def test_what_holds_no_decoder_is_refused_by_its_path(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: there is no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no run\.json, no manifest\.json and no config\.json"):
        load_model(tmp_path)
    saved_run(tmp_path, model_of("gpt2"), recipe="classify", model={})
    with pytest.raises(UserError, match="is a model of the recipe 'classify', which generates no text"):
        load_model(tmp_path)
