"""An index of documents: by their words, by their vectors, or both; kept in a folder.

N documents, D numbers of a vector, Q queries.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigbatch.recipes.core.data.examples import Examples, read_examples
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.match.config import SearchSection, Stemming
from bigbatch.recipes.match.data import TEXTS, Embed
from bigbatch.recipes.match.ranking import Lexical, Ranked, fuse, top

APPROXIMATE_FROM = 20_000  # documents: below, comparing with all takes no longer
NEIGHBOURS, LOOKED_AT = 32, 128  # of the graph, https://arxiv.org/abs/1603.09320; more find more and take longer
DEPTH = 1000  # of each ranking that is put together
PROBE = "Which model made these vectors?"
FACTS, DOCUMENTS, VECTORS, GRAPH = "index.json", "documents.jsonl", "vectors.npy", "vectors.faiss"


class Document(NamedTuple):
    """What is searched."""

    id: str
    text: str


class Index(NamedTuple):
    """Documents and what they are found by."""

    documents: list[Document]
    vectors: np.ndarray  # float32 [N, D]
    lexical: Lexical
    graph: Any
    """faiss' graph of many vectors, where it is installed; None: all are compared."""


def build_index(documents: list[Document], embed: Embed, stemming: Stemming = "none") -> Index:
    """Index documents; raise UserError where there are none."""
    if not documents:
        raise UserError("--documents", "there are none")
    texts = [document.text for document in documents]
    vectors = embed(texts).astype(np.float32)
    graph = None
    if len(texts) >= APPROXIMATE_FROM and importlib.util.find_spec("faiss"):
        import faiss  # noqa: PLC0415 - may not be there

        graph = faiss.IndexHNSWFlat(vectors.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efSearch = LOOKED_AT
        graph.add(vectors)
    return Index(documents, vectors, Lexical(texts, stemming), graph)


def search(
    index: Index, queries: list[str], embed: Embed, section: SearchSection, by: str, count: int
) -> list[list[tuple[Document, float]]]:
    """Return for each query its best documents with their scores; `by` is hybrid, model or words."""
    words = [] if by == "model" else index.lexical.rank(queries, max(count, DEPTH))
    dense = [] if by == "words" else _nearest(index, embed(queries), max(count, DEPTH))
    ranked = words or dense
    if by == "hybrid":
        ranked = [fuse(*both, section) for both in zip(words, dense, strict=True)]
    found = [zip(one.documents[:count].tolist(), one.scores[:count].tolist(), strict=True) for one in ranked]
    return [[(index.documents[number], score) for number, score in one] for one in found]


def _nearest(index: Index, queries: np.ndarray, count: int) -> list[Ranked]:
    if index.graph is None:
        return [top(scores, count) for scores in (queries @ index.vectors.T).astype(np.float64)]
    scores, numbers = index.graph.search(queries.astype(np.float32), min(count, len(index.documents)))
    return [
        Ranked(row[row >= 0], found[row >= 0]) for row, found in zip(numbers, scores.astype(np.float64), strict=True)
    ]


def save_index(index: Index, embed: Embed, folder: Path) -> None:
    """Write an index into a new folder."""
    folder.mkdir(parents=True)
    lines = (json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in index.documents)
    (folder / DOCUMENTS).write_text("".join(lines), encoding="utf-8")
    np.save(folder / VECTORS, index.vectors)
    if index.graph is not None:
        import faiss  # noqa: PLC0415 - as above

        faiss.write_index(index.graph, str(folder / GRAPH))
    (folder / FACTS).write_text(json.dumps({"version": 1, "probe": embed([PROBE])[0].tolist()}) + "\n")


def load_index(folder: Path, embed: Embed, stemming: Stemming = "none") -> Index:
    """Open an index; raise UserError for a folder that holds none, or one that another model has made."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        lines = (folder / DOCUMENTS).read_text(encoding="utf-8").splitlines()
        documents = [Document(**json.loads(line)) for line in lines]
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        probe = np.array(facts["probe"])
        if len(vectors) != len(documents):
            raise ValueError(f"{len(documents)} documents and {len(vectors)} vectors")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError("--index", f"{folder} holds no index that can be read: {error}") from None
    here = embed([PROBE])[0]
    if here.shape != probe.shape or not np.allclose(here, probe, atol=1e-3):
        raise UserError("--index", f"{folder} was made by another model; --documents makes one for this")
    graph = None
    if (folder / GRAPH).exists() and importlib.util.find_spec("faiss"):
        import faiss  # noqa: PLC0415 - as above

        graph = faiss.read_index(str(folder / GRAPH))
    return Index(documents, vectors, Lexical([document.text for document in documents], stemming), graph)


def prepared_documents(folder: Path) -> list[Document]:
    """Return the right texts of all splits of a run's prepared folder, each once."""
    found: dict[str, Document] = {}
    for split in (name for name in read_examples(folder).splits if name.endswith(TEXTS)):
        table = Examples(folder, split)
        numbers = np.flatnonzero(table.numbers("is_right"))
        for name, text in zip(table.texts("id", numbers), table.texts("text", numbers), strict=True):
            if not found.get(text, Document("", "")).id:
                found[text] = Document(name, text)
    return list(found.values())
