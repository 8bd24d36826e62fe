"""Kill a save at each of its operations and restore from what is left: `kill_walk.py OUT`.

Checkpoint A (step 1) is there, and a damaged one of step 2. A process saves B (step 2) behind its next steps, of which
retention then keeps B alone, and kills itself before its n-th operation, for every n: an operation is an opening for
writing, a chunk written (half of it, then), an fsync, a rename, an unlink, a mkdir or rmdir. Another process restores
from the debris as it is, and as a power cut might leave it: what was not synced is lost. A save that is waited for does
the same operations in the same order, so the walk is one for both. Then one of two ranks dies in a save.
OUT/result.json has a row for each operation, and what became of the two ranks.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoint_faults import flip_bit, make_engine, take_step
from forked_ranks import import_everything, run_forked

from bigbatch.recipes.core import checkpoint, runtime, tensor_file
from bigbatch.recipes.core.saver import Saver

SHARD = "rank_00000.safetensors"
CREATES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Saboteur:
    """Counts what a save does, keeps a journal of what is not on disk yet, and ends the process before operation n."""

    def __init__(self, kill_at: int, journal: Path) -> None:
        self.kill_at, self.journal = kill_at, journal
        self.operations: list[str] = []
        self.unsynced: set[str] = set()
        self.pending: list[tuple[str, str, str]] = []  # (kind, path, source or content)
        self.busy = False

    def install(self) -> None:
        """Watch this process from now on."""
        real_fsync, real_write = os.fsync, tensor_file._write_all

        def fsync(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self.operation(f"fsync {Path(path).name}")
            real_fsync(descriptor)
            self.unsynced.discard(path)
            self.pending = [entry for entry in self.pending if str(Path(entry[1]).parent) != path]

        def write(file: Any, chunk: memoryview) -> None:
            self.operation(f"write {len(chunk)} bytes", lambda: real_write(file, chunk[: len(chunk) // 2]))
            real_write(file, chunk)

        os.fsync, tensor_file._write_all = fsync, write
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of file operations before they happen."""
        if self.busy:
            return
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & CREATES:
            self.operation(f"open {Path(arguments[0]).name}")
            self.unsynced.add(arguments[0])
            self.pending.append(("create", arguments[0], ""))
        elif event == "os.rename":
            source, target = map(str, arguments[:2])
            self.operation(f"rename to {Path(target).name}")
            self.pending.append(("rename", target, source))
        elif event == "os.remove":
            self.operation(f"unlink {Path(arguments[0]).name}")
            if Path(arguments[0]).name == checkpoint.MANIFEST and Path(arguments[0]).is_absolute():
                self.busy = True
                self.pending.append(("unlink", str(arguments[0]), Path(arguments[0]).read_text()))
                self.busy = False
        elif event == "os.mkdir":
            self.operation(f"mkdir {Path(arguments[0]).name}")
            self.pending.append(("create", str(arguments[0]), ""))
        elif event == "os.rmdir":
            self.operation(f"rmdir {Path(arguments[0]).name}")

    def operation(self, name: str, half: Callable[[], None] = lambda: None) -> None:
        """Count; when it is time, do half of it and kill."""
        self.operations.append(name)
        if len(self.operations) == self.kill_at:
            half()
            self.end()
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self) -> None:
        """Leave the journal; watch no more."""
        self.busy, self.kill_at = True, 0
        content = {"operations": self.operations, "unsynced": sorted(self.unsynced), "pending": self.pending}
        self.journal.write_text(json.dumps(content))


