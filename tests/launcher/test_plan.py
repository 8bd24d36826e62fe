"""`bigbatch plan`: memory and time against published figures, hand computations, autograd and measured ranks."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bigbatch.launcher import memory, step_time
from bigbatch.launcher.cards import GIB, TABLE, card_names, find_card
from bigbatch.launcher.memory import (
    Workload,
    layer_activation_bytes,
    model_states,
    predict_memory,
    rank_parameters,
)
from bigbatch.launcher.plan import (
    Cluster,
    figures,
    find_plans,
    fits,
    plan,
    schedule_steps,
    settings,
    to_json,
    workload,
)
from bigbatch.launcher.predict import count_parameters
from bigbatch.launcher.resolve import resolve
from bigbatch.launcher.step_time import bandwidth, communication, model_flops, predict_step
from bigbatch.recipes.core.config import OptimizerSection
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection
from bigbatch.recipes.core.models.decoder import Decoder
from bigbatch.recipes.core.plan import ParallelPlan
from bigbatch.recipes.core.recipe import find

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "memory.json").read_text())
ADAMW = OptimizerSection(learning_rate=1e-4)
GPT = DecoderSection(num_layers=4, hidden_size=64, num_heads=4, max_positions=1024)
LLAMA = DecoderSection(
    family="llama", num_layers=4, hidden_size=64, num_heads=4, num_key_value_heads=2, tie_embeddings=False
)
ENCODER = EncoderSection(num_layers=4, hidden_size=64, num_heads=4)


def work_of(model, dtype="bf16", sequence_length=1024, vocabulary_size=50257, **more):
    return Workload(model, vocabulary_size, sequence_length, dtype, ADAMW, **more)


def gpt_of(num_layers, hidden_size, num_heads, vocabulary_size):
    """Return a published GPT: sequences of 2,048."""
    model = DecoderSection(
        num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads, max_positions=2048, tie_embeddings=True
    )
    return work_of(model, sequence_length=2048, vocabulary_size=vocabulary_size)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_of_7_5_billion_parameters_on_64_ranks_are_those_of_the_zero_paper(stage, gigabytes):
    states = model_states(7.5e9, stage, 64, working_bytes=2, moment_bytes=8)
    assert sum(states) / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_activations_of_a_gpt_layer_with_dropout_are_those_of_the_megatron_paper(tensor):
    # arXiv 2205.05198, equation 2, without the 5 a s / (h t) that flash attention does not keep
    work = work_of(GPT.model_copy(update={"dropout": 0.1}))
    expected = 64 * (10 + 24 / tensor)
    assert layer_activation_bytes(work, ParallelPlan(tensor=tensor)) == expected
    # Equation 4, with sequence parallelism.
    assert layer_activation_bytes(work, ParallelPlan(tensor=tensor, tensor_sequence=True)) == 64 * 34 / tensor


SHAPES = {
    "gpt2": GPT,
    "llama": LLAMA,
    "gpt2 with experts": GPT.model_copy(update={"num_experts": 4, "capacity_factor": 1.0}),
    "llama with experts": LLAMA.model_copy(update={"num_experts": 4, "capacity_factor": 1.0}),
    "encoder": ENCODER.model_copy(update={"dropout": 0.0}),
    "encoder with dropout": ENCODER,
    "encoder, pre-norm, rotary": ENCODER.model_copy(update={"norm": "pre", "positions": "rotary", "dropout": 0.0}),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [128, 640])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_of_a_layer_are_what_autograd_keeps(shape, length, dtype):
    model = SHAPES[shape].model_copy(update={"max_positions": 1024})
    predicted = 2 * length * layer_activation_bytes(work_of(model, dtype, length, on_cpu=True), ParallelPlan())
    kept = kept_bytes(model, length, dtype, 5) - kept_bytes(model, length, dtype, 4)
    assert predicted == pytest.approx(kept, rel=0.05)


def kept_bytes(section, length, dtype, num_layers):
    """Return the bytes of all tensors that a forward pass on [2, T] keeps for the backward pass, each storage once."""
    from bigbatch.recipes.core.models.decoder import Decoder
    from bigbatch.recipes.core.models.encoder import MaskedLanguageModel

    section = section.model_copy(update={"num_layers": num_layers})
    model = (Decoder if isinstance(section, DecoderSection) else MaskedLanguageModel)(section, 100)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(torch.zeros(2, length, dtype=torch.int64))
    del result
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def test_expert_ranks_have_their_part_of_the_experts_and_zero_divides_each_over_those_that_have_it():
    model = SHAPES["llama with experts"]
    whole, half = (rank_parameters(model, 1000, ParallelPlan(data=8, expert=expert), 0) for expert in (1, 2))
    assert whole == count_parameters(model, 1000) == sum(p.numel() for p in Decoder(model, 1000).parameters())
    expert = 3 * 64 * model.inner_size
    assert whole - half == 4 * 2 * expert  # layers, experts
    assert memory.zero_share(model, ParallelPlan(data=8, expert=2), half) == (half - 8 * expert) / 8 + 8 * expert / 4


def test_what_travels_to_experts_and_back_are_their_buffers():
    work, states = work_of(SHAPES["llama with experts"], sequence_length=512), 2 * 512 * 64 * 2
    plan = ParallelPlan(data=4, expert=4, micro_size=2, accumulation_steps=3)
    # micro-batches, layers, four exchanges, two experts a token, a quarter of them here
    assert communication(work, plan, recompute=False).expert == 3 * 4 * 4 * 2 * states * 3 / 4


@pytest.mark.parametrize("model", [GPT, LLAMA, ENCODER, SHAPES["encoder, pre-norm, rotary"]])
def test_parameters_of_all_ranks_together_are_the_models(model):
    count = count_parameters(model, 1000)
    assert rank_parameters(model, 1000, ParallelPlan(), 0) == count
    stages = sum(rank_parameters(model, 1000, ParallelPlan(pipeline=4), stage) for stage in range(4))
    own_table = getattr(model, "tie_embeddings", True) * 1024 * 64  # the last stage has the tied table once more
    assert stages == count + own_table


def test_tensor_ranks_of_a_gpt_repeat_its_norms_positions_and_row_parallel_biases():
    count, part = count_parameters(GPT, 1000), rank_parameters(GPT, 1000, ParallelPlan(tensor=4), 0)
    repeated = 1024 * 64 + 4 * (4 + 2) * 64 + 2 * 64
    assert 4 * part == count + 3 * repeated


def test_the_calibration_table_is_current_and_within_the_stated_bound(measure_memory):
    cases = measure_memory.cases()
    assert GOLDEN.keys() == cases.keys()
    for name, row in GOLDEN.items():
        assert cases[name].predicted_bytes() == row["predicted_bytes"], name
        assert row["ratio"] == pytest.approx(row["predicted_bytes"] / row["measured_bytes"], abs=1e-4)
        assert abs(row["ratio"] - 1) < memory.ERROR_BOUND, name


def test_ranks_still_hold_what_the_calibration_table_says(run_program, tmp_path):
    names = ("zero1x2_fp32", "recompute_zero3x2")
    run_program("measure_memory.py", tmp_path / "table.json", *names)
    measured = json.loads((tmp_path / "table.json").read_text())
    assert list(measured) == [name for name in GOLDEN if name in names]
    for name, row in measured.items():
        assert row["measured_bytes"] == pytest.approx(GOLDEN[name]["measured_bytes"], rel=0.02), name


@pytest.fixture(scope="module")
def measure_memory():
    """Load the program that measures."""
    import importlib

    programs = str(Path(__file__).parents[1] / "programs")
    sys.path.insert(0, programs)
    try:
        return importlib.import_module("measure_memory")
    finally:
        sys.path.remove(programs)


def test_the_first_pipeline_stage_holds_a_micro_batch_a_stage_behind_it():
    work = work_of(gpt_of(8, 1024, 16, 64).model, sequence_length=2048, vocabulary_size=64)
    one = predict_memory(work, ParallelPlan(accumulation_steps=8), {}, recompute=False)
    four = predict_memory(work, ParallelPlan(pipeline=4, accumulation_steps=8), {}, recompute=False)
    # 2 layers x 4 micro-batches = 8 layers x 1; the loss is the last stage's.
    assert four.activations == 8 * 2048 * layer_activation_bytes(work, ParallelPlan())
    assert one.activations - four.activations == 2048 * 1024 * (2 + 2 + 2)  # last norm, gradient of its result
    few = predict_memory(work, ParallelPlan(pipeline=4, accumulation_steps=2), {}, recompute=False)
    assert few.activations == four.activations / 2


def test_offloading_leaves_no_state_of_the_optimizer_on_the_card():
    plan = ParallelPlan(data=2, zero_stage=2)
    kept = predict_memory(work_of(GPT), plan, {}, recompute=False)
    offloaded = predict_memory(work_of(GPT), plan, {"offload_optimizer": {"device": "cpu"}}, recompute=False)
    count = count_parameters(GPT, 50257)
    assert kept.total - offloaded.total >= 12 * count / 2 - 1
    assert offloaded.masters == offloaded.optimizer == 0


def test_a_save_behind_takes_each_ranks_part_of_the_state_in_host_memory_not_on_a_card(capsys):
    work, count = work_of(GPT, saves_behind=True), count_parameters(GPT, 50257)
    for stage, ranks in ((0, 2), (1, 2), (3, 4)):
        plan_of = ParallelPlan(data=ranks, zero_stage=stage)
        assert memory.snapshot_bytes(work, plan_of) == 12 * count / ranks
        assert predict_memory(work, plan_of, {}, recompute=False).snapshot == 0
    alone = work._replace(trains_alone=True, on_cpu=True)
    held = predict_memory(alone, ParallelPlan(data=2, zero_stage=0), {}, recompute=False)
    assert held.snapshot == (12 + 8 / 2) * count
    assert held.outer == 8 * count
    assert plan("gpt/124m", [], 2) == 0
    assert f"{12 * 124475904 / 2 / GIB:.2f} GiB a card in the host's memory" in capsys.readouterr().out


def test_ranks_that_train_alone_have_plans_at_stage_0_alone():
    lines = ["parallel.zero_stage=0", "deepspeed=null", "parallel.sync=local_sgd"]
    answer = find_plans(resolve("gpt/124m", lines), Cluster(find_card("H100"), 8, 8))
    assert {(option.plan.zero_stage, option.plan.pipeline) for option in answer.fitting} == {(0, 1)}
    assert answer.fitting[0].memory.outer > 0


def test_a_mask_of_documents_and_few_targets_are_counted():
    work = work_of(ENCODER, sequence_length=512)
    plan, zero = ParallelPlan(micro_size=8), {"reduce_bucket_size": 1}
    whole = predict_memory(work, plan, zero, recompute=False)
    masked = predict_memory(work._replace(has_mask=True), plan, zero, recompute=False)
    assert masked.activations - whole.activations == 8 * 512 * 512 * 2
    few = predict_memory(work._replace(target_fraction=0.125), plan, zero, recompute=False)
    rows, columns = 8 * 512, 50304
    assert whole.phase == few.phase == "loss"
    chunk = 2**28 // (columns * 2)
    assert whole.logits == pytest.approx(min(rows, chunk) * columns * 6 + 4 * columns * 64, rel=1e-3)
    assert few.logits == pytest.approx(rows / 8 * columns * 6 + 4 * columns * 64, rel=1e-3)


# -------------------------------------------------------------------------------------------------- time


UNTIED = ["model.family=llama", "model.num_key_value_heads=2", "model.tie_embeddings=false"]


@pytest.mark.parametrize(
    ("run", "changes"),
    [("gpt/quick", []), ("gpt/quick", UNTIED), ("gpt/moe_quick", []), ("bert_pretrain/quick", [])],
)
def test_operations_of_a_sample_are_those_that_the_recipe_reports(run, changes):
    config = resolve(run, changes).config
    work = workload(config, find_card("H100"))
    facts = {"vocabulary_size": config.data.tokenizer.vocabulary_size}
    expected = find(config.recipe).flops_per_sample(config, facts)
    assert sum(model_flops(work)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("run", ["gpt/7b", "gpt/8x7b", "bert_pretrain/large"])
def test_operations_of_a_large_model_are_counted_without_a_number_of_its_weights(run, measure_memory):
    config = resolve(run).config
    with measure_memory.LiveBytes() as live:
        assert find(config.recipe).flops_per_sample(config, {"vocabulary_size": 32000}) > 1e11
    assert live.most == 0


def test_volumes_are_those_of_the_papers():
    work = work_of(GPT, sequence_length=512)
    states = 2 * 512 * 64 * 2  # bytes of the hidden states of a micro-batch of 2
    volumes = communication(work, ParallelPlan(tensor=4, micro_size=2, accumulation_steps=3), recompute=False)
    assert volumes.tensor == 3 * 4 * 4 * 2 * states * 3 / 4  # micro-batches, layers, all-reduces, ring of four
    assert communication(work, ParallelPlan(tensor=4, micro_size=2), recompute=True).tensor == volumes.tensor / 3 * 1.5
    # Gathered and scattered twice each way, and in the backward pass gathered twice more.
    spread = ParallelPlan(tensor=4, micro_size=2, tensor_sequence=True)
    assert communication(work, spread, recompute=False).tensor == 4 * (8 + 2) * states * 3 / 4
    assert communication(work, spread, recompute=True).tensor == 4 * (12 + 2) * states * 3 / 4
    volumes = communication(work, ParallelPlan(sequence=2, micro_size=2), recompute=False)
    assert volumes.sequence == 4 * 2 * 4 * states / 2 / 2  # layers, directions, exchanges, halves of halves
    grouped = work_of(LLAMA, sequence_length=512)  # as many query heads, half as many of keys and values
    volumes = communication(grouped, ParallelPlan(sequence=2, micro_size=2), recompute=False)
    assert volumes.sequence == 4 * 2 * 3 * states / 2 / 2
    volumes = communication(work, ParallelPlan(pipeline=2, micro_size=2, accumulation_steps=3), recompute=False)
    assert volumes.pipeline == 3 * 2 * states
    weights = 2 * count_parameters(GPT, 50257)
    for stage, times in ((0, 2), (1, 2), (2, 1 + 3), (3, 3 * 3)):
        volumes = communication(work, ParallelPlan(data=4, zero_stage=stage, accumulation_steps=3), recompute=False)
        assert volumes.data == times * weights * 3 / 4
    assert communication(work, ParallelPlan(), recompute=False) == (0, 0, 0, 0, 0)


def test_a_ring_over_nodes_has_the_network_of_its_ranks_on_each():
    card = find_card("H100")
    wide = ParallelPlan(data=16, tensor=4)
    assert bandwidth(wide, card, 8, "tensor") == 450e9
    assert bandwidth(wide, card, 8, "data", "sequence") == 2 * 50e9
    assert bandwidth(ParallelPlan(data=16), card, 8, "data", "sequence") == 8 * 50e9
    assert bandwidth(ParallelPlan(data=8), card, 8, "data", "sequence") == 450e9
    assert bandwidth(ParallelPlan(data=8, pipeline=4), card, 8, "pipeline") == 50e9


def test_the_bubble_is_that_of_the_pipeline_paper():
    step = predict_step(
        gpt_of(32, 4096, 32, 50304), ParallelPlan(pipeline=8, accumulation_steps=32), find_card("A100"), 8, False, False
    )
    assert step.bubble / step.arithmetic == pytest.approx((8 - 1) / 32)


# llm-foundry, scripts/train/benchmarking/README.md: layers, hidden size, heads, cards, tokens/s a card.
FOUNDRY = [
    ("A100", 12, 768, 12, 8, 142_830),
    ("A100", 24, 1024, 16, 8, 58_782),
    ("A100", 24, 1536, 12, 8, 32_434),
    ("A100", 24, 2048, 16, 8, 20_513),
    ("A100", 32, 2560, 20, 8, 10_811),
    ("A100", 32, 4096, 32, 8, 4_641),
    ("A100", 40, 5120, 40, 8, 2_262),
    ("A100", 48, 7168, 56, 8, 916),
    ("A100", 80, 8192, 64, 64, 410),
    ("H100", 24, 1536, 12, 8, 63_147),
    ("H100", 24, 2048, 16, 8, 45_455),
    ("H100", 32, 2560, 20, 8, 24_142),
    ("H100", 32, 4096, 32, 8, 10_643),
    ("H100", 40, 5120, 40, 8, 4_792),
    ("H100", 48, 7168, 56, 8, 2_002),
    ("H100", 80, 8192, 64, 64, 1_039),
]


@pytest.mark.parametrize("row", FOUNDRY, ids=lambda row: f"{row[0]}-{row[2]}")
def test_throughput_of_a_sharded_gpt_is_that_which_llm_foundry_reports(row):
    name, num_layers, hidden_size, num_heads, gpus, published = row
    work, card = gpt_of(num_layers, hidden_size, num_heads, 50368), find_card(name)
    fastest = min(
        predict_step(
            work, ParallelPlan(gpus, zero_stage=3, micro_size=size, accumulation_steps=8), card, 8, again, False
        ).total
        / size
        for size in (1, 2, 4, 8, 16, 32)
        for again in (False, True)
        if predict_memory(
            work, ParallelPlan(gpus, zero_stage=3, micro_size=size, accumulation_steps=8), {}, again
        ).total
        < card.memory_bytes / (1 + memory.ERROR_BOUND)
    )
    assert 1 / 1.3 < 8 * 2048 / fastest / published < 1.3


# arXiv 2104.04473, table 1: layers, hidden size, heads, tensor, pipeline, cards, samples, TFLOP/s a card. From memory,
# November 2026: of the table itself no page was at hand.
MEGATRON = [
    (24, 2304, 24, 1, 1, 32, 512, 137),
    (30, 3072, 32, 2, 1, 64, 512, 138),
    (36, 4096, 32, 4, 1, 128, 512, 142),
    (40, 6144, 48, 8, 1, 256, 1024, 135),
    (48, 8192, 64, 8, 2, 512, 1536, 138),
    (60, 10240, 80, 8, 4, 1024, 1792, 140),
    (80, 12288, 96, 8, 8, 1536, 2304, 148),
    (96, 16384, 128, 8, 16, 1920, 2160, 155),
    (105, 20480, 128, 8, 35, 2520, 2520, 163),
    (128, 25600, 160, 8, 64, 3072, 3072, 163),
]


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: f"{row[1]}")
def test_rates_of_three_dimensional_plans_are_those_of_the_megatron_paper(row):
    num_layers, hidden_size, num_heads, tensor, pipeline, gpus, samples, published = row
    work, data = gpt_of(num_layers, hidden_size, num_heads, 51200), gpus // tensor // pipeline
    micro_size = max(
        size for size in (1, 2, 4, 8, 16) if (samples // data % size == 0 and size * pipeline <= 16) or size == 1
    )
    plan = ParallelPlan(data, tensor, pipeline, 1, 0, micro_size, samples // data // micro_size)
    seconds = predict_step(work, plan, find_card("A100"), 8, recompute=True, offloads=False).total
    layers, head = model_flops(work)
    rate = (4 / 3 * layers + head) * samples / seconds / gpus / 1e12  # the paper counts the second forward pass
    assert 1 / step_time.ERROR_FACTOR < rate / published < step_time.ERROR_FACTOR


# -------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def answer():
    """Plan the 7 B preset for 64 cards."""
    return find_plans(resolve("gpt/7b"), Cluster(find_card("H100"), 64, 8))


def test_plans_fit_with_the_error_bound_and_the_fastest_is_first(answer):
    totals = [option.time.total for option in answer.fitting]
    assert totals[0] <= 1.02 * min(totals)
    assert all(later >= 0.98 * earlier for earlier, later in pairwise(totals))
    for option in answer.fitting:
        assert option.memory.total * 1.1 <= 80 * GIB
        assert option.plan.world_size == 64
        assert option.plan.global_size == 1024
    keys = [(plan.tensor, plan.pipeline, plan.sequence, plan.zero_stage) for plan, *_ in answer.fitting]
    assert len(set(keys)) == len(keys)
    # 16 bytes a parameter do not fit without ZeRO, and with it need no tensor parallelism.
    assert (1, 1, 1, 0) not in keys
    assert keys[0][:3] == (1, 1, 1)


def test_days_energy_and_cost_follow_from_the_step(answer):
    option = answer.fitting[0]
    found = figures(option, answer)
    seconds = option.time.total
    hours = 477_000 * seconds / 3600
    assert found["tokens_per_second"] == pytest.approx(1024 * 4096 / seconds)
    assert found["days"] == pytest.approx(hours / 24)
    assert found["energy_kwh"] == pytest.approx(64 * 0.7 * hours)
    assert found["cost_dollars"] == pytest.approx(64 * 2.95 * hours)
    # llm-foundry's 10,643 tokens/s on each H100 (with shorter sequences): the preset's own 34 days
    assert found["days"] == pytest.approx(34, rel=0.3)
    assert 0.3 < found["model_flops_utilization"] < 0.52


def test_steps_of_the_ramp_count_by_their_share():
    changes = ['batch.ramp=[{"until_step": 10, "global_size": 8}]', "schedule.total_steps=100"]
    config = resolve("gpt/quick", ["batch.global_size=32", *changes]).config
    assert schedule_steps(config) == pytest.approx(10 * 8 / 32 + 90)
    config = resolve("gpt/quick", ["batch.global_size=32", *changes, "schedule.stop_step=6"]).config
    assert schedule_steps(config) == pytest.approx(6 * 8 / 32)


def test_a_plan_is_told_as_settings_and_they_resolve(answer):
    option = next(
        option
        for option in answer.fitting
        if option.plan.zero_stage == 1 and option.plan.world_size == option.plan.data
    )
    lines = settings(option, answer.resolved)
    assert lines[:2] == ["parallel.zero_stage=null", "deepspeed=zero1"]
    again = resolve("gpt/7b", lines)
    assert again.deepspeed["zero_optimization"]["stage"] == 1
    assert again.config.batch.micro_size == option.plan.micro_size
    assert again.config.model.recompute_activations == option.recompute


def test_the_command_prints_a_table_and_how_sure_it_is(capsys):
    assert plan("gpt/7b", [], 64, gpu_memory=80, top=3) == 0
    text = capsys.readouterr().out
    assert text.startswith("64 x H100 with 80 GiB, 8 a node")
    assert "more fit (--top" in text
    assert "memory: within 10% of what CPU ranks held" in text
    assert "time: published runs on A100 and H100 lie within a factor of 1.5" in text
    assert "to take it: --set " in text


def test_the_command_as_json_has_all_parts(capsys):
    assert plan("gpt/124m", [], 8, card="A100", price=1.0, network=10.0, top=2, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 2
    first = found["plans"][0]
    parts = first["memory_bytes"]
    assert sum(parts[name] for name in memory.Memory._fields[1:]) == pytest.approx(parts["total"])
    assert first["memory_gib"] == pytest.approx(parts["total"] / GIB)
    assert sum(first["seconds"].values()) == pytest.approx(first["step_seconds"])
    assert first["data"] * first["micro_size"] * first["accumulation_steps"] == 512
    assert found["card"]["price_per_hour"] == 1.0
    assert found["card"]["network_link"] == 10e9
    assert found["memory_error_bound"] == memory.ERROR_BOUND


def test_where_nothing_fits_the_nearest_is_shown_with_what_to_change(capsys):
    assert plan("gpt/7b", [], 1) == 2
    text = capsys.readouterr().out
    assert "nothing fits; the nearest:" in text
    assert "- most of it is optimizer: 50.2 GiB" in text  # 8 bytes x 6.74 billion parameters
    assert "- 2 cards are enough" in text
    assert "- it fits with the optimizer in the host's memory: deepspeed=zero2_offload or zero3_offload" in text
    found = to_json(find_plans(resolve("gpt/7b"), Cluster(find_card("H100"), 1, 8)), 5)
    assert found["plans"] == []
    assert found["nearest"]["recompute_activations"]
    assert len(found["advice"]) == 3


def test_a_run_with_offloading_fits_where_it_does_not_without():
    cluster = Cluster(find_card("H100"), 1, 8)
    found = find_plans(resolve("gpt/7b", ["deepspeed=zero3_offload"]), cluster)
    assert {option.plan.zero_stage for option in found.fitting} == {3}
    assert all(fits(option, cluster) for option in found.fitting)
    # 2 bytes down, 2 up over PCIe, 30 in the host's memory, for each of 6.74 billion parameters
    assert found.fitting[0].time.update == pytest.approx(6.74e9 * 34 / 25e9, rel=0.01)


@pytest.mark.parametrize(
    ("run", "gpus", "card", "message"),
    [
        ("gpt/7b", 64, "V100", "precision.dtype: V100 has no bf16; right is fp16 or fp32"),
        ("gpt/7b", 64, "H10", "--card: there is no 'H10' in the table; did you mean H100?"),
        ("gpt/7b", 3, "H100", "--gpus: no plan divides batch.global_size 1024 over 3 cards"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, gpus, card, message):
    with pytest.raises(UserError) as caught:
        plan(run, [], gpus, card=card)
    assert str(caught.value) == message


def test_every_card_names_its_sources():
    rows = json.loads(TABLE.read_text())["cards"]
    assert card_names() == ["V100", "A100-40", "A100", "H100", "H200", "B200", "MI300X", "CPU"]
    for name, row in rows.items():
        assert row["sources"].keys() == {"figures", "sustained_fraction", "price"}, name
        card = find_card(name.lower())
        assert card.memory_bytes == row["memory"] * GIB
        assert 0 < card.sustained_fraction < 1


def test_a_plan_takes_no_torch_and_a_second_or_two_of_a_slow_core():
    code = (
        "import sys, time; from bigbatch.launcher.plan import plan; plan('gpt/7b', [], 64)\n"
        "assert 'torch' not in sys.modules; print(time.process_time())"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout.splitlines()[-1]) < 3
