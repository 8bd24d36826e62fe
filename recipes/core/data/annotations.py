"""Annotated sentences in files: columns of words and tags, and sentences with two marked words and their relation."""

import re
from collections.abc import Iterable, Iterator

SENTENCE_COLUMNS = ("lines",)
RELATION_COLUMNS = ("id", "text", "relation")
DOCUMENT_START = "-DOCSTART-"
_NUMBERED = re.compile(r'(?P<id>\d+)\s+"?(?P<text>.*?)"?\s*')

Lines = Iterable[tuple[int, str]]  # each with its number


def conll_rows(lines: Lines) -> Iterator[tuple[dict[str, list[list[str]]], int]]:
    """Yield each sentence as `lines`, of each line its fields, and the number of its first line.

    A line is a word with further fields behind it, by tabs where there are any, else by spaces; a blank one ends the
    sentence.
    """
    for number, block in _blocks(lines):
        fields = [line.split("\t") if "\t" in line else line.split() for line in block]
        if fields[0][0] != DOCUMENT_START:
            yield {"lines": fields}, number


def semeval_rows(lines: Lines) -> Iterator[tuple[dict[str, str], int]]:
    """Yield each sentence of SemEval-2010 task 8, its relation, "" where none is given, and its line's number.

    A sentence is a line with a number and a text in quotation marks; its relation is the next line, and a comment may
    follow (https://aclanthology.org/S10-1006).
    """
    for number, block in _blocks(lines):
        found = _NUMBERED.fullmatch(block[0])
        name, text = (found["id"], found["text"]) if found else ("", block[0])
        relation = block[1].strip() if len(block) > 1 and not block[1].startswith("Comment") else ""
        yield dict(zip(RELATION_COLUMNS, (name, text, relation), strict=True)), number


def _blocks(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """Yield runs of lines that are not blank, each with the number of its first."""
    block: list[str] = []
    first = 0
    for number, line in lines:
        if line.strip():
            first = first if block else number
            block.append(line.rstrip("\r\n"))
        elif block:
            yield first, block
            block = []
    if block:
        yield first, block
