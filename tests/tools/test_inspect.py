import fcntl
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bigbatch.launcher import cli
from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.checkpoint import Reader
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.tensor_file import Entry, write_json, write_tensors
from bigbatch.tools import checkpoint_diff
from bigbatch.tools.inspect import main

MAKERS = {
    "no_manifest": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest: the save was interrupted"),
    "half_manifest": (
        lambda folder: os.truncate(folder / "manifest.json", 100),
        "manifest.json cannot be read (Unterminated string",
    ),
    "edited_manifest": (
        lambda folder: edit(folder / "manifest.json", b'"step": 3', b'"step": 4'),
        "manifest.json does not match its own hash",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / "rank_00001.safetensors", 5000),
        "rank_00001.safetensors has 5000 bytes, ",
    ),
    "lost_shard": (lambda folder: (folder / "rank_00001.safetensors").unlink(), "rank_00001.safetensors is missing"),
    "flipped_bit": (
        lambda folder: flip(folder / "rank_00000.safetensors"),
        "rank_00000.safetensors does not match its hash: its bytes have changed",
    ),
}
# What the manifest alone does not show.
SEEN_BY_VERIFY_ALONE = {"truncated", "lost_shard", "flipped_bit"}


def edit(path, before, after):
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run_dir(runs, tmp_path):
    """Copy a run whose one checkpoint, of step 3, is of ZeRO-3 on two ranks."""
    shutil.copytree(runs / "gpt2_tied", tmp_path / "run")
    return tmp_path / "run"


def damage(run_dir, kind, step):
    """Add a damaged copy of the checkpoint under another step."""
    folder = run_dir / f"checkpoints/step_{step:08d}"
    shutil.copytree(run_dir / "checkpoints/step_00000003", folder)
    MAKERS[kind][0](folder)


def printed(capsys, *arguments):
    """Run the verb; return its exit status and what it printed."""
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def test_a_whole_checkpoint_is_described_by_its_figures(run_dir, capsys):
    shards = (run_dir / "checkpoints/step_00000003").glob("*.safetensors")
    num_bytes = sum(path.stat().st_size for path in shards)
    for action in ("ls", "verify"):
        status, out = printed(capsys, action, run_dir, "--json")
        (row,) = json.loads(out)
        assert status == 0
        assert 0 <= row.pop("age_seconds") < 600
        assert row == {
            "checkpoint": "step_00000003",
            "step": 3,
            "problem": "",
            "bytes": num_bytes,
            "ranks": 2,
            "zero_stage": 3,
            "consumed_samples": 12,
            "tensors": 2 * 12 + 2 + 2,
            "content_id": "c" * 12,
        }


def test_the_table_says_whole_only_after_every_byte_was_read(run_dir, capsys):
    for action, state in (("ls", "committed"), ("verify", "whole")):
        status, out = printed(capsys, action, run_dir)
        assert status == 0
        head, row = out.splitlines()
        assert head.split() == ["checkpoint", "size", "ranks", "ZeRO", "samples", "seen", "age", "state"]
        assert row.split()[:6] == ["step_00000003", "0.5", "MB", "2", "3", "12"]
        assert row.split()[-1] == state


@pytest.mark.parametrize("kind", MAKERS)
def test_a_damaged_checkpoint_is_named_with_its_damage(run_dir, capsys, kind):
    damage(run_dir, kind, 7)
    status, out = printed(capsys, "verify", run_dir, "--json")
    assert status == 1
    sound, damaged = json.loads(out)
    assert (sound["step"], sound["problem"]) == (3, "")
    assert damaged["step"] == 7
    assert damaged["problem"].startswith(MAKERS[kind][1])
    status, out = printed(capsys, "verify", run_dir)
    assert status == 1
    rows = out.partition("step_00000007")
    assert "whole" in rows[0]
    assert "".join(rows[2].split()).startswith("".join(MAKERS[kind][1].split()))  # wrapped in its column
    status, out = printed(capsys, "ls", run_dir, "--json")
    assert status == 0
    assert (json.loads(out)[1]["problem"] == "") == (kind in SEEN_BY_VERIFY_ALONE)


