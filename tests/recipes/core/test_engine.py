"""Every ZeRO stage and precision on 1 and 2 gloo ranks, against a plain torch loop written here."""

import json
import math

import pytest
import torch

from bigbatch.recipes.core import checkpoint

STEPS, HALF = 6, 3
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_sharded")
SOME_STAGES = ("zero0", "zero1", "zero2", "zero3_sharded")
RANKS = (1, 2)


def weights(outcome, step=STEPS) -> dict[str, torch.Tensor]:
    reader = checkpoint.Reader(checkpoint.checkpoint_dir(outcome.folder, step))
    return {name: reader.read(name) for name in reader.tensors}


def tensors(outcome, step) -> dict[str, torch.Tensor]:
    reader = checkpoint.Reader(checkpoint.checkpoint_dir(outcome.folder, step))
    return {f"{kind}/{name}": reader.read(name, kind) for name in reader.tensors for kind in reader.kinds()}


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Name the tensors that are not the same bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest |found - expected| / |expected| over the tensors, in 2-norms."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def values(outcome, name: str) -> list[float]:
    return [step[name] for step in outcome.steps]


def plain_training(toy, global_sizes=(8,) * STEPS, skipped=()):
    """Train with torch alone, whole batches in one piece; return losses, gradient norms and final weights."""
    torch.manual_seed(0)
    model = toy.Toy()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step, size in enumerate(global_sizes):
        warm_up, cosine = (step + 1) / 3, 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 7)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (warm_up if step < 2 else cosine)
        batch = {name: torch.from_numpy(array) for name, array in toy.samples(step, size).items()}
        result = toy.loss(model, batch)
        mean = result.sum / result.num_targets
        optimizer.zero_grad()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step not in skipped:
            optimizer.step()
        losses.append(mean.item())
        norms.append(norm.item())
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("plan", STAGES)
def test_every_stage_in_fp32_is_the_plain_torch_loop(plan, ranks, engine_cases, toy):
    outcome = engine_cases("train", ranks, f"{plan}_plain")
    losses, norms, expected = plain_training(toy)
    assert values(outcome, "loss") == pytest.approx(losses, rel=1e-6)
    assert values(outcome, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 1 > min(norms)  # clipping took part, and not always
    assert relative_difference(weights(outcome), expected) < 1e-6


def test_the_ranks_and_micro_batches_of_these_cases_have_different_numbers_of_targets(toy):
    for step in range(STEPS):
        counted = (toy.samples(step, 8)["targets"] != toy.IGNORED).sum(axis=1)
        micro_batches = counted.reshape(4, 2).sum(axis=1)
        assert len(set(micro_batches)) > 1
        assert micro_batches[::2].sum() != micro_batches[1::2].sum()  # rank 0's, rank 1's


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", ["accumulation_1", "accumulation_8"])
def test_accumulation_and_ranks_do_not_change_what_is_learned(case, ranks, engine_cases, toy):
    outcome = engine_cases("train", ranks, case)
    losses, norms, expected = plain_training(toy)
    assert values(outcome, "loss") == pytest.approx(losses, rel=1e-6)
    assert values(outcome, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert relative_difference(weights(outcome), expected) < 1e-6


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("plan", SOME_STAGES)
def test_a_batch_ramp_takes_its_sizes_step_by_step(plan, ranks, engine_cases, toy):
    outcome = engine_cases("train", ranks, f"{plan}_ramp")
    losses, _, expected = plain_training(toy, (4, 4, 8, 8, 8, 8))
    assert values(outcome, "loss") == pytest.approx(losses, rel=1e-6)
    assert relative_difference(weights(outcome), expected) < 1e-6


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stage_0_and_1_give_the_same_losses_bit_for_bit_in_low_precision(dtype, ranks, engine_cases):
    stage0, stage1 = (engine_cases("train", ranks, f"{plan}_{dtype}_dropout") for plan in ("zero0", "zero1"))
    assert values(stage0, "loss") == values(stage1, "loss")
    # Sums for the norm in another order, and vector instructions on other lengths, move a last bit of the masters.
    assert relative_difference(tensors(stage0, STEPS), tensors(stage1, STEPS)) < 1e-6


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_stages_agree_in_every_precision_and_low_precision_stays_near_fp32(dtype, ranks, engine_cases):
    reference = engine_cases("train", ranks, "zero0_fp32_dropout")
    expected = weights(reference)
    # bf16 has 8 bits: the sums over ranks and the linear layers' biases are rounded elsewhere at stages 2 and 3.
    loss_tolerance, weight_tolerance = {"fp32": (1e-6, 1e-6), "bf16": (1e-3, 0.05), "fp16": (1e-4, 0.01)}[dtype]
    for plan in STAGES:
        outcome = engine_cases("train", ranks, f"{plan}_{dtype}_dropout")
        assert values(outcome, "loss") == pytest.approx(values(reference, "loss"), rel=loss_tolerance)
        assert relative_difference(weights(outcome), expected) < weight_tolerance


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", SOME_STAGES)
def test_a_step_with_a_nan_on_one_rank_leaves_everything_bitwise_as_it_was(plan, dtype, ranks, engine_cases):
    outcome = engine_cases("train", ranks, f"{plan}_{dtype}_nan")
    assert values(outcome, "skipped") == [False, False, False, True, False, False]
    assert math.isnan(outcome.steps[HALF]["loss"])
    before, after = (tensors(outcome, step) for step in (HALF, HALF + 1))
    assert len(before) == 3 * 9  # master and two moments of nine tensors
    assert different(before, after) == []
    manifests = [
        json.loads((checkpoint.checkpoint_dir(outcome.folder, step) / "manifest.json").read_text())
        for step in (HALF, HALF + 1)
    ]
    assert manifests[0]["optimizer"] == manifests[1]["optimizer"] == {"name": "adamw", "steps": 3.0}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("plan", SOME_STAGES)
def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(plan, ranks, engine_cases, toy):
    outcome = engine_cases("train", ranks, f"{plan}_fp32_nan")
    losses, _, _ = plain_training(toy, skipped=(HALF,))
    assert values(outcome, "loss")[HALF + 1 :] == pytest.approx(losses[HALF + 1 :], rel=1e-6)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("plan", SOME_STAGES)
def test_the_fp16_loss_scale_halves_at_each_overflow_and_training_goes_on(plan, ranks, engine_cases):
    outcome = engine_cases("train", ranks, f"{plan}_fp16_overflow")
    assert values(outcome, "loss_scale") == [256, 256, 256, 128, 64, 64]
    assert values(outcome, "skipped") == [False, False, True, True, False, False]
    before, after = (tensors(outcome, step) for step in (2, 4))
    assert different(before, after) == []
    assert outcome.steps[5]["loss"] < outcome.steps[0]["loss"]
    assert outcome.steps[5]["grad_norm"] == pytest.approx(1.1, abs=0.1)  # the scale is divided out
