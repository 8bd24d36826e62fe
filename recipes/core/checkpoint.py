"""Transactional checkpoints of logical tensors, readable under any plan and without unpickling.

A checkpoint is a folder `checkpoints/step_00001000` with one safetensors file a rank and one `manifest.json`. The
manifest names every logical tensor (name, shape) and where its pieces lie: file, kind (`master`, or a state of the
optimizer), first element and length in the flattened tensor; and where a tensor rank had but a share of it, what share:
[dim, [[begin, end], ...]], the piece being a range of these rows or columns put together. Where data ranks train alone
(parallel.sync local_sgd), `exp_avg@1` is that of data rank 1, and `exp_avg` reads as the mean of all ranks'. It is
written last, by rename, after all shards are on disk: a folder without a manifest that verifies does not exist. Who
reads a checkpoint holds a shared lock on its manifest, so that a run that goes on meanwhile does not retire it.

Longer than other files: what is written and how it is read back are one contract.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.fragments import Fragment, is_replicated
from bigbatch.recipes.core.layout import Share, copy_overlap, logical_shapes, rectangles, share_of
from bigbatch.recipes.core.local_sgd import ANCHOR, MOMENTUM
from bigbatch.recipes.core.optim import set_state, state_keys
from bigbatch.recipes.core.parallel import ALONE, Mesh
from bigbatch.recipes.core.tensor_file import (
    Entry,
    TensorFile,
    hash_file,
    sync_folder,
    write_json,
    write_tensors,
)

FORMAT_VERSION = 2  # 1 has no pieces of rows or columns
MANIFEST = "manifest.json"
MASTER = "master"
MOST_OPEN_FILES = 64
HASHING_THREADS = 4  # a file system of many disks is no faster than its reader

FirstText = Callable[[str], str]  # Mesh.first_text, or the same over another group


class Piece(NamedTuple):
    """A flat range of one kind of one logical tensor or of a share of it, and the file that holds it."""

    file: str
    kind: str
    start: int
    length: int
    share: list[Any] | None = None
    """[dim, ranges]; None: of the whole tensor."""


class CheckpointDamagedError(Exception):
    """A checkpoint that does not verify; says which file and how."""


# ---------------------------------------------------------------------------------------------------------------- save


class Part(NamedTuple):
    """What this rank writes of one kind of one logical tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole logical tensor."""
    kind: str
    start: int
    values: torch.Tensor  # [n]
    share: Share | None
    """What `start` counts in, where that is not the whole."""


def save(run_dir: Path, engine: Engine, mesh: Mesh, state: dict[str, Any]) -> Path:
    """Write a checkpoint of the engine and the loop's `state` (JSON), then apply retention; return its folder.

    A failure on any rank raises UserError on all of them; checkpoints that were there stay. Collective: every rank must
    call it.
    """
    return write(
        run_dir, engine.config, mesh, mesh.first_text, list(owned(engine, mesh)), {**state, **engine_state(engine)}
    )


def write(
    run_dir: Path, config: RunConfig, mesh: Mesh, first_text: FirstText, parts: list[Part], state: dict[str, Any]
) -> Path:
    """Write the parts of all ranks as one checkpoint; return its folder.

    Collective over the ranks of `first_text`: every rank must call it.
    """
    folder = checkpoint_dir(run_dir, state["step"])
    agreed = _Agreed(first_text, folder, mesh.is_writer)
    with agreed:
        if mesh.is_writer:
            clear(folder)
            folder.mkdir(parents=True)
    with agreed:
        shard = f"rank_{mesh.rank:05d}.safetensors"
        header = [Entry(f"{part.kind}/{part.name}", part.values.dtype, tuple(part.values.shape)) for part in parts]
        description = write_tensors(folder / shard, header, (part.values for part in parts))
        pieces = [[part.name, part.shape, _piece(shard, part)] for part in parts]
        write_json(folder / f"rank_{mesh.rank:05d}.json", {"file": description, "pieces": pieces})
        sync_folder(folder)
    with agreed:
        if mesh.is_writer:
            _commit(folder, mesh.world_size, state)
            _apply_retention(run_dir, config, state["step"], state.get("best_step", 0))
    return folder


def _piece(shard: str, part: Part) -> list[Any]:
    piece = [shard, part.kind, part.start, part.values.numel()]
    return [*piece, [part.share.dim, part.share.ranges]] if part.share else piece


def owned(engine: Engine, mesh: Mesh) -> Iterator[Part]:
    """Yield what this rank writes, float32, as views where it is that.

    Of what all ranks of ZeRO have (stage 0) each takes a part; what all tensor ranks have is the first one's, and what
    two stages of a pipeline have is the first stage's. Where data ranks train alone, each writes its own, a part of it
    each of its sequence ranks.
    """
    is_everywhere, local = is_replicated(engine.deepspeed), engine.local

    def taken(fragment: Fragment, kind: str, values: torch.Tensor, is_everywhere: bool) -> Iterator[Part]:
        sharing = mesh.zero if is_everywhere else mesh.sequence if local else ALONE
        size = mesh.expert.size if is_everywhere and fragment.is_expert else 1
        count, rank = sharing.size // size, sharing.rank // size
        begin, end = values.numel() * rank // count, values.numel() * (rank + 1) // count
        if begin < end:
            start, values = fragment.start + begin, values[begin:end].float()
            yield Part(fragment.name, fragment.shape, kind, start, values, fragment.share)

    def is_own(fragment: Fragment) -> bool:
        return fragment.name not in engine.copies and (mesh.tensor.rank == 0 or fragment.share is not None)

    own = f"@{mesh.data_rank}" if local else ""
    master = MASTER if local is None or local.is_met else MASTER + own
    for fragment in filter(is_own, engine.fragments()):
        yield from taken(fragment, master, fragment.master, is_everywhere and master == MASTER)
        for key in _present_keys(engine):
            yield from taken(fragment, key + own, fragment.state(engine.optimizer, key), is_everywhere and not local)
    for fragment, outer in local.pieces() if local else ():
        for kind in (MOMENTUM,) if master == MASTER else outer:  # at a meeting the masters are the outer parameters
            if is_own(fragment):
                yield from taken(fragment, kind, outer[kind], is_everywhere)
    for fragment in filter(is_own, engine.frozen()):
        yield from taken(fragment, MASTER, fragment.master, engine.deepspeed.zero_optimization_stage() < 3)


def _present_keys(engine: Engine) -> tuple[str, ...]:
    """Name the optimizer's state tensors; none before its first step."""
    return state_keys(engine.config.optimizer) if engine.optimizer.state else ()


