"""Train the GPT recipe through the worker, as the launcher would, in one start: `train_cases.py OUT`.

OUT/<case>/ is a run folder; OUT/result.json has each case's exit statuses and what its ranks printed.
"""

import json
import os
import pydoc_data.topics
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from forked_ranks import import_everything, run_forked

from bigbatch.recipes.core import worker
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig

TEXT = pydoc_data.topics.topics["for"][:1500]
DOCUMENT: dict[str, Any] = {
    "version": 1,
    "recipe": "gpt",
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 32, "dropout": 0.1},
    "data": {"validation_fraction": 0.2, "validation_split": "tail", "sequence_length": 16},
    "batch": {"global_size": 8, "micro_size": 2},
    "precision": {"dtype": "fp32"},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "schedule": {"total_steps": 10, "warmup_steps": 2},
    "checkpoint": {"every_steps": 3, "keep": 9},
    "evaluate": {"every_steps": 5},
    "report": {"every_steps": 1, "tensorboard": False},
    "sample": {"prompts": []},
}


class Cases:
    """Plays cases one after the other and remembers what came of each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.results: dict[str, list[dict[str, Any]]] = {}

    def run(self, case: str, num_ranks: int, verb: str = "train", ask_to_stop: tuple[int, str] | None = None) -> None:
        """Start the ranks of a case; `ask_to_stop` is the step after which the last rank gets which signal."""
        log = self.out / case / f"log{len(self.results.get(case, []))}.txt"
        statuses = run_forked(partial(self.work, verb, self.out / case, ask_to_stop), num_ranks, log)
        printed = [log.with_suffix(f".{rank}.txt").read_text() for rank in range(num_ranks)]
        self.results.setdefault(case, []).append({"statuses": statuses, "printed": printed})

    def work(self, verb: str, run_dir: Path, ask_to_stop: tuple[int, str] | None) -> None:
        """Be one rank."""
        if ask_to_stop and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            threading.Thread(target=send_signal, args=(run_dir, *ask_to_stop), daemon=True).start()
        status = worker.main([verb, str(run_dir)])
        sys.stdout.flush()
        os._exit(status)

    def write(self, case: str, num_ranks: int, **sections: dict[str, Any]) -> None:
        """Write the documents of a run folder; what a case changes is given as sections."""
        run_dir = self.out / case
        run_dir.mkdir(exist_ok=True)
        document = dict(DOCUMENT)
        data = {"train": [str(self.out / "text.txt")], "prepared_dir": str(self.out / "prepared")}
        document["data"] = {**document["data"], **data, "tokenizer": {"kind": "character"}}
        for section, settings in sections.items():
            document[section] = {**document.get(section, {}), **settings}
        config = GptConfig.model_validate_json(json.dumps(document))
        (run_dir / "run.json").write_text(config.model_dump_json())
        (run_dir / "deepspeed.json").write_text(json.dumps(complete(config, {}, num_ranks)))
        (run_dir / "environment.json").write_text(json.dumps({"content_id": "c" * 12}))


def send_signal(run_dir: Path, step: int, name: str) -> None:
    """Wait until a step is written down, then signal this process."""
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or f'"kind": "train", "step": {step},' not in metrics.read_text():
        time.sleep(0.002)
    os.kill(os.getpid(), getattr(signal, name))


def play(cases: Cases) -> None:
    """Play all cases."""
    out = cases.out
    (out / "text.txt").write_text(TEXT)
    for num_ranks in (1, 2):
        cases.write(f"whole_{num_ranks}", num_ranks)
        if num_ranks == 1:
            cases.run("whole_1", 1, "prepare")
        cases.run(f"whole_{num_ranks}", num_ranks)
    shutil.copytree(out / "whole_2", out / "evaluated")
    for num_ranks in (1, 2):
        cases.run("evaluated", num_ranks, "evaluate")
    cases.write("stopped_2", 2)
    cases.run("stopped_2", 2, ask_to_stop=(2, "SIGTERM"))
    cases.run("stopped_2", 2)
    cases.write("moved", 1)
    cases.run("moved", 1, ask_to_stop=(2, "SIGUSR1"))
    cases.write("moved", 2)
    cases.run("moved", 2)
    cases.write("cut_short", 1, schedule={"stop_step": 5})
    cases.run("cut_short", 1)
    cases.write("cut_short", 1)
    cases.run("cut_short", 1, ask_to_stop=(6, "SIGINT"))
    cases.write("waited_for", 2, checkpoint={"asynchronous": False})
    cases.run("waited_for", 2)
    cases.write("blocked", 2)
    (out / "blocked/checkpoints").mkdir()
    (out / "blocked/checkpoints/step_00000006").write_text("in the way")
    cases.run("blocked", 2)
    diverging = {"learning_rate": 1e38, "gradient_clipping": None}
    cases.write("diverging", 1, optimizer=diverging)
    cases.run("diverging", 1)
    cases.write("skipping", 2, optimizer=diverging, precision={"on_non_finite": "skip", "max_skipped_steps": 2})
    cases.run("skipping", 2)
    shutil.copytree(out / "whole_1", out / "changed")
    (out / "text.txt").write_text(TEXT.replace("the", "teh"))
    cases.write("changed", 1, schedule={"total_steps": 12})
    cases.run("changed", 1, "prepare")
    cases.run("changed", 1)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    import_everything()
    assert recipe  # imported for the children
    cases = Cases(out)
    play(cases)
    (out / "result.json").write_text(json.dumps(cases.results))
