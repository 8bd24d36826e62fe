"""A mixture of experts over DeepSpeed's layer: against plain torch and transformers' Mixtral, under all its plans.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/experts.json anew; say in the change why the losses are other ones.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.data.sampler import sample_order
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import (
    Decoder,
    hugging_face_config,
    hugging_face_state,
    load_hugging_face,
    section_from_hugging_face,
)
from bigbatch.recipes.core.models.mixture import MixtureFeedForward
from bigbatch.recipes.core.parts import load_run
from bigbatch.recipes.gpt.config import GptConfig
from bigbatch.tools.convert import convert

GOLDEN = Path(__file__).parents[2] / "golden" / "experts.json"
HALF, STEPS, LENGTH = 5, 10, 32
COEFFICIENT = 0.1  # large enough to be seen
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 40, "num_experts": 4}
SHAPE |= {"initializer_range": 0.1, "auxiliary_loss_coefficient": COEFFICIENT}
MIXTRAL = SHAPE | {"family": "llama", "num_key_value_heads": 2, "feed_forward_size": 48, "tie_embeddings": False}
MODELS = {
    "mixtral": MIXTRAL,
    "switch": SHAPE | {"family": "gpt2", "experts_per_token": 1, "expert_interval": 2, "recompute_activations": True},
    "dropping": MIXTRAL | {"capacity_factor": 0.6},
    "dropping_switch": SHAPE | {"family": "gpt2", "experts_per_token": 1, "capacity_factor": 0.6},
}
AGREEING = [("mixtral", plan) for plan in ("one", "dp2", "zero0x2", "ep2_zero0", "ep2_zero1", "ep2_zero2", "ep2xdp2")]
RESUMED = [("one", "ep2_zero1"), ("ep2_zero1", "one"), ("ep2_zero1", "ep2xdp2"), ("ep2_zero0", "dp2")]
TEXT = "".join(f"The {i * i} of {i} and {i % 7} is {i * 3 + i % 5}.\n" for i in range(300))


def document(model: dict, data: dict, **sections: dict) -> dict:
    return {
        "version": 1,
        "recipe": "gpt",
        "model": model,
        "data": data,
        "batch": {"global_size": 8, "micro_size": 2},
        "precision": {"dtype": "fp32"},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "gradient_clipping": 1.0},
        "schedule": {"name": "constant", "total_steps": STEPS},
        "evaluate": {"every_steps": HALF, "max_samples": 7},
        "report": {"every_steps": 1, "tensorboard": False},
        "sample": {"prompts": ["The 9 of", "is", "and 4"], "max_new_tokens": 12, "temperature": 0.8},
        **sections,
    }


@pytest.fixture(scope="module")
def trained(run_program, tmp_path_factory):
    """Train all cases in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("experts")
    (out / "text.txt").write_text(TEXT)
    data = {"train": [str(out / "text.txt")], "validation_fraction": 0.1, "validation_split": "tail"}
    data |= {"sequence_length": LENGTH, "tokenizer": {"kind": "character"}, "prepared_dir": str(out / "prepared")}
    documents = {name: document(model, data) for name, model in MODELS.items()}
    documents["bf16"] = document(MIXTRAL, data, precision={"dtype": "bf16"})
    documents["lamb"] = document(MIXTRAL, data, optimizer={"name": "lamb", "learning_rate": 1e-2})
    offloading = {"version": 1, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    (out / "offloading.json").write_text(json.dumps(offloading))
    documents["offload"] = document(MIXTRAL, data, deepspeed=str(out / "offloading.json"))
    for name, content in documents.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    plans = [*AGREEING, *((name, plan) for name in ("switch", "bf16", "lamb") for plan in ("dp2", "ep2_zero1"))]
    plans += [("lamb", "ep2_zero0"), ("bf16", "ep2_zero0"), ("offload", "ep2_zero2")]
    plans += [(name, plan) for name in ("dropping", "dropping_switch") for plan in ("dp2", "ep2_zero1")]
    cases = [(f"{name}_{plan}", name, plan, None) for name, plan in plans]
    cases += [("mixtral_whole", "mixtral", "ep2_zero1", None)]
    cases += [(f"{one}_to_{other}", "mixtral", other, f"mixtral_{one}") for one, other in RESUMED]
    cases += [("again", "mixtral", "ep2_zero1", "mixtral_ep2_zero1")]
    (out / "cases.json").write_text(json.dumps(cases))
    run_program("tensor_cases.py", out)
    return out


def rows(folder, kind):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def values(folder, name, kind="train"):
    return [row[name] for row in rows(folder, kind)]


def reader(folder, step=HALF):
    return checkpoint.Reader(checkpoint.checkpoint_dir(folder, step))


def plain_mixture(mixture: MixtureFeedForward, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the mixture should make of each token [N, D], and the load-balancing loss."""
    section, outputs = mixture.section, []
    probabilities = torch.softmax(hidden @ mixture.router.T, -1)
    for token, row in zip(hidden, probabilities, strict=True):
        weights, chosen = row.topk(section.experts_per_token)
        if section.experts_per_token > 1:
            weights = weights / weights.sum()
        experts = [mixture.experts[str(int(index))] for index in chosen]
        outputs.append(sum(weight * expert(token) for weight, expert in zip(weights, experts, strict=True)))
    count = 1 if section.experts_per_token == 2 else section.experts_per_token  # GShard counts the first choice alone
    chosen = probabilities.topk(count).indices.flatten()
    shares = torch.bincount(chosen, minlength=section.num_experts) / len(chosen)
    return torch.stack(outputs), section.num_experts * (shares * probabilities.mean(0)).sum()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("experts_per_token", [1, 2, 3])
def test_a_layer_is_the_plain_mixture_of_its_experts_and_so_are_its_gradients(family, experts_per_token):
    torch.manual_seed(0)
    section = DecoderSection(**SHAPE | {"family": family, "experts_per_token": experts_per_token})
    mixture = Decoder(section, 50).blocks[0].feed_forward
    hidden = torch.randn(3, 7, 32, requires_grad=True)
    found = mixture(hidden)
    expected, auxiliary = plain_mixture(mixture, hidden.flatten(0, 1))
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixture.auxiliary_loss, auxiliary, rtol=1e-6, atol=0)
    leaves = [hidden, *mixture.parameters()]
    ours = torch.autograd.grad(found.square().sum() + mixture.auxiliary_loss, leaves)
    theirs = torch.autograd.grad(expected.square().sum() + auxiliary, leaves)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_evaluation_drops_no_token_and_one_token_is_enough():
    section = DecoderSection(**MIXTRAL | {"capacity_factor": 0.1})
    mixture = Decoder(section, 50).blocks[0].feed_forward.eval()
    hidden = torch.randn(1, 9, 32)
    torch.testing.assert_close(mixture(hidden)[0], plain_mixture(mixture, hidden[0])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixture(hidden[:, :1]), mixture(hidden)[:, :1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(mixture.train()(hidden), mixture.eval()(hidden))


def test_buffers_have_room_for_every_token_and_few_different_sizes():
    mixture = Decoder(DecoderSection(**MIXTRAL), 50).blocks[0].feed_forward
    fullest, sizes = [], []
    for seed in range(40):
        mixture(torch.randn(1, 500, 32, generator=torch.Generator().manual_seed(seed)))
        fullest.append(int(mixture.moe.deepspeed_moe.exp_counts.max()))
        sizes.append(math.ceil(500 / 4 * 2 * mixture.moe.deepspeed_moe.gate.capacity_factor))
        assert fullest[-1] <= sizes[-1] <= 1.125 * fullest[-1]
    assert len(set(sizes)) < len(set(fullest)) / 3


def test_the_traps_of_deepspeeds_layer_are_still_there():
    """Its experts begin as copies of one, and it adds noise to the second choice even in evaluation."""
    from deepspeed.moe.layer import MoE

    torch.manual_seed(0)
    theirs = MoE(32, torch.nn.Linear(32, 32), num_experts=4, k=2).eval()
    first, second, *_ = theirs.deepspeed_moe.experts.deepspeed_experts
    assert torch.equal(first.weight, second.weight)
    with torch.no_grad():
        for expert in theirs.deepspeed_moe.experts.deepspeed_experts:
            torch.nn.init.normal_(expert.weight)
        hidden = torch.randn(1, 64, 32)
        assert not torch.equal(theirs(hidden)[0], theirs(hidden)[0])
    ours = Decoder(DecoderSection(**MIXTRAL), 50).blocks[0].feed_forward.eval()
    assert not torch.equal(ours.experts["0"].down.weight, ours.experts["1"].down.weight)
    assert torch.equal(ours(hidden), ours(hidden))


def as_mixtral(model: Decoder, folder) -> transformers.PreTrainedModel:
    """Have transformers read our weights from a folder."""
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in hugging_face_state(model).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hugging_face_config(model.section, model.vocabulary_size)))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_mixture_is_transformers_mixtral_and_comes_back_from_its_folder(tmp_path):
    torch.manual_seed(0)
    model = Decoder(DecoderSection(**MIXTRAL), 101).eval()
    tokens = torch.randint(0, 101, (2, 33))
    theirs = as_mixtral(model, tmp_path / "folder")
    assert type(theirs) is transformers.MixtralForCausalLM
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "saved")
    section = section_from_hugging_face(json.loads((tmp_path / "saved" / "config.json").read_text()))
    assert (section.num_experts, section.experts_per_token, section.family) == (4, 2, "llama")
    back = Decoder(section, 101).eval()
    load_hugging_face(back, tmp_path / "saved")
    assert torch.equal(back(tokens), model(tokens))
    with pytest.raises(UserError, match=r"model.num_experts.*1, but the model in .* has 4"):
        load_hugging_face(Decoder(DecoderSection(**MIXTRAL | {"num_experts": 1}), 101), tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "name"), [({"family": "gpt2"}, "family"), ({"experts_per_token": 1}, "experts_per_token")]
)
def test_a_mixture_that_transformers_does_not_have_is_refused_by_the_setting_that_differs(change, name):
    shape = {**SHAPE, "family": "llama", **change}
    with pytest.raises(UserError, match=f"model.{name}.*a Mixtral has family llama, expert_interval 1"):
        hugging_face_config(DecoderSection(**shape), 101)


def reference_losses(trained, tmp_path) -> list[float]:
    """Train transformers' Mixtral with plain torch, the load-balancing loss made of what its router says."""
    run = load_run(trained / "mixtral_one")
    samples = run.recipe.open_data(run.config).train
    torch.manual_seed(run.config.seed)
    model = as_mixtral(Decoder(run.config.model, samples.vocabulary_size), tmp_path / "reference").train()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95), 1e-8)
    losses = []
    for step in range(HALF):
        order = sample_order(run.config.seed, samples.num_samples, 8 * step, 8)
        total, num_targets = torch.zeros(()), 8 * LENGTH
        for begin in range(0, 8, 2):  # a micro-batch is what the load is balanced over
            batch = samples.batch(order.ids[begin : begin + 2], order.epochs[begin : begin + 2])
            out = model(torch.from_numpy(batch["tokens"]), output_router_logits=True)
            labels = torch.from_numpy(batch["labels"]).flatten()
            total = total + F.cross_entropy(out.logits.flatten(0, 1), labels, reduction="sum")
            for logits in out.router_logits:
                shares = torch.bincount(logits.argmax(-1), minlength=4) / len(logits)
                balance = 4 * (shares * logits.softmax(-1).mean(0)).sum()
                total = total + COEFFICIENT * len(labels) * balance
        optimizer.zero_grad()
        (total / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item() / num_targets)
    return losses


