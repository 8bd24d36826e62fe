"""`bigbatch predict MODEL [TEXT ...]`: what a model says of texts, to standard output in their order.

Where a recipe's inputs are objects (FIELDS: question and context), a line is one in JSON, a row of a table or a SQuAD
document is one, and texts among the arguments are their fields in turns.
"""

import argparse
import json
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.arguments import Parser, count
from bigbatch.recipes.core.errors import EXIT_DONE, UserError, one_line
from bigbatch.recipes.core.run_home import enter_home

Predict = Callable[[list[Any]], list[dict[str, Any]]]
Fields = tuple[str, ...]

EPILOG = """Without TEXT and --file, or with -, texts are the lines of standard input; answers come as batches fill or
the input pauses. A line is a JSON object: text, label and probability; with --top also labels, the likeliest and their
probabilities; where a text may have any number of labels, labels alone, those that it has. A model that answers
questions takes QUESTION CONTEXT in turns, or a JSON object with both a line, or a file of such or in SQuAD's format; a
line of its answers holds id (where given), question, answer, start and end (characters of the context; "" and null for
no answer), probability, null_score (by how much no answer is better than the best), with --top also candidates. A model
that finds entities gives entities: text, type, start and end; one of relations takes texts with <e1>...</e1> and
<e2>...</e2> in them. One that matches pairs takes LEFT RIGHT in turns, or objects with both, and gives their score. One
of the next word gives words, the likeliest behind the text. One that summarizes takes documents: texts, JSON objects
with a document, a text or a list of sentences, or a file of such; it gives a summary, and where that is chosen from the
document its sentences, each with place and score. One that translates gives translation and score; one that judges
translations takes SOURCE TRANSLATION in turns, or a JSON object with both, and gives quality. One that chats takes what
a user says, or JSON objects with messages, and gives reply, stopped and, of a dialogue too long, how many messages it
has left_out. A model of images or speech takes the paths of files for texts; one of speech gives transcript and
seconds. An argument that cannot be taken, an empty one for example, ends the command with status 2; a line of a file or
of standard input gets an answer with the key error instead, in its place, and the number of such lines is told at the
end."""
PAUSE_SECONDS = 0.05
BLOCK_BYTES = 2**16
DIGITS = 6  # of a probability
# What is shown as it is.
PLAIN = dict.fromkeys(("reply", "summary", "transcript", "translation"), "{}")
PLAIN |= dict.fromkeys(("quality", "score"), "{:.3f}")
NEXT_WORDS = 5  # that are shown unless --top says how many
MOST_OF_THE_WIDTH = 0.5  # that a table's answers may take


class Item(NamedTuple):
    """An input, and why it cannot be taken; empty where it can, as far as is known."""

    text: Any
    """A text, or an object with the recipe's fields."""
    problem: str = ""


def main(argv: list[str]) -> int:
    """Run the verb `predict`."""
    arguments = _parser().parse_args(argv)
    if arguments.texts and arguments.file:
        raise UserError("--file", f"is given beside the text {arguments.texts[0]!r}; give one or the other")
    file = None if arguments.file in (None, "-") else str(Path(arguments.file).expanduser().absolute())
    here, path = Path.cwd(), enter_home(arguments.model)  # the current folder may change here
    files = find_file(file) if file else []  # before the model is opened, which takes longer
    predict, fields = open_predictor(path, here)
    table = arguments.format == "table" or (arguments.format is None and sys.stdout.isatty())
    output = Output(fields, arguments.top, table)
    if file:
        items = read_file(files, arguments.text_column, fields)
        _answer_stream(predict, batched(items, arguments.batch_size), output)
    elif arguments.texts and arguments.texts != ["-"]:
        _answer_arguments(predict, batched(_as_items(arguments.texts, fields), arguments.batch_size), output)
    else:
        lines = lines_as_they_come(sys.stdin.fileno(), arguments.batch_size)
        _answer_stream(predict, ([_as_object(item, fields) for item in items] for items in lines), output)
    return EXIT_DONE


def open_predictor(path: Path, here: Path = Path()) -> tuple[Predict, Fields]:
    """Open a run folder, a checkpoint or a Hugging Face folder; raise UserError for a model that predicts nothing.

    Also return of what an input consists, () where it is a text. Inputs that are files are looked for from `here`.
    """
    import torch

    from bigbatch.recipes.core import recipe as recipes
    from bigbatch.tools.opened import open_model

    opened = open_model(path, must_predict=True)
    recipe, config = opened.recipe, opened.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    predict = recipe.predictor(config, opened.facts, opened.model.to(device))
    if recipes.further(recipe, "READS_FILES"):
        return (lambda names: predict([str(here / Path(name).expanduser()) for name in names])), ()
    fields = recipes.further(recipe, "fields")
    return predict, fields(config) if fields else recipes.further(recipe, "FIELDS") or ()


class Output(NamedTuple):
    """How answers are printed."""

    fields: Fields
    top: int | None
    is_table: bool


