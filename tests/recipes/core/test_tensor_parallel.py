"""Tensor ranks: the same losses, norms and weights as one rank, and checkpoints that resume under any other plan."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.batch import plan_batch
from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.layout import Share
from bigbatch.recipes.core.models.config import DecoderSection, padded_vocabulary
from bigbatch.recipes.core.parts import load_run
from bigbatch.recipes.gpt.config import GptConfig
from bigbatch.tools.convert import convert

HALF, STEPS = 5, 10
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 40}
LLAMA = {"family": "llama", "num_key_value_heads": 2, "feed_forward_size": 48, "tie_embeddings": False}
DECODERS = {"gpt2": SHAPE | {"family": "gpt2"}, "llama": SHAPE | LLAMA}
DATA_BY_TENSOR = [f"dp2xtp2_zero{stage}" for stage in range(4)]
AGREEING = [("gpt2", "tp2_zero0"), ("llama", "tp2_zero1"), ("bert", "dp2xtp2_zero2"), ("bert", "tp2_zero3")]
AGREEING += [(family, plan) for family in DECODERS for plan in DATA_BY_TENSOR]
PLANS = ("one", "dp2", "zero3x2", "tp2_zero1", "dp2xtp2_zero2")
# Those of other data ranks and stages alone are in test_engine.py.
MATRIX = [(one, other) for one in PLANS for other in PLANS if "tp2" in one + other]
TEXT = "".join(f"The {i * i} of {i} and {i % 7} is {i * 3 + i % 5}.\n" for i in range(300))


def document(recipe: str, model: dict, data: dict, **sections: dict) -> dict:
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.1, "gradient_clipping": 1.0}
    sample = {"prompts": ["The 9 of", "is", "and 4"], "max_new_tokens": 12, "temperature": 0.8}
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
        **({"sample": sample} if recipe == "gpt" else {}),
        **sections,
    }


@pytest.fixture(scope="module")
def trained(run_program, tmp_path_factory):
    """Train all cases in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("tensor")
    (out / "text.txt").write_text(TEXT)
    data = {"train": [str(out / "text.txt")], "validation_fraction": 0.1, "validation_split": "tail"}
    data |= {"sequence_length": 32, "tokenizer": {"kind": "character"}, "prepared_dir": str(out / "prepared")}
    words = data | {"tokenizer": {"kind": "wordpiece", "vocabulary_size": 100}}
    documents = {family: document("gpt", model, data) for family, model in DECODERS.items()}
    documents["bert"] = document("bert_pretrain", SHAPE | {"dropout": 0.0}, words)
    documents["bf16"] = document("gpt", DECODERS["gpt2"], data, precision={"dtype": "bf16"})
    lamb = {"name": "lamb", "learning_rate": 1e-2}
    documents["lamb"] = document("gpt", DECODERS["gpt2"] | {"recompute_activations": True}, data, optimizer=lamb)
    for name, content in documents.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    plans = [*AGREEING, *((family, "one") for family in ("gpt2", "llama", "bert", "lamb"))]
    plans += [("llama", "dp2"), ("llama", "zero3x2"), ("lamb", "tp2_zero0"), ("lamb", "dp2xtp2_zero3")]
    plans += [("bf16", plan) for plan in ("dp2", "tp2_zero0", "dp2xtp2_zero2")]
    cases = [(f"{family}_{plan}", family, plan, None) for family, plan in plans]
    cases += [("llama_whole", "llama", "one", None), ("bert_whole", "bert", "one", None)]
    cases += [(f"{one}_to_{other}", "llama", other, f"llama_{one}") for one, other in MATRIX]
    cases += [("bert_tp2_to_dp2", "bert", "dp2", "bert_tp2_zero3")]
    cases += [("gpt2_evaluated", "gpt2", "dp2xtp2_zero0", "gpt2_tp2_zero0")]
    (out / "cases.json").write_text(json.dumps(cases))
    run_program("tensor_cases.py", out)
    return out


def rows(folder, kind):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def values(folder, name):
    return [row[name] for row in rows(folder, "train")]


def reader(folder, step=HALF):
    return checkpoint.Reader(checkpoint.checkpoint_dir(folder, step))