def lose_what_was_not_synced(run_dir: Path, debris: Path, journal: dict[str, Any]) -> None:
    """Turn a copy of the debris into what a power cut may leave of it: torn contents, entries that never came to be."""

    def moved(path: str) -> Path:
        return debris / Path(path).relative_to(run_dir)

    for path in map(moved, journal["unsynced"]):
        if path.exists():
            os.truncate(path, path.stat().st_size // 2)
    for kind, path, other in reversed(journal["pending"]):
        target = moved(path)
        if kind == "create" and target.is_dir():
            shutil.rmtree(target)
        elif kind == "create":
            target.unlink(missing_ok=True)
        elif kind == "rename" and target.exists():
            target.rename(moved(other))
        elif kind == "unlink" and target.parent.exists():
            target.write_text(other)


def prepare(out: Path) -> None:
    """Make A, and beside it a damaged checkpoint of the step that B will have."""
    mesh = runtime.start_mesh()
    engine = make_engine(mesh)
    for step in range(2):
        take_step(engine, mesh, step)
        checkpoint.save(out / "pristine", engine, mesh, {"step": step + 1})
    shutil.copytree(out / "pristine", out / "whole")
    flip_bit(checkpoint.checkpoint_dir(out / "pristine", 2), SHARD)


def save_and_die(out: Path, kill_at: int) -> None:
    """Go on from A and save B, up to one operation of it, while the weights are changed again."""
    mesh = runtime.start_mesh()
    engine = make_engine(mesh, keep=1)
    if kill_at > 1:
        check(out, kill_at - 1, engine, mesh)
    run_dir = out / f"killed_{kill_at}"
    go_on_from_a(out, run_dir, engine, mesh)
    tensor_file.CHUNK_BYTES = 1000  # so that a shard has several
    with Saver(run_dir, engine, mesh, print) as saver:
        saboteur = Saboteur(kill_at, out / f"journal_{kill_at}.json")
        saboteur.install()
        saver.save({"step": 2})
        for step in (2, 3):
            take_step(engine, mesh, step)
    saboteur.end()  # there was no such operation: the walk is over
    check(out, kill_at, engine, mesh)
    go_on_from_a(out, out / "waited_for", engine, mesh)
    saboteur = Saboteur(0, out / "waited_for.json")
    saboteur.install()
    checkpoint.save(out / "waited_for", engine, mesh, {"step": 2})
    saboteur.end()


def go_on_from_a(out: Path, run_dir: Path, engine: Any, mesh: Any) -> None:
    """Have a copy of the run, restored, and a step further on."""
    shutil.copytree(out / "pristine", run_dir)
    state = checkpoint.restore(run_dir, engine, mesh, print)
    assert state
    assert state["step"] == 1
    take_step(engine, mesh, 1)


def check(out: Path, kill_at: int, engine: Any, mesh: Any) -> None:
    """Restore from the debris of a kill, in both forms; go on and save; write down what came of it."""
    killed, lost = out / f"killed_{kill_at}", out / f"lost_{kill_at}"
    journal = json.loads((out / f"journal_{kill_at}.json").read_text())
    shutil.copytree(killed, lost)
    lose_what_was_not_synced(killed, lost, journal)
    row = {"operations": journal["operations"]}
    for name, run_dir in (("killed", killed), ("lost", lost)):
        state = checkpoint.restore(run_dir, engine, mesh, print)
        step = state["step"] if state else None
        take_step(engine, mesh, 2)
        row[name] = {"step": step, "same_as": [s for s in (1, 2) if state and holds(run_dir, step, out / "whole", s)]}
        checkpoint.save(run_dir, engine, mesh, {"step": 3})
        row[name]["after"] = checkpoint.newest(run_dir).manifest["step"]
        row[name]["left"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        shutil.rmtree(run_dir)
    (out / f"row_{kill_at}.json").write_text(json.dumps(row))


def save_and_lose_a_rank(out: Path) -> None:
    """Save A, then B, of which rank 1 dies in the middle of its shard."""
    mesh = runtime.start_mesh()
    engine = make_engine(mesh)
    for step in range(2):
        take_step(engine, mesh, step)
        if step == 1 and mesh.rank == 1:
            Saboteur(4, out / "journal_of_rank_1.json").install()
        checkpoint.save(out / "lost_rank", engine, mesh, {"step": step + 1})


def restore_after_the_loss(out: Path) -> None:
    """Restore on two ranks, and save again."""
    mesh = runtime.start_mesh()
    engine = make_engine(mesh)
    messages: list[str] = []
    state = checkpoint.restore(out / "lost_rank", engine, mesh, messages.append)
    take_step(engine, mesh, 1)
    checkpoint.save(out / "lost_rank", engine, mesh, {"step": 2})
    after = checkpoint.newest(out / "lost_rank").manifest["step"]
    (out / "lost_rank.json").write_text(json.dumps({"step": state and state["step"], "said": messages, "after": after}))


def holds(run_dir: Path, step: int, other: Path, other_step: int) -> bool:
    """Compare two checkpoints' tensors bit by bit."""
    readers = [checkpoint.Reader(checkpoint.checkpoint_dir(*place)) for place in ((run_dir, step), (other, other_step))]
    return all(
        torch.equal(readers[0].read(name, kind), readers[1].read(name, kind))
        for name in readers[1].tensors
        for kind in readers[1].kinds()
    )


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    import_everything()
    statuses = run_forked(partial(prepare, out), 1, out / "log.txt")
    kill_at = 0
    while statuses in ([-signal.SIGKILL], [0]) and not (kill_at and statuses == [0]):
        kill_at += 1
        statuses = run_forked(partial(save_and_die, out, kill_at), 1, out / "log.txt")
    print(kill_at, statuses, (out / "log.0.txt").read_text())
    rows = [json.loads((out / f"row_{number}.json").read_text()) for number in range(1, kill_at + 1)]
    statuses = run_forked(partial(save_and_lose_a_rank, out), 2, out / "lost_rank.txt")
    run_forked(partial(restore_after_the_loss, out), 2, out / "after_the_loss.txt")
    waited_for = json.loads((out / "waited_for.json").read_text())["operations"]
    result = {
        "walk": rows,
        "waited_for": waited_for,
        "lost_rank": {"statuses": statuses, **json.loads((out / "lost_rank.json").read_text())},
    }
    (out / "result.json").write_text(json.dumps(result))
