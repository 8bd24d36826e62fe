"""Checkpoints: resumed bit for bit, read under any plan, never taken when torn, never lost by a failing save."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.checkpoint import CheckpointDamagedError, Reader, checkpoint_dir
from bigbatch.recipes.core.errors import UserError

STEPS, HALF = 6, 3
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_sharded")
RANKS = (1, 2)


def reader(outcome, step=STEPS) -> Reader:
    return Reader(checkpoint_dir(outcome.folder, step))


def tensors(outcome, step=STEPS) -> dict[str, torch.Tensor]:
    source = reader(outcome, step)
    return {f"{kind}/{name}": source.read(name, kind) for name in source.tensors for kind in source.kinds()}


def losses(outcome) -> list[float]:
    return [step["loss"] for step in outcome.steps]


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("plan", STAGES)
def test_a_new_process_goes_on_bit_for_bit_as_the_uninterrupted_run(plan, dtype, ranks, engine_cases):
    whole = engine_cases("train", ranks, f"{plan}_{dtype}_dropout")
    resumed = engine_cases("resume", ranks, f"{plan}_{dtype}_dropout")
    assert len(resumed.steps) == STEPS - HALF
    assert resumed.steps == whole.steps[HALF:]  # loss, gradient norm, learning rate, loss scale: the same numbers
    found, expected = tensors(resumed), tensors(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    manifests = [
        {key: reader(outcome).manifest.get(key) for key in ("optimizer", "loss_scaler")} for outcome in (resumed, whole)
    ]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("after", ["zero0", "zero1", "zero3_sharded", "zero2_offload", "zero3_offload"])
@pytest.mark.parametrize("before", ["zero0", "zero1", "zero3_sharded"])
def test_a_checkpoint_is_gone_on_from_under_another_number_of_ranks_stage_and_offload(
    before, after, ranks, engine_cases
):
    whole = engine_cases("train", 3 - ranks, f"{before}_plain")
    resumed = engine_cases("resume", ranks, f"{after}_after_{before}")
    assert losses(resumed) == pytest.approx(losses(whole)[HALF:], rel=1e-6)
    found, expected = tensors(resumed), tensors(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm())


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("plan", ["zero0", "zero3_sharded"])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "lion", "lamb"])
def test_every_optimizers_state_moves_to_another_plan(name, plan, ranks, engine_cases):
    whole = engine_cases("train", 2, f"zero1_{name}")
    resumed = engine_cases("resume", ranks, f"{plan}_{name}")
    assert losses(resumed) == pytest.approx(losses(whole)[HALF:], rel=1e-6)
    assert reader(resumed).kinds() == reader(whole).kinds()


# --------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("plan", ["zero0", "zero1", "zero3_sharded"])
def test_the_shards_are_plain_safetensors_for_the_librarys_own_loader(plan, engine_cases):
    outcome = engine_cases("train", 2, f"{plan}_plain")
    folder = checkpoint_dir(outcome.folder, STEPS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
    shards = {path.name: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")}
    source = reader(outcome)
    assert sum(part.numel() for shard in shards.values() for part in shard.values()) == 3 * sum(
        source.read(name).numel() for name in source.tensors
    )
    for name, tensor in source.tensors.items():
        for kind in source.kinds():
            pieces = sorted([*piece[2:], piece[0]] for piece in tensor["pieces"] if piece[1] == kind)
            joined = torch.cat([shards[file][f"{kind}/{name}"] for _, _, file in pieces])
            assert torch.equal(joined.view(tensor["shape"]), source.read(name, kind))


def test_the_ranks_share_the_writing_evenly_at_stage_0(engine_cases):
    source = reader(engine_cases("train", 2, "zero0_plain"))
    first, second = (file["bytes"] for file in source.manifest["files"])
    assert first == pytest.approx(second, rel=0.02)


@pytest.fixture
def copied(engine_cases, tmp_path) -> Path:
    """A checkpoint folder to spoil, of two shards."""
    folder = checkpoint_dir(tmp_path, STEPS)
    shutil.copytree(checkpoint_dir(engine_cases("train", 2, "zero1_plain").folder, STEPS), folder)
    return folder


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_manifest_with_any_byte_changed_is_damaged_or_means_the_same(position, flip, copied):
    manifest = copied / "manifest.json"
    content = manifest.read_bytes()
    changed = bytearray(content)
    changed[int(position * len(content))] ^= flip
    manifest.write_bytes(changed)
    try:
        assert Reader(copied).manifest == json.loads(content)
    except CheckpointDamagedError as error:
        assert "manifest.json" in str(error)
    finally:
        manifest.write_bytes(content)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), shard=st.integers(0, 1))
def test_a_shard_with_any_bit_flipped_is_damaged_by_name(position, bit, shard, copied):
    path = copied / f"rank_{shard:05d}.safetensors"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(position * len(content))] ^= 1 << bit
    path.write_bytes(changed)
    with pytest.raises(CheckpointDamagedError, match=f"{path.name} does not match its hash"):
        Reader(copied).verify()
    path.write_bytes(content)


def rewritten(folder: Path, **changes) -> None:
    """Change the manifest and make its hash right again."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["xxh3_128"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_that_points_outside_its_folder_is_refused(copied):
    files = Reader(copied).manifest["files"]
    rewritten(copied, files=[files[0] | {"name": "../../elsewhere.safetensors"}])
    with pytest.raises(CheckpointDamagedError, match="lies outside the checkpoint"):
        Reader(copied).verify()


