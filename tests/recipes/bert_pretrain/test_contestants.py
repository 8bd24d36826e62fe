"""run_mlm's rows, as `bigbatch bench train` feeds them to transformers' Trainer."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bigbatch.recipes.bert_pretrain import recipe
from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig
from bigbatch.recipes.bert_pretrain.contestants import PaddedDocuments, _row


@pytest.fixture(scope="module")
def opened(make_document, tmp_path_factory):
    document = make_document(tmp_path_factory.mktemp("bench"), data={"unit": "sentence"})
    config = BertPretrainConfig.model_validate_json(json.dumps(document))
    recipe.prepare(config)
    return recipe.open_data(config)


def test_padded_rows_hold_one_sentence_each_and_count_no_padding(opened):
    lines, begin, end = PaddedDocuments(opened.train), 2, opened.facts["end_of_text"]
    assert lines.num_samples > 100
    assert (lines.rows[:, 0] == begin).all()
    assert (lines.rows == begin).sum() == lines.num_samples  # no row holds two
    assert 8 < lines.mean_tokens < 20  # a sentence of six words and its full stop, in pieces
    ids = np.arange(lines.num_samples)
    batch = lines.batch(ids, np.zeros_like(ids))
    assert batch["useful"].sum() / lines.num_samples == pytest.approx(lines.mean_tokens)
    counted = batch["labels"] != -100
    assert batch["useful"][np.nonzero(counted)[0], batch["targets"][counted]].all()
    assert (np.take_along_axis(lines.rows, lines.lengths[:, None] - 1, axis=1) == end).all()


def test_a_row_for_transformers_has_the_same_targets(opened):
    batch = opened.train.batch(np.array([5]), np.array([0]))
    row = _row(batch)
    (places,) = (row["labels"] != -100).nonzero(as_tuple=True)
    counted = batch["labels"][0] != -100
    assert places.tolist() == batch["targets"][0][counted].tolist()
    assert row["labels"][places].tolist() == batch["labels"][0][counted].tolist()
    assert row["input_ids"].tolist() == batch["tokens"][0].tolist()
    assert row["attention_mask"].all()


def test_the_benchmark_measures_all_three_in_useful_tokens(make_document, tmp_path):
    document = make_document(tmp_path, data={"unit": "sentence"}, batch={"global_size": 8, "micro_size": None})
    path = tmp_path / "document.json"
    path.write_text(json.dumps(document))
    command = [sys.executable, "-m", "bigbatch.launcher.cli", "bench", "train", str(path)]
    command += ["--rounds", "1", "--steps", "1", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout)
    names = ["bigbatch", "run_mlm, texts cut", "run_mlm, line by line"]
    assert [row["name"] for row in measured["results"]] == names
    ours, cut, lines = (row["tokens_per_second"] * row["step_seconds"] for row in measured["results"])
    assert ours == pytest.approx(8 * 32)
    assert cut == pytest.approx(8 * 32)
    assert 8 * 8 < lines < 8 * 20
