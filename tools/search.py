"""`bigbatch search MODEL [QUERY ...]`: the documents that match a query best, to standard output."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.recipes.core.arguments import Parser, count
from bigbatch.recipes.core.errors import EXIT_DONE, UserError, one_line
from bigbatch.recipes.core.run_home import enter_home

if TYPE_CHECKING:  # what they import takes seconds, and --help needs none of it
    from bigbatch.recipes.match.config import Stemming
    from bigbatch.recipes.match.data import Embed
    from bigbatch.recipes.match.search import Document, Index

EPILOG = """MODEL is a run or checkpoint of the recipe match, a bi-encoder, or a Hugging Face folder of a BERT.
Documents are those of --documents, of an --index made before, or of the run's own data. --documents and --index
together make an index and keep it. A line of the output is a query with its hits: id, score, text; on a terminal a
table of hits. Both rankings are put together as the run says (`search.fusion`)."""
WAYS = ("hybrid", "model", "words")
DIGITS = 6


def main(argv: list[str]) -> int:
    """Run the verb `search`."""
    arguments = _parser().parse_args(argv)
    given = {name: getattr(arguments, name) for name in ("index", "documents")}
    paths = {name: Path(value).expanduser().absolute() for name, value in given.items() if value}
    path = enter_home(arguments.model)  # the current folder may change here
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from bigbatch.recipes.match import recipe
    from bigbatch.recipes.match.search import search
    from bigbatch.tools.opened import open_model

    if (path / "config.json").is_file():
        opened = open_model(path, recipe_name="match")
        config, facts, model = opened.config, opened.facts, opened.model
    else:
        config, facts, model = recipe.open_run(path, str(path))
    embed = recipe.encoder_of(config, facts, model)
    index = _index(paths, arguments, facts, embed, config.data.stemming)
    table = arguments.format == "table" or (arguments.format is None and sys.stdout.isatty())
    for query in arguments.queries or ([] if len(paths) == 2 else sys.stdin):
        (found,) = search(
            index,
            [recipe.checked(query, "QUERY")],
            embed,
            config.search,
            arguments.by or config.search.by,
            arguments.top,
        )
        _print(query.strip(), found, table)
    return EXIT_DONE


def _index(
    paths: dict[str, Path], arguments: argparse.Namespace, facts: dict[str, Any], embed: "Embed", stemming: "Stemming"
) -> "Index":
    """Make an index, or open the one that is there."""
    from bigbatch.recipes.match.search import build_index, load_index, prepared_documents, save_index

    folder = paths.get("index")
    if "documents" not in paths:
        if folder:
            return load_index(folder, embed, stemming)
        if (Path(facts["tokenizer"]) / "config.json").is_file():
            raise UserError("--documents", "is missing: a model folder holds none; right is a file, or an --index")
        return build_index(prepared_documents(Path(facts["tokenizer"])), embed, stemming)
    if folder and folder.exists():
        raise UserError("--index", f"{folder} exists already; leave --documents out, or name another folder")
    documents = _read(str(paths["documents"]), arguments.id_column, arguments.text_column)
    index = build_index(documents, embed, stemming)
    if folder:
        save_index(index, embed, folder)
        print(f"{len(index.documents):,} documents in {folder}", file=sys.stderr)
    return index


def _read(path: str, id_column: str, text_column: str) -> "list[Document]":
    """Read documents; those of a .txt are its lines, numbered from 1. One without text is never found."""
    from bigbatch.recipes.core.data.rows import as_text, read_rows
    from bigbatch.recipes.match.search import Document
    from bigbatch.tools.predict import find_file

    files = find_file(path)
    is_plain = files[0].format == "lines"
    columns = {"text": "--file"} if is_plain else {text_column: "--text-column", id_column: "--id-column"}
    found, seen = [], set()
    for number, row in enumerate((row for file in files for row in read_rows(file, columns)), 1):
        name = str(number if is_plain else row.values[id_column])
        if name in seen:
            raise UserError(row.origin, f"has the id {name!r}, as an earlier one has")
        seen.add(name)
        found.append(Document(name, as_text(row.values["text" if is_plain else text_column], row.origin, text_column)))
    return found


def _print(query: str, found: "list[tuple[Document, float]]", is_table: bool) -> None:
    if not is_table:
        hits = [{"id": document.id, "score": round(score, DIGITS), "text": document.text} for document, score in found]
        print(json.dumps({"query": query, "hits": hits}, ensure_ascii=False), flush=True)
        return
    width = shutil.get_terminal_size((100, 24)).columns
    for document, score in found:
        line = f"{score:8.4f}  {document.id and document.id + '  '}{one_line(document.text)}"
        print(line if len(line) <= width else f"{line[: width - 3]}...")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bigbatch search", description="Find the documents that match a query best.", epilog=EPILOG)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("queries", nargs="*", default=[], metavar="QUERY", help="by default lines of standard input")
    parser.add_argument("--documents", metavar="F", help="a .txt (a line each), .jsonl, .csv, .tsv or .parquet")
    parser.add_argument("--index", metavar="DIR", help="a folder to keep the index in, or to take it from")
    parser.add_argument("--by", choices=WAYS, help="both, the model or BM25 (words); default: the run's search.by")
    parser.add_argument("--top", type=count, metavar="K", default=10, help="so many documents a query (default 10)")
    parser.add_argument("--id-column", default="id", metavar="C", help="of the file (default id)")
    parser.add_argument("--text-column", default="text", metavar="C", help="of the file (default text)")
    parser.add_argument("--format", choices=("jsonl", "table"), help="by default a table on a terminal, else jsonl")
    return parser
