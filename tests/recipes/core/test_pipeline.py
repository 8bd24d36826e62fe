"""Stages and sequence ranks: losses, norms, texts and checkpoints of one rank, resumes from and under any other plan.

BIGBATCH_WRITE_GOLDEN=1 resumes from every plan under every other and writes tests/golden/plans.md anew.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layout import logical_parameters, logical_shapes
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder
from bigbatch.recipes.core.parallel import Axis
from bigbatch.recipes.core.pipeline import Stage, stage_building
from bigbatch.recipes.gpt.config import GptConfig

HALF, STEPS = 5, 25
TABLE = Path(__file__).parents[2] / "golden" / "plans.md"
WRITES_TABLE = os.environ.get("BIGBATCH_WRITE_GOLDEN") == "1"
SHAPE = {"family": "gpt2", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 40}
LLAMA = {"family": "llama", "num_key_value_heads": 2, "feed_forward_size": 48, "tie_embeddings": False}
MODELS = {
    "gpt2": SHAPE,
    "llama": SHAPE | LLAMA,
    "deep": SHAPE | {"num_layers": 4, "recompute_activations": True},
    "dropout": SHAPE | {"dropout": 0.1},
}
PLANS = ("one", "zero0x2", "zero1x2", "zero3x2", "tp2", "pp2", "tp2xpp2", "dp2xtp2", "sp2", "dp2xsp2", "tp2xsp2")
STAGED, SEQUENCED = ("pp2", "tp2xpp2"), ("sp2", "dp2xsp2", "tp2xsp2")
AGREEING = [("gpt2", plan) for plan in (*PLANS[1:], "dp2xpp2", "sp2_zero0", "sp4")]
AGREEING += [("llama", "pp2"), ("llama", "dp2xpp2"), ("llama", "tp2xpp2"), ("llama", "dp2xsp2")]
AGREEING += [("isolate", "sp2"), ("deep", "pp4")]
AGREEING += [
    ("bert", "pp2"),
    ("bert", "tp2xpp2"),
    ("bert", "sp2"),
    ("bert", "tp2xsp2"),
    ("pairs", "pp2"),
    ("pairs", "sp2"),
]
AGREEING += [("gpt2", f"{plan}_spread") for plan in ("dp2xtp2", "tp2xsp2")]
AGREEING += [("llama", "dp2xtp2_spread"), ("isolate", "tp2_spread"), ("bert", "dp2xtp2_spread")]
AGREEING += [("pairs", "tp2xsp2_spread")]
MATRIX = [(one, other) for one in PLANS for other in PLANS]
RESUMES = [(one, other) for one, other in MATRIX if {one, other} & {*STAGED} and not {one, other} & {*SEQUENCED}]
RESUMES += [("one", "sp2"), ("sp2", "zero3x2"), ("zero0x2", "dp2xsp2"), ("dp2xsp2", "one"), ("dp2xtp2", "dp2xsp2")]
RESUMES += [("sp2", "tp2xsp2"), ("tp2xsp2", "pp2"), ("tp2xpp2", "sp2")]
RESUMES = MATRIX if WRITES_TABLE else RESUMES
RESUMES += [("dp2xtp2_spread", "zero1x2"), ("tp2", "tp2_spread")]
TEXT = "".join(f"The {i * i} of {i} and {i % 7} is {i * 3 + i % 5}.\n" for i in range(300))


def document(recipe: str, model: dict, data: dict, **sections: object) -> dict:
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.1, "gradient_clipping": 1.0}
    prompts = {"prompts": ["The 9 of", "is"], "max_new_tokens": 4, "temperature": 0.8}
    return {
        "version": 1,
        "recipe": recipe,
        "model": model,
        "data": data,
        "batch": {"global_size": 8, "micro_size": 2},
        "precision": {"dtype": "fp32"},
        "optimizer": optimizer,
        "schedule": {"total_steps": STEPS, "warmup_steps": 2},
        "evaluate": {"every_steps": HALF, "max_samples": 7},
        "report": {"every_steps": 1, "tensorboard": False},
        **({"sample": prompts} if recipe == "gpt" else {}),
        **sections,
    }


def write_text(out: Path) -> dict:
    """Write the text to train on; return the section that names it."""
    (out / "text.txt").write_text(TEXT)
    data = {"train": [str(out / "text.txt")], "validation_fraction": 0.1, "validation_split": "tail"}
    return data | {"sequence_length": 32, "tokenizer": {"kind": "character"}, "prepared_dir": str(out / "prepared")}


@pytest.fixture(scope="module")
def trained(run_program, tmp_path_factory):
    """Train all cases in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("pipeline")
    data = write_text(out)
    words = data | {"tokenizer": {"kind": "wordpiece", "vocabulary_size": 100}, "packing": "isolate"}
    documents = {name: document("gpt", model, data) for name, model in MODELS.items()}
    documents["isolate"] = document("gpt", MODELS["llama"], data | {"packing": "isolate", "unit": "line"})
    documents["bf16"] = document("gpt", SHAPE, data, precision={"dtype": "bf16"})
    encoder = {key: value for key, value in SHAPE.items() if key != "family"} | {"dropout": 0.0}
    documents["bert"] = document("bert_pretrain", encoder, words)
    documents["pairs"] = documents["bert"] | {"sentence_task": "sentence_order"}
    for name, content in documents.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    plans = [*AGREEING, *((name, "one") for name in ("gpt2", "llama", "isolate", "deep", "bert", "pairs"))]
    plans += [("bf16", plan) for plan in ("zero1x2", "pp2", "tp2xpp2", "dp2xsp2")]
    plans += [("dropout", "pp2"), ("dropout", "sp2")]
    cases = [(f"{name}_{plan}", name, plan, None) for name, plan in plans]
    cases += [("gpt2_whole", "gpt2", "one", None)]
    cases += [(f"dropout_{plan}_whole", "dropout", plan, None) for plan in ("pp2", "sp2")]
    cases += [(f"{one}_to_{other}", "gpt2", other, f"gpt2_{one}") for one, other in RESUMES]
    cases += [(f"dropout_{plan}_resumed", "dropout", plan, f"dropout_{plan}") for plan in ("pp2", "sp2")]
    (out / "cases.json").write_text(json.dumps(cases))
    run_program("tensor_cases.py", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_eight_ranks_in_three_dimensions_learn_as_one_and_one_goes_on_from_them(name, run_program, tmp_path):
    (tmp_path / f"{name}.json").write_text(json.dumps(document("gpt", MODELS[name], write_text(tmp_path))))
    eight = ("eight", name, "dp2xtp2xpp2", None)
    cases = [eight, ("one_whole", name, "one", None), ("eight_to_one", name, "one", "eight")]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_program("tensor_cases.py", tmp_path)
    whole = tmp_path / "one_whole"
    for figure in ("loss", "grad_norm"):
        expected = values(whole, figure)
        assert len(expected) == STEPS
        assert difference(values(tmp_path / "eight", figure), expected[:HALF]) < 1e-5
        assert difference(values(tmp_path / "eight_to_one", figure), expected[HALF:]) < 1e-4
    ours, theirs = (reader(folder, STEPS).manifest for folder in (tmp_path / "eight_to_one", whole))
    assert ours["order_hash"] == theirs["order_hash"]


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def values(folder: Path, name: str) -> list[float]:
    return [row[name] for row in rows(folder, "train")]


def reader(folder: Path, step: int) -> checkpoint.Reader:
    return checkpoint.Reader(checkpoint.checkpoint_dir(folder, step))


def difference(found: list[float], expected: list[float]) -> float:
    """Return the largest relative one."""
    return max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "plan"), AGREEING)
