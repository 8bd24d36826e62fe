import json
import shutil
from pathlib import Path

import pytest

from bigbatch.launcher.cli import main
from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.judge import judge
from bigbatch.tools.opened import open_model
from bigbatch.tools.run_data import open_data


@pytest.mark.parametrize("kind", ["classify", "question_answering", "gpt_llama"])
def test_a_model_folder_has_the_figures_of_its_run(tiny_folder, kind, tmp_path, capsys, monkeypatch):
    run, converted = tiny_folder(kind)
    monkeypatch.chdir(tmp_path)
    right = judge(run, "validation")
    assert len(right) > 4
    assert main(["evaluate", str(converted)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("model") == str(converted)
    del right["model"]
    assert found.pop("loss") == pytest.approx(right.pop("loss"), rel=1e-6)
    numbers = {name: value for name, value in right.items() if isinstance(value, float)}
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    assert found.keys() == right.keys()


def copied(folder: Path, to: Path, change) -> Path:
    """Copy a model folder and change what its run was."""
    shutil.copytree(folder, to)
    record = json.loads((to / "conversion.json").read_text())
    change(record)
    (to / "conversion.json").write_text(json.dumps(record))
    return to


def test_data_that_are_gone_or_unknown_or_of_another_model_are_told(tiny_folder, tmp_path):
    run, converted = tiny_folder("classify")

    def lose(record):
        record["run"]["data"]["prepared_dir"] = str(tmp_path / "gone")
        record["run"]["data"]["train"] = [str(tmp_path / "gone.jsonl")]

    for name, change, message in (
        ("lost", lose, "the data to judge it on are not here .*; --run RUN_DIR names a run's"),
        ("unknown", lambda record: record.update(run={}), "does not say what data it was trained on"),
    ):
        with pytest.raises(UserError, match=message):
            judge(copied(converted, tmp_path / name, change), "validation")
    opened = open_model(converted)
    with pytest.raises(UserError, match="is of the recipe 'question_answering', the model of 'classify'"):
        open_data(opened, tiny_folder("question_answering")[0])
    other = shutil.copytree(converted, tmp_path / "other")
    told = json.loads((other / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["rose"], vocabulary["the"] = vocabulary["the"], vocabulary["rose"]
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="its data have another tokenizer"):
        open_data(open_model(other), run)
    with pytest.raises(UserError, match="its data have the labels"):
        open_data(opened._replace(facts={**opened.facts, "labels": ["a"]}), run)


def test_what_cannot_be_evaluated_is_refused_in_one_line(tmp_path, capsys):
    for arguments, message in (
        (
            [str(tmp_path)],
            f"error: {tmp_path}: is no run folder (it has no run.json), no checkpoint and no model folder",
        ),
        ([str(tmp_path), "--split", "train"], "error: bigbatch evaluate: argument --split: invalid choice"),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert message in capsys.readouterr().err
