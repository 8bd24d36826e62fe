"""Damage checkpoints in every way and restore: `checkpoint_faults.py OUT`, on 1 and on 2 ranks in one start.

OUT/<ranks>/<scenario>/result_<rank>.json says what each rank took, was told, and was refused.
"""

import json
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_cases import own_batches
from forked_ranks import import_everything, run_forked
from torch import nn
from toy import Toy, loss, make_config

from bigbatch.recipes.core import checkpoint, runtime, tensor_file
from bigbatch.recipes.core.batch import plan_batch
from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.saver import Saved, Saver
from bigbatch.recipes.core.tensor_file import hash_file

PAGE = 4096
SHARDS = ("rank_00000.safetensors", "rank_00001.safetensors")


def make_engine(mesh: Mesh, model: nn.Module | None = None, **checkpoint_settings: Any) -> Engine:
    """Wrap a toy."""
    config = make_config({"parallel": {"zero_stage": 1}, "checkpoint": {"keep": 2, **checkpoint_settings}})
    torch.manual_seed(0)
    return Engine(model or Toy(), config, complete(config, {}, mesh.data_ranks), mesh)


def take_step(engine: Engine, mesh: Mesh, step: int) -> None:
    """Take one step, so that every checkpoint is another."""
    batches, num_targets = own_batches(engine.config, mesh, step, 1.0)
    engine.train_step(step, batches, loss, num_targets)


def weight_sum(engine: Engine, mesh: Mesh) -> float:
    """Tell the engine's masters apart from others."""
    return mesh.sum(float(sum(fragment.master.double().sum() for fragment in engine.fragments())))[0]


def in_turn(mesh: Mesh, act: Callable[[], Any]) -> None:
    """Have one rank change the files."""
    if mesh.is_writer:
        act()
    mesh.barrier()


# ------------------------------------------------------------------------------------------------------------- damages


def truncate(folder: Path, shard: str) -> None:
    """Cut the last byte off."""
    path = folder / shard
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(folder: Path, shard: str) -> None:
    """Flip one bit in the middle of the data."""
    path = folder / shard
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_manifest_byte(folder: Path, _: str) -> None:
    """Change a digit of the step: still JSON, and another number."""
    path = folder / "manifest.json"
    content = path.read_text()
    assert '"step": 2' in content
    path.write_text(content.replace('"step": 2', '"step": 3'))


def halve_manifest(folder: Path, _: str) -> None:
    """Leave half a manifest."""
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_manifest(folder: Path, _: str) -> None:
    """Leave a manifest of no bytes."""
    (folder / "manifest.json").write_bytes(b"")


def remove(folder: Path, shard: str) -> None:
    """Take a shard away."""
    (folder / shard).unlink()


def remove_manifest(folder: Path, _: str) -> None:
    """Leave what an interrupted save leaves."""
    (folder / "manifest.json").unlink()