def answer(predict: Predict, items: list[Item]) -> list[dict[str, Any]]:
    """Return the model's answers; of a text that it cannot take, {"error": ...}."""
    texts = [item.text for item in items if not item.problem]
    try:
        found = iter(predict(texts) if texts else [])
    except UserError as error:
        if len(items) == 1:
            return [{"error": error.message}]
        return [one for item in items for one in answer(predict, [item])]
    return [{"error": item.problem} if item.problem else next(found) for item in items]


def shaped(found: dict[str, Any], top: int | None) -> dict[str, Any]:
    """Return an answer as it is printed: labels, candidates or next words ranked, only as many as are asked for."""
    if "candidates" in found:
        best = _rounded({name: value for name, value in found.items() if name != "candidates"})
        return best | ({"candidates": [_rounded(one) for one in found["candidates"][:top]]} if top else {})
    if words := found.get("words"):
        return {"words": [{"word": word, "probability": round(p, DIGITS)} for word, p in words[: top or NEXT_WORDS]]}
    chances = found.get("probabilities")
    if chances is None:
        return found
    ranked = sorted(chances, key=lambda label: -chances[label])
    shown = ranked[:top] if top else [label for label in ranked if label in found.get("labels", ())]
    labels = [{"label": label, "probability": round(chances[label], DIGITS)} for label in shown]
    if "label" not in found:
        return {"labels": labels}
    best = {"label": found["label"], "probability": round(found["probability"], DIGITS)}
    return best | ({"labels": labels} if top else {})


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in found.items()}


# ------------------------------------------------------------------------------------------------------------- texts


def as_item(text: str) -> Item:
    """Refuse what is not Unicode: half a character, or bytes of another encoding in an argument."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Item(text.encode(errors="replace").decode(), "is not Unicode: half a character, or bytes")
    return Item(text)


def _as_items(texts: list[str], fields: Fields) -> list[Item]:
    """Return the arguments, each a text, or the fields of objects in turns."""
    if not fields:
        return [as_item(text) for text in texts]
    if len(texts) % len(fields):
        raise UserError("TEXT", f"found {len(texts)}; right is {' and '.join(fields)}, in turns")
    found = []
    for begin in range(0, len(texts), len(fields)):
        parts = [as_item(text) for text in texts[begin : begin + len(fields)]]
        problem = next((part.problem for part in parts if part.problem), "")
        found.append(Item(dict(zip(fields, (part.text for part in parts), strict=True)), problem))
    return found


def _as_object(item: Item, fields: Fields) -> Item:
    """Return the object that a line holds, where there are fields; a plain line is the only one."""
    if not fields or item.problem:
        return item
    if len(fields) == 1 and not item.text.lstrip().startswith("{"):
        return Item({fields[0]: item.text})
    try:
        found = json.loads(item.text)
    except ValueError as error:
        return item._replace(problem=f"is not JSON: {error}")
    missing = [name for name in fields if name not in found] if isinstance(found, dict) else list(fields)
    return item._replace(problem=f"has no {missing[0]!r}") if missing else Item(found)


def find_file(path: str) -> list[Any]:
    """Return the files of --file; raise UserError where there is none."""
    from bigbatch.recipes.core.config import TableSource
    from bigbatch.recipes.core.data.sources import format_of, list_files

    try:
        return list_files([TableSource(path=path, format="lines") if format_of(path) == "txt" else path], "")
    except UserError as error:
        raise UserError("--file", error.message) from None


def read_file(files: list[Any], column: str | None, fields: Fields = ()) -> Iterator[Item]:
    """Yield the lines of a .txt or the rows of a table: a column, or the fields, and an `id` where there is one."""
    column = "text" if files[0].format == "lines" else column
    if not fields:
        return _read_column(files, column or "text")
    return _read_objects(files, dict(zip(fields, [column] if column and len(fields) == 1 else fields, strict=True)))


def _read_objects(files: list[Any], columns: dict[str, str]) -> Iterator[Item]:
    """Yield objects, of each field the column that holds it, and an `id` where there is one."""
    from bigbatch.recipes.core.data.rows import read_rows

    wanted, named = dict.fromkeys(columns.values(), "--file"), {"id": "id", **columns}
    for file in files:
        try:
            next(read_rows(file, {"id": ""}), None)
            found = {"id": "--file", **wanted}
        except UserError:
            found = wanted
        for row in read_rows(file, found):
            yield Item({name: row.values[column] for name, column in named.items() if column in found})


def _read_column(files: list[Any], column: str) -> Iterator[Item]:
    from bigbatch.recipes.core.data.rows import as_text, read_rows

    for row in (row for file in files for row in read_rows(file, {column: "--text-column"})):
        try:
            yield as_item(as_text(row.values[column], row.origin, column))
        except UserError as error:
            yield Item(str(row.values[column]), error.message)


def lines_as_they_come(descriptor: int, batch_size: int) -> Iterator[list[Item]]:
    """Yield the lines of a stream in batches: full ones, and what there is when no more has come for a moment."""
    waiting, rest, ended = [], b"", False
    while not ended:
        # Python's own buffer would hide from `select` what has been read ahead.
        if not select.select([descriptor], [], [], PAUSE_SECONDS if waiting else None)[0]:
            yield waiting
            waiting = []
            continue
        block = os.read(descriptor, BLOCK_BYTES)
        ended = not block
        *lines, rest = (rest + block).split(b"\n")
        waiting += [_decoded(line) for line in lines + ([rest] if ended and rest else [])]
        while len(waiting) >= batch_size or (ended and waiting):
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]


def _decoded(line: bytes) -> Item:
    line = line.removesuffix(b"\r")
    try:
        return Item(line.decode())
    except UnicodeDecodeError as error:
        return Item(line.decode(errors="replace"), f"is not UTF-8: the first wrong byte is at offset {error.start}")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield items, so many at once."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


# ------------------------------------------------------------------------------------------------------------ output


def _answer_arguments(predict: Predict, batches: Iterator[list[Item]], output: Output) -> None:
    """Answer all or, where one cannot be taken, none."""
    pairs = [pair for items in batches for pair in zip(items, answer(predict, items), strict=True)]
    for number, (_, found) in enumerate(pairs, 1):
        if "error" in found:
            raise UserError(f"TEXT {number}", found["error"])
    _print([item for item, _ in pairs], [found for _, found in pairs], output)


def _answer_stream(predict: Predict, batches: Iterable[list[Item]], output: Output) -> None:
    begin, count, errors = time.perf_counter(), 0, 0
    for items in batches:
        found = answer(predict, items)
        count, errors = count + len(items), errors + sum("error" in one for one in found)
        _print(items, found, output)
    seconds = time.perf_counter() - begin
    print(f"{count:,} texts in {seconds:.2f} s, {count / seconds:,.1f} texts/s", file=sys.stderr)
    if errors:
        print(f"{errors:,} of them could not be taken; their answers say why (error)", file=sys.stderr)


def _print(items: list[Item], found: list[dict[str, Any]], output: Output) -> None:
    answers = [shaped(one, output.top) for one in found]
    if not output.is_table:
        for item, one in zip(items, answers, strict=True):
            print(json.dumps({**_told(item, output.fields), **one}, ensure_ascii=False))
        sys.stdout.flush()
        return
    width = shutil.get_terminal_size((100, 24)).columns
    cells = [one_line(_cell(one)) for one in answers]
    room = min(max(map(len, cells)), int(width * MOST_OF_THE_WIDTH))
    for item, cell in zip(items, cells, strict=True):
        text = _last_said(list(_told(item, output.fields).values())[-1])
        print(f"{_cut(cell, room):{room}}  {_cut(one_line(text), max(10, width - room - 2))}".rstrip())
    sys.stdout.flush()


def _told(item: Item, fields: Fields) -> dict[str, Any]:
    """Return what an answer's line says of its input: the text, or of an object its id and first field."""
    if isinstance(item.text, dict):
        return {name: item.text[name] for name in ("id", fields[0]) if name in item.text}
    return {"text": item.text}


