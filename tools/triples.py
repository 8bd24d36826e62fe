"""`bigbatch triples ENTITIES RELATIONS [TEXT ...]`: what texts say, as subject, relation and object.

A model that finds entities names them, one of relations tells of each pair how it is related. Both are models of the
recipe `extract`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.tools.predict import Item, Predict, answer, as_item, batched, find_file, open_predictor, read_file

DIGITS = 6  # of a probability
BASE = "http://example.org/"
TYPE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"
LABEL = "http://www.w3.org/2000/01/rdf-schema#label"
_IRI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\x00-\x20<>\"{}|^`\\]*")
_ESCAPED = re.compile(r"[\x00-\x1f\"\\\x7f]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r", '"': '\\"', "\\": "\\\\"}

Entity = dict[str, Any]  # text, type, start, end


class Triple(NamedTuple):
    """One thing that a text says."""

    subject: Entity
    relation: str
    object: Entity
    probability: float


class Settings(NamedTuple):
    """Which pairs are asked about, and which answers count."""

    least: float
    within: int


def main(argv: list[str]) -> int:
    """Run the verb `triples`."""
    arguments = _parser().parse_args(argv)
    if bool(arguments.texts) == bool(arguments.file):
        raise UserError("TEXT", "and --file are both given, or neither; right is one of them")
    if not _IRI.fullmatch(arguments.base):
        raise UserError("--base", f"{arguments.base!r} is no absolute IRI; right is one such as {BASE}")
    file = str(Path(arguments.file).expanduser().absolute()) if arguments.file else None
    items = read_file(find_file(file), arguments.text_column) if file else map(as_item, arguments.texts)
    entities, relations = (open_predictor(path.expanduser().absolute())[0] for path in arguments.models)
    settings = Settings(arguments.least, arguments.within)
    told: set[str] = set()
    counts = {"texts": 0, "entities": 0, "pairs": 0, "triples": 0, "not taken": 0}
    for some in batched(items, arguments.batch_size):
        for item, found in zip(some, find_triples(entities, relations, some, settings, counts), strict=True):
            lines = [as_json(item, found)] if arguments.format == "jsonl" else n_triples(found, arguments.base)
            for line in lines if arguments.format == "jsonl" else [line for line in lines if line not in told]:
                print(line)
                told.add(line)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()), file=sys.stderr)
    return EXIT_DONE


def find_triples(
    entities: Predict, relations: Predict, items: list[Item], settings: Settings, counts: dict[str, int]
) -> list[list[Triple] | str]:
    """Return the triples of each text, or why it cannot be taken, and count.

    Each two entities are asked about once, the first one in the text as <e1>, unless they stand further apart than
    `within` characters. A text with such a marker in it cannot be taken.
    """
    marked: list[Item] = []
    whose: list[tuple[int, Entity, Entity]] = []
    found: list[list[Triple] | str] = []
    for number, (item, one) in enumerate(zip(items, answer(entities, items), strict=True)):
        if "error" not in one and "entities" not in one:
            raise UserError(
                "ENTITIES", "is a model that finds no entities; right is one of extract, data.task entities"
            )
        found.append(one.get("error", []))
        pairs = list(_pairs(one.get("entities", []), settings.within))
        marked += [Item(_marked(item.text, *pair)) for pair in pairs]
        whose += [(number, *pair) for pair in pairs]
        counts["entities"] += len(one.get("entities", []))
    for (number, first, second), one in zip(whose, answer(relations, marked), strict=True):
        if "error" not in one and "relation" not in one:
            raise UserError("RELATIONS", "is a model of no relations; right is one of extract, data.task relations")
        own, relation = found[number], one.get("relation")
        counts["not taken"] += "error" in one
        if isinstance(own, list) and relation and one["probability"] >= settings.least:
            subject, other = (first, second) if relation["subject"] == "e1" else (second, first)
            own.append(Triple(subject, relation["name"], other, one["probability"]))
            counts["triples"] += 1
    counts["texts"] += len(items)
    counts["pairs"] += len(whose)
    counts["not taken"] += sum(isinstance(one, str) for one in found)
    return found


def as_json(item: Item, found: list[Triple] | str) -> str:
    """Return a text and its triples as a line of JSON, or the error."""
    if isinstance(found, str):
        return json.dumps({"text": item.text, "error": found}, ensure_ascii=False)
    triples = [triple._asdict() | {"probability": round(triple.probability, DIGITS)} for triple in found]
    return json.dumps({"text": item.text, "triples": triples}, ensure_ascii=False)


def n_triples(found: list[Triple] | str, base: str) -> Iterator[str]:
    """Yield triples as lines of N-Triples (https://www.w3.org/TR/n-triples/), and of each entity its type and name.

    An entity is BASE type / name, a relation BASE relation, what is not a plain letter percent-encoded.
    """
    for triple in found if isinstance(found, list) else ():
        nodes = []
        for entity in (triple.subject, triple.object):
            name = " ".join(entity["text"].split())
            nodes.append(f"<{base}{_encoded(entity['type'])}/{_encoded(name)}>")
            yield f"{nodes[-1]} <{TYPE}> <{base}{_encoded(entity['type'])}> ."
            yield f"{nodes[-1]} <{LABEL}> {literal(name)} ."
        yield f"{nodes[0]} <{base}{_encoded(triple.relation)}> {nodes[1]} ."


def literal(text: str) -> str:
    """Return a text as a literal of N-Triples."""
    return '"' + _ESCAPED.sub(lambda c: _SHORT.get(c[0], f"\\u{ord(c[0]):04X}"), text) + '"'


def _encoded(name: str) -> str:
    return quote(name, safe="")


def _pairs(entities: Iterable[Entity], within: int) -> Iterator[tuple[Entity, Entity]]:
    in_order = sorted(entities, key=lambda entity: entity["start"])
    return (pair for pair in combinations(in_order, 2) if pair[1]["start"] - pair[0]["end"] <= within)


def _marked(text: str, first: Entity, second: Entity) -> str:
    (a, b), (c, d) = ((entity["start"], entity["end"]) for entity in (first, second))
    return f"{text[:a]}<e1>{text[a:b]}</e1>{text[b:c]}<e2>{text[c:d]}</e2>{text[d:]}"


def _parser() -> argparse.ArgumentParser:
    what = "Find in texts what is related to what: subject, relation and object, by two models of the recipe extract."
    parser = Parser(prog="bigbatch triples", description=what)
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL", help="one of entities, then one of relations")
    parser.add_argument("texts", nargs="*", default=[], metavar="TEXT", help="a text")
    parser.add_argument("--file", metavar="F", help="a .txt (a line each), .jsonl, .csv, .tsv or .parquet")
    parser.add_argument("--text-column", default="text", metavar="C", help="of the file (default text)")
    parser.add_argument("--format", choices=("jsonl", "ntriples"), default="jsonl", help="default jsonl, a line a text")
    parser.add_argument("--base", default=BASE, metavar="IRI", help=f"of ntriples: what names begin with ({BASE})")
    parser.add_argument("--least", type=float, default=0.5, metavar="P", help="the least probability (default 0.5)")
    parser.add_argument("--within", type=int, default=200, metavar="N", help="characters between a pair (default 200)")
    parser.add_argument("--batch-size", type=int, metavar="N", default=32, help="texts at once (default 32)")
    return parser
