"""The whole way once on this machine, from raw text to generated text, each step as the command that a user types."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from bigbatch.launcher.local import count_gpus
from bigbatch.launcher.resolve import resolve
from bigbatch.recipes.core.errors import EXIT_DONE

RUN = "gpt/quick"
PROMPT = "Return the "


class Step(NamedTuple):
    """What a step is for, and its command without the leading `bigbatch`."""

    purpose: str
    arguments: list[str]


def quickstart() -> int:
    """Take every step in a fresh folder under runs/; stop at the first that fails and return its exit status."""
    began = time.monotonic()
    folder = _fresh_folder()
    steps = _steps(folder)
    for number, step in enumerate(steps, start=1):
        _say(f"\n[{number}/{len(steps)}] {step.purpose}\n$ {_typed(step.arguments)}")
        status = _run(step.arguments)
        if status != EXIT_DONE:
            _say(
                f"\nThe quick start ends here, at step {number}, with exit status {status}. To go on, type its command."
            )
            return status
    _say(_closing(folder, time.monotonic() - began))
    return EXIT_DONE


def _steps(folder: str) -> list[Step]:
    ranks = str(count_gpus() or 2)
    half = resolve(RUN).config.schedule.total_steps // 2
    model = f"{folder}/hugging_face"
    train = ["train", RUN, "--ranks", ranks, "--run-dir", folder, "--set", f"schedule.stop_step={half}"]
    resume = ["train", folder, "--ranks", ranks, "--set", "schedule.stop_step=null"]
    return [
        Step(f"Prepare the text, train a small GPT on {ranks} ranks, and stop half-way on purpose", train),
        Step("Go on where it stopped", resume),
        Step("Evaluate it on text that it has not seen", ["evaluate", folder]),
        Step("Convert it to a Hugging Face folder, compared with transformers' own model", ["convert", folder, model]),
        Step("Generate text", ["generate", model, "--prompt", PROMPT, "--max-new-tokens", "100", "--seed", "0"]),
        Step("Write a report to open in a browser", ["report", folder]),
    ]


def _fresh_folder() -> str:
    """Return runs/quickstart, or with the first number behind it that is free."""
    number = 1
    while True:
        name = "runs/quickstart" + (f"-{number}" if number > 1 else "")
        if not Path(name).exists():
            return name
        number += 1


def _run(arguments: list[str]) -> int:
    """Run one command to its end; Ctrl-C reaches it from the terminal, other signals from here."""
    process = subprocess.Popen([sys.executable, "-P", "-m", "bigbatch.launcher.cli", *arguments])

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None)}
    before |= {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _closing(folder: str, seconds: float) -> str:
    lines = [
        f"\nDone in {seconds // 60:.0f} min {seconds % 60:.0f} s. The report: {folder}/report.html",
        "Three commands to try next" + (":" if shutil.which("bigbatch") else ", after `. .venv/bin/activate`:"),
    ]
    return "\n".join([*lines, *map(_typed, _next_commands(folder))])


def _next_commands(folder: str) -> list[list[str]]:
    lion = ["--set", "optimizer.name=lion", "--set", "optimizer.learning_rate=0.0003"]
    return [
        ["generate", f"{folder}/hugging_face", "--prompt", "If the ", "--temperature", "1.0"],
        ["train", RUN, "--ranks", "2", *lion],
        ["recipes"],
    ]


def _typed(arguments: list[str]) -> str:
    return shlex.join(["bigbatch", *arguments])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
