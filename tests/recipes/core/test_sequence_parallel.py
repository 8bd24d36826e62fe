"""Models over two sequence ranks: what they exchange, and the loss and gradients of the same model on one rank.

Whole runs, and resumes under other plans, are in test_pipeline.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.parallel import Axis, Mesh
from bigbatch.recipes.core.plan import ParallelPlan
from bigbatch.recipes.gpt.config import GptConfig

EXACT = ("gpt2", "llama", "recompute", "one_token", "encoder", "no_target")


@pytest.fixture(scope="module")
def out(run_program, tmp_path_factory):
    """Run all cases in one start; return the folder that holds what came of them."""
    folder = tmp_path_factory.mktemp("sequence_models")
    run_program("sequence_models.py", folder)
    return folder


@pytest.fixture(scope="module")
def results(out):
    """Return what one rank alone has, and what each of the two has."""
    return [load_file(out / f"{name}.safetensors") for name in ("whole", "0", "1")]


@pytest.mark.parametrize("case", EXACT)
def test_the_ranks_gradients_add_up_to_those_of_one_rank(results, case):
    whole, first, second = results
    names = [name for name in whole if name.startswith(f"{case}/grad")]
    assert len(names) > 10
    for name in names:
        largest = float(whole[name].abs().max())
        torch.testing.assert_close(first[name] + second[name], whole[name], rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.parametrize("case", EXACT)
def test_the_loss_is_that_of_whole_rows_on_every_rank(results, case):
    whole, *ranks = results
    for found in ranks:
        assert found[f"{case}/loss"].item() == pytest.approx(whole[f"{case}/loss"].item(), rel=1e-6)


@pytest.mark.parametrize("case", ["encoder", "no_target"])
def test_pairs_are_judged_on_every_rank(results, case):
    whole, *ranks = results
    for found in ranks:
        torch.testing.assert_close(found[f"{case}/pairs"], whole[f"{case}/pairs"], rtol=1e-5, atol=1e-6)


def test_without_labels_each_rank_computes_whole_rows(results):
    whole, *ranks = results
    assert all(torch.equal(found["llama/logits"], whole["llama/logits"]) for found in ranks)


def test_every_parameter_has_a_gradient_on_a_rank_without_targets(results):
    whole, _, second = results
    names = {name for name in whole if name.startswith("no_target/grad")}
    assert names <= second.keys()
    assert not second["no_target/grad/head.transform.weight"].any()
    assert second["encoder/grad/head.transform.weight"].any()


def test_with_dropout_too_the_loss_is_that_of_whole_rows(results):
    whole, first, second = results
    assert torch.equal(first["dropout/loss"], second["dropout/loss"])
    assert not torch.isclose(first["dropout/loss"], whole["dropout/loss"])


def test_sequence_ranks_drop_by_numbers_of_their_own_and_their_tensor_ranks_by_the_same():
    drawn = []
    for rank in range(4):
        Engine._seed(SimpleNamespace(config=SimpleNamespace(seed=1), mesh=mesh_of(rank)), 3, 0)  # type: ignore[arg-type]
        drawn.append(torch.rand(8))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.isclose(drawn[0], drawn[2]).any()


def test_heads_of_own_tokens_become_own_heads_of_all_tokens_and_back(results):
    whole = results[0]["exchange/heads"]
    assert whole.shape == (2, 6, 4, 3)
    for rank, found in enumerate(results[1:]):
        assert torch.equal(found["exchange/heads"], whole.chunk(2, dim=2)[rank])
        assert torch.equal(found["exchange/fewer"], whole[:, :, rank : rank + 1])
        assert torch.equal(found["exchange/back"], whole.chunk(2, dim=1)[rank].flatten(2))
        assert torch.equal(found["exchange/first"], whole[:, 0])
    assert torch.equal(torch.cat([found["exchange/grad"] for found in results[1:]], 1), results[0]["exchange/grad"])


def test_deepspeed_told_of_sequence_ranks_adds_up_or_averages_or_forgets_their_gradients(out):
    """Why it is told that they are data ranks; the gradients are 1 and 2."""
    first, second = (json.loads((out / f"traps_{rank}.json").read_text()) for rank in range(2))
    assert [first[f"mpu_{stage}"] for stage in range(4)] == [3, 3, 3, 1.5]
    assert all(first[f"mpu_{stage}"] == second[f"mpu_{stage}"] for stage in range(4))
    assert all(first[f"mesh_param_{stage}"] != second[f"mesh_param_{stage}"] for stage in (0, 1))


@pytest.mark.parametrize("rank", range(8))
def test_sequence_ranks_read_the_same_samples_and_one_speaks_for_them(rank):
    mesh = mesh_of(rank)
    assert (mesh.data_rank, mesh.data_ranks) == (rank // 4, 2)
    assert (mesh.zero.rank, mesh.zero.size) == (rank // 2, 4)
    assert mesh.counts == (rank % 4 == 0)


def mesh_of(rank: int) -> Mesh:
    """Return the place of one of eight ranks."""
    place = ParallelPlan(data=2, sequence=2, tensor=2).coordinates(rank)
    axes = {"tensor": Axis(place.tensor, 2), "sequence": Axis(place.sequence, 2)}
    return Mesh(rank, 8, torch.device("cpu"), **axes)


def gpt_config(model: dict | None = None, length: int = 32, **sections) -> GptConfig:
    document = {
        "version": 1,
        "recipe": "gpt",
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 40, **(model or {})},
        "data": {"train": ["x"], "sequence_length": length},
        "batch": {"global_size": 8, "micro_size": 2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"total_steps": 1},
        **sections,
    }
    return GptConfig.model_validate_json(json.dumps(document))


@pytest.mark.parametrize(
    ("sections", "ranks", "expected"),
    [
        ({"length": 33}, 2, r"parallel\.sequence: 2 does not divide data\.sequence_length 33; right is 1 or 3"),
        (
            {"model": {"family": "llama", "num_key_value_heads": 2}, "parallel": {"sequence": 4}},
            4,
            r"4 does not divide num_key_value_heads 2; right is 2; legal and near: .*sequence 2, zero_stage 1",
        ),
        (
            {"model": {"family": "llama", "num_key_value_heads": 1}},
            2,
            r"parallel\.sequence: 2 does not divide num_key_value_heads 1; right is 1",
        ),
        (
            {"parallel": {"sequence": 4, "tensor": 2}},
            8,
            r"parallel\.sequence: 4 does not divide num_heads 4 / tensor 2",
        ),
        (
            {"parallel": {"sequence": 2, "pipeline": 2}},
            4,
            r"parallel\.sequence: 2 with pipeline 2: DeepSpeed's pipeline",
        ),
        ({}, 3, r"parallel\.sequence: .*2 does not divide 3 ranks"),
    ],
)
def test_a_sequence_degree_that_does_not_divide_is_refused_before_anything_starts(sections, ranks, expected):
    with pytest.raises(UserError, match=expected):
        complete(gpt_config(**{"parallel": {"sequence": 2}, **sections}), {}, ranks)


def test_a_recipe_whose_model_is_of_one_piece_refuses_sequence_ranks():
    content = gpt_config(parallel={"sequence": 2}).model_dump()
    config = RunConfig.model_validate({key: content[key] for key in RunConfig.model_fields})
    with pytest.raises(UserError, match=r"parallel\.sequence: 2, but this recipe's model is not divided"):
        complete(config, {}, 2)


def test_secondary_partitions_of_zero_do_not_go_with_sequence_ranks():
    native = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    with pytest.raises(UserError, match=r"zero_hpz_partition_size: 2 does not go with parallel\.sequence 2"):
        complete(gpt_config(parallel={"sequence": 2}), native, 4)


def test_the_batch_is_divided_over_data_ranks_and_deepspeed_sees_sequence_ranks_as_such():
    content = complete(gpt_config(parallel={"sequence": 2}), {}, 4)
    assert (content["train_batch_size"], content["gradient_accumulation_steps"]) == (16, 2)