def engine_state(engine: Engine) -> dict[str, Any]:
    """Return what a resume needs of the engine beside its tensors."""
    mesh, stage = engine.mesh, engine.deepspeed.zero_optimization_stage()
    state: dict[str, Any] = {"zero_stage": stage, "ranks": mesh.world_size}
    state |= {"tensor_ranks": mesh.tensor.size, "pipeline_ranks": mesh.pipeline.size}
    state |= {"sequence_ranks": mesh.sequence.size, "expert_ranks": mesh.expert.size}
    steps = [float(value["step"]) for value in engine.optimizer.state.values() if "step" in value]
    if engine.local:
        state["local_ranks"] = mesh.data_ranks
    state["optimizer"] = {"name": engine.config.optimizer.name, "steps": steps[0] if steps else None}
    if engine.loss_scaler:
        state["loss_scaler"] = {
            key: value
            for key, value in vars(engine.loss_scaler).items()
            if key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        }
    return state


def _commit(folder: Path, num_ranks: int, state: dict[str, Any]) -> None:
    """Gather the ranks' descriptions into the manifest: its rename is the moment from which the checkpoint exists."""
    tensors: dict[str, Any] = {}
    files = []
    for rank in range(num_ranks):
        path = folder / f"rank_{rank:05d}.json"
        description = json.loads(path.read_text())
        files.append(description["file"])
        for name, shape, piece in description["pieces"]:
            tensors.setdefault(name, {"shape": shape, "dtype": "F32", "pieces": []})["pieces"].append(piece)
    manifest = {"format": FORMAT_VERSION, **state, "files": files, "tensors": tensors}
    manifest["xxh3_128"] = _manifest_hash(manifest)
    write_json(folder / MANIFEST, manifest)
    sync_folder(folder)
    sync_folder(folder.parent)
    write_json(folder.parent / "latest", folder.name)
    sync_folder(folder.parent)
    for rank in range(num_ranks):
        (folder / f"rank_{rank:05d}.json").unlink()


