"""ZeRO++: weights gathered from secondary shards, and communication that is quantized on GPUs alone."""

import json

import pytest
import torch

from bigbatch.recipes.core.engine import refuse_quantized_communication
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError


@pytest.fixture(scope="module")
def trained(run_program, tmp_path_factory):
    out = tmp_path_factory.mktemp("secondary_shards")
    run_program("secondary_shards.py", out)
    return json.loads((out / "result.json").read_text())


def test_four_ranks_with_shards_in_groups_of_two_train_as_they_do_without(trained):
    without, within = (torch.tensor(trained[size]["steps"]) for size in ("1", "2"))
    assert without.shape == (5, 2)
    torch.testing.assert_close(within, without, rtol=1e-6, atol=0)
    assert without[-1, 0] < without[0, 0]


def test_weights_come_from_the_secondary_shards_once_a_forward_pass_has_made_them(trained):
    without, within = (trained[size]["gathered"] for size in ("1", "2"))
    assert without.keys() == {"forward 4", "backward 4"}
    assert within.keys() == {"forward 4", "forward 2", "backward 2"}
    assert within["backward 2"] == without["backward 4"]
    # Of the two micro-batches of a step, the first finds new weights.
    assert within["forward 4"] + within["forward 2"] == without["forward 4"]
    assert within["forward 2"] > 0


@pytest.mark.parametrize("name", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantized_communication_is_refused_on_a_cpu_and_not_on_a_gpu(name):
    document = {"zero_optimization": {"stage": 3, name: True}}
    with pytest.raises(UserError, match=rf"^deepspeed\.zero_optimization\.{name}: needs GPUs; on CPUs right would be"):
        refuse_quantized_communication(document, torch.device("cpu"))
    refuse_quantized_communication(document, torch.device("cuda", 0))


def test_gradients_are_quantized_from_fp16_alone(toy):
    native = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}
    config = toy.make_config({"parallel": {"zero_stage": 3}, "precision": {"dtype": "bf16"}})
    with pytest.raises(UserError, match=r"precision\.dtype: bf16 does not go with zero_quantized_gradients"):
        complete(config, native, 2)
    complete(config, {**native, "communication_data_type": "fp16"}, 2)
    complete(toy.make_config({"parallel": {"zero_stage": 3}, "precision": {"dtype": "fp16"}}), native, 2)
