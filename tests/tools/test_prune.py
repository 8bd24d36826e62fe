import json

import pytest
import torch
from safetensors.torch import load_file

from bigbatch.launcher import cli
from bigbatch.tools import opened


@pytest.fixture(scope="module")
def curve(tiny_folder, tmp_path_factory):
    """Prune a tiny classifier at two ratios, measured."""
    out = tmp_path_factory.mktemp("curve") / "out"
    command = ["prune", str(tiny_folder("classify")[0]), str(out), "--method", "feed_forward", "--ratio", "0.75"]
    assert cli.main([*command, "--curve", "0.5", "--score-steps", "2"]) == 0
    return out


def test_a_curve_is_in_the_record_the_card_and_the_page(curve):
    (rung,) = json.loads((curve / "deployment.json").read_text())["rungs"]
    record = rung["record"]
    (point,) = record["curve"]
    assert (record["ratio"], record["method"], point["ratio"]) == (0.75, "feed_forward", 0.5)
    assert record["parameters"] < point["parameters"] < record["parameters_before"]
    assert rung["after"]["num_bytes"] < point["measured"]["num_bytes"] < rung["before"]["num_bytes"]
    card = (curve / "model_card.md").read_text()
    figure = point["measured"]["figure"][1]
    assert f"| 0.5 | {figure:.4g}" in card
    assert f"{point['parameters']:,}" in card
    page = (curve / "report.html").read_text()
    assert page.count("Quality and ratio") == 2  # the heading, and what is read out
    assert f"<td>{record['parameters']:,}</td>" in page


def test_a_pruned_folder_opens_as_a_native_model(curve):
    assert type(opened.open_model(curve).model).__name__ == "Classifier"
    parameters = json.loads((curve / "deployment.json").read_text())["rungs"][0]["record"]["parameters"]
    assert sum(tensor.numel() for tensor in load_file(curve / "model.safetensors").values()) == parameters


def test_a_recovery_changes_the_weights_and_leaves_zeros_zero(tiny_folder, tmp_path):
    run, folder = tiny_folder("classify")
    command = ["prune", str(run), str(tmp_path / "out"), "--method", "magnitude", "--ratio", "0.8", "--scope", "layer"]
    assert cli.main([*command, "--recover", "3", "--recover-rate", "0.01", "--no-measure"]) == 0
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    # Queries, keys and values are one matrix to this project.
    matrices = [name for name in before if ".dense.weight" in name and ".layer." in name]
    assert len(matrices) == 2 * 3
    for name in matrices:
        kept = before[name].abs() > before[name].abs().flatten().sort().values[round(0.8 * before[name].numel()) - 1]
        assert torch.equal(after[name] != 0, kept)
        assert (after[name] != before[name])[kept].float().mean() > 0.9
    assert not (tmp_path / "out" / "prepared").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--method magnitude", "error: --ratio: is missing; right is a share such as 0.3"),
        ("--method magnitude --ratio 1", "found '1'; right is a number between 0 and 1"),
        (
            "--method 2:4 --ratio 0.3",
            "error: --ratio: 2:4 is one half, and has no curve; leave --ratio and --curve out",
        ),
        (
            "--method layers --ratio 0.5 --scope layer",
            "error: --scope: has no effect here: it needs --method magnitude",
        ),
        (
            "--method layers --ratio 0.5 --recover-rate 1",
            "error: --recover-rate: has no effect here: it needs --recover",
        ),
        ("--method layers --ratio 0.5 --curve 0.2 --no-measure", "it needs measuring, not --no-measure"),
    ],
)
def test_flags_that_do_not_go_together_are_told_in_a_line(flags, line, tmp_path, capsys):
    assert cli.main(["prune", "model", str(tmp_path / "out"), *flags.split()]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
