"""Search over an index: the same hits as comparing with everything, kept in a folder, refused where it does not fit."""

import numpy as np
import pytest

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.match import search as searching
from bigbatch.recipes.match.config import SearchSection
from bigbatch.recipes.match.search import Document, build_index, load_index, save_index, search

TEXTS = ("red rose garden", "blue wall garden", "old oven", "cold kettle kitchen", "loud printer office")
DOCUMENTS = [Document(f"d{number}", text) for number, text in enumerate(TEXTS)]


def embed(texts: list[str]) -> np.ndarray:
    """Give a text the counts of its letters, as a model would give it a vector."""
    counts = np.array([[1.0, *(text.count(letter) for letter in "abcdefghiklnoprstuw")] for text in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def ids(found: list[tuple[Document, float]]) -> list[str]:
    return [document.id for document, _ in found]


def test_a_search_by_the_model_ranks_by_cosine_and_one_by_words_by_shared_words():
    index = build_index(DOCUMENTS, embed)
    (found,) = search(index, ["garden wall"], embed, SearchSection(), "model", 5)
    cosines = embed(["garden wall"])[0] @ embed(list(TEXTS)).T
    assert ids(found) == [f"d{number}" for number in np.argsort(-cosines)]
    assert [score for _, score in found] == pytest.approx(sorted(cosines.tolist(), reverse=True), abs=1e-6)
    (by_words,) = search(index, ["garden wall"], embed, SearchSection(), "words", 5)
    assert ids(by_words) == ["d1", "d0"]
    (both,) = search(index, ["garden wall"], embed, SearchSection(), "hybrid", 2)
    assert ids(both) == ["d1", "d0"]
    assert both[0][1] == pytest.approx(2 / 61)


def test_a_kept_index_finds_the_same_and_no_other_model_may_use_it(tmp_path):
    index = build_index(DOCUMENTS, embed)
    save_index(index, embed, tmp_path / "index")
    again = load_index(tmp_path / "index", embed)
    asked = (["rose", "kitchen office"], embed, SearchSection(), "hybrid", 3)
    assert search(again, *asked) == search(index, *asked)
    with pytest.raises(UserError, match="was made by another model; --documents makes one for this"):
        load_index(tmp_path / "index", lambda texts: embed(texts)[:, ::-1])
    (tmp_path / "index" / "vectors.npy").write_bytes(b"")
    with pytest.raises(UserError, match="holds no index that can be read"):
        load_index(tmp_path / "index", embed)


@pytest.mark.filterwarnings("ignore:builtin type [Ss]wig:DeprecationWarning")  # faiss under Python 3.12
def test_a_graph_of_faiss_finds_what_comparing_with_all_finds(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install faiss-cpu")
    generator = np.random.default_rng(1)
    words = ["".join(generator.choice(list("abcdefghiklnoprstuw"), 8)) for _ in range(400)]
    documents = [Document(str(number), word) for number, word in enumerate(words)]
    exact = build_index(documents, embed)
    monkeypatch.setattr(searching, "APPROXIMATE_FROM", 100)
    save_index(build_index(documents, embed), embed, tmp_path / "index")
    graph = load_index(tmp_path / "index", embed)
    assert exact.graph is None
    assert graph.graph is not None
    asked = (words[:20], embed, SearchSection(), "model", 10)
    pairs = zip(search(exact, *asked), search(graph, *asked), strict=True)
    scores = [([score for _, score in one], [score for _, score in other]) for one, other in pairs]
    assert np.mean([np.allclose(one, other, atol=1e-5) for one, other in scores]) >= 0.9
