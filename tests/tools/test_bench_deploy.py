import json

import pytest

from bigbatch.launcher import cli
from bigbatch.tools.bench_deploy import BASE, summarize


def test_ratios_are_of_turns_in_the_same_round():
    seconds = {BASE: [0.4, 0.4, 1.2], "other": [0.1, 0.2, 0.3]}

    base, other = summarize(seconds, 8, 2, {BASE: 100, "other": 30})

    assert (base.milliseconds, base.ratio, base.batch, base.num_bytes) == (200, 1, 8, 100)
    assert (other.milliseconds, other.num_bytes) == (100, 30)
    assert other.ratio == pytest.approx(4)  # of 4, 2 and 4


@pytest.mark.parametrize(
    ("kind", "engines"),
    [("classify", ["onnxruntime"]), ("gpt_llama", ["onnxruntime", "onnxruntime-genai", "llama.cpp"])],
)
def test_a_model_is_measured_under_every_engine_that_is_here(kind, engines, tiny_folder, capsys):
    assert cli.main(["bench", "deploy", str(tiny_folder(kind)[1]), "--rounds", "1", "--json"]) == 0

    results = json.loads(capsys.readouterr().out)["results"]
    names = {one["name"] for one in results}
    assert {name.partition(",")[0] for name in names} == {"transformers", *engines}
    assert {one["batch"] for one in results} == {1, 8}
    assert all(one["milliseconds"] > 0 and one["num_bytes"] > 0 for one in results)
    sizes = {one["name"]: one["num_bytes"] for one in results}
    assert sizes["onnxruntime, fp16"] < 0.7 * sizes["onnxruntime, fp32"]


def test_a_model_to_measure_has_to_be_named(capsys):
    assert cli.main(["bench", "deploy"]) == 2
    assert "MODEL: is missing; right is a run folder, a checkpoint or a model folder" in capsys.readouterr().err