@pytest.mark.parametrize(("family", "plan"), AGREEING)
def test_tensor_ranks_under_every_stage_give_the_losses_and_norms_of_one_rank(trained, family, plan):
    one, found = trained / f"{family}_one", trained / f"{family}_{plan}"
    assert len(values(found, "loss")) == HALF
    assert values(found, "loss") == pytest.approx(values(one, "loss"), rel=1e-5)
    assert values(found, "grad_norm") == pytest.approx(values(one, "grad_norm"), rel=1e-5)
    assert max(values(one, "grad_norm")) > 1  # clipping took part


@pytest.mark.parametrize("plan", ["tp2_zero0", "dp2xtp2_zero3"])
def test_lambs_norms_are_those_of_whole_layers_with_recomputed_activations_too(trained, plan):
    assert values(trained / f"lamb_{plan}", "loss") == pytest.approx(values(trained / "lamb_one", "loss"), rel=1e-5)


@pytest.mark.parametrize("plan", ["tp2_zero0", "dp2xtp2_zero2"])
def test_tensor_ranks_in_bf16_stay_near_data_ranks_in_bf16(trained, plan):
    assert values(trained / f"bf16_{plan}", "loss") == pytest.approx(values(trained / "bf16_dp2", "loss"), rel=5e-3)


def resumed_is_whole(folder, whole):
    assert [row["message"] for row in rows(folder, "event") if row["event"] == "resumed"] == [f"after step {HALF}"]
    assert values(folder, "step") == list(range(HALF + 1, STEPS + 1))
    assert values(folder, "loss") == pytest.approx(values(whole, "loss")[HALF:], rel=1e-4)
    found, expected = (reader(each, STEPS).manifest for each in (folder, whole))
    assert found["order_hash"] == expected["order_hash"]
    assert found["optimizer"] == expected["optimizer"]


@pytest.mark.parametrize(("one", "other"), MATRIX)
def test_a_run_goes_on_under_another_plan_as_if_nothing_had_happened(trained, one, other):
    resumed_is_whole(trained / f"{one}_to_{other}", trained / "llama_whole")


def test_an_encoder_goes_on_under_another_plan(trained):
    resumed_is_whole(trained / "bert_tp2_to_dp2", trained / "bert_whole")


@pytest.mark.parametrize("name", ["llama_tp2_zero1", "llama_dp2xtp2_zero0", "llama_dp2xtp2_zero3", "gpt2_tp2_zero0"])
def test_a_checkpoint_holds_each_element_once_and_no_piece_a_row(trained, name):
    found, one = reader(trained / name), reader(trained / f"{name.split('_')[0]}_one")
    assert found.manifest["format"] == 2
    assert found.manifest["tensor_ranks"] == 2
    assert found.tensors.keys() == one.tensors.keys()
    for tensor, entry in found.tensors.items():
        assert entry["shape"] == one.tensors[tensor]["shape"]
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            pieces = [piece for piece in entry["pieces"] if piece[1] == kind]
            assert len(pieces) <= found.manifest["ranks"]
            assert sum(piece[3] for piece in pieces) == torch.Size(entry["shape"]).numel()
            expected = one.read(tensor, kind)
            assert float((found.read(tensor, kind) - expected).norm() / expected.norm()) < 1e-3


def test_a_share_is_read_from_checkpoints_of_any_plan(trained):
    readers = [reader(trained / f"llama_{plan}") for plan in ("one", "zero3x2", "dp2xtp2_zero3")]
    for found in readers:
        for name, dim in (("blocks.0.feed_forward.down.weight", 1), ("blocks.1.attention.qkv.weight", 0)):
            share = Share(tuple(found.tensors[name]["shape"]), dim, ((1, 4), (10, 31)))
            assert torch.equal(found.read(name, share=share), share.cut(found.read(name)))


def test_a_checkpoint_of_the_first_format_is_read(trained, tmp_path):
    """It is what a run without tensor ranks writes today, but for its number."""
    saved = reader(trained / "llama_dp2")
    manifest = {key: value for key, value in saved.manifest.items() if key != "tensor_ranks"} | {"format": 1}
    assert all(len(piece) == 4 for entry in manifest["tensors"].values() for piece in entry["pieces"])
    manifest["xxh3_128"] = checkpoint._manifest_hash(manifest)
    for file in saved.folder.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    old = checkpoint.Reader(tmp_path)
    old.verify()
    assert all(torch.equal(old.read(name), saved.read(name)) for name in saved.tensors)