def test_every_plan_gives_the_losses_norms_and_evaluations_of_one_rank(trained, name, plan):
    one, found = trained / f"{name}_one", trained / f"{name}_{plan}"
    assert len(values(found, "loss")) == HALF
    assert values(found, "num_targets") == values(one, "num_targets")
    assert difference(values(found, "loss"), values(one, "loss")) < 1e-6
    assert difference(values(found, "grad_norm"), values(one, "grad_norm")) < 1e-5
    assert max(values(one, "grad_norm")) > 1  # clipping took part
    (expected,), (evaluation,) = rows(one, "evaluation"), rows(found, "evaluation")
    for figure in ("loss", "pair_loss") if name == "pairs" else ("loss",):
        assert evaluation[figure] == pytest.approx(expected[figure], rel=1e-5)


@pytest.mark.parametrize(("name", "plan"), [case for case in AGREEING if case[0] in MODELS])
def test_the_texts_of_every_plan_are_those_of_one_rank(trained, name, plan):
    (expected,), (text,) = rows(trained / f"{name}_one", "text"), rows(trained / f"{name}_{plan}", "text")
    assert text["samples"] == expected["samples"]
    assert sum(len(sample["text"]) for sample in expected["samples"]) >= 2


@pytest.mark.parametrize("plan", [*STAGED, "dp2xsp2"])
def test_stages_and_sequence_ranks_in_bf16_stay_near_data_ranks_in_bf16(trained, plan):
    found, near = (values(trained / f"bf16_{name}", "loss") for name in (plan, "zero1x2"))
    assert difference(found, near) < 5e-3


