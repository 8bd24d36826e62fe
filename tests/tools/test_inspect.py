import json
import os
import shutil

import pytest

from bigbatch.launcher import cli
from bigbatch.recipes.core.errors import UserError
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
