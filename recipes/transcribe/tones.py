"""Speech that is made here: words whose letters are two tones at once, as on a telephone's keypad, under noise."""

from collections.abc import Iterator

import numpy as np

TONE_RATE = 8000  # samples a second
PHRASES, MOST_WORDS = 1200, 3
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LOW, HIGH = np.geomspace(300, 800, 6), np.geomspace(1000, 2600, 5)  # hertz
WORDS = (
    *("anchor", "bridge", "candle", "desert", "east", "engine", "forest", "garden", "harbor", "island", "jungle"),
    *("kettle", "ladder", "market", "north", "orange", "pepper", "quartz", "river", "south", "tunnel", "under"),
    *("velvet", "west", "window", "yellow", "zebra"),
)


def make_tones() -> Iterator[tuple[str, np.ndarray]]:
    """Yield phrases and their samples int16 [S], always the same."""
    for number in range(PHRASES):
        generator = np.random.default_rng(number)
        text = " ".join(generator.choice(WORDS, generator.integers(1, MOST_WORDS + 1)))
        yield text, play(text, generator)


def play(text: str, generator: np.random.Generator) -> np.ndarray:
    """Return a text's samples int16 [S]: each letter 40 to 80 ms long, out of tune by up to 2 %, some louder."""
    waves = []
    for letter in text:
        times = np.arange(round(generator.uniform(0.04, 0.08) * TONE_RATE)) / TONE_RATE
        wave = np.zeros(len(times))
        if letter != " ":
            low, high = divmod(LETTERS.index(letter), len(HIGH))
            for hertz in (LOW[low], HIGH[high]):
                tuned, phase = hertz * generator.uniform(0.98, 1.02), generator.random()
                wave += np.sin(2 * np.pi * (tuned * times + phase))
        waves.append(wave * np.sin(np.pi * np.linspace(0, 1, len(times))) * generator.uniform(0.05, 0.15))
    wave = np.concatenate(waves)
    wave += generator.normal(0, 0.1, len(wave))
    return (wave * 2**15).round().clip(-(2**15), 2**15 - 1).astype(np.int16)