class Trap:
    """Ends the process of whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (sys.exit, ("a pickle was opened",))


def plant_pickles(folder: Path, _: str) -> None:
    """Put pickles where careless code would find them."""
    for name in ("rank_00000.pt", "mp_rank_00_model_states.pt", "manifest.pkl", "optimizer.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap()))


def pickle_for_shard(folder: Path, shard: str, as_torch: bool = False) -> None:
    """Put a pickle in the place of a shard, with a manifest that vouches for it."""
    if as_torch:
        torch.save(Trap(), folder / shard)
    else:
        (folder / shard).write_bytes(pickle.dumps(Trap()))
    vouch(folder, shard, shard)


def pickle_by_name(folder: Path, shard: str) -> None:
    """Have the manifest name a pickle in place of a shard."""
    torch.save(Trap(), folder / "mp_rank_00_model_states.pt")
    vouch(folder, shard, "mp_rank_00_model_states.pt")


def header_of_a_pickle(folder: Path, shard: str) -> None:
    """Make the header, which is JSON in a sound shard, a pickle."""
    header = pickle.dumps(Trap())
    (folder / shard).write_bytes(len(header).to_bytes(8, "little") + header)
    vouch(folder, shard, shard)


def vouch(folder: Path, shard: str, name: str) -> None:
    """Write a file into the manifest in place of a shard, with its true size and hash."""
    path = folder / "manifest.json"
    file = {"name": name, "bytes": (folder / name).stat().st_size, "xxh3_128": hash_file(folder / name)}
    manifest = json.loads(path.read_text().replace(json.dumps(shard), json.dumps(name)))
    manifest["files"] = [file if old["name"] == name else old for old in manifest["files"]]
    manifest["xxh3_128"] = checkpoint._manifest_hash(manifest)
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "truncated_shard": (truncate, "rank_00000.safetensors"),
    "flipped_bit": (flip_bit, "rank_00000.safetensors"),
    "flipped_bit_in_the_last_shard": (flip_bit, "LAST"),
    "missing_shard": (remove, "LAST"),
    "flipped_manifest_byte": (flip_manifest_byte, ""),
    "half_a_manifest": (halve_manifest, ""),
    "empty_manifest": (empty_manifest, ""),
    "no_manifest": (remove_manifest, ""),
    "pickles": (plant_pickles, ""),
    "pickle_for_shard": (pickle_for_shard, "rank_00000.safetensors"),
    "torch_pickle_for_shard": (partial(pickle_for_shard, as_torch=True), "LAST"),
    "pickle_by_name": (pickle_by_name, "LAST"),
    "header_of_a_pickle": (header_of_a_pickle, "rank_00000.safetensors"),
}


def damaged(name: str, run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Damage step 2, restore, then save step 3 beside what is there."""
    damage, shard = DAMAGES[name]
    shard = shard.replace("LAST", f"rank_{mesh.world_size - 1:05d}.safetensors")
    in_turn(mesh, lambda: damage(checkpoint.checkpoint_dir(run_dir, 2), shard))
    engine = make_engine(mesh)
    result = restored(run_dir, engine, mesh)
    take_step(engine, mesh, result["step"])
    checkpoint.save(run_dir, engine, mesh, {"step": result["step"] + 1})
    return {**result, "after": checkpoint.newest(run_dir).manifest["step"]}


def restored(run_dir: Path, engine: Engine, mesh: Mesh) -> dict[str, Any]:
    """Restore; return what was taken and said, or the refusal."""
    messages: list[str] = []
    state = checkpoint.restore(run_dir, engine, mesh, messages.append)
    return {"step": state and state["step"], "said": messages, "weights": weight_sum(engine, mesh)}


# ----------------------------------------------------------------------------------------------------- other scenarios


class Wider(nn.Module):
    """One layer of another size."""

    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        toy = Toy()
        for name, child in toy.named_children():
            setattr(self, name, nn.Linear(*sizes[name]) if name in sizes else child)


