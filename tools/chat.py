"""`bigbatch chat MODEL`: talk with a model in the terminal; what it says comes as it is written."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.tools.generate import add_sampling_flags, open_model, printable, sampling_of

PROMPT = "> "
HELP = "/reset begins anew, /system TEXT says what the model is to be (and begins anew), /quit or Ctrl-D ends it"


def main(argv: list[str]) -> int:
    """Run the verb `chat`."""
    arguments = _parser().parse_args(argv)
    loaded, text_model = open_model(arguments.model, arguments.dtype)
    from bigbatch.recipes.core.data.chat import check_messages, open_chat

    chat = open_chat(loaded.tokenizer)
    sampling = sampling_of(arguments, loaded.document, text_model)
    ends = {*sampling.stop_tokens, chat.tokenizer.end_of_text}
    conversation = Conversation(loaded.model, chat, sampling._replace(stop_tokens=tuple(sorted(ends))))
    if arguments.system:
        try:
            conversation.messages = check_messages([{"role": "system", "content": arguments.system}], chat)
        except ValueError as error:
            raise UserError("--system", str(error)) from None
    if sys.stdin.isatty():
        _say(HELP)
    for line in _lines():
        if not _obey(conversation, line):
            return EXIT_DONE
    return EXIT_DONE


@dataclass
class Conversation:
    """What has been said, and who replies."""

    model: Any  # Decoder
    chat: Any  # core.data.chat.Chat
    sampling: Any  # core.generate.Sampling
    messages: list[dict[str, str]] = field(default_factory=list)
    left_out: int = 0
    """Messages that no longer fit."""

    def reply(self, text: str) -> Iterator[str]:
        """Yield the reply to what the user says as it comes; raise ValueError for what cannot be replied to.

        Both are kept once the reply has begun, however it ends.
        """
        from tokenizers.decoders import DecodeStream

        from bigbatch.recipes.core.data.chat import check_messages, fit_request
        from bigbatch.recipes.core.generate import stream

        said = check_messages([*self.messages, {"role": "user", "content": text}], self.chat)
        positions = self.model.section.max_positions
        room = positions - min(self.sampling.max_new_tokens, positions // 2)
        request, left_out = fit_request(self.chat, said, room)
        if left_out > self.left_out:
            _say(f"({left_out} messages from the beginning no longer fit into {positions} tokens and are left out)")
        self.left_out = left_out
        written, decoder = "", DecodeStream(ids=request, skip_special_tokens=True)
        sampling = self.sampling._replace(seed=self.sampling.seed + len(said))
        try:
            for (token,) in stream(self.model, [request], sampling):
                part = decoder.step(self.chat.tokenizer.tokenizer, token) or ""
                part = part if written else part.lstrip()
                written += part
                yield part
        finally:
            if written.strip():
                self.messages = [*said, {"role": "assistant", "content": written}]
        if not written.strip():
            _say("(the model says nothing; your message is not kept)")


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a line asks for; return whether there is to be another."""
    command, _, rest = line.strip().partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        kept = [message for message in conversation.messages[:1] if message["role"] == "system"]
        conversation.messages, conversation.left_out = kept, 0
        _say("(begun anew)")
    elif command == "/system":
        from bigbatch.recipes.core.data.chat import check_messages

        system = [{"role": "system", "content": rest}] if rest.strip() else []
        try:
            conversation.messages = check_messages(system, conversation.chat) if system else []
        except ValueError as error:
            _say(f"error: {error}")
            return True
        conversation.left_out = 0
        _say("(begun anew with it)" if system else "(begun anew without a system message)")
    elif command.startswith("/"):
        _say(f"{command} is no command; {HELP}")
    elif command:
        _print_reply(conversation, line.strip())
    return True


def _print_reply(conversation: Conversation, text: str) -> None:
    try:
        for part in conversation.reply(text):
            print(printable(part), end="", flush=True)
    except ValueError as error:
        _say(f"error: {error}")
        return
    except KeyboardInterrupt:
        _say(" (stopped)")
    print(flush=True)


def _lines() -> Iterator[str]:
    """Yield what the user types, with the keys of a line editor on a terminal; else the lines of standard input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - arrow keys and history in input()

    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bigbatch chat", description="Talk with a model that was trained to chat.", epilog=HELP)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="what the model is to be")
    add_sampling_flags(parser)
    return parser