def test_checkpoints_stand_in_the_order_of_their_steps(run_dir, capsys):
    for step, kind in ((100_000_000, "truncated"), (20, "no_manifest"), (5, "flipped_bit")):
        damage(run_dir, kind, step)
    (run_dir / "checkpoints/step_mine").mkdir()  # somebody else's folder is none
    _, out = printed(capsys, "verify", run_dir, "--json")
    rows = json.loads(out)
    assert [row["step"] for row in rows] == [3, 5, 20, 100_000_000]
    assert [bool(row["problem"]) for row in rows] == [False, True, True, True]


def test_the_command_line_exits_with_1_when_a_checkpoint_is_damaged(run_dir, capsys):
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == 0
    damage(run_dir, "flipped_bit", 4)
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == 1
    assert cli.main(["checkpoint", "ls", str(run_dir)]) == 0
    capsys.readouterr()
    assert cli.main(["checkpoint", "verify", str(run_dir / "checkpoints")]) == 2
    assert capsys.readouterr().err == f"error: {run_dir / 'checkpoints'}: is not a run folder: it has no run.json\n"


def test_a_run_without_checkpoints_says_so(run_dir, capsys):
    shutil.rmtree(run_dir / "checkpoints")
    assert printed(capsys, "verify", run_dir) == (0, "no checkpoints\n")
    assert printed(capsys, "ls", run_dir, "--json") == (0, "[]\n")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no run\.json"):
        main(["ls", str(tmp_path)])


# ----------------------------------------------------------------------------------------------------------------- diff


def changed(run_dir, step, changes=(), drop=()):
    """Write a copy of the checkpoint as one rank's, with changes {kind/name: function}, and without some tensors."""
    source = Reader(run_dir / "checkpoints/step_00000003")
    folder = run_dir / f"checkpoints/step_{step:08d}"
    folder.mkdir()
    names = [(kind, name) for name in source.tensors for kind in sorted(source.kinds()) if f"{kind}/{name}" not in drop]
    values = {(kind, name): source.read(name, kind) for kind, name in names}
    for key, change in dict(changes).items():
        pair = tuple(key.split("/", 1))
        values[pair] = change(values[pair])
    entries = [Entry(f"{kind}/{name}", torch.float32, tuple(value.shape)) for (kind, name), value in values.items()]
    shard = write_tensors(folder / "rank_00000.safetensors", entries, values.values())
    tensors = {}
    for (kind, name), value in values.items():
        tensor = tensors.setdefault(name, {"shape": list(value.shape), "dtype": "F32", "pieces": []})
        tensor["pieces"].append([shard["name"], kind, 0, value.numel()])
    manifest = source.manifest | {"step": step, "files": [shard], "tensors": tensors}
    manifest["xxh3_128"] = checkpoint._manifest_hash(manifest)
    write_json(folder / "manifest.json", manifest)
    return folder


def test_checkpoints_of_other_plans_with_the_same_numbers_are_equal(run_dir, capsys):
    a, b = run_dir / "checkpoints/step_00000003", changed(run_dir, 4)  # of two ranks' pieces, and of one file
    status, out = printed(capsys, "diff", a, b, "--json")
    found = json.loads(out)
    assert (status, found["equal"], found["tensors"]) == (0, True, [])
    assert [row["kind"] for row in found["kinds"]] == ["master", "exp_avg", "exp_avg_sq"]
    source = Reader(a)
    assert found["kinds"][0]["elements"] == sum(source.read(name).numel() for name in source.tensors)
    status, out = printed(capsys, "diff", a, b)
    assert status == 0
    assert out.endswith("all tensors are equal\n")


