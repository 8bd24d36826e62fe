"""Numbers in German and in English words: a small language pair whose word order differs, made here."""

from collections.abc import Iterator

NUMBER_COLUMNS = ("source", "target")
NUM_PAIRS = 12_000
SMALL, LARGEST, STEP = 1_000, 1_000_000, 617_411  # coprime to LARGEST - SMALL: every number once, neighbours apart


def _words(text: str) -> list[str]:
    return text.split()


_GERMAN = _words(
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
)
_GERMAN_TENS = _words("- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")
_ENGLISH = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_ENGLISH_TENS = _words("- - twenty thirty forty fifty sixty seventy eighty ninety")


def number_pairs() -> Iterator[dict[str, str]]:
    """Yield pairs of words for the numbers below a thousand and others below a million, always the same."""
    for index in range(NUM_PAIRS):
        number = index if index < SMALL else SMALL + index * STEP % (LARGEST - SMALL)
        yield {"source": german(number), "target": english(number)}


def german(number: int) -> str:
    """Return a number from 0 to 999,999 in German words, which are one word."""
    words = _german_below(number % 1000) if number % 1000 or not number else ""
    if number % 100 == 1:
        words += "s"  # eins, but eintausend
    return (f"{_german_below(number // 1000)}tausend" if number >= 1000 else "") + words


def english(number: int) -> str:
    """Return a number from 0 to 999,999 in British English words."""
    if number >= 1000:
        rest = number % 1000
        joint = " and " if 0 < rest < 100 else " "
        return f"{english(number // 1000)} thousand" + (joint + english(rest) if rest else "")
    if number >= 100:
        return f"{_ENGLISH[number // 100]} hundred" + (f" and {english(number % 100)}" if number % 100 else "")
    if number >= 20:
        return _ENGLISH_TENS[number // 10] + (f"-{_ENGLISH[number % 10]}" if number % 10 else "")
    return _ENGLISH[number]


def _german_below(number: int) -> str:
    """Return a number below 1,000, its 1 as it stands ahead of another word."""
    if number >= 100:
        return f"{_GERMAN[number // 100]}hundert" + (_german_below(number % 100) if number % 100 else "")
    if number >= 20:
        return (f"{_GERMAN[number % 10]}und" if number % 10 else "") + _GERMAN_TENS[number // 10]
    return _GERMAN[number]