def test_a_checkpoint_of_a_format_to_come_is_refused_and_not_skipped(copied):
    rewritten(copied, format=3)
    with pytest.raises(UserError, match="has format 3; this version reads 1 to 2"):
        Reader(copied)


# ------------------------------------------------------------------------------------------------ weights by themselves


def test_a_plain_model_takes_the_weights_of_a_run_or_of_one_checkpoint(copied, toy):
    source = Reader(copied)
    for path in (copied, copied.parents[1]):
        model = toy.Toy()
        checkpoint.load_weights(path, model)
        for name, weight in model.named_parameters():
            assert torch.equal(weight, source.read(name))


def test_a_damaged_checkpoint_gives_no_weights(copied, toy):
    shard = copied / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"damaged: rank_00001.safetensors has \d+ bytes"):
        checkpoint.load_weights(copied, toy.Toy())
    with pytest.raises(UserError, match="has no checkpoint that verifies"):
        checkpoint.load_weights(copied.parents[1], toy.Toy())


def test_weights_of_another_model_are_refused_by_the_first_tensor_and_never_broadcast(copied, toy):
    model = toy.Toy()
    model.down = torch.nn.Linear(36, 1)
    with pytest.raises(UserError, match=r"tensor 'down.weight' is \(12, 36\), the model's is \(1, 36\)"):
        checkpoint.load_weights(copied, model)


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def faults(run_program, tmp_path_factory):
    """Play all fault scenarios once; give a function from (ranks, scenario) to each rank's result."""
    out = tmp_path_factory.mktemp("faults")
    run_program("checkpoint_faults.py", out)

    def results(ranks: int, scenario: str) -> list[dict]:
        folder = out / str(ranks) / scenario
        found = [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(ranks)]
        if "skip" in found[0]:
            pytest.skip(found[0]["skip"])
        assert all(result == found[0] for result in found)  # what one rank is told, all are
        for result in (found[0], *found[0].get("tries", ())):
            if result.get("weights"):
                result["whole"] = result["weights"] in [
                    float((folder / f"weights_{step}.json").read_text()) for step in (1, 2)
                ]
        return found

    return results


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("truncated_shard", r"rank_00000\.safetensors has \d+ bytes, \d+ were written"),
        ("flipped_bit", r"rank_00000\.safetensors does not match its hash: its bytes have changed"),
        ("flipped_bit_in_the_last_shard", r"rank_0000LAST\.safetensors does not match its hash"),
        ("missing_shard", r"rank_0000LAST\.safetensors is missing"),
        ("flipped_manifest_byte", r"manifest\.json does not match its own hash"),
        ("half_a_manifest", r"manifest\.json cannot be read"),
        ("empty_manifest", r"manifest\.json cannot be read"),
        ("no_manifest", r"the save was interrupted"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name_on_every_rank_and_the_one_before_taken(scenario, said, ranks, faults):
    result = faults(ranks, scenario)[0]
    assert (result["step"], result["whole"]) == (1, True)
    assert len(result["said"]) == 1
    pattern = "skipped step_00000002: " + said.replace("LAST", str(ranks - 1))
    assert re.match(pattern, result["said"][0])
    assert result["after"] == 2  # the damaged one was replaced by the save that followed


@pytest.mark.parametrize("ranks", RANKS)
def test_a_run_none_of_whose_checkpoints_verifies_does_not_begin_again_unasked(ranks, faults):
    refusal = faults(ranks, "all_damaged")[0]["refusal"]
    assert "checkpoints: holds no checkpoint that verifies" in refusal
    assert "give another --run-dir to begin at step 0" in refusal


@pytest.mark.parametrize("ranks", RANKS)
def test_an_intact_checkpoint_is_taken_without_a_word(ranks, faults):
    result = faults(ranks, "intact")[0]
    assert (result["step"], result["said"], result["whole"]) == (2, [], True)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_pickle_in_the_folder_is_never_opened(ranks, faults):
    result = faults(ranks, "pickles")[0]
    assert (result["step"], result["said"], result["after"]) == (2, [], 3)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("pickle_for_shard", "rank_00000.safetensors is no safetensors file"),
        ("torch_pickle_for_shard", "rank_0000LAST.safetensors is no safetensors file"),
        ("pickle_by_name", "mp_rank_00_model_states.pt is no safetensors file"),
        ("header_of_a_pickle", r"rank_00000.safetensors is no safetensors file \(UnicodeDecodeError"),
    ],
)
def test_a_pickle_that_the_manifest_vouches_for_is_refused_and_never_opened(scenario, said, ranks, faults):
    result = faults(ranks, scenario)[0]  # unpickling anything would have ended the program
    assert (result["step"], result["whole"], result["after"]) == (1, True, 2)
    assert re.match("skipped step_00000002: " + said.replace("LAST", str(ranks - 1)), result["said"][0])


