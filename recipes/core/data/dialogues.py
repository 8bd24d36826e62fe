"""Dialogues in JSON documents, as the messages of a user and an assistant."""

from typing import Any

from bigbatch.recipes.core.data.questions import Rows, objects_of, text_of
from bigbatch.recipes.core.errors import UserError

SGD_COLUMNS = ("id", "services", "messages")
SPEAKERS = {"USER": "user", "SYSTEM": "assistant"}


def sgd_rows(document: Any, file: str) -> Rows:
    """Yield the dialogues of a Schema-Guided Dialogue file (https://arxiv.org/abs/1909.05855), annotations left out.

    Raises UserError at the JSON path of what is not as it should be.
    """
    for place, dialogue in objects_of({"": document}, "", "", file, "dialogues"):
        messages = []
        for turn_place, turn in objects_of(dialogue, "turns", f"{place}.", file):
            speaker = text_of(turn, "speaker", turn_place, file)
            if speaker not in SPEAKERS:
                raise UserError(
                    f"{file}:{turn_place}", f"has the speaker {speaker!r}; right is {' or '.join(SPEAKERS)}"
                )
            messages.append({"role": SPEAKERS[speaker], "content": text_of(turn, "utterance", turn_place, file)})
        values = (str(dialogue.get("dialogue_id", place)), dialogue.get("services", []), messages)
        yield dict(zip(SGD_COLUMNS, values, strict=True)), place