@pytest.mark.parametrize("plan", ["pp2", "sp2"])
def test_dropout_of_stages_and_sequence_ranks_is_drawn_again_as_it_was(trained, plan):
    resumed, whole = trained / f"dropout_{plan}_resumed", trained / f"dropout_{plan}_whole"
    assert values(resumed, "loss") == values(whole, "loss")[HALF:]
    assert difference(values(whole, "loss")[:HALF], values(trained / "gpt2_one", "loss")) > 1e-4


@pytest.mark.parametrize(("one", "other"), RESUMES)
def test_a_run_goes_on_under_another_plan_as_if_nothing_had_happened(trained, one, other):
    found, whole = trained / f"{one}_to_{other}", trained / "gpt2_whole"
    assert [row["message"] for row in rows(found, "event") if row["event"] == "resumed"] == [f"after step {HALF}"]
    assert values(found, "step") == list(range(HALF + 1, STEPS + 1))
    assert difference(values(found, "loss"), values(whole, "loss")[HALF:]) < 1e-4
    ours, theirs = (reader(folder, STEPS).manifest for folder in (found, whole))
    assert ours["order_hash"] == theirs["order_hash"]
    assert ours["optimizer"] == theirs["optimizer"]


@pytest.mark.parametrize("name", ["gpt2_tp2xpp2", "llama_dp2xpp2", "bert_pp2", "deep_pp4"])
def test_each_stage_writes_its_own_tensors_and_a_tied_one_once(trained, name):
    found, one = reader(trained / name, HALF), reader(trained / f"{name.split('_')[0]}_one", HALF)
    ranks, stages = found.manifest["ranks"], found.manifest["pipeline_ranks"]
    assert found.tensors.keys() == one.tensors.keys()
    for tensor, entry in found.tensors.items():
        assert entry["shape"] == one.tensors[tensor]["shape"]
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            pieces = [piece for piece in entry["pieces"] if piece[1] == kind]
            assert sum(piece[3] for piece in pieces) == torch.Size(entry["shape"]).numel()
            writers = {int(piece[0][5:10]) * stages // ranks for piece in pieces}  # rank_00000.safetensors
            assert len(writers) == 1
            if "embed" in tensor:
                assert writers == {0}
            if "head.norm" in tensor:
                assert writers == {stages - 1}
            expected = one.read(tensor, kind)
            assert float((found.read(tensor, kind) - expected).norm() / expected.norm()) < 1e-3


def test_the_table_in_the_repository_is_of_these_plans(trained):
    """The numbers are those of the machine that wrote it; the bounds of the tests above are those of all."""
    lines = ["# Plans against one rank", "", "Written by tests/recipes/core/test_pipeline.py: float32, relative.", ""]
    lines += ["## Five steps", "", "| model | plan | loss | gradient norm |", "| --- | --- | --- | --- |"]
    for name, plan in AGREEING:
        one, found = trained / f"{name}_one", trained / f"{name}_{plan}"
        both = (f"{difference(values(found, key), values(one, key)):.0e}" for key in ("loss", "grad_norm"))
        lines.append(f"| {name} | {plan} | {' | '.join(both)} |")
    lines += ["", "## Losses of five steps after a resume, from a row's plan under a column's", ""]
    lines += [f"| | {' | '.join(PLANS)} |", "| --- |" + " --- |" * len(PLANS)]
    whole = values(trained / "gpt2_whole", "loss")[HALF : 2 * HALF]
    for one in PLANS:
        there = [other for other in PLANS if (one, other) in RESUMES]
        after = {other: values(trained / f"{one}_to_{other}", "loss")[:HALF] for other in there}
        cells = [f"{difference(after[other], whole):.0e}" if other in after else "" for other in PLANS]
        lines.append(f"| {one} | {' | '.join(cells)} |")
    if WRITES_TABLE:
        TABLE.write_text("\n".join(lines) + "\n")
    kept, number = TABLE.read_text(), r"\d+e[-+]\d\d"
    assert re.sub(number, "", kept) == re.sub(number, "", "\n".join(lines) + "\n")
    numbers = [float(found) for found in re.findall(number, kept)]
    assert len(numbers) == 2 * len(AGREEING) + len(PLANS) ** 2
    assert max(numbers[: 2 * len(AGREEING) : 2]) < 1e-6
    assert max(numbers[: 2 * len(AGREEING)]) < 1e-5
    assert max(numbers) < 1e-4


@pytest.mark.parametrize(("name", "rank"), [("gpt2", 0), ("gpt2", 1), ("llama", 1)])
def test_a_stage_draws_the_weights_of_the_whole_model_and_holds_its_own_blocks_alone(name, rank):
    section = DecoderSection(**MODELS[name])
    torch.manual_seed(0)
    whole = Decoder(section, 50)
    torch.manual_seed(0)
    with stage_building(section.num_layers, Axis(rank, 2)):
        model = Decoder(section, 50)
    assert len(list(model.blocks[1 - rank].parameters())) == 0
    held = sum(parameter.numel() for parameter in model.parameters())
    stage = Stage(model, Axis(rank, 2), torch.device("cpu"))
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    assert logical_shapes(stage.model) == shapes
    found = logical_parameters(stage.model)
    assert set(found) == {name for name in shapes if belongs(name, rank, section.tie_embeddings)}
    for name, parameter in found.items():
        assert torch.equal(parameter, whole.get_parameter(name))
    assert held == sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in whole.blocks[0].parameters())
    assert list(stage.ties) == (["embed.tokens.weight"] if section.tie_embeddings else [])