def _last_said(value: Any) -> str:
    """Return a text, of messages the last one's."""
    last = value[-1] if isinstance(value, list) and value else None
    return str(last["content"] if isinstance(last, dict) and "content" in last else value)


def _cell(one: dict[str, Any]) -> str:
    if "error" in one:
        return f"error: {one['error']}"
    for name, form in PLAIN.items():
        if name in one:
            return form.format(one[name]) or "-"
    if "answer" in one:
        return f"{one['answer'] or '-'} {one['probability']:.1%}"
    shown = _listed(one)
    return json.dumps(one, ensure_ascii=False) if shown is None else ", ".join(shown) or "-"


def _listed(one: dict[str, Any]) -> list[str] | None:
    if "entities" in one:
        return [f"{entity['text']} ({entity['type']})" for entity in one["entities"]]
    if "words" in one:
        return [f"{item['word']!r} {item['probability']:.1%}" for item in one["words"]]
    labels = one.get("labels", [one] if "label" in one else None)
    if labels is None:
        return None
    return [f"{item['label']} {item['probability']:.1%}" for item in labels]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _parser() -> argparse.ArgumentParser:
    what = "Tell of which kind texts or images are, answer questions, sum up, translate, go on, or write down speech."
    parser = Parser(prog="bigbatch predict", description=what, epilog=EPILOG)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    texts = "a text, the path of an image or recording, or QUESTION CONTEXT in turns; - is standard input, a line each"
    parser.add_argument("texts", nargs="*", default=[], metavar="TEXT", help=texts)
    file = "a .txt (a line each), .jsonl, .csv, .tsv or .parquet; of questions also SQuAD's .json"
    parser.add_argument("--file", metavar="F", help=file)
    parser.add_argument("--text-column", metavar="C", help="of the file (default text; of documents document)")
    parser.add_argument("--format", choices=("jsonl", "table"), help="by default a table on a terminal, else jsonl")
    parser.add_argument("--top", type=count, metavar="K", help="the likeliest so many, each with probability")
    parser.add_argument("--batch-size", type=count, metavar="N", default=32, help="texts at once (default 32)")
    return parser
