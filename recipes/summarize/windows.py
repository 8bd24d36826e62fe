"""Documents as windows of whole sentences, for an encoder that scores these.

W windows of at most S sentences, each sentence [CLS] its tokens [SEP], lie in R rows of T tokens.
"""

from pathlib import Path

import numpy as np

from bigbatch.recipes.core.data.examples import Examples
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.packing import lay_out
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.data.splits import SPLITS
from bigbatch.recipes.core.data.token_dropout import drop_tokens
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.summarize.config import SPECIAL_TOKENS, DocumentDataSection


class DocumentSamples:
    """A split as `Samples`: each window is one sample, so that a batch is as large whatever the documents' lengths."""

    def __init__(
        self, folder: Path, split: str, data: DocumentDataSection, token_dropout: float = 0.0, seed: int = 0
    ) -> None:
        """Map the split into memory."""
        self.tokenizer = load_tokenizer(folder)
        if self.tokenizer.begin_of_text is None:
            found = "has no token that begins a text; kind 'wordpiece' has, and so has BERT's own"
            raise UserError("data.tokenizer", found)
        self.split, self.data, self.token_dropout, self.seed = SPLITS.index(split), data, token_dropout, seed
        self.documents = Examples(folder, split)
        everything = np.arange(self.documents.num_rows)
        found = [cut_document(lengths, data) for lengths in self.documents.lists("lengths", everything)]
        self.rows = np.repeat(everything, [len(cuts) for cuts in found])  # [num_samples] each
        self.begins, self.ends = np.concatenate(found).T
        lengths = self.documents.lengths("tokens") + SPECIAL_TOKENS * self.documents.lengths("lengths")
        self.mean_tokens = (float(lengths.sum() / len(self.rows)),)
        self.num_samples = len(self.rows)
        self.fingerprint = self._fingerprint()

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows as `collate` does, and what is right: labels and worths [W, S] float32, 0 beyond.

        rows [W] is the window's document, splits [W] the number of the split.
        """
        rows, begins, ends = (side[sample_ids] for side in (self.rows, self.begins, self.ends))
        found = [self._sentences(*window) for window in zip(rows.tolist(), begins, ends, strict=True)]
        texts, cuts = [tokens for tokens, _ in found], [cuts for _, cuts in found]
        if self.token_dropout:
            texts = drop_tokens(texts, self.token_dropout, self.seed, Order(sample_ids, epochs), self.tokenizer)
        windows = [np.split(tokens, places) for tokens, places in zip(texts, cuts, strict=True)]
        batch = collate(windows, self.data, self.tokenizer)
        labels, worths = (np.zeros(batch["places"].shape, np.float32) for _ in range(2))
        oracles, values = self.documents.lists("oracle", rows), self.documents.lists("worths", rows)
        for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            labels[number, : end - begin] = np.isin(np.arange(begin, end), oracles[number])
            worths[number, : end - begin] = values[number][begin:end]
        targets = {"labels": labels, "worths": worths}
        return batch | targets | {"rows": rows, "splits": np.full(len(rows), self.split)}

    def described(self) -> str:
        """Tell what the split holds."""
        lengths = self.documents.table["lengths"].combine_chunks().flatten().to_numpy()
        line = f"{self.documents.num_rows:,} documents of {len(lengths):,} sentences; "
        line += f"{self.num_samples:,} windows of {self.data.sequence_length} tokens at most"
        long = int((lengths > self.data.sequence_length - SPECIAL_TOKENS).sum())
        return line + (f"; {long:,} sentences are longer, and cut" if long else "")

    def _sentences(self, row: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of some sentences, and where all but the first begin."""
        (lengths,), (tokens,) = (self.documents.lists(name, np.array([row])) for name in ("lengths", "tokens"))
        places = np.append(0, np.cumsum(lengths))
        return tokens[places[begin] : places[end]], places[begin + 1 : end] - places[begin]

    def _fingerprint(self) -> str:
        section = self.data
        content = [self.documents.fingerprint, section.sequence_length, section.window_sentences, section.packing]
        content += [self.token_dropout, self.seed if self.token_dropout else 0]
        return fingerprint_of(content)


def cut_document(lengths: np.ndarray, data: DocumentDataSection) -> list[tuple[int, int]]:
    """Return each window's first sentence and the one behind its last, of sentences so many tokens long.

    A window takes whole sentences as long as they fit; one that fits into none is cut when it is laid out.
    """
    windows, begin, room = [], 0, data.sequence_length
    for number, length in enumerate(lengths.tolist()):
        needed = min(length + SPECIAL_TOKENS, data.sequence_length)
        if number > begin and (needed > room or number - begin == data.window_sentences):
            windows.append((begin, number))
            begin, room = number, data.sequence_length
        room -= needed
    return [*windows, (begin, len(lengths))]


def collate(
    windows: list[list[np.ndarray]], data: DocumentDataSection, tokenizer: TextTokenizer
) -> dict[str, np.ndarray]:
    """Lay windows, each the tokens of its sentences, out in rows as `lay_out` does.

    segments [R, T] int64 is 1 in every second sentence of a window; places [W, S] int64 is where each sentence begins
    in the flattened tokens, -1 beyond the last.
    """
    first, end = (np.array([token], np.uint32) for token in (tokenizer.begin_of_text, tokenizer.end_of_text))
    room = data.sequence_length - SPECIAL_TOKENS
    parts = [[np.concatenate([first, sentence[:room], end]) for sentence in sentences] for sentences in windows]
    batch = lay_out([np.concatenate(window) for window in parts], data.sequence_length if data.packing else None)
    segments = np.zeros(batch["tokens"].size, np.int64)
    places = np.full((len(windows), max(map(len, windows))), -1, np.int64)
    for number, (begin, window) in enumerate(zip(batch["firsts"], parts, strict=True)):
        begins = begin + np.cumsum([0, *map(len, window)])
        places[number, : len(window)] = begins[:-1]
        for start, stop in zip(begins[1:-1:2], begins[2::2], strict=True):
            segments[start:stop] = 1
    return batch | {"segments": segments.reshape(batch["tokens"].shape), "places": places}