def test_five_steps_go_the_way_of_transformers_mixtral_in_plain_torch(trained, tmp_path):
    assert values(trained / "mixtral_one", "loss") == pytest.approx(reference_losses(trained, tmp_path), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "plan"),
    [("mixtral", "one"), *((name, "ep2_zero1") for name in ("switch", "dropping", "dropping_switch"))],
)
def test_five_steps_of_every_kind_of_mixture_give_the_golden_losses(trained, model, plan):
    if os.environ.get("BIGBATCH_WRITE_GOLDEN") == "1":
        golden = json.loads(GOLDEN.read_text()) | {model: values(trained / f"{model}_{plan}", "loss")}
        GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())[model]
    assert values(trained / f"{model}_{plan}", "loss") == pytest.approx(golden, rel=1e-4)
    assert golden[0] - golden[-1] > 0.2


@pytest.mark.parametrize(("model", "plan"), AGREEING[1:])
def test_expert_ranks_under_every_stage_give_the_losses_and_norms_of_one_rank(trained, model, plan):
    one, found = trained / f"{model}_one", trained / f"{model}_{plan}"
    assert len(values(found, "loss")) == HALF
    for name in ("loss", "grad_norm"):
        assert values(found, name) == pytest.approx(values(one, name), rel=1e-5)
    assert max(values(one, "grad_norm")) > 1  # clipping took part
    assert values(found, "loss", "evaluation") == pytest.approx(values(one, "loss", "evaluation"), rel=1e-5)
    assert values(found, "samples", "text") == values(one, "samples", "text")