@pytest.mark.parametrize("ranks", RANKS)
def test_a_restore_opens_each_shard_once_to_read_it_and_one_rank_once_to_hash_it(ranks, faults):
    result = faults(ranks, "opens")[0]
    assert result["step"] == 2
    assert result["most"] == 2


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("another_shape", "tensor 'up.weight' is (36, 12), the model's is (40, 12): another model"),
        ("a_tensor_too_many", "holds 'head.bias', which the model does not have: another model"),
        ("a_tensor_missing", "has no tensor 'extra.weight' that the model needs: it is of another model"),
    ],
)
def test_another_models_checkpoint_is_refused_with_the_first_tensor(scenario, message, ranks, faults):
    assert faults(ranks, scenario)[0]["refusal"].endswith(f"checkpoints/step_00000002: {message}")


@pytest.mark.parametrize("ranks", RANKS)
def test_retention_keeps_the_newest_the_permanent_and_what_is_not_its_own(ranks, faults):
    assert faults(ranks, "retention")[0]["folders"] == [
        "latest",
        "step_00000001.backup",
        *(f"step_{step:08d}" for step in (4, 8, 9, 10)),
    ]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_damaged_checkpoint_of_a_later_step_does_not_crowd_out_the_one_just_saved(ranks, faults):
    assert faults(ranks, "damaged_newer")[0] == {"first": 1, "second": 5}


@pytest.mark.parametrize("ranks", RANKS)
def test_a_full_disk_fails_the_save_on_all_ranks_wherever_it_fills_and_the_earlier_checkpoint_stays(ranks, faults):
    tries = faults(ranks, "full_disk")[0]["tries"]
    assert len(tries) > 5
    for attempt in tries[:-1]:
        assert "could not be written (No space left on device); the earlier ones are untouched" in attempt["refusal"]
        assert {"step_00000001", "step_00000002"} <= set(attempt["left"])
        # On the last page the manifest fits and only the pointer `latest` does not: then it is there, and whole.
        assert attempt["step"] == 3 if "step_00000003" in attempt["left"] else attempt["whole"]
    assert [attempt["step"] for attempt in tries].count(2) >= len(tries) - 2
    assert (tries[-1]["refusal"], tries[-1]["step"]) == (None, 3)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("read_only", "Read-only file system"),
        ("file_size_limit", "File too large"),  # on the last rank alone
        ("file_in_the_way", "Not a directory"),
    ],
)
def test_a_save_that_cannot_be_written_fails_on_all_ranks_with_the_reason_and_loses_nothing(
    scenario, reason, ranks, faults
):
    result = faults(ranks, scenario)[0]
    assert f"the checkpoint could not be written ({reason}); the earlier ones are untouched" in result["refusal"]
    assert {"step_00000001", "step_00000002"} <= set(result["left"])
    assert (result["step"], result["whole"]) == (2, True)


