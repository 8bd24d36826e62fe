"""Documents beside their summaries, for an encoder-decoder that writes.

W pairs lie in R rows of S tokens of documents and T of summaries.
"""

from pathlib import Path

import numpy as np

from bigbatch.recipes.core.data.examples import Examples
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.packing import first_fit_pairs, truncated
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.data.token_dropout import drop_tokens
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, load_tokenizer
from bigbatch.recipes.summarize.config import DocumentDataSection


class PairSamples:
    """A split as `Samples`: a document and, in each epoch, the next of its summaries."""

    def __init__(
        self,
        folder: Path,
        split: str,
        data: DocumentDataSection,
        begin_of_target: int,
        token_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Map the split into memory."""
        self.tokenizer = load_tokenizer(folder)
        self.data, self.begin_of_target, self.token_dropout, self.seed = data, begin_of_target, token_dropout, seed
        self.documents = Examples(folder, split)
        self.num_samples = self.documents.num_rows
        special = 1 + (self.tokenizer.begin_of_text is not None)
        self.lengths = self.documents.lengths("tokens") + special
        self.mean_tokens = (
            float(self.lengths.clip(max=data.sequence_length).mean()),
            float((self.documents.lengths("summary_tokens") / self.documents.lengths("summary_lengths")).mean()),
        )
        content = [self.documents.fingerprint, data.sequence_length, data.summary_tokens, begin_of_target]
        content += [token_dropout, seed if token_dropout else 0]
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the pairs as `collate` does."""
        texts = self.documents.lists("tokens", sample_ids)
        if self.token_dropout:
            texts = drop_tokens(texts, self.token_dropout, self.seed, Order(sample_ids, epochs), self.tokenizer)
        sources = [whole(tokens, self.tokenizer, self.data) for tokens in texts]
        columns = (self.documents.lists(f"summary_{name}", sample_ids) for name in ("lengths", "tokens"))
        summaries = []
        for lengths, tokens, epoch in zip(*columns, epochs.tolist(), strict=True):
            chosen = epoch % len(lengths)
            begin = int(lengths[:chosen].sum())
            summaries.append(truncated(tokens[begin : begin + lengths[chosen]], self.data.summary_tokens))
        most = max(self.data.sequence_length, self.data.summary_tokens)
        return collate(sources, summaries, self.begin_of_target, most)

    def sources(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return the tokens of documents."""
        return [whole(tokens, self.tokenizer, self.data) for tokens in self.documents.lists("tokens", ids)]

    def described(self) -> str:
        """Tell what the split holds."""
        line = f"{self.num_samples:,} documents of {self.lengths.mean():.0f} tokens on average"
        long = int((self.lengths > self.data.sequence_length).sum())
        line += f"; {long:,} are cut at {self.data.sequence_length}" if long else ""
        lengths = self.documents.table["summary_lengths"].combine_chunks().flatten().to_numpy()
        line += f"; {len(lengths):,} summaries of {lengths.mean():.0f}"
        long = int((lengths > self.data.summary_tokens).sum())
        return line + (f", {long:,} of them cut at {self.data.summary_tokens}" if long else "")


def whole(tokens: np.ndarray, tokenizer: TextTokenizer, data: DocumentDataSection) -> np.ndarray:
    """Return a document's tokens between the special ones, cut where there are too many."""
    first = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
    return truncated(np.concatenate([first, tokens, [tokenizer.end_of_text]]).astype(np.uint32), data.sequence_length)


def collate(
    sources: list[np.ndarray], summaries: list[np.ndarray], begin_of_target: int, row_tokens: int
) -> dict[str, np.ndarray]:
    """Lay pairs out in rows, several in one where both sides have room within `row_tokens`.

    tokens [R, S] and written [R, T] int64, what encoder and decoder read; labels [R, T] int64, what the decoder is to
    say; documents [R, S] and target_documents [R, T] int32, the number of the pair, -1 where nothing lies.
    """
    rows = first_fit_pairs(np.array([list(map(len, sources)), list(map(len, summaries))]).T, row_tokens)
    tokens, documents = _lay_out(sources, rows, 0)
    labels, target_documents = _lay_out(summaries, rows, IGNORED_LABEL)
    written = _lay_out([np.append([begin_of_target], summary[:-1]) for summary in summaries], rows, 0)[0]
    parts = {"tokens": tokens, "written": written, "labels": labels}
    return parts | {"documents": documents, "target_documents": target_documents}


def _lay_out(texts: list[np.ndarray], rows: np.ndarray, filler: int) -> tuple[np.ndarray, np.ndarray]:
    ends = np.zeros(int(rows.max()) + 1, np.int64)
    np.add.at(ends, rows, [len(text) for text in texts])
    shape = (len(ends), int(ends.max()))
    values, documents = np.full(shape, filler, np.int64), np.full(shape, -1, np.int32)
    ends[:] = 0
    for number, (text, row) in enumerate(zip(texts, rows.tolist(), strict=True)):
        place = slice(ends[row], ends[row] + len(text))
        values[row, place], documents[row, place] = text, number
        ends[row] += len(text)
    return values, documents