def test_a_difference_is_told_by_tensor_and_kind_with_the_figures_of_numpy(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_diff, "WINDOW_ELEMENTS", 100)  # so that tensors have several windows
    a = run_dir / "checkpoints/step_00000003"
    embedding, norm = (next(name for name in Reader(a).tensors if part in name) for part in ("embed", "norm"))
    generator = torch.Generator().manual_seed(0)

    def disturb(value):
        return value + 1e-3 * torch.randn(value.shape, generator=generator)

    b = changed(run_dir, 4, {f"master/{embedding}": disturb, f"exp_avg/{norm}": lambda value: value * 2})
    status, out = printed(capsys, "diff", a, b, "--json")
    found = json.loads(out)
    assert (status, found["equal"]) == (1, False)
    rows = {f"{row['kind']}/{row['name']}": row for row in found["tensors"]}
    assert rows.keys() == {f"master/{embedding}", f"exp_avg/{norm}"}
    before, after = (Reader(folder).read(embedding).double().numpy() for folder in (a, b))
    row = rows[f"master/{embedding}"]
    assert row["differing"] == int((before != after).sum())
    assert row["max_abs"] == pytest.approx(np.abs(before - after).max())
    assert row["relative_norm"] == pytest.approx(np.linalg.norm(before - after) / np.linalg.norm(before))
    assert rows[f"exp_avg/{norm}"]["relative_norm"] == pytest.approx(1.0)
    kinds = {row["kind"]: row for row in found["kinds"]}
    whole = np.concatenate([Reader(a).read(name).double().numpy().ravel() for name in Reader(a).tensors])
    assert kinds["master"]["max_abs"] == row["max_abs"]
    assert kinds["master"]["relative_norm"] == pytest.approx(
        np.linalg.norm(before - after) / np.linalg.norm(whole), rel=1e-9
    )
    assert kinds["exp_avg_sq"]["differing"] == 0
    status, out = printed(capsys, "diff", a, b)
    assert (status, "all tensors are equal" in out) == (1, False)


def test_what_only_one_has_and_what_has_another_shape_is_a_difference(run_dir, capsys):
    a = run_dir / "checkpoints/step_00000003"
    first, second = list(Reader(a).tensors)[:2]
    shorter = {f"{kind}/{first}": lambda value: value[:5] for kind in ("master", "exp_avg", "exp_avg_sq")}
    b = changed(run_dir, 4, shorter, drop=[f"exp_avg/{second}"])
    _, out = printed(capsys, "diff", a, b, "--json")
    found = json.loads(out)
    assert not found["equal"]
    assert (found["only_in_a"], found["only_in_b"]) == ([f"exp_avg/{second}"], [])
    shape = Reader(a).tensors[first]["shape"]
    assert {row["name"] for row in found["shapes"]} == set(shorter)
    assert found["shapes"][0] | {"name": ""} == {"name": "", "a": shape, "b": [5, *shape[1:]]}
    status, out = printed(capsys, "diff", b, a)
    assert status == 1
    assert f"exp_avg/{second}: only in B" in out


def test_a_nan_equals_a_nan_and_differs_from_a_number(run_dir, capsys):
    name = next(iter(Reader(run_dir / "checkpoints/step_00000003").tensors))
    with_nan = changed(run_dir, 4, {f"master/{name}": lambda value: value.index_fill(0, torch.tensor([1]), torch.nan)})
    again = changed(run_dir, 5, {f"master/{name}": lambda value: value.index_fill(0, torch.tensor([1]), torch.nan)})
    assert printed(capsys, "diff", with_nan, again)[0] == 0
    status, out = printed(capsys, "diff", run_dir / "checkpoints/step_00000003", with_nan, "--json")
    assert status == 1
    assert json.loads(out)["tensors"][0]["max_abs"] == "nan"  # strict JSON has no other


def test_runs_may_be_given_and_a_damaged_checkpoint_is_not_compared(run_dir, capsys):
    changed(run_dir, 4)
    a = run_dir / "checkpoints/step_00000003"
    _, out = printed(capsys, "diff", run_dir, a, "--json")
    assert json.loads(out)["a"]["step"] == 4
    flip(a / "rank_00000.safetensors")
    assert cli.main(["checkpoint", "diff", str(run_dir), str(a)]) == 2
    assert "the checkpoint is damaged: rank_00000.safetensors does not match its hash" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------- gc