def _manifest_hash(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "xxh3_128"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _apply_retention(run_dir: Path, config: RunConfig, newest_step: int, best_step: int) -> None:
    settings = config.checkpoint
    for folder in retired(run_dir, settings.keep, settings.keep_every_steps, newest_step, best_step):
        clear_unread(folder)  # one that is read now goes after a later save


def retired(run_dir: Path, keep: int, keep_every_steps: int | None, newest_step: int, best_step: int = 0) -> list[Path]:
    """List what interrupted saves left, and all but the newest `keep`, the best and the permanent checkpoints.

    Those of later steps than the newest sound one do not count: they did not verify when the run went on without them.
    """
    whole = committed(run_dir)
    debris = [folder for folder in checkpoint_dirs(run_dir) if folder not in whole]
    counted = [folder for folder in whole if step_of(folder) <= newest_step]
    surplus = [folder for folder in counted[keep:] if not keep_every_steps or step_of(folder) % keep_every_steps]
    return debris + [folder for folder in surplus if step_of(folder) != best_step]


def clear_unread(folder: Path) -> bool:
    """Remove a checkpoint unless a process reads it; return whether it is gone."""
    with ExitStack() as stack:
        if (folder / MANIFEST).exists():
            manifest = stack.enter_context((folder / MANIFEST).open("r+b"))  # NFS wants it writable
            try:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        clear(folder)
        return True


def clear(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that none is half there."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


class _Agreed:
    """Run a block on every rank; if it failed on any, raise on all, and clear the folder unless it is committed."""

    def __init__(self, first_text: FirstText, folder: Path, is_writer: bool) -> None:
        self.first_text, self.folder, self.is_writer = first_text, folder, is_writer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, OSError):
            return
        reason = self.first_text(f"{error.strerror or error}" if error else "")
        if not reason:
            return
        if self.is_writer and not (self.folder / MANIFEST).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        raise UserError(
            str(self.folder), f"the checkpoint could not be written ({reason}); the earlier ones are untouched"
        ) from error


# ------------------------------------------------------------------------------------------------------------- restore


def restore(run_dir: Path, engine: Engine, mesh: Mesh, say: Any) -> dict[str, Any] | None:
    """Load the newest checkpoint that verifies, under whatever plan the engine has; return the loop's state.

    Return None where no save was ever finished. Those that do not verify are named through `say`; raise UserError if
    none does. Collective: every rank must call it.
    """
    names = mesh.broadcast_text(
        " ".join(folder.name for folder in committed(run_dir, say))
    )  # one rank's view of the disk
    for name in names.split():
        folder = run_dir / "checkpoints" / name
        opened, problem = _problem(lambda folder=folder: _opened(folder))
        problem = mesh.first_text(problem)
        if opened and not problem:
            _check_shapes(opened, engine.module)
            _, problem = _problem(lambda reader=opened: _load_and_verify(reader, engine, mesh))
            opened.release()  # an error has left a cycle that keeps it
            problem = mesh.first_text(problem)
        if opened and not problem:
            engine.write_back()
            return opened.manifest
        say(f"skipped {folder.name}: {problem}")
    if names:
        raise UserError(
            str(run_dir / "checkpoints"),
            "holds no checkpoint that verifies, so this run has nothing to go on from; "
            "bring one back, or give another --run-dir to begin at step 0",
        )
    return None


def _problem(act: Callable[[], "Reader | None"]) -> "tuple[Reader | None, str]":
    """Return what `act` returns and "", or None and how the checkpoint is damaged."""
    try:
        return act(), ""
    except (CheckpointDamagedError, OSError) as error:
        return None, str(error)


def _opened(folder: Path) -> "Reader":
    reader = Reader(folder)
    reader.check_files()
    return reader


def _load_and_verify(reader: "Reader", engine: Engine, mesh: Mesh) -> None:
    """Fill the engine while a thread hashes this rank's share of the files; each byte comes from the disk once.

    What a damaged checkpoint has put into the engine, the next one or the end of the process replaces.
    """
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(reader.check_hashes, mesh.rank, mesh.world_size)
        _load_into(reader, engine)
        hashed.result()


def _load_into(reader: "Reader", engine: Engine) -> None:
    """Fill the engine's masters, optimizer state and loss scaler, but not its working weights."""
    optimizer_state = reader.manifest["optimizer"]
    same_optimizer = optimizer_state["name"] == engine.config.optimizer.name
    steps = optimizer_state["steps"] if same_optimizer else None
    kinds = {kind.partition("@")[0] for kind in reader.kinds()}
    has_state = same_optimizer and (steps is not None or not kinds.isdisjoint(state_keys(engine.config.optimizer)))
    keys = state_keys(engine.config.optimizer) if has_state else ()
    # Each rank's own, if there are as many as then; else the mean of all.
    is_own = engine.local is not None and reader.manifest.get("local_ranks") == engine.mesh.data_ranks
    own = f"@{engine.mesh.data_rank}" if is_own else ""
    engine.optimizer.state.clear()
    states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for fragment in engine.fragments():
        reader.read_into(fragment.name, MASTER + own, fragment.start, fragment.master, fragment.share)
        if fragment.flat not in states:
            states[fragment.flat] = {key: torch.zeros_like(fragment.flat.detach()) for key in keys}
        for key, tensor in states[fragment.flat].items():
            part = tensor.view(-1)[fragment.offset : fragment.offset + fragment.master.numel()]
            reader.read_into(fragment.name, key + own, fragment.start, part, fragment.share)
    if has_state:
        for flat, tensors in states.items():
            set_state(engine.optimizer, flat, tensors, steps)
    for fragment in engine.frozen():
        reader.read_into(fragment.name, MASTER, fragment.start, fragment.master, fragment.share)
    if engine.local:
        engine.local.begin()
        engine.local.is_met = ANCHOR not in kinds
        for fragment, outer in engine.local.pieces():
            for kind in kinds & outer.keys():
                reader.read_into(fragment.name, kind, fragment.start, outer[kind], fragment.share)
    for key, value in reader.manifest.get("loss_scaler", {}).items():
        if engine.loss_scaler:
            setattr(engine.loss_scaler, key, value)


def _check_shapes(reader: "Reader", module: torch.nn.Module) -> None:
    """Refuse a checkpoint of another model, naming the first tensor that differs."""
    shapes = logical_shapes(module)
    for name, shape in shapes.items():
        if name not in reader.tensors:
            raise UserError(str(reader.folder), f"has no tensor {name!r} that the model needs: it is of another model")
        found = tuple(reader.tensors[name]["shape"])
        if found != shape:
            raise UserError(str(reader.folder), f"tensor {name!r} is {found}, the model's is {shape}: another model")
    extra = set(reader.tensors) - set(shapes)
    if extra:
        raise UserError(str(reader.folder), f"holds {min(extra)!r}, which the model does not have: another model")


# ---------------------------------------------------------------------------------------------------------------- read


class Reader:
    """A committed checkpoint: its manifest, and its logical tensors a range at a time."""

    def __init__(self, folder: Path) -> None:
        """Read and check the manifest; raise CheckpointDamagedError if it is not whole.

        No retention removes the checkpoint while the reader is there.
        """
        self.folder = folder
        try:
            self._manifest_file = (folder / MANIFEST).open("rb")  # held: with it goes the lock
            fcntl.flock(self._manifest_file, fcntl.LOCK_SH)
            if not os.fstat(self._manifest_file.fileno()).st_nlink:  # removed while we waited
                raise FileNotFoundError
            self.manifest = json.loads(self._manifest_file.read())
        except FileNotFoundError:
            raise CheckpointDamagedError("it has no manifest: the save was interrupted") from None
        except (ValueError, OSError) as error:
            raise CheckpointDamagedError(f"{MANIFEST} cannot be read ({error})") from None
        if not isinstance(self.manifest, dict) or self.manifest.get("xxh3_128") != _manifest_hash(self.manifest):
            raise CheckpointDamagedError(f"{MANIFEST} does not match its own hash")
        if not 1 <= self.manifest["format"] <= FORMAT_VERSION:
            known = f"this version reads 1 to {FORMAT_VERSION}"
            raise UserError(str(folder), f"has format {self.manifest['format']}; {known}")
        self.tensors: dict[str, Any] = self.manifest["tensors"]
        self._open: dict[str, TensorFile] = {}

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let go of the checkpoint, to which nothing may then be asked."""
        if hasattr(self, "_manifest_file"):
            self._manifest_file.close()

    def kinds(self) -> set[str]:
        """Name the kinds of tensors there are: `master` and the optimizer's states."""
        return {piece[1] for tensor in self.tensors.values() for piece in tensor["pieces"]}

    def verify(self) -> None:
        """Check that every file is there and has the bytes that were written; raise CheckpointDamagedError."""
        self.check_files()
        self.check_hashes()

    def check_files(self) -> None:
        """Check that every file is there and of its size, and that no tensor lies elsewhere."""
        names = {file["name"] for file in self.manifest["files"]}
        for name in names | {piece[0] for tensor in self.tensors.values() for piece in tensor["pieces"]}:
            if (self.folder / name).parent != self.folder or name not in names:
                raise CheckpointDamagedError(f"{name} lies outside the checkpoint")
        for file in self.manifest["files"]:
            path = self.folder / file["name"]
            if not path.exists():
                raise CheckpointDamagedError(f"{path.name} is missing")
            if path.stat().st_size != file["bytes"]:
                raise CheckpointDamagedError(
                    f"{path.name} has {path.stat().st_size} bytes, {file['bytes']} were written"
                )

    def check_hashes(self, part: int = 0, parts: int = 1) -> None:
        """Compare the hashes of every `parts`-th file; several are read at a time."""
        files = self.manifest["files"][part::parts]
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            hashes = pool.map(hash_file, (self.folder / file["name"] for file in files))
            for file, found in zip(files, hashes, strict=True):
                if found != file["xxh3_128"]:
                    raise CheckpointDamagedError(f"{file['name']} does not match its hash: its bytes have changed")

    def read(self, name: str, kind: str = MASTER, share: Share | None = None) -> torch.Tensor:
        """Return one logical tensor, or a share of it, float32."""
        shape = share.local_shape if share else self.tensors[name]["shape"]
        tensor = torch.empty(shape)
        self.read_into(name, kind, 0, tensor.view(-1), share)
        return tensor

    def read_into(self, name: str, kind: str, start: int, target: torch.Tensor, share: Share | None = None) -> None:
        """Fill `target` [n] with elements start..start+n of the flattened tensor, from whichever files hold them.

        With a share, of the flattened share. What only single ranks have is their mean.
        """
        first, *others = self._kinds_of(name, kind)
        self._fill(name, first, start, target, share)
        if others:
            part = torch.empty_like(target)
            for other in others:
                self._fill(name, other, start, part, share)
                target.add_(part)
            target.div_(1 + len(others))

    def _kinds_of(self, name: str, kind: str) -> list[str]:
        """Name the kind that is stored, all ranks' where there is none for all, that for all where a rank has none."""
        stored, shared = {piece[1] for piece in self.tensors[name]["pieces"]}, kind.partition("@")[0]
        if kind in stored or shared in stored:
            return [kind if kind in stored else shared]
        return sorted(other for other in stored if other.startswith(f"{shared}@")) or [kind]

    def _fill(self, name: str, kind: str, start: int, target: torch.Tensor, share: Share | None) -> None:
        filled = 0
        for piece in (Piece(*piece) for piece in self.tensors[name]["pieces"]):
            if piece.kind == kind:
                try:
                    filled += self._read_piece(name, piece, start, target, share)
                except ValueError as error:
                    raise CheckpointDamagedError(str(error)) from None
        if filled != target.numel():
            raise CheckpointDamagedError(f"{kind} of {name!r} covers {filled} of {target.numel()} elements")

    def _read_piece(self, name: str, piece: Piece, start: int, target: torch.Tensor, share: Share | None) -> int:
        """Copy what a piece has of a range; return how many elements that is."""
        shape = tuple(self.tensors[name]["shape"])
        stored = Share.of(shape, piece.share)
        key, end = f"{piece.kind}/{name}", start + target.numel()
        if stored == share:  # both are ranges of the same tensor
            low, high = max(start, piece.start), min(end, piece.start + piece.length)
            if low < high:
                self._file(piece.file).read_into(key, low - piece.start, target[low - start : high - start])
            return max(0, high - low)

        def read(begin: int, end: int) -> torch.Tensor:
            staged = torch.empty(end - begin)
            self._file(piece.file).read_into(key, begin, staged)
            return staged

        theirs = rectangles(shape, stored, piece.start, piece.start + piece.length)
        return copy_overlap(target, rectangles(shape, share, start, end), read, theirs)

    def _file(self, name: str) -> TensorFile:
        """Return a shard, open; it stays so, for tensors that are neighbours in the model are so in the files."""
        if name not in self._open:
            if len(self._open) == MOST_OPEN_FILES:
                del self._open[next(iter(self._open))]
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step_"))


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """List the checkpoint folders, whole or not, newest first; what else lies beside them is left alone."""
    folders = [path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(folders, key=step_of, reverse=True)


def committed(run_dir: Path, say: Any = None) -> list[Path]:
    """List the folders that have a manifest, newest first; those without are named through `say`."""
    folders = checkpoint_dirs(run_dir)
    for folder in folders:
        if say and not (folder / MANIFEST).exists():
            say(f"skipped {folder.name}: the save was interrupted")
    return [folder for folder in folders if (folder / MANIFEST).exists()]


def newest(run_dir: Path) -> Reader:
    """Open the newest committed checkpoint that verifies; name those skipped; raise UserError if there is none."""
    folders = committed(run_dir)
    for folder in folders:
        try:
            reader = Reader(folder)
            reader.verify()
        except (CheckpointDamagedError, OSError) as error:
            print(f"skipped {folder.name}: {error}", file=sys.stderr, flush=True)
            continue
        return reader
    if committed(run_dir) != folders:  # a run that goes on has saved and retired meanwhile
        return newest(run_dir)
    raise UserError(str(run_dir), "has no checkpoint that verifies (bigbatch checkpoint verify says more)")


def best(run_dir: Path) -> Reader:
    """Open the checkpoint that is best by `evaluate.best_by`, where the run has that; else the newest that verifies."""
    last = newest(run_dir)
    step = last.manifest.get("best_step", 0)
    if step in (0, last.manifest["step"]):
        return last
    try:
        reader = Reader(checkpoint_dir(run_dir, step))
        reader.verify()
    except (CheckpointDamagedError, OSError) as error:
        if committed(run_dir)[:1] != [last.folder]:
            return best(run_dir)
        raise UserError(str(checkpoint_dir(run_dir, step)), f"is the best checkpoint, and damaged: {error}") from None
    return reader


def open_checkpoint(path: Path) -> Reader:
    """Open a checkpoint's folder, or a run's best checkpoint; raise UserError if it is damaged."""
    if not (path / MANIFEST).exists():
        return best(path)
    try:
        reader = Reader(path)
        reader.verify()
    except CheckpointDamagedError as error:
        raise UserError(str(path), f"the checkpoint is damaged: {error}") from None
    return reader


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Copy the masters of a checkpoint (or of a run's best) into a model's parameters, one tensor at a time.

    Raise UserError if the checkpoint is damaged or of another model.
    """
    fill(open_checkpoint(path), model)


def fill(reader: Reader, model: torch.nn.Module) -> None:
    """Copy a verified checkpoint's masters, or a tensor rank's share of them, into a model's parameters.

    Raise UserError if it is of another model.
    """
    _check_shapes(reader, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, share=share_of(parameter)))
