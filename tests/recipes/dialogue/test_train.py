"""Chat fine-tuning under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/dialogue.json anew; say in the change why the losses differ.
"""

import json
import math
import re

import numpy as np
import pytest
import sacrebleu
import torch
import transformers
from trained_runs import EVERY_PLAN, RANKS, STAGES, STEPS, Plans, losses, plain_steps, rows

from bigbatch.launcher.preflight import check_run, has_errors
from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.dialogue import recipe
from bigbatch.recipes.dialogue.config import DialogueConfig
from bigbatch.recipes.dialogue.data import Reply
from bigbatch.recipes.dialogue.scores import distinct, most_similar_replies, reply_figures
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict

SEED = 3
TEA = [{"role": "user", "content": "How much is the tea on Monday?"}]


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("dialogue")
    plans = Plans(out)
    plans.add("plain", make_document(out), *EVERY_PLAN)
    plans.add("resumed", make_document(out, model={"dropout": 0.1}), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, model={"dropout": 0.1}), (2, 3, None))
    plans.add(
        "learning", make_document(out, schedule={"total_steps": 150}, evaluate={"every_steps": 150}), (1, 1, None)
    )
    return plans.train(run_program)


def config_of(run_dir):
    return DialogueConfig.model_validate_json((run_dir / "run.json").read_text())


@pytest.fixture(scope="module")
def learned(trained):
    """Return configuration, data and model of the run that has learned its dialogues."""
    config = config_of(trained / "learning_1_1")
    data = recipe.open_data(config)
    model = recipe.build_model(config, data.facts, initialize=False)
    checkpoint.load_weights(trained / "learning_1_1", model)
    return config, data, model.eval()


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    """Return the folder that the run becomes."""
    out = tmp_path_factory.mktemp("converted") / "model"
    parity = convert(trained / "learning_1_1", out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    return out


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    return kept_golden("dialogue", lambda: {"llama": losses(trained, "plain", 1, 0)})["llama"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"plain_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "plain", ranks, stage) == pytest.approx(golden, rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


def reply_losses(model, tokenizer, messages):
    """Sum the loss of transformers' model on the replies of one dialogue, found message by message."""
    text = tokenizer.apply_chat_template(messages, return_dict=False)
    labels = [-100] * len(text)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            first = len(tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=False))
            end = text.index(tokenizer.eos_token_id, first) + 1
            labels[first:end] = text[first:end]
    count = sum(label != -100 for label in labels)
    return model(input_ids=torch.tensor([text]), labels=torch.tensor([labels])).loss * count, count


def test_transformers_own_model_takes_the_same_steps_on_single_dialogues(trained, golden):
    """Train LlamaForCausalLM from the same first weights on the replies of the same dialogues, one at a time."""
    config = config_of(trained / "plain_1_0")
    data = recipe.open_data(config)
    torch.manual_seed(SEED)
    model = recipe.build_model(config, data.facts)
    export = recipe.hugging_face(config, data.facts)
    theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.for_model(**export.config))
    parameters = dict(model.named_parameters())
    state = {
        p.name: parameters[name].detach()[p.start : p.stop] for name, found in export.tensors.items() for p in found
    }
    theirs.load_state_dict(state, strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(data.facts["tokenizer"])

    def losses_of(order):
        windows = np.array([window for sample in order.ids for window in data.train.rows[sample]])
        dialogues = map(json.loads, data.train.examples.texts("messages", windows))
        sums, counts = zip(*(reply_losses(theirs, tokenizer, messages) for messages in dialogues), strict=True)
        yield sum(sums) / sum(counts)

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden, rel=1e-4)
    assert golden[0] == pytest.approx(math.log(data.facts["vocabulary_size"]), abs=0.1)


def test_a_model_that_has_learned_replies_to_questions_in_words_of_its_own(trained, learned):
    config, data, model = learned
    (row,) = rows(trained / "learning_1_1", "evaluation")
    assert row["perplexity"] < 1.5
    (answer,) = recipe.predictor(config, data.facts, model)([{"messages": "How much is the tea today?"}])
    assert answer["stopped"] == "end"
    assert re.fullmatch(r"The \w+ is \w+ euros? today\.", answer["reply"])
    figures = recipe.generated_figures(config, data.facts, model, data.validation)
    assert figures["num_replies"] == data.validation.examples.lengths("firsts").sum()
    assert figures["bleu"] > 40
    assert figures["of_most_similar_dialogue"]["bleu"] > 40  # in a shop the last question says all
    assert figures["of_references"]["bleu"] == pytest.approx(100)


def test_a_dialogue_too_long_loses_its_oldest_turns_and_one_question_too_long_is_refused(learned):
    answers = recipe.predictor(*(learned[0], learned[1].facts, learned[2]))
    turn = [*TEA, {"role": "assistant", "content": "The tea is nine euros."}]
    system = [{"role": "system", "content": "You keep a shop."}]
    (whole, long) = answers([{"messages": system + TEA}, {"messages": system + 4 * turn + TEA}])
    assert "left_out" not in whole
    assert long["left_out"] in (4, 6, 8)
    (same,) = answers([{"messages": system + (4 * turn)[long["left_out"] :] + TEA}])
    assert same["reply"] == long["reply"]
    with pytest.raises(UserError, match=r"messages: has \d+ tokens without any earlier message; there is room for 72"):
        answers([{"messages": "tea " * 100}])


