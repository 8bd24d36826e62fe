"""Chat templates against transformers' own rendering: those that are built in, and one that a model brings."""

import json

import pytest
import transformers

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.chat import encode_dialogue, encode_request, fit_request, install_template, open_chat
from bigbatch.recipes.core.data.tokenizing import make_tokenizer
from bigbatch.recipes.core.errors import UserError

BROUGHT = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {% if message.role == 'user' %}[Q] {{ message.content | trim }} [/Q]\n"
    "  {% elif message.role == 'assistant' %} {{ message.content | trim + eos_token }}\n"
    "  {% else %}{{ raise_exception('only user and assistant') }}{% endif %}\n"
    "{% endfor %}"
)
DIALOGUE = [
    {"role": "user", "content": "Was kostet Tee?"},
    {"role": "assistant", "content": "  Neun – “Euro”.\n\nOder so "},
    {"role": "user", "content": "0 :) \t?"},
    {"role": "assistant", "content": ":-)"},
    {"role": "user", "content": "not asked for"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(TokenizerSection(kind="bpe", vocabulary_size=300), ["Was kostet Tee? Neun Euro."], tmp_path)
    return tmp_path


def bring(folder, template):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))


@pytest.mark.parametrize("name", ["chatml", "text", "own"])
def test_tokens_and_replies_are_those_that_transformers_makes(folder, name):
    bring(folder, BROUGHT)
    install_template(folder, name)
    chat, theirs = open_chat(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages = DIALOGUE if name == "own" else SYSTEM + DIALOGUE
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert encode_request(chat, messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    found = encode_dialogue(chat, messages)
    assert found.tokens.tolist() == whole[: len(found.tokens)]
    assert found.tokens[-1] == theirs.eos_token_id
    texts = [theirs.decode(found.tokens[first:end]) for first, end in found.replies]
    expected = [message["content"].strip() + theirs.eos_token for message in messages if message["role"] == "assistant"]
    assert [text.lstrip() for text in texts] == expected
    for (first, _), place in zip(found.replies, (1, 3), strict=True):
        before = messages[: place + len(messages) - len(DIALOGUE)]
        asked = theirs.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert asked == found.tokens[:first].tolist()


def test_the_oldest_turns_go_first_and_the_system_message_stays(folder):
    install_template(folder, "chatml")
    chat = open_chat(folder)
    whole = encode_request(chat, SYSTEM + DIALOGUE)
    assert fit_request(chat, SYSTEM + DIALOGUE, len(whole)) == (whole, 0)
    shorter = encode_request(chat, SYSTEM + DIALOGUE[2:])
    assert fit_request(chat, SYSTEM + DIALOGUE, len(whole) - 1) == (shorter, 2)
    with pytest.raises(ValueError, match=r"has \d+ tokens without any earlier message; there is room for 20"):
        fit_request(chat, SYSTEM + DIALOGUE, 20)


def test_templates_that_cannot_be_used_say_why(folder):
    with pytest.raises(
        UserError, match=r"data\.template: is 'own', but the tokenizer has none; right is text or chatml"
    ):
        install_template(folder, "own")
    bring(folder, BROUGHT)
    with pytest.raises(ValueError, match="the chat template cannot write it: only user and assistant"):
        encode_dialogue(open_chat(folder), SYSTEM + DIALOGUE)
    bring(folder, "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}")
    with pytest.raises(ValueError, match="writes the beginning of a dialogue otherwise than alone"):
        encode_dialogue(open_chat(folder), DIALOGUE)
