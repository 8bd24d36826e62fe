"""Ranks that train alone and meet: against DiLoCo written out here, in all precisions, resumed, under other plans."""

import json
import math

import pytest
import torch

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.parts import load_run

STEPS, MET, ALONE = 7, 4, 5
HALF, LONG = 5, 60
SHAPE = {"family": "gpt2", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 40}
TEXT = "".join(f"The {i * i} of {i} and {i % 7} is {i * 3 + i % 5}.\n" for i in range(300))


@pytest.fixture(scope="module")
def cases(run_program, tmp_path_factory):
    """Train the toy in all cases; give a function from a case to its folder and steps."""
    out = tmp_path_factory.mktemp("local")
    run_program("local_cases.py", out)

    def outcome(name):
        results = [json.loads(path.read_text()) for path in sorted((out / name).glob("result_*.json"))]
        for result in results:
            assert "error" not in result, result["error"]
        assert len({json.dumps(result) for result in results}) == 1  # the ranks agree
        return out / name, results[0]["steps"]

    return outcome


def values(steps, name="loss"):
    return [step[name] for step in steps]


def reader(folder, step):
    return checkpoint.Reader(checkpoint.checkpoint_dir(folder, step))


def tensors(folder, step):
    source = reader(folder, step)
    return {f"{kind}/{name}": source.read(name, kind) for name in source.tensors for kind in sorted(source.kinds())}


def different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def plain_diloco(toy, ranks=2, skipped=()):
    """Train `ranks` models with torch alone; return losses, gradient norms, and the outer parameters by step."""
    torch.manual_seed(0)
    outer = toy.Toy()
    outer_optimizer = torch.optim.SGD(outer.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    models = [toy.Toy() for _ in range(ranks)]
    optimizers = []
    for model in models:
        model.load_state_dict(outer.state_dict())
        matrices, vectors = ([p for p in model.parameters() if p.dim() == dims] for dims in (2, 1))
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8))
    losses, norms, met = [], [], {}
    for step in range(STEPS):
        warm_up, cosine = (step + 1) / 3, 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 3))) / 2
        batch = {name: torch.from_numpy(array) for name, array in toy.samples(step, 8).items()}
        results, squares = [], 0.0
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            own = [sample for sample in range(8) if sample // 2 % ranks == rank]  # micro-batches of two go round
            result = toy.loss(model, {name: array[own] for name, array in batch.items()})
            optimizer.zero_grad()
            (result.sum / result.num_targets).backward()
            squares += float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)) ** 2
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (warm_up if step < 2 else cosine)
            if step not in skipped:
                optimizer.step()
            results.append(result)
        losses.append(sum(r.sum.item() for r in results) / sum(r.num_targets for r in results))
        norms.append((squares / ranks) ** 0.5)
        if step % 2 == 1 or step == STEPS - 1:
            for parameter, *own in zip(*(m.parameters() for m in (outer, *models)), strict=True):
                parameter.grad = parameter.detach() - torch.stack([p.detach() for p in own]).mean(0)
            outer_optimizer.step()
            for model in models:
                model.load_state_dict(outer.state_dict())
            met[step + 1] = {name: parameter.detach().clone() for name, parameter in outer.named_parameters()}
    return losses, norms, met