@pytest.mark.parametrize("plan", ["tp2_zero1", *DATA_BY_TENSOR])
def test_evaluations_and_texts_while_training_are_those_of_one_rank(trained, plan):
    one, found = trained / "llama_one", trained / f"llama_{plan}"
    (expected,), (evaluation,) = rows(one, "evaluation"), rows(found, "evaluation")
    assert evaluation["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    (expected,), (text,) = rows(one, "text"), rows(found, "text")
    assert text["samples"] == expected["samples"]
    assert sum(len(sample["text"]) for sample in expected["samples"]) >= 3


def test_a_split_is_evaluated_over_tensor_ranks_each_sample_once(trained):
    folder = trained / "gpt2_evaluated"
    figures = [json.loads((folder / f"figures_{rank}.json").read_text()) for rank in range(4)]
    assert all(figure == figures[0] for figure in figures)
    run = load_run(folder)
    data = run.recipe.open_data(run.config)
    model = run.recipe.build_model(run.config, data.facts, initialize=False).eval()
    checkpoint.load_weights(folder, model)
    assert data.validation
    samples = torch.arange(data.validation.num_samples).numpy()
    batch = {name: torch.from_numpy(array) for name, array in data.validation.batch(samples, 0 * samples).items()}
    with torch.no_grad():
        expected = run.recipe.loss(model, batch)
    assert figures[0]["num_targets"] == expected.num_targets == 32 * len(samples)
    assert figures[0]["loss"] == pytest.approx(float(expected.sum) / expected.num_targets, rel=1e-6)


def test_a_checkpoint_of_tensor_ranks_converts(trained, tmp_path):
    convert(trained / "llama_tp2_zero1", tmp_path / "two")
    convert(trained / "llama_one", tmp_path / "one")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def gpt_config(model: dict | None = None, **sections) -> GptConfig:
    content = document("gpt", DECODERS["llama"] | (model or {}), {"train": ["x"], "sequence_length": 32}, **sections)
    return GptConfig.model_validate_json(json.dumps(content))


@pytest.mark.parametrize(
    ("model", "tensor", "ranks", "expected"),
    [
        ({}, 2, 3, r"parallel\.tensor: .*2 does not divide 3 ranks"),
        ({}, 4, 4, r"parallel\.tensor: 4 does not divide num_key_value_heads 2"),
        (
            {"num_heads": 16, "num_key_value_heads": 16, "feed_forward_size": 40},
            16,
            16,
            "does not divide feed_forward_",
        ),
        ({}, 3, 3, r"parallel\.tensor: 3 does not divide num_heads 4"),
    ],
)
def test_a_tensor_degree_that_does_not_divide_is_refused_before_anything_starts(model, tensor, ranks, expected):
    with pytest.raises(UserError, match=expected):
        complete(gpt_config(model, parallel={"tensor": tensor}), {}, ranks)


def test_a_vocabulary_that_does_not_divide_is_refused():
    section = DecoderSection(vocabulary_multiple=5)
    assert padded_vocabulary(101, section, 3) == 105
    with pytest.raises(UserError, match=r"model\.vocabulary_multiple: 5 makes 105 rows of 101 tokens.*tensor 2"):
        padded_vocabulary(101, section, 2)


def test_the_batch_is_divided_over_data_ranks_alone():
    config = gpt_config(parallel={"tensor": 2})
    document = complete(config, {}, 4)
    assert (document["train_batch_size"], document["gradient_accumulation_steps"]) == (8, 2)
    assert plan_batch(config.batch, 2).accumulation_steps == 2


def test_a_recipe_whose_model_is_of_one_piece_refuses_tensor_ranks():
    content = document("toy", {}, {}, parallel={"tensor": 2})
    config = RunConfig.model_validate({key: content[key] for key in content if key in RunConfig.model_fields})
    with pytest.raises(UserError, match=r"parallel\.tensor: 2, but this recipe's model is not divided"):
        complete(config, {}, 2)


def test_secondary_partitions_of_zero_do_not_go_with_tensor_ranks():
    native = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    with pytest.raises(UserError, match=r"zero_hpz_partition_size: 2 does not go with parallel\.tensor 2"):
        complete(gpt_config(parallel={"tensor": 2}), native, 4)