def test_a_converted_run_and_transformers_ask_and_reply_alike(learned, converted, capsys):
    config, data, model = learned
    theirs = transformers.AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    messages = [
        {"role": "system", "content": " You keep a shop.\n"},
        *TEA,
        {"role": "assistant", "content": "It’s 9."},
        *TEA,
    ]
    request = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    chat = recipe.open_chat(converted)
    assert request[0].tolist() == recipe.fit_request(chat, messages, 96)[0]
    written = theirs.generate(request, attention_mask=torch.ones_like(request), max_new_tokens=24, do_sample=False)
    reply = tokenizer.decode(written[0, request.shape[1] :], skip_special_tokens=True)
    (ours,) = recipe.predictor(config, data.facts, model)([{"messages": messages}])
    assert ours["reply"] == reply.strip()
    capsys.readouterr()
    assert predict([str(converted), "How much is the tea on Monday?", "--format", "jsonl"]) == 0
    line = json.loads(capsys.readouterr().out)
    (again,) = recipe.predictor(config, data.facts, model)([{"messages": TEA}])
    assert line == {"messages": "How much is the tea on Monday?", **again}
    (converted.parent / "asked.jsonl").write_text(
        json.dumps({"id": 7, "messages": TEA}) + '\n{"id": 8, "messages": []}\n'
    )
    assert predict([str(converted), "--file", str(converted.parent / "asked.jsonl"), "--format", "table"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("  ")[0] == again["reply"]
    assert first.endswith("How much is the tea on Monday?")
    assert second.startswith("error: has [] for messages; right")  # the rest has no room on a narrow terminal


def test_preflight_knows_a_run_to_start_from_and_names_one_that_is_none(trained, learned, make_document, tmp_path):
    document = make_document(tmp_path, model={"initialize_from": str(trained / "learning_1_1")})
    del document["data"]["tokenizer"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    findings = check_run(str(tmp_path / "run.json"), [], 1)
    assert not has_errors(findings)
    (numbers,) = [finding.message for finding in findings if finding.path == "model"]
    assert numbers == f"about {sum(p.numel() for p in learned[2].parameters()) / 1000:.3g} k parameters"
    findings = check_run(str(tmp_path / "run.json"), ["model.initialize_from=nowhere"], 1)
    (error,) = [finding for finding in findings if finding.severity == "error"]
    assert error.path == "model.initialize_from"
    assert error.message.startswith("nowhere is not there; give a run or checkpoint of a decoder, or a folder")
    document["data"]["tokenizer"] = {"kind": "bpe", "vocabulary_size": 300}
    (tmp_path / "run.json").write_text(json.dumps(document))
    (error, *_) = check_run(str(tmp_path / "run.json"), [], 1)
    assert error.message.endswith("model.initialize_from brings its own tokenizer; leave it out")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_start_keeps_its_weights_and_a_new_token_is_the_mean_of_the_others(family, make_document, tmp_path):
    """Start from a folder of transformers' with the plain words for roles as template, then with new tokens."""
    document = make_document(tmp_path, data={"template": "text"}, model={"family": family})
    config = DialogueConfig.model_validate_json(json.dumps(document))
    folder = recipe.prepare(config)
    facts = recipe.open_data(config).facts
    export = recipe.hugging_face(config, facts)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**export.config)).eval()
    start = tmp_path / "start"
    theirs.save_pretrained(start)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(start)
    tokens = torch.arange(20).reshape(2, 10)
    for template, added in (("own", 0), ("chatml", 2)):
        data = {**document["data"], "template": template}
        del data["tokenizer"]
        own = {**document, "data": data, "model": {**document["model"], "initialize_from": str(start)}}
        config = DialogueConfig.model_validate_json(json.dumps(own))
        recipe.prepare(config)
        found = recipe.open_data(config).facts
        assert found["vocabulary_size"] == facts["vocabulary_size"] + added
        model = recipe.build_model(config, found).eval()
        with torch.no_grad():
            expected, logits = theirs(input_ids=tokens).logits, model(tokens)
        known = facts["vocabulary_size"]
        assert torch.allclose(logits[..., :known], expected, atol=1e-5)
        table = model.embed.tokens.weight.detach()
        assert torch.allclose(table[known : known + added], table[:known].mean(0).expand(added, -1), atol=1e-6)


def test_a_start_from_a_run_has_its_tokens_and_weights(trained, learned, make_document, tmp_path):
    _, data, model = learned
    document = make_document(tmp_path, model={"initialize_from": str(trained / "learning_1_1")})
    document["data"] = {**document["data"], "template": "own", "tokenizer": {}}
    own = DialogueConfig.model_validate_json(json.dumps(document))
    recipe.prepare(own)
    facts = recipe.open_data(own).facts
    assert facts["vocabulary_size"] == data.facts["vocabulary_size"]
    started = dict(recipe.build_model(own, facts).named_parameters())
    rows_kept = slice(facts["vocabulary_size"])
    for name, parameter in model.named_parameters():
        assert torch.equal(started[name][rows_kept], parameter[rows_kept])
    wrong = own.model_copy(update={"model": own.model.model_copy(update={"num_layers": 1})})
    with pytest.raises(UserError, match=r"model.num_layers: 1, but the model in .* has 2"):
        recipe.build_model(wrong, facts)


def test_figures_of_replies_are_those_of_their_definitions():
    replies, references = ["the tea is nine euros", "the tea is one euro"], ["the tea is nine euros today", "one euro"]
    found = reply_figures(replies, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(replies, [references]).score
    assert "tok:13a" in found["bleu_signature"]
    assert found["distinct_1"] == 7 / 10
    assert found["distinct_2"] == 6 / 8
    assert distinct(["one"], 2) == 0.0


def test_the_baseline_says_what_followed_the_most_similar_dialogue():
    known = [
        Reply(np.array([1]), [{"role": "user", "content": text}], reply)
        for text, reply in (("how much is the tea", "nine"), ("where is the station", "there"))
    ]
    asked = [[{"role": "user", "content": text}] for text in ("is the station far", "what does tea cost", "zzz")]
    assert most_similar_replies(known, asked) == ["there", "nine", "nine"]
