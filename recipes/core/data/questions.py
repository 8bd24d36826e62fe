"""Questions on texts in JSON documents: SQuAD's format, and utterances whose slots are labeled."""

from collections.abc import Iterator
from typing import Any

from bigbatch.recipes.core.errors import UserError

SQUAD_COLUMNS = ("id", "title", "question", "context", "answers")
SLOT_COLUMNS = ("id", "slot", "question", "context", "answers")

Rows = Iterator[tuple[dict[str, Any], str]]  # the values of a row by column, and its JSON path


def squad_rows(document: Any, file: str) -> Rows:
    """Yield the questions of a document as SQuAD 1.1 or 2.0 has them (https://arxiv.org/abs/1806.03822).

    `answers` are objects with `text` and `answer_start`, none where there is none. Raises UserError at the JSON path of
    what is not as it should be.
    """
    for place, article in objects_of(document, "data", "", file):
        for paragraph_place, paragraph in objects_of(article, "paragraphs", f"{place}.", file):
            context = text_of(paragraph, "context", paragraph_place, file)
            for question_place, item in objects_of(paragraph, "qas", f"{paragraph_place}.", file):
                answers = item.get("answers", [])
                if item.get("is_impossible") and answers:
                    found = f"is_impossible, but has {len(answers)} answers; right is one or the other"
                    raise UserError(f"{file}:{question_place}", found)
                question = text_of(item, "question", question_place, file)
                values = (str(item.get("id", question_place)), str(article.get("title", "")), question, context)
                yield dict(zip(SQUAD_COLUMNS, (*values, answers), strict=True)), question_place


def slot_rows(document: Any, file: str) -> Rows:
    """Yield a question for each utterance and each slot that the document labels anywhere.

    The question is the slot's name in words, and "requested" before it where the system had just asked for this one. A
    slot that an utterance has no label for has no answer. The format is that of https://arxiv.org/abs/2005.08866.
    """
    utterances = list(objects_of({"": document}, "", "", file))
    labels = [list(objects_of({"labels": [], **item}, "labels", f"{place}.", file)) for place, item in utterances]
    slots = sorted({text_of(label, "slot", place, file) for found in labels for place, label in found})
    for (place, item), found in zip(utterances, labels, strict=True):
        context = text_of(item.get("userInput"), "text", f"{place}.userInput", file)
        asked = (item.get("context") or {}).get("requestedSlots") or []
        for slot in slots:
            spans = [(label.get("valueSpan") or {}) for _, label in found if label["slot"] == slot]
            answers = [{"start": span.get("startIndex", 0), "end": span.get("endIndex")} for span in spans]
            question = ("requested " if slot in asked else "") + slot.replace("_", " ")
            values = (f"{place}/{slot}", slot, question, context, answers)
            yield dict(zip(SLOT_COLUMNS, values, strict=True)), f"{place}({slot})"


def objects_of(
    holder: Any, key: str, where: str, file: str, what: str = "utterances"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a list, each with its JSON path; with the key "" the list is the document itself."""
    found = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(found, list):
        right = f"right is an object with a list {key!r}" if key else f"right is a list of {what}"
        raise UserError(f"{file}:{where.rstrip('.')}".rstrip(":"), f"has no list {key!r}; {right}" if key else right)
    for number, item in enumerate(found):
        place = f"{where}{key}[{number}]"
        if not isinstance(item, dict):
            raise UserError(f"{file}:{place}", "is no object")
        yield place, item


def text_of(holder: Any, key: str, place: str, file: str) -> str:
    """Return a text of an object; raise UserError at its JSON path where there is none."""
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, str):
        raise UserError(f"{file}:{place}", f"has no text {key!r}")
    return value