@pytest.mark.parametrize(("case", "ranks"), [("plain", 2), ("one_rank", 1)])
def test_losses_norms_and_parameters_are_those_of_diloco_written_out(cases, toy, case, ranks):
    folder, steps = cases(case)
    losses, norms, met = plain_diloco(toy, ranks)
    assert values(steps) == pytest.approx(losses, rel=1e-6)
    assert values(steps, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 1  # clipping took part
    for step in (2, MET, STEPS):
        for name, expected in met[step].items():
            assert float((reader(folder, step).read(name) - expected).norm() / expected.norm()) < 1e-6


def test_meeting_at_each_step_to_take_the_mean_is_synchronous_sgd(cases):
    (folder, steps), (other, expected) = cases("each_step"), cases("all_reduce")
    assert values(steps) == pytest.approx(values(expected), rel=1e-6)
    for name in reader(other, STEPS).tensors:
        found, same = (reader(each, STEPS).read(name) for each in (folder, other))
        assert float((found - same).norm() / same.norm()) < 1e-6


@pytest.mark.parametrize("step", [MET, ALONE])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_resume_under_the_same_plan_is_bit_for_bit_the_uninterrupted_run(cases, dtype, step):
    (whole, expected), (folder, steps) = cases(dtype), cases(f"{dtype}_after_{step}")
    assert steps == expected[step:]
    assert different(tensors(folder / "restored", step), tensors(whole, step)) == []
    assert different(tensors(folder, STEPS), tensors(whole, STEPS)) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(cases, dtype):
    assert values(cases(dtype)[1]) == pytest.approx(values(cases("fp32")[1]), rel=3e-3)


def test_a_checkpoint_has_each_ranks_own_and_once_what_is_common(cases):
    folder, _ = cases("plain")
    own = {f"{key}@{rank}" for key in ("exp_avg", "exp_avg_sq") for rank in (0, 1)}
    assert reader(folder, MET).kinds() == own | {"master", "outer_momentum"}
    between = reader(folder, ALONE)
    assert between.kinds() == own | {"master@0", "master@1", "outer_parameters", "outer_momentum"}
    assert between.manifest["local_ranks"] == 2
    for name in between.tensors:
        first, second = (between.read(name, f"master@{rank}") for rank in (0, 1))
        assert not torch.equal(first, second)
        assert torch.equal(between.read(name), (first + second) / 2)
        assert torch.equal(between.read(name, "outer_parameters"), reader(folder, MET).read(name))


@pytest.mark.parametrize("step", [MET, ALONE])
@pytest.mark.parametrize("plan", ["one_rank", "zero2"])
def test_under_another_plan_a_run_goes_on_from_the_means(cases, plan, step):
    folder, steps = cases(f"{plan}_after_{step}")
    whole, expected = cases("plain")
    before, after = reader(whole, step), reader(folder / "restored", step)
    for name in before.tensors:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(after.read(name, kind), before.read(name, kind))
    assert values(steps)[0] == pytest.approx(values(expected)[step], rel=1e-6 if step == MET else 1e-3)


def test_the_outer_state_goes_with_a_run_to_another_number_of_ranks(cases):
    before, after = (reader(folder, ALONE) for folder in (cases("plain")[0], cases("one_rank_after_5")[0] / "restored"))
    for name in before.tensors:
        for kind in ("outer_parameters", "outer_momentum"):
            assert torch.equal(after.read(name, kind), before.read(name, kind))


def test_a_synchronous_run_goes_on_alone_from_where_it_was(cases):
    folder, steps = cases("after_synchronous")
    assert values(steps)[0] == pytest.approx(values(cases("synchronous")[1])[MET], rel=1e-6)
    start = reader(folder / "restored", MET)
    assert all(not start.read(name, "outer_momentum").any() for name in start.tensors)


def test_other_rounds_may_begin_at_a_checkpoint(cases):
    folder, steps = cases("shorter_rounds")  # rounds of 3: the next meeting is after step 6, as before
    assert steps == cases("plain")[1][ALONE:]
    assert reader(folder, STEPS).manifest["local_ranks"] == 2


def test_a_step_that_fails_on_one_rank_is_passed_over_by_all(cases, toy):
    folder, steps = cases("skipping")
    assert values(steps, "skipped") == [False, False, True, False, False, False, False]
    losses, _, met = plain_diloco(toy, skipped=(2,))
    assert values(steps)[3:] == pytest.approx(losses[3:], rel=1e-6)
    source = reader(folder, STEPS)
    assert source.manifest["optimizer"]["steps"] == STEPS - 1
    assert all(torch.allclose(source.read(name), met[STEPS][name], atol=1e-6) for name in source.tensors)


def test_the_fp16_loss_scale_is_the_same_on_all_ranks(cases):
    _, steps = cases("fp16_overflow")
    assert values(steps, "loss_scale") == [256, 256, 256, 128, 128, 128, 128]
    assert values(steps, "skipped")[2]


def test_deepspeeds_sum_for_inference_keeps_to_its_group(cases):
    """Its own extension, which `import_deepspeed` keeps it from building, sums over all ranks (0.19.8, CPU)."""
    out = cases("plain")[0].parent
    assert [json.loads((out / f"sum_{rank}.json").read_text()) for rank in range(4)] == [3.0, 3.0, 7.0, 7.0]


@pytest.fixture(scope="module")
def trained(run_program, tmp_path_factory):
    """Train a GPT in all cases; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("local_gpt")
    (out / "text.txt").write_text(TEXT)
    data = {"train": [str(out / "text.txt")], "validation_fraction": 0.1, "validation_split": "tail"}
    data |= {"sequence_length": 32, "tokenizer": {"kind": "character"}, "prepared_dir": str(out / "prepared")}

    def write(name, total_steps, parallel):
        document = {"version": 1, "recipe": "gpt", "model": SHAPE, "data": data, "precision": {"dtype": "fp32"}}
        document |= {"batch": {"global_size": 8, "micro_size": 2}, "parallel": parallel}
        document |= {"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1}}
        document |= {"schedule": {"total_steps": total_steps, "warmup_steps": 2}, "report": {"every_steps": 1}}
        document |= {"evaluate": {"every_steps": HALF if total_steps < LONG else LONG}}
        (out / f"{name}.json").write_text(json.dumps(document))

    write("synchronous", LONG, {})
    write("local", LONG, {"sync": "local_sgd", "local_sgd": {"every_steps": 10}})
    write("rounds", 2 * HALF, {"sync": "local_sgd", "local_sgd": {"every_steps": 2}})
    runs = [("synchronous_whole", "synchronous", "zero0x2", None), ("local_whole", "local", "zero0x2", None)]
    runs += [("rounds_whole", "rounds", "zero0x2", None), ("rounds_dp2", "rounds", "zero0x2", None)]
    runs += [("rounds_tp2", "rounds", "dp2xtp2_zero0", None), ("rounds_sp2", "rounds", "dp2xsp2_zero0", None)]
    runs += [("tp2_after_dp2", "rounds", "dp2xtp2_zero0", "rounds_dp2")]
    (out / "cases.json").write_text(json.dumps(runs))
    run_program("tensor_cases.py", out)
    return out


def rows(folder, kind):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def test_sixty_steps_in_rounds_of_ten_come_near_synchronous_ones(trained):
    """Within 15 %: each rank's inner batch is half as large, and there were six outer steps."""
    (local,), (synchronous,) = (rows(trained / f"{name}_whole", "evaluation") for name in ("local", "synchronous"))
    assert local["loss"] < synchronous["loss"] * 1.15
    assert synchronous["loss"] < rows(trained / "local_whole", "train")[0]["loss"] / 2


@pytest.mark.parametrize("plan", ["tp2", "sp2"])
def test_a_rank_that_trains_alone_may_be_several_tensor_or_sequence_ranks(trained, plan):
    found, expected = trained / f"rounds_{plan}", trained / "rounds_dp2"
    for name in ("loss", "grad_norm"):
        assert values(rows(found, "train"), name) == pytest.approx(values(rows(expected, "train"), name), rel=1e-5)
    for name in reader(expected, HALF).tensors:
        first, second = (reader(folder, HALF).read(name, "master@1") for folder in (found, expected))
        assert float((first - second).norm() / second.norm()) < 1e-3


def test_each_ranks_own_state_goes_with_it_when_tensor_ranks_come(trained):
    expected = rows(trained / "rounds_whole", "train")
    assert values(rows(trained / "tp2_after_dp2", "train")) == pytest.approx(values(expected)[HALF:], rel=1e-5)


@pytest.mark.parametrize("name", ["rounds_dp2", "rounds_tp2"])
def test_between_meetings_the_mean_of_the_ranks_is_evaluated_and_changes_nothing(trained, name):
    (evaluation,) = rows(trained / name, "evaluation")
    run = load_run(trained / name)
    data = run.recipe.open_data(run.config)
    model = run.recipe.build_model(run.config, data.facts, initialize=False).eval()
    checkpoint.fill(reader(trained / name, HALF), model)
    samples = torch.arange(data.validation.num_samples).numpy()
    batch = {key: torch.from_numpy(array) for key, array in data.validation.batch(samples, 0 * samples).items()}
    with torch.no_grad():
        expected = run.recipe.loss(model, batch)
    assert evaluation["loss"] == pytest.approx(float(expected.sum) / expected.num_targets, rel=1e-6)
