"""Search on the Cranfield collection, before any training."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbatch.launcher.resolve import resolve
from bigbatch.recipes.core.data.splits import SPLITS
from bigbatch.recipes.match import recipe

DATA = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[4] / "shared/data"))


@pytest.mark.skipif(
    not (DATA / "cranfield").is_dir(), reason=f"NO REAL DATA: there is no {DATA}/cranfield; set BIGBATCH_TEST_DATA"
)
def test_bm25_reaches_what_is_known_of_it_and_fresh_vectors_find_much_of_it_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BIGBATCH_DATA", str(DATA))
    resolved = resolve("match/cranfield", [f"data.prepared_dir={tmp_path}"])
    recipe.prepare(resolved.config)
    assert "left out: 3 empty, 225 not relevant" in capsys.readouterr().err
    data = recipe.open_data(resolved.config)
    assert data.test.num_samples == 225 + 1399  # queries, and documents: two are empty
    torch.manual_seed(1)
    embed = recipe.encoder_of(resolved.config, data.facts, recipe.build_model(resolved.config, data.facts))
    numbers = np.arange(data.test.num_samples)
    vectors = embed(data.test.texts.texts("text", numbers))
    arrays = {"vectors": vectors, "splits": np.full(len(numbers), SPLITS.index("test")), "rows": numbers}
    found = recipe.figures(resolved.config, data.facts, arrays, thorough=True)
    assert found["bm25_ndcg@10"] == pytest.approx(0.363, abs=0.02)  # of others, with their own words and judgements
    assert found["ndcg@10"] > 0.25
    assert found["hybrid_ndcg@10"] > found["ndcg@10"]
