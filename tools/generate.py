"""`bigbatch generate MODEL TEXT...`: text to standard output as it comes, figures to standard error."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.recipes.core.run_home import enter_home


def main(argv: list[str]) -> int:
    """Run the verb `generate`."""
    arguments = _parser().parse_args(argv)
    loaded, text_model = open_model(arguments.model, arguments.dtype)
    prompts = [
        sys.stdin.read() if prompt == "-" else prompt for prompt in [*arguments.texts, *arguments.prompt] or [""]
    ]
    run(loaded.model, text_model, prompts, sampling_of(arguments, loaded.document, text_model), arguments.json)
    return EXIT_DONE


class TextModel(NamedTuple):
    """A tokenizer and the tokens that end a text."""

    tokenizer: Any  # tokenizers.Tokenizer
    stop_tokens: tuple[int, ...]


def open_model(folder: Path, dtype: str | None, threads: int | None = None) -> tuple[Any, TextModel]:
    """Open what `generate.load_model` does, or a quantized, pruned or exported folder, and its tokenizer.

    On the GPU where there is one. `threads` are those of another format's engine.
    """
    import torch

    from bigbatch.recipes.core.generate import Loaded, load_model
    from bigbatch.recipes.core.precision import place
    from bigbatch.tools import opened

    path = enter_home(folder)
    if opened.is_deployed(path):
        found = opened.open_model(path, threads)
        opened.check_writes(found)
        loaded = Loaded(found.model, found.config.model, path, opened.read_json(path / opened.CONFIG_FILE))
    else:
        loaded = load_model(path)
    text_model = _open_tokenizer(loaded, path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bf16" if device == "cuda" else "fp32")
    place(loaded.model, device, dtype)
    return loaded, text_model


def run(model: Any, text_model: TextModel, prompts: list[str], sampling: Any, as_json: bool) -> None:
    """Generate and print: one row of text as it comes, or the rows one after another, or JSON lines."""
    from bigbatch.recipes.core.generate import Completion, generate, stream, why_stopped

    encoded = [_encode(text_model, prompt) for prompt in prompts]
    begin = time.perf_counter()
    if as_json:
        rows = [row for rows in generate(model, encoded, sampling) for row in rows]
    else:
        printer = RowPrinter(text_model.tokenizer, prompts, encoded, sampling.num_samples)
        for tokens in stream(model, encoded, sampling):
            printer.add(tokens)
        printer.close()
        samples = [prompt for prompt in encoded for _ in range(sampling.num_samples)]
        rows = [
            Completion(row, why_stopped(model, prompt, row, sampling))
            for prompt, row in zip(samples, printer.tokens, strict=True)
        ]
    seconds = time.perf_counter() - begin
    for index, row in enumerate(rows if as_json else []):
        prompt, sample = divmod(index, sampling.num_samples)
        text = text_model.tokenizer.decode(row.tokens)
        line = {"prompt": prompts[prompt], "sample": sample, "text": text, "num_tokens": len(row.tokens)}
        print(json.dumps(line | {"stopped": row.stopped}, ensure_ascii=False))
    num_tokens = sum(len(row.tokens) for row in rows)
    print(f"{num_tokens:,} tokens in {seconds:.2f} s, {num_tokens / seconds:,.1f} tokens/s", file=sys.stderr)
    if any(row.stopped == "context" for row in rows):
        print(f"stopped where the model's {model.section.max_positions:,} positions are used up", file=sys.stderr)


class RowPrinter:
    """Print rows of text that grow side by side one after another: one is seen growing, the later ones wait."""

    def __init__(self, tokenizer: Any, prompts: list[str], encoded: list[list[int]], num_samples: int) -> None:
        from tokenizers.decoders import DecodeStream

        self.tokenizer = tokenizer
        self.starts = [prompt for prompt in prompts for _ in range(num_samples)]
        self.decoders = [DecodeStream(ids=ids, skip_special_tokens=True) for ids in encoded for _ in range(num_samples)]
        self.tokens: list[list[int]] = [[] for _ in self.starts]
        self.waiting = [""] * len(self.starts)
        self.current = 0
        self._start_row()

    def add(self, tokens: list[int | None]) -> None:
        """Take the next token of each row, None where one has ended."""
        for row, token in enumerate(tokens):
            if token is not None:
                self.tokens[row].append(token)
                self.waiting[row] += self.decoders[row].step(self.tokenizer, token) or ""
        self._write(self.current)
        while tokens[self.current] is None and self.current + 1 < len(tokens):
            self._next_row()

    def close(self) -> None:
        """Print what is left."""
        while self.current + 1 < len(self.starts):
            self._next_row()
        print(flush=True)

    def _next_row(self) -> None:
        self.current += 1
        print()
        self._start_row()
        self._write(self.current)

    def _start_row(self) -> None:
        if len(self.starts) > 1:
            print(f"--- {self.current + 1} of {len(self.starts)}")
        print(printable(self.starts[self.current]), end="", flush=True)

    def _write(self, row: int) -> None:
        print(printable(self.waiting[row]), end="", flush=True)
        self.waiting[row] = ""


def printable(text: str) -> str:
    """Show characters that would steer a terminal as their escapes; leave them to a file or a pipe."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _encode(text_model: TextModel, prompt: str) -> list[int]:
    """Return a prompt's tokens; an empty one begins where a text ends."""
    from bigbatch.recipes.core.data.tokenizing import encode_prompt

    tokens = encode_prompt(text_model.tokenizer, prompt, "--prompt")
    if not tokens and not text_model.stop_tokens:
        raise UserError("--prompt", "is empty, and the tokenizer has no end-of-text token to begin behind")
    return tokens or [text_model.stop_tokens[0]]