@pytest.mark.parametrize("model", ["switch", "lamb", "dropping", "dropping_switch"])
def test_expert_ranks_agree_with_data_ranks_in_every_kind_of_mixture(trained, model):
    plain, found = trained / f"{model}_dp2", trained / f"{model}_ep2_zero1"
    assert values(found, "loss") == pytest.approx(values(plain, "loss"), rel=1e-5)
    assert values(found, "loss", "evaluation") == pytest.approx(values(plain, "loss", "evaluation"), rel=1e-5)


def test_the_optimizer_of_experts_may_be_in_the_hosts_memory(trained):
    found, one = trained / "offload_ep2_zero2", trained / "mixtral_one"
    for name in ("loss", "grad_norm"):
        assert values(found, name) == pytest.approx(values(one, name), rel=1e-5)


def test_lambs_norms_are_those_of_each_expert_at_stage_0_too(trained):
    assert values(trained / "lamb_ep2_zero0", "loss") == pytest.approx(values(trained / "lamb_dp2", "loss"), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1])
def test_expert_ranks_in_bf16_stay_near_data_ranks_in_bf16(trained, stage):
    assert values(trained / f"bf16_ep2_zero{stage}", "loss") == pytest.approx(
        values(trained / "bf16_dp2", "loss"), rel=5e-3
    )