def refused(model: nn.Module, run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Restore into another model."""
    return restored(run_dir, make_engine(mesh, model), mesh)


def other_models() -> dict[str, Callable[[Path, Mesh], dict[str, Any]]]:
    """Return a scenario for each way a model can differ."""
    smaller = Toy()
    del smaller.head
    larger = Toy()
    larger.extra = nn.Linear(2, 2)
    return {
        "another_shape": partial(refused, Wider(up=(12, 40))),
        "a_tensor_too_many": partial(refused, smaller),
        "a_tensor_missing": partial(refused, larger),
    }


def retention(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Save ten steps, keeping 2 and every fourth, with folders beside them that are none of ours."""
    first = checkpoint.checkpoint_dir(run_dir, 1)
    in_turn(mesh, lambda: shutil.copytree(first, first.with_suffix(".backup")))
    engine = make_engine(mesh, keep_every_steps=4)
    for step in range(3, 11):
        take_step(engine, mesh, step - 1)
        checkpoint.save(run_dir, engine, mesh, {"step": step})
    return {"folders": sorted(path.name for path in (run_dir / "checkpoints").iterdir())}


def damaged_newer(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Keep one checkpoint; the newest is damaged and of a later step than the one saved next."""
    in_turn(mesh, lambda: checkpoint.checkpoint_dir(run_dir, 2).rename(checkpoint.checkpoint_dir(run_dir, 9)))
    in_turn(mesh, lambda: flip_bit(checkpoint.checkpoint_dir(run_dir, 9), "rank_00000.safetensors"))
    engine = make_engine(mesh, keep=1)
    first = restored(run_dir, engine, mesh)
    checkpoint.save(run_dir, engine, mesh, {"step": 5})
    return {"first": first["step"], "second": restored(run_dir, engine, mesh)["step"]}


def all_damaged(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Damage every checkpoint, then restore."""
    for step in (1, 2):
        in_turn(mesh, lambda step=step: flip_bit(checkpoint.checkpoint_dir(run_dir, step), "rank_00000.safetensors"))
    return restored(run_dir, make_engine(mesh), mesh)


def failing_save(run_dir: Path, engine: Engine, mesh: Mesh, fresh: Engine) -> dict[str, Any]:
    """Save where it cannot be; then restore what is there."""
    refusal = None
    try:
        checkpoint.save(run_dir, engine, mesh, {"step": 3})
    except UserError as error:
        refusal = str(error)
    mesh.barrier()
    left = sorted(path.name for path in (run_dir / "checkpoints").glob("*"))
    return {"refusal": refusal, "left": left, **restored(run_dir, fresh, mesh)}


def on_small_disk(play: Callable[[Path, Path, Mesh], dict[str, Any]], run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Play a scenario with the checkpoints on a file system of their own; told as skipped where none may be mounted."""
    home, kept = run_dir / "checkpoints", run_dir / "kept"
    is_mounted = 0.0
    if mesh.is_writer:
        home.rename(kept)
        home.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "bigbatch-test", str(home)]
        is_mounted = float(subprocess.run(mount, capture_output=True, check=False).returncode == 0)
    if not any(mesh.sum(is_mounted)):
        return {"skip": "this machine does not let us mount a small file system"}
    try:
        in_turn(mesh, lambda: shutil.copytree(kept, home, dirs_exist_ok=True))
        return play(run_dir, home, mesh)
    finally:
        in_turn(mesh, lambda: subprocess.run(["umount", str(home)], check=True))


def full_disk(run_dir: Path, home: Path, mesh: Mesh) -> dict[str, Any]:
    """Save with no page free, with one, with two, ... until it fits; restore after each."""
    engine, fresh = make_engine(mesh), make_engine(mesh)
    take_step(engine, mesh, 0)
    tries = []
    for num_pages in range(20):
        in_turn(mesh, lambda num_pages=num_pages: leave_pages(home, num_pages))
        tries.append(failing_save(run_dir, engine, mesh, fresh))
        if not tries[-1]["refusal"]:
            break
    return {"tries": tries}


def leave_pages(home: Path, num_pages: int) -> None:
    """Fill a file system but for some pages."""
    ballast = home / "ballast"
    ballast.unlink(missing_ok=True)
    ballast.write_bytes(bytes(shutil.disk_usage(home).free - num_pages * PAGE))


def read_only(run_dir: Path, home: Path, mesh: Mesh) -> dict[str, Any]:
    """Save where nothing can be written, whoever tries."""
    engine, fresh = make_engine(mesh), make_engine(mesh)
    in_turn(mesh, lambda: subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True))
    return failing_save(run_dir, engine, mesh, fresh)


def limited(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Let one rank alone fail, by a limit on the size of its files."""
    engine, fresh = make_engine(mesh), make_engine(mesh)
    take_step(engine, mesh, 0)
    if mesh.rank == mesh.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        return failing_save(run_dir, engine, mesh, fresh)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def file_in_the_way(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Save where a file stands in place of the folder."""
    in_turn(mesh, lambda: checkpoint.checkpoint_dir(run_dir, 3).write_text("in the way"))
    engine, fresh = make_engine(mesh), make_engine(mesh)
    return failing_save(run_dir, engine, mesh, fresh)


def behind(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Save behind a step, though the disk stands still meanwhile; save again; save waited for. Restore each."""
    told: list[Saved] = []
    weights, restored_weights = [], []
    engine = make_engine(mesh, keep=9)
    first = checkpoint.checkpoint_dir(run_dir, 3)
    disk_moves, real_write = threading.Event(), tensor_file._write_all

    def write(file: Any, chunk: memoryview) -> None:
        disk_moves.wait(60)
        real_write(file, chunk)

    tensor_file._write_all = write
    with Saver(run_dir, engine, mesh, told.append) as saver:
        for step in (3, 4):
            weights.append(weight_sum(engine, mesh))
            saver.save({"step": step})
            there = [saver.has_failed, (first / checkpoint.MANIFEST).exists()]
            take_step(engine, mesh, step)
            if step == 3:
                there_first = there
                threading.Timer(0.2, disk_moves.set).start()
    tensor_file._write_all = real_write
    engine = make_engine(mesh, keep=9, asynchronous=False)
    with Saver(run_dir, engine, mesh, told.append) as saver:
        take_step(engine, mesh, 9)
        weights.append(weight_sum(engine, mesh))
        saver.save({"step": 5})
    for step in (5, 4, 3):
        restored_weights.insert(0, restored(run_dir, engine, mesh)["weights"])
        in_turn(mesh, lambda step=step: checkpoint.clear(checkpoint.checkpoint_dir(run_dir, step)))
    return {
        "told": [[saved.step, saved.folder.name] for saved in told],
        "in_order": all(saved.whole_seconds >= saved.stall_seconds > 0 for saved in told),
        "waited": told[0].stall_seconds > 0.1,
        "after_first_save": there_first,
        "after_second_save": there,
        "weights": weights,
        "restored": restored_weights,
    }


def copied_late(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Save behind steps whose forward and backward pass is over before the state is copied, under every stage.

    Tell in what order things came, and which tensors are not those of a save that was waited for before.
    """
    results = {}
    stages: list[dict[str, Any]] = [{"zero_stage": stage} for stage in range(4)]
    for parallel in (*stages, {"zero_stage": 0, "sync": "local_sgd", "local_sgd": {"every_steps": 2}}):
        for dtype in ("fp32", "bf16"):
            config = make_config({"parallel": parallel, "precision": {"dtype": dtype}})
            engine = Engine(Toy(), config, complete(config, {}, mesh.data_ranks), mesh)
            take_step(engine, mesh, 0)
            name = "_".join(map(str, (parallel.get("sync", parallel["zero_stage"]), dtype)))
            before, behind = run_dir / f"{name}_before", run_dir / f"{name}_behind"
            checkpoint.save(before, engine, mesh, {"step": 3})
            order, losses = [], plan_batch(config.batch, mesh.data_ranks).accumulation_steps
            with Saver(behind, engine, mesh, lambda saved: None) as saver:
                copy = saver._snapshot

                def copy_late(parts, copy=copy, order=order, losses=losses):
                    while order.count("loss") < losses:
                        time.sleep(0.01)
                    time.sleep(0.1)
                    order.append("copy")
                    return copy(parts)

                def watched(module, batch, order=order):
                    order.append("loss")
                    return loss(module, batch)

                saver._snapshot = copy_late
                saver.save({"step": 3})
                order.append("saved")
                batches, num_targets = own_batches(config, mesh, 1, 1.0)
                engine.train_step(1, batches, watched, num_targets)
                order.append("step")
            readers = [checkpoint.Reader(checkpoint.checkpoint_dir(folder, 3)) for folder in (before, behind)]
            results[name] = {
                "order": list(dict.fromkeys(order)),
                "kinds": sorted(readers[1].kinds()),
                "different": [
                    f"{kind}/{tensor}"
                    for tensor in readers[0].tensors
                    for kind in readers[0].kinds()
                    if not torch.equal(*(reader.read(tensor, kind) for reader in readers))
                ],
            }
    return results


def failing_behind(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Save behind where a file stands in the way; see it failed without asking, then be told, then save elsewhere."""
    in_turn(mesh, lambda: checkpoint.checkpoint_dir(run_dir, 3).write_text("in the way"))
    engine = make_engine(mesh)
    told: list[Saved] = []
    refusal, began = "", time.monotonic()
    with Saver(run_dir, engine, mesh, told.append) as saver:
        saver.save({"step": 3})
        while not saver.has_failed and time.monotonic() - began < 60:
            saver.poll()
            time.sleep(0.01)
        seen = saver.has_failed
        try:
            saver.save({"step": 4})
        except UserError as error:
            refusal = str(error)
        saver.save({"step": 5})
    return {"seen": seen, "refusal": refusal, "told": [saved.step for saved in told]}


def failing_run(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Let a run fail of its own while a save is under way: the save is committed all the same."""
    engine = make_engine(mesh)
    told: list[Saved] = []
    try:
        with Saver(run_dir, engine, mesh, told.append) as saver:
            saver.save({"step": 3})
            raise ArithmeticError("of its own")
    except ArithmeticError as error:
        reason = str(error)
    return {
        "reason": reason,
        "told": [saved.step for saved in told],
        "step": checkpoint.newest(run_dir).manifest["step"],
    }


def opens(run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Count how often a restore opens each shard."""
    opened: list[str] = []
    is_counting = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and is_counting and str(arguments[0]).endswith(".safetensors"):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(hook)
    result = restored(run_dir, make_engine(mesh), mesh)
    is_counting.clear()
    return {"step": result["step"], "most": int(max(mesh.sum(*(float(opened.count(name)) for name in SHARDS))))}


def scenarios() -> dict[str, Callable[[Path, Mesh], dict[str, Any]]]:
    """Return all by name."""
    return {
        "intact": lambda run_dir, mesh: restored(run_dir, make_engine(mesh), mesh),
        **{name: partial(damaged, name) for name in DAMAGES},
        **other_models(),
        "retention": retention,
        "damaged_newer": damaged_newer,
        "all_damaged": all_damaged,
        "full_disk": partial(on_small_disk, full_disk),
        "read_only": partial(on_small_disk, read_only),
        "file_size_limit": limited,
        "file_in_the_way": file_in_the_way,
        "behind": behind,
        "copied_late": copied_late,
        "failing_behind": failing_behind,
        "failing_run": failing_run,
        "opens": opens,
    }


def forbid_pickles() -> None:
    """End the process when anything is unpickled."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            raise SystemExit(f"unpickled {arguments}")

    sys.addaudithook(hook)


def run_all(out: Path) -> None:
    """Make a run of two checkpoints, then play every scenario on a copy of it."""
    torch.set_num_threads(1)
    mesh = runtime.start_mesh()
    base = out / str(mesh.world_size) / "base"
    engine = make_engine(mesh)
    for step in range(2):
        take_step(engine, mesh, step)
        checkpoint.save(base, engine, mesh, {"step": step + 1})
        weights = weight_sum(engine, mesh)
        in_turn(mesh, lambda weights=weights, step=step: (base / f"weights_{step + 1}.json").write_text(str(weights)))
    forbid_pickles()
    for name, play in scenarios().items():
        run_dir = base.parent / name
        in_turn(mesh, lambda run_dir=run_dir: shutil.copytree(base, run_dir))
        try:
            result = play(run_dir, mesh)
        except UserError as error:
            result = {"refusal": str(error)}
        (run_dir / f"result_{mesh.rank}.json").write_text(json.dumps(result))
    runtime.leave_mesh(mesh)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    import_everything()
    for num_ranks in (1, 2):
        (out / str(num_ranks)).mkdir()
        statuses = run_forked(partial(run_all, out), num_ranks, out / f"{num_ranks}.txt")
        print(num_ranks, statuses, *(path.read_text() for path in out.glob(f"{num_ranks}.*.txt")), flush=True)
        if any(statuses):
            sys.exit(1)