def belongs(name: str, rank: int, is_tied: bool) -> bool:
    """Tell whether the first (0) or the last (1) of two stages has a parameter of a decoder of two blocks."""
    if name.startswith("blocks"):
        return name.startswith(f"blocks.{rank}.")
    return name.startswith("head") == bool(rank) or (is_tied and name == "embed.tokens.weight")


def gpt_config(model: dict | None = None, **sections: object) -> GptConfig:
    content = document("gpt", SHAPE | (model or {}), {"train": ["x"], "sequence_length": 32}, **sections)
    return GptConfig.model_validate_json(json.dumps(content))


@pytest.mark.parametrize(
    ("sections", "native", "ranks", "expected"),
    [
        ({"parallel": {"pipeline": 2}}, {}, 3, r"parallel\.pipeline: .*2 does not divide 3 ranks"),
        ({"parallel": {"pipeline": 4}}, {}, 4, r"parallel\.pipeline: 4 does not divide num_layers 2; right is 2"),
        ({"parallel": {"pipeline": 2, "sync": "local_sgd"}}, {}, 2, r"parallel\.sync: local_sgd does not go with"),
        ({"parallel": {"pipeline": 2, "zero_stage": 0}}, {}, 2, r"parallel\.zero_stage: 0 with pipeline 2; right is 1"),
        ({}, {"zero_optimization": {"stage": 2}}, 2, r"parallel\.zero_stage: 2 with pipeline 2; right is 1"),
        ({"precision": {"dtype": "fp16"}}, {}, 2, r"precision\.dtype: fp16 does not go with parallel\.pipeline 2"),
        ({"optimizer": {"name": "adamw_8bit", "learning_rate": 1.0}}, {}, 2, r"optimizer\.name: adamw_8bit"),
        (
            {},
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            2,
            r"offload_optimizer: does not go with",
        ),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_before_anything_starts(sections, native, ranks, expected):
    with pytest.raises(UserError, match=expected):
        complete(gpt_config(**{"parallel": {"pipeline": 2}, **sections}), native, ranks)


def test_the_batch_is_divided_over_data_ranks_not_over_stages():
    content = complete(gpt_config(parallel={"pipeline": 2}), {}, 4)
    assert (content["train_batch_size"], content["gradient_accumulation_steps"]) == (8, 2)
    assert content["zero_optimization"]["stage"] == 1