def test_tokens_beyond_the_capacity_are_dropped_in_training_alone(trained):
    full, dropping = trained / "mixtral_dp2", trained / "dropping_dp2"
    assert abs(values(full, "loss")[0] - values(dropping, "loss")[0]) > 1e-3


@pytest.mark.parametrize(("one", "other"), RESUMED)
def test_a_run_goes_on_under_another_plan_as_if_nothing_had_happened(trained, one, other):
    folder, whole = trained / f"{one}_to_{other}", trained / "mixtral_whole"
    assert values(folder, "step") == list(range(HALF + 1, STEPS + 1))
    assert values(folder, "loss") == pytest.approx(values(whole, "loss")[HALF:], rel=1e-5)
    assert reader(folder, STEPS).manifest["order_hash"] == reader(whole, STEPS).manifest["order_hash"]


def test_a_run_goes_on_under_the_same_plan_bit_for_bit(trained):
    again, whole = reader(trained / "again", STEPS), reader(trained / "mixtral_whole", STEPS)
    assert values(trained / "again", "loss") == values(trained / "mixtral_whole", "loss")[HALF:]
    assert again.tensors.keys() == whole.tensors.keys()
    for name in whole.tensors:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(again.read(name, kind), whole.read(name, kind))


@pytest.mark.parametrize("plan", ["ep2_zero0", "ep2_zero1", "ep2xdp2"])
def test_a_checkpoint_holds_each_expert_once_as_a_tensor_of_its_own(trained, plan):
    found, one = reader(trained / f"mixtral_{plan}"), reader(trained / "mixtral_one")
    assert found.manifest["expert_ranks"] == 2
    assert found.tensors.keys() == one.tensors.keys()
    assert found.tensors["blocks.1.feed_forward.experts.3.down.weight"]["shape"] == [32, 48]
    for entry in found.tensors.values():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            pieces = [piece for piece in entry["pieces"] if piece[1] == kind]
            assert sum(piece[3] for piece in pieces) == torch.Size(entry["shape"]).numel()


def test_a_checkpoint_of_expert_ranks_becomes_a_mixtral(trained, tmp_path):
    parity = convert(trained / "mixtral_ep2_zero1", tmp_path / "folder")
    assert parity.largest_difference <= 1e-5 * parity.largest_logit
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert type(model) is transformers.MixtralForCausalLM
    with pytest.raises(UserError, match=r"model.family.*'gpt2' has no like in transformers"):
        convert(trained / "switch_dp2", tmp_path / "other")


REFUSED = [
    ({"tensor": 2}, {}, 4, r"parallel.tensor.*2 with model.num_experts 4: DeepSpeed lays .* legal and near: tensor 1"),
    ({"pipeline": 2}, {}, 4, r"parallel.pipeline.*2 with model.num_experts 4: the load-balancing loss"),
    ({"zero_stage": 3}, {}, 4, r"parallel.zero_stage.*3 with model.num_experts 4.*right is 2; legal and near: "),
    ({"expert": 3}, {}, 3, r"parallel.expert.*3 does not divide model.num_experts 4; right is 2 or 4"),
    ({"expert": 4}, {}, 2, r"parallel.expert.*4 does not divide the data ranks 2; right is 2"),
    ({"expert": 2}, {"num_experts": 1}, 2, r"parallel.expert.*2, but the model has no experts; right is 1"),
    ({"sync": "local_sgd", "zero_stage": 0}, {}, 2, r"parallel.sync.*local_sgd does not go with model.num_experts"),
]


@pytest.mark.parametrize(("parallel", "model", "ranks", "message"), REFUSED)
def test_what_deepspeeds_layer_does_not_go_with_is_refused_with_what_would_be_right(parallel, model, ranks, message):
    data = {"train": ["x.txt"], "sequence_length": LENGTH, "tokenizer": {"kind": "character"}}
    content = document(MIXTRAL | model, data, parallel=parallel, batch={"global_size": 12})
    config = GptConfig.model_validate_json(json.dumps(content))
    with pytest.raises(UserError, match=message):
        complete(config, {}, ranks)


def test_settings_of_zero_that_the_layer_cannot_do_with_are_refused():
    data = {"train": ["x.txt"], "sequence_length": LENGTH, "tokenizer": {"kind": "character"}}
    config = GptConfig.model_validate_json(json.dumps(document(MIXTRAL, data)))
    with pytest.raises(UserError, match=r"zero_optimization.reduce_scatter.*false does not go with experts"):
        complete(config, {"zero_optimization": {"stage": 2, "reduce_scatter": False}}, 1)