def steps_left(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def make_best(run_dir, step, best_step):
    path = run_dir / f"checkpoints/step_{step:08d}/manifest.json"
    manifest = json.loads(path.read_text()) | {"best_step": best_step}
    manifest["xxh3_128"] = checkpoint._manifest_hash(manifest)
    path.write_text(json.dumps(manifest))


def test_gc_keeps_the_newest_the_best_and_the_permanent_and_tells_the_bytes(run_dir, capsys):
    for step in (4, 5, 6, 7, 8, 9):
        changed(run_dir, step)
    damage(run_dir, "no_manifest", 2)
    make_best(run_dir, 9, best_step=5)
    sizes = {
        step: sum(path.stat().st_size for path in (run_dir / f"checkpoints/step_{step:08d}").iterdir())
        for step in (2, 3, 6, 7)
    }
    arguments = ("gc", run_dir, "--keep", "1", "--keep-every", "4")
    status, out = printed(capsys, *arguments, "--dry-run", "--json")
    assert status == 0
    rows = json.loads(out)
    assert {row["step"]: row["bytes"] for row in rows} == sizes
    assert {row["step"] for row in rows if row["why"] == "interrupted save"} == {2}
    assert steps_left(run_dir) == [2, 3, 4, 5, 6, 7, 8, 9]
    _, out = printed(capsys, *arguments)
    assert out.splitlines()[-1].startswith("were removed: 4, ")
    assert f"({sum(sizes.values()):,} bytes)" in out
    assert steps_left(run_dir) == [4, 5, 8, 9]
    assert printed(capsys, *arguments)[1] == "were removed: 0, 0.0 MB (0 bytes)\n"


def test_gc_by_itself_applies_the_runs_own_retention(run_dir, capsys):
    for step in (4, 5, 6):
        changed(run_dir, step)
    printed(capsys, "gc", run_dir)
    assert json.loads((run_dir / "run.json").read_text())["checkpoint"]["keep"] == 2
    assert steps_left(run_dir) == [5, 6]


def test_gc_never_takes_the_newest_sound_checkpoint_though_newer_ones_are_there(run_dir, capsys):
    for kind, step in (("flipped_bit", 7), ("truncated", 8)):
        damage(run_dir, kind, step)
    printed(capsys, "gc", run_dir, "--keep", "1")
    assert steps_left(run_dir) == [3, 7, 8]
    flip(run_dir / "checkpoints/step_00000003/rank_00000.safetensors")
    assert cli.main(["checkpoint", "gc", str(run_dir), "--keep", "1"]) == 2
    assert "has no checkpoint that verifies" in capsys.readouterr().err
    assert steps_left(run_dir) == [3, 7, 8]


def test_gc_leaves_a_checkpoint_that_is_being_read(run_dir, capsys):
    changed(run_dir, 5)
    reader = Reader(run_dir / "checkpoints/step_00000003")
    assert cli.main(["checkpoint", "gc", str(run_dir), "--keep", "1"]) == 0
    assert "step_00000003 is being read, and stays" in capsys.readouterr().err
    assert steps_left(run_dir) == [3, 5]
    reader.verify()
    del reader
    printed(capsys, "gc", run_dir, "--keep", "1")
    assert steps_left(run_dir) == [5]


def test_a_reader_that_waited_for_a_removal_finds_no_checkpoint(run_dir):
    folder = run_dir / "checkpoints/step_00000003"
    with (folder / "manifest.json").open("r+b") as manifest, ThreadPoolExecutor(1) as pool:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        waiting = pool.submit(Reader, folder)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        checkpoint.clear(folder)
        manifest.close()
        with pytest.raises(checkpoint.CheckpointDamagedError, match="it has no manifest"):
            waiting.result()


def test_gc_leaves_a_run_in_progress_alone(run_dir, capsys):
    damage(run_dir, "no_manifest", 9)  # it may be the save that is being written
    with (run_dir / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["checkpoint", "gc", str(run_dir)]) == 2
    assert "a run is in progress here" in capsys.readouterr().err
    assert steps_left(run_dir) == [3, 9]
    assert cli.main(["checkpoint", "gc", str(run_dir), "--keep", "0"]) == 2
    assert "found '0'; right is a number from 1 on" in capsys.readouterr().err
