"""Talk over standard input with a model that knows nothing, and one of transformers' own making."""

import io
import json

import pytest
import torch
import transformers

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.chat import install_template, open_chat
from bigbatch.recipes.core.data.tokenizing import make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import load_model
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder, hugging_face_config, hugging_face_state
from bigbatch.tools.chat import Conversation, main
from bigbatch.tools.generate import sampling_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a random model over bytes that chats."""
    folder = tmp_path_factory.mktemp("chat")
    make_tokenizer(TokenizerSection(kind="bpe", vocabulary_size=260), ["a"], folder)
    install_template(folder, "chatml")
    size = open_chat(folder).tokenizer.vocabulary_size
    torch.manual_seed(3)
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 96, "tie_embeddings": False}
    section = DecoderSection(**shape, initializer_range=0.5)
    model = Decoder(section, size)
    config = hugging_face_config(section, size) | {"eos_token_id": open_chat(folder).tokenizer.end_of_text}
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    twin.load_state_dict(hugging_face_state(model), strict=False)
    twin.save_pretrained(folder)
    return folder


@pytest.fixture
def say(folder, monkeypatch, capsys):
    """Give a function that says lines to the model and returns its replies and what is told beside them."""

    def talk(lines, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main([str(folder), "--max-new-tokens", "6", *flags]) == 0
        return capsys.readouterr()

    return talk


def test_replies_come_line_by_line_and_the_same_seed_says_the_same(say):
    first = say(["Hi", "", "/quit", "never said"])
    assert say(["Hi"]).out == first.out
    assert say(["Hi"], "--seed", "1").out != first.out
    assert say(["Hi"], "--system", "Be brief.", "--temperature", "0").out != say(["Hi"], "--temperature", "0").out


def test_a_reply_is_what_the_template_and_transformers_make_of_all_that_was_said(folder):
    loaded = load_model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sampling = sampling_of(_flags(), {}, type("Ends", (), {"stop_tokens": (tokenizer.eos_token_id,)}))
    conversation = Conversation(loaded.model, open_chat(folder), sampling)
    for text in ("Hi", "And you?"):
        said = [*conversation.messages, {"role": "user", "content": text}]
        request = tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        written = theirs.generate(
            request, attention_mask=torch.ones_like(request), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        expected = tokenizer.decode(written[0, request.shape[1] :], skip_special_tokens=True)
        found = "".join(conversation.reply(text))
        assert expected.lstrip().startswith(found.rstrip("\ufffd"))
        assert conversation.messages[-1] == {"role": "assistant", "content": found}
    assert len(conversation.messages) == 4


def _flags():
    names = {"max_new_tokens": 6, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    return type("Flags", (), {**names, "__contains__": lambda self, name: name in names})()


def test_commands_are_obeyed_and_mistakes_told_without_an_end(say):
    shown = say(["/reset", "/system Be brief.", "/system", "/sing", "<|im_end|>", "tea " * 90, "Hi"])
    told = shown.err.splitlines()
    assert told[:3] == ["(begun anew)", "(begun anew with it)", "(begun anew without a system message)"]
    assert told[3].startswith("/sing is no command; /reset begins anew")
    assert told[4] == "error: messages[0] (user) spells the special token '<|im_end|>'"
    assert told[5].startswith("error: has 3")
    assert told[5].endswith("tokens without any earlier message; there is room for 90")
    assert len(shown.out.splitlines()) >= 1


def test_the_oldest_turns_are_left_out_and_it_is_said(say):
    shown = say(["one two three four five"] * 6)
    assert "messages from the beginning no longer fit into 96 tokens and are left out)" in shown.err


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match="its tokenizer has no chat template; right is a model that was trained to chat"
    ):
        main([str(tmp_path)])
    (tmp_path / "chat_template.jinja").write_text("{% for message in %}")
    with pytest.raises(UserError, match="its chat template cannot be read: "):
        main([str(tmp_path)])
