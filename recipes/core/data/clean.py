"""Text as it is tokenized: the same Unicode form and line ends everywhere, and nothing invisible."""

import re
import unicodedata

from bigbatch.recipes.core.config import CleanSection

# Control characters but for tab and line feed; line ends have become line feeds before.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE_END = re.compile(r"\r\n?")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


_UNIT_ENDS = {"line": re.compile(r"\n"), "sentence": re.compile(r"(?<=[.!?])\s+|\n\s*\n")}


def units(text: str, unit: str) -> list[str]:
    """Cut a text into its lines or sentences (a sentence ends at . ! ? before whitespace, or at an empty line)."""
    if unit == "text":
        return [text]
    return [part.strip() for part in _UNIT_ENDS[unit].split(text) if part.strip()]


def clean(text: str, section: CleanSection) -> str | None:
    """Return the text to train on, or None for a document that is too short, surrounding whitespace not counted.

    Half of a surrogate pair, which a JSON escape may hold and no UTF-8 can, becomes U+FFFD whatever the settings.
    """
    text = _SURROGATE.sub("\ufffd", text)
    if section.strip_control_characters:
        text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    if section.unicode_form != "none":
        text = unicodedata.normalize(section.unicode_form, text)
    return text if len(text.strip()) >= section.min_characters else None
