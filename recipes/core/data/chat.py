"""Chat templates: messages become one text, and its tokens, as transformers' apply_chat_template makes them.

A message is {"role": ..., "content": ...}. A template is a Jinja text in the tokenizer's own folder, so that whatever
program opens the folder writes a dialogue as the model has learned it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bigbatch.recipes.core.data.manifest import write_atomically
from bigbatch.recipes.core.data.rows import shown
from bigbatch.recipes.core.data.tokenizing import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    TextTokenizer,
    load_given_tokenizer,
    read_settings,
    token_name,
)
from bigbatch.recipes.core.errors import UserError, one_line

ROLES = ("system", "user", "assistant")
Messages = list[dict[str, str]]


class BuiltIn(NamedTuple):
    """A template that any tokenizer can have."""

    template: str
    special_tokens: tuple[str, ...] = ()
    """Added to the vocabulary where it has them not; the last one ends a message, else the end of a text does."""


BUILT_IN = {
    "text": BuiltIn(
        "{% for message in messages %}"
        "{{ message['role'] | capitalize + ':\\n' + message['content'] | trim + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
    ),
    "chatml": BuiltIn(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
}


class Chat(NamedTuple):
    """A tokenizer with its template."""

    tokenizer: TextTokenizer
    template: jinja2.Template
    names: dict[str, str]
    """Of special tokens, which a template may use."""
    special_tokens: tuple[str, ...]


class Encoded(NamedTuple):
    """A dialogue up to the end of its last reply."""

    tokens: np.ndarray  # uint32 [length]
    replies: list[tuple[int, int]]
    """Of each reply, its first token and the one behind the token that ends it."""


def install_template(folder: Path, name: str) -> None:
    """Give the tokenizer in a folder a built-in template, and the special tokens that this needs; "own" keeps its own.

    Raises UserError for a tokenizer that is to keep a template and has none.
    """
    settings = read_settings(folder)
    if name == "own":
        if not settings.get("chat_template"):
            raise UserError("data.template", f"is 'own', but the tokenizer has none; right is {' or '.join(BUILT_IN)}")
        return
    built_in = BUILT_IN[name]
    if built_in.special_tokens:
        tokenizer = load_given_tokenizer(folder).tokenizer
        tokenizer.add_special_tokens(list(built_in.special_tokens))
        settings["eos_token"] = built_in.special_tokens[-1]
        write_atomically(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True) + "\n")
    settings["chat_template"] = built_in.template
    write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def open_chat(folder: Path) -> Chat:
    """Open the tokenizer of a folder; raise UserError where it has no chat template, or one that is none."""
    tokenizer, settings = load_given_tokenizer(folder), read_settings(folder)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if not template:
        raise UserError(str(folder), "its tokenizer has no chat template; right is a model that was trained to chat")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(str(folder), f"its chat template cannot be read: {one_line(str(error))}") from None
    names = {key: token_name(settings, key) for key in ("bos_token", "unk_token", "pad_token")}
    names["eos_token"] = tokenizer.tokenizer.id_to_token(tokenizer.end_of_text) or ""
    added = tokenizer.tokenizer.get_added_tokens_decoder().values()
    return Chat(tokenizer, compiled, names, tuple(token.content for token in added if token.special))


def check_messages(messages: Any, chat: Chat | None = None) -> Messages:
    """Return messages that are as they should be; raise ValueError that says what is wrong with the first that isn't.

    With a chat, a content that spells one of its special tokens is wrong too: it would end a message, or begin one.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"has {shown(messages)} for messages; right is a list of objects with role and content")
    for number, message in enumerate(messages):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ROLES:
            raise ValueError(f"messages[{number}] has the role {shown(role)}; right is {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"messages[{number}] ({role}) has {shown(content)} for content; right is a text")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise ValueError(f"messages[{number}] ({role}) is not Unicode: it holds half a character") from None
        if spelled := [token for token in (chat.special_tokens if chat else ()) if token in content]:
            raise ValueError(f"messages[{number}] ({role}) spells the special token {spelled[0]!r}")
    return messages


def render(chat: Chat, messages: Messages, add_generation_prompt: bool = False) -> str:
    """Return messages as one text; raise ValueError where the template refuses them."""
    try:
        return chat.template.render(messages=messages, add_generation_prompt=add_generation_prompt, **chat.names)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template cannot write it: {one_line(str(error))}") from None


def encode_dialogue(chat: Chat, messages: Messages) -> Encoded:
    """Return the tokens of a dialogue that has a reply; raise ValueError where the template refuses it."""
    places = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    text, spans = render(chat, messages[: places[-1] + 1]), []
    for place in places:
        before, whole = render(chat, messages[:place], True), render(chat, messages[: place + 1])
        if not (text.startswith(whole) and whole.startswith(before)):
            raise ValueError("the chat template writes the beginning of a dialogue otherwise than alone")
        spans.append((len(before), len(whole)))
    encoding = chat.tokenizer.tokenizer.encode(text, add_special_tokens=False)
    tokens = np.array(encoding.ids, np.uint32)
    replies = np.searchsorted([start for start, _ in encoding.offsets], spans)  # [replies, 2]
    for number, (first, end) in enumerate(replies):  # what follows the token that ends a message is never written
        ends = np.flatnonzero(tokens[first:end] == chat.tokenizer.end_of_text)
        replies[number, 1] = first + ends[0] + 1 if len(ends) else end
    return Encoded(tokens[: replies[-1, 1]], [(first, end) for first, end in replies.tolist()])


def encode_request(chat: Chat, messages: Messages) -> list[int]:
    """Return the tokens that ask for a reply to these messages; raise ValueError where the template refuses them."""
    return chat.tokenizer.tokenizer.encode(render(chat, messages, True), add_special_tokens=False).ids


def fit_request(chat: Chat, messages: Messages, most_tokens: int) -> tuple[list[int], int]:
    """Return the tokens that ask for a reply, without the oldest turns where they are too many, and how many were left.

    What is left out are whole messages; a system message at the beginning stays. Raises ValueError where the last
    message alone is too long.
    """
    kept = int(messages[0]["role"] == "system")
    starts = [number for number in range(kept, len(messages)) if number == kept or messages[number]["role"] == "user"]
    for start in starts:
        tokens = encode_request(chat, messages[:kept] + messages[start:])
        if len(tokens) <= most_tokens:
            return tokens, start - kept
    raise ValueError(f"has {len(tokens)} tokens without any earlier message; there is room for {most_tokens}")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
