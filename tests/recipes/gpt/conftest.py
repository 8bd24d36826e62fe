"""Texts that are the same everywhere, the folder of real data, and the command as a user has it."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NOUNS = ("engine", "river", "lamp", "teacher", "window", "garden", "letter", "machine", "road", "number")
VERBS = ("carries", "follows", "finds", "leaves", "paints", "counts", "opens", "remembers")
ADJECTIVES = ("old", "quiet", "seventh", "green", "patient", "broken", "narrow")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def made_documents() -> list[str]:
    """Return 120 short documents, the same ones on every machine and under every Python."""
    generator = random.Random(2)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    def sentence() -> str:
        return f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} a {pick(NOUNS)}."

    return [" ".join(sentence() for _ in range(1 + int(generator.random() * 4))) for _ in range(120)]


@pytest.fixture(scope="session")
def write_documents() -> Callable[[Path, list[str]], Path]:
    """Give a function that writes texts as JSON lines and returns the file."""

    def write(path: Path, texts: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """Return the folder of real data sets, having made sure of this one."""
    folder = Path(os.environ.get("BIGBATCH_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "tinyshakespeare" / "input.txt").is_file():
        pytest.skip(f"NO REAL DATA: {folder}/tinyshakespeare/input.txt does not exist; set BIGBATCH_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def bigbatch() -> Callable[..., subprocess.CompletedProcess]:
    """Give a function that runs the installed command in a folder, and checks its exit status."""

    def run(cwd: Path, *arguments: object, **settings: str) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).with_name("bigbatch")), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
        ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}"
        return ended

    return run