def _open_tokenizer(loaded: Any, path: Path) -> TextModel:
    from tokenizers import Tokenizer

    if loaded.tokenizer is None:
        raise UserError(
            str(path),
            f"has no tokenizer.json, or its run's prepared data are not where they were, seen from {Path.cwd()}",
        )
    file = loaded.tokenizer / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(str(file), f"is not a tokenizer.json: {error}") from None
    stop_tokens = loaded.document.get("eos_token_id")
    if stop_tokens is None:
        stop_tokens = tokenizer.token_to_id(_named_end(loaded.tokenizer / "tokenizer_config.json"))
    if stop_tokens is None:
        return TextModel(tokenizer, ())
    return TextModel(tokenizer, tuple(stop_tokens) if isinstance(stop_tokens, list) else (stop_tokens,))


def _named_end(path: Path) -> str:
    name = json.loads(path.read_text("utf-8")).get("eos_token") if path.exists() else None
    return (name["content"] if isinstance(name, dict) else name) or ""


def sampling_of(arguments: argparse.Namespace, document: dict[str, Any], text_model: TextModel) -> Any:
    """Take what the command line says, else the run document's `sample`, else the defaults."""
    from bigbatch.recipes.core.generate import Sampling

    given = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    asked = {name: value for name, value in given.items() if value is not None}
    trained = {name: value for name, value in document.get("sample", {}).items() if name in given}
    rest = {"seed": arguments.seed, "stop_tokens": text_model.stop_tokens}
    rest |= {"num_samples": arguments.num_samples} if "num_samples" in arguments else {}
    return Sampling(**(trained | asked | rest))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bigbatch generate", description="Generate text with a model.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    text = "text to go on with; - reads standard input"
    parser.add_argument("texts", nargs="*", metavar="TEXT", help=text)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="the same; repeatable")
    add_sampling_flags(parser)
    parser.add_argument("--num-samples", type=_number(int, 1), default=1, help="continuations of each prompt (1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    return parser


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says how tokens are chosen, and in which number format."""
    parser.add_argument("--max-new-tokens", type=_number(int, 1), help="stop after this many tokens (100)")
    parser.add_argument("--temperature", type=_number(float, 0), help="0 is greedy (0.8)")
    parser.add_argument("--top-k", type=_number(int, 0), help="choose among the likeliest this many; 0 is all (50)")
    parser.add_argument(
        "--top-p", type=_number(float, 0, 1), help="choose among the likeliest with this probability (1)"
    )
    parser.add_argument("--seed", type=_number(int, 0), default=0, help="the same seed gives the same text (0)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="by default bf16 on a GPU, fp32 on a CPU")


def _number(kind: type, least: float, most: float = float("inf")) -> Any:
    """Return the reader of a flag's number between two bounds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if least <= value <= most:
            return value
        bounds = f"from {least} to {most}" if most < float("inf") else f"from {least} on"
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number {bounds}")

    return read
