"""Train small GPTs to be converted, and kill conversions: `convert_cases.py OUT`.

OUT/<run>/ is a run folder with its checkpoint; OUT/killed/<place>/ what a conversion leaves that is killed there, and
OUT/killed.json each one's exit status.
"""

import json
import os
import pydoc_data.topics
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_ranks import import_everything, run_forked

from bigbatch.recipes.core import worker
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig
from bigbatch.tools import convert

TOPICS = ("for", "if", "while", "try", "with", "class", "function", "import", "assert", "lambda")
# Large first weights: the models differ a lot from each other, and a wrong weight shows.
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 64, "initializer_range": 0.2}
RUNS: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "gpt2_tied": (3, 2, "fp32", {"family": "gpt2"}),
    "gpt2_untied": (1, 1, "bf16", {"family": "gpt2", "tie_embeddings": False}),
    "llama_tied": (1, 1, "fp16", {"family": "llama"}),
    "llama_grouped_untied": (3, 2, "bf16", {"family": "llama", "num_key_value_heads": 2, "tie_embeddings": False}),
}
PLACES = ("_parts", "_write_weights", "_write_rest", "compare", "_write_card", "sync_folder")


def write_run(out: Path, name: str) -> Path:
    """Write a run's documents."""
    stage, ranks, dtype, model = RUNS[name]
    document = {
        "version": 1,
        "recipe": "gpt",
        "about": {"purpose": "Be converted.", "needs": "little", "expect": "little"},
        "model": SHAPE | model,
        "data": {
            "train": [str(out / "text.txt")],
            "prepared_dir": str(out / "prepared"),
            "validation_fraction": 0.2,
            "validation_split": "tail",
            "sequence_length": 48,
            "tokenizer": {"kind": "bpe", "vocabulary_size": 300},
        },
        "batch": {"global_size": 4},
        "parallel": {"zero_stage": stage},
        "precision": {"dtype": dtype, "initial_scale_power": 6},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"total_steps": 3},
        "report": {"tensorboard": False},
        "sample": {"prompts": [], "max_new_tokens": 12, "temperature": 0.7, "top_k": 9, "top_p": 0.5},
    }
    config = GptConfig.model_validate_json(json.dumps(document))
    run_dir = out / name
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(config.model_dump_json())
    (run_dir / "deepspeed.json").write_text(json.dumps(complete(config, {}, ranks)))
    (run_dir / "environment.json").write_text(json.dumps({"content_id": "c" * 12}))
    return run_dir


def work(verb: str, run_dir: Path) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    status = worker.main([verb, str(run_dir)])
    sys.stdout.flush()
    os._exit(status)


def convert_killed(run_dir: Path, out: Path, place: str) -> None:
    """Convert, and die by SIGKILL when a function of the conversion has done its work."""
    torch.set_num_threads(1)
    function: Callable[..., Any] = getattr(convert, place)

    def do_and_die(*arguments: Any) -> Any:
        result = function(*arguments)
        if place != "_parts" or len(calls := [*getattr(do_and_die, "calls", []), 1]) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        do_and_die.calls = calls  # type: ignore[attr-defined]
        return result

    setattr(convert, place, do_and_die)
    convert.convert(run_dir, out)


def main(out: Path) -> None:
    """Play everything."""
    torch.set_num_threads(1)
    import_everything()
    import transformers  # noqa: F401 - for the children

    assert recipe
    (out / "text.txt").write_text("\n\n".join(pydoc_data.topics.topics[topic] for topic in TOPICS))
    for index, (name, (_, ranks, *_)) in enumerate(RUNS.items()):
        run_dir = write_run(out, name)
        if index == 0:
            assert run_forked(partial(work, "prepare", run_dir), 1, out / "prepare.txt") == [0]
        statuses = run_forked(partial(work, "train", run_dir), ranks, run_dir / "log.txt")
        if any(statuses):
            print(name, statuses, *(path.read_text() for path in run_dir.glob("log.*")))
            sys.exit(1)
    killed = {}
    for place in PLACES:
        folder = out / "killed" / place
        folder.mkdir(parents=True)
        (killed[place],) = run_forked(
            partial(convert_killed, out / "gpt2_tied", folder / "out", place), 1, out / "k.txt"
        )
    (out / "killed.json").write_text(json.dumps(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