# --------------------------------------------------------------------------------------------------------------- behind


@pytest.mark.parametrize("ranks", RANKS)
def test_a_save_behind_holds_the_state_of_its_moment_though_steps_go_on(ranks, faults):
    result = faults(ranks, "behind")[0]
    assert result["told"] == [[step, f"step_{step:08d}"] for step in (3, 4, 5)]
    assert result["in_order"]
    assert result["restored"] == result["weights"]
    assert len(set(result["weights"])) == 3
    assert result["after_first_save"] == [False, False]  # neither failed nor committed: the disk stood still
    assert result["after_second_save"] == [False, True]  # it had waited for the first
    assert result["waited"]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_copy_of_a_save_behind_is_awaited_by_the_next_update_alone_at_every_stage(ranks, faults):
    results = faults(ranks, "copied_late")[0]
    assert len(results) == 10
    for name, result in results.items():
        assert result["order"] == ["saved", "loss", "copy", "step"], name
        assert result["different"] == [], name
        assert {"exp_avg", "exp_avg_sq"} <= {kind.partition("@")[0] for kind in result["kinds"]}, name


@pytest.mark.parametrize("ranks", RANKS)
def test_a_save_that_fails_behind_is_known_on_every_rank_and_raised_by_the_next(ranks, faults):
    result = faults(ranks, "failing_behind")[0]
    assert result["seen"]
    assert "step_00000003: the checkpoint could not be written (Not a directory)" in result["refusal"]
    assert result["told"] == [5]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_run_that_fails_of_its_own_commits_the_save_under_way(ranks, faults):
    assert faults(ranks, "failing_run")[0] == {"reason": "of its own", "told": [3], "step": 3}


# ----------------------------------------------------------------------------------------------------------------- kill


@pytest.fixture(scope="module")
def kill_walk(run_program, tmp_path_factory):
    out = tmp_path_factory.mktemp("kills")
    run_program("kill_walk.py", out)
    return json.loads((out / "result.json").read_text())


@pytest.fixture
def kills(kill_walk):
    return kill_walk["walk"]


def test_the_walk_kills_at_every_operation_of_a_save_and_of_retention_waited_for_or_behind(kills, kill_walk):
    operations = kills[-1]["operations"]
    assert len(kills) == len(operations) + 1  # the last save ran to its end
    assert [row["operations"] for row in kills[:-1]] == [operations[: n + 1] for n in range(len(operations))]
    kinds = {operation.split()[0] for operation in operations}
    assert kinds == {"open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir"}
    assert kill_walk["waited_for"] == operations
    assert sum(operation.startswith("write") for operation in operations) > 20
    assert "rename to manifest.json" in operations
    assert "rmdir step_00000001" in operations


def test_after_a_kill_at_any_operation_one_of_both_checkpoints_is_taken_whole(kills):
    for row in kills:
        taken = row["killed"]
        committed = "rename to manifest.json" in row["operations"][:-1]
        assert taken["step"] == (2 if committed else 1), row["operations"][-1]
        assert taken["same_as"] == [taken["step"]], row["operations"][-1]


def test_after_a_power_cut_at_any_operation_one_of_both_checkpoints_is_taken_whole(kills):
    for row in kills:
        taken = row["lost"]
        assert taken["step"] in (1, 2), row["operations"][-1]
        assert taken["step"] <= row["killed"]["step"], row["operations"][-1]
        assert taken["same_as"] == [taken["step"]], row["operations"][-1]
    assert kills[-1]["lost"]["step"] == 2


def test_the_next_save_succeeds_on_top_of_any_debris_and_clears_it(kills):
    for row in kills:
        for state in ("killed", "lost"):
            assert row[state]["after"] == 3
            assert row[state]["left"] == ["latest", "step_00000003"], row["operations"][-1]


def test_a_rank_killed_in_its_shard_ends_the_others_save_and_nothing_is_committed(kill_walk):
    result = kill_walk["lost_rank"]
    assert result["statuses"] == [1, -9]
    assert (result["step"], result["after"]) == (1, 2)
    assert result["said"] == ["skipped step_00000002: the save was interrupted"]
