"""Rows in three splits: what falls to which, which texts stand in two, and the files and tokenizer they come from."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import xxhash

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.examples import Built, Request, latest_examples, prepare_examples, read_examples
from bigbatch.recipes.core.data.sources import SourceFile, list_files, shared_file
from bigbatch.recipes.core.data.tokenizing import fingerprint, given_tokenizer_file
from bigbatch.recipes.core.errors import UserError

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
RARE = ("",)  # stands for all sets of labels of which a share is less than a row

SplitSources = Any
"""A SplitSection with train, validation and test; and, where it is of texts, a tokenizer."""


class Row(Protocol):
    """What is known of a row ahead of any split."""

    @property
    def text(self) -> str:
        """By which rows are equal."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Of each of which every split gets its share; () where rows have none."""
        ...

    @property
    def origin(self) -> str:
        """File and line, for messages."""
        ...


def cut_splits(data: SplitSources, rows: dict[str, list[Any]], multi_label: bool = False) -> dict[str, list[Any]]:
    """Cut validation and test rows from the training rows where the settings say so, by `data.split_seed`."""
    if not any(split_shares(data).values()):
        return rows
    splits = assign_splits(rows[TRAIN], split_shares(data), data.split_seed, multi_label)
    cut = list(zip(splits, rows[TRAIN], strict=True))
    return {split: [row for name, row in cut if name == split] or rows[split] for split in SPLITS}


def assign_splits(rows: Sequence[Row], shares: dict[str, float], seed: int, multi_label: bool = False) -> list[str]:
    """Return the split of each row: shares of each label's rows, rounded, the others train.

    Which ones follows from a hash of the seed and the text; rows of equal texts stay together, and a row of each label
    stays in train. With several labels a text it is shares of each set of labels, all rare sets counted as one.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_folded(row.text), []).append(number)
    training = Counter(label for row in rows for label in row.labels)
    splits = [TRAIN] * len(rows)
    for texts in _strata(rows, groups, max(shares.values()), multi_label):
        num_rows = sum(len(groups[text]) for text in texts)
        texts.sort(key=lambda text: xxhash.xxh3_128_digest(f"{seed} {text}".encode()))
        for split, share in shares.items():
            room = round(share * num_rows)
            for text in texts if room else ():
                members = groups[text]
                lost = Counter(label for number in members for label in rows[number].labels)
                is_free = splits[members[0]] == TRAIN and all(training[label] > n for label, n in lost.items())
                if is_free and len(members) <= room:
                    room -= len(members)
                    training -= lost
                    for number in members:
                        splits[number] = split
    return splits


def _strata(rows: Sequence[Row], groups: dict[str, list[int]], share: float, multi_label: bool) -> list[list[str]]:
    """Return the texts of each label, or set of labels; a text with several goes with the first by name."""
    strata: dict[tuple[str, ...], list[str]] = {}
    for text, members in groups.items():
        strata.setdefault(min(rows[number].labels for number in members), []).append(text)
    if multi_label:
        sizes = {labels: sum(len(groups[text]) for text in texts) for labels, texts in strata.items()}
        for labels in [labels for labels, size in sizes.items() if round(share * size) == 0]:
            strata.setdefault(RARE, []).extend(strata.pop(labels))
    return [strata[labels] for labels in sorted(strata)]


def count_leaks(data: SplitSources, rows: dict[str, list[Any]]) -> dict[str, int]:
    """Count the rows of each split whose text stands in an earlier one, however it is written, and drop or refuse."""
    earlier: dict[str, str] = {}
    counts = {}
    for split in SPLITS:  # the first one has none
        found = [(row, _folded(row.text)) for row in rows[split]]
        leaked = [(row, text) for row, text in found if text in earlier]
        if leaked and data.on_leak == "fail":
            row, text = leaked[0]
            which = f"{len(leaked)} of its texts stand in an earlier split too, such as {row.origin} in {earlier[text]}"
            raise UserError(f"data.{split}", f"{which}; data.on_leak 'drop' leaves them out")
        if data.on_leak == "drop":
            rows[split] = [row for row, text in found if text not in earlier]
        for row, text in found:
            earlier.setdefault(text, row.origin)
        counts[split] = len(leaked)
    return counts


def leave_out(data: SplitSources, counts: Counter[str], kind: str, origin: str, found: str) -> None:
    """Count a row that cannot be taken as it is, or raise UserError with what was found: as `data.on_error` says."""
    if data.on_error == "fail":
        raise UserError(origin, f"{found}; data.on_error 'skip' leaves such rows out")
    counts[kind] += 1


def _folded(text: str) -> str:
    """Return what equal texts share, however they are spaced and capitalized."""
    return " ".join(text.casefold().split())


def check_splits(data: SplitSources, rows: dict[str, list[Any]], counts: dict[str, int]) -> None:
    """Raise UserError for a split that was asked for and has no row."""
    for split, share in split_shares(data).items():
        if share and not rows[split]:
            raise UserError(f"data.{split}_fraction", f"is {share}: too little for a row of {len(rows[TRAIN])}")
        if getattr(data, split) and not rows[split]:
            raise UserError(f"data.{split}", f"no row is left ({shown_counts(counts)})")


def prepare_splits(
    data: SplitSources,
    build: Callable[[Path, dict[str, list[SourceFile]], Any], Built],
    tokenizer_folder: Path | None = None,
    further_hashes: tuple[str, ...] = (),
) -> Path:
    """Make the prepared folder of these settings and sources by `build(folder, files by split, settings)`, or find it.

    With `tokenizer_folder` the settings that `build` gets have the tokenizer there instead of their own.
    `further_hashes` stand for what else goes into the folder.
    """
    data = _with_tokenizer(data, tokenizer_folder)
    hashes = _tokenizer_hashes(data.tokenizer) if hasattr(data, "tokenizer") else ()
    request = Request(_content(data), list_split_files(data), hashes + further_hashes)
    return prepare_examples(Path(data.prepared_dir), request, lambda folder: build(folder, request.files, data))


def prepared_splits(data: SplitSources, tokenizer_folder: Path | None = None) -> Path:
    """Return the folder that `prepare_splits` made last for these settings; the sources may be gone by now."""
    return latest_examples(Path(data.prepared_dir), _content(_with_tokenizer(data, tokenizer_folder)))


def _content(data: SplitSources) -> dict[str, Any]:
    return data.model_dump(mode="json", exclude={"prepared_dir", *data.not_content})


def _with_tokenizer(data: SplitSources, folder: Path | None) -> SplitSources:
    """Return the settings with the tokenizer of the folder of a model to start from."""
    given = {"tokenizer": TokenizerSection(kind="pretrained", path=str(folder))} if folder else {}
    return data.model_copy(update=given)


def _tokenizer_hashes(section: TokenizerSection) -> tuple[str, ...]:
    """Return what stands for a tokenizer that is brought along."""
    return (fingerprint(given_tokenizer_file(section)),) if section.kind == "pretrained" else ()


def tell_prepared(folder: Path, data: SplitSources, held: Iterable[str], leaked: str) -> None:
    """Say on standard error what a prepared folder holds, in given lines, and what it does not.

    That is in the facts `counts`, of which `read` is what there was, and `leaks`. `leaked` says what stands in two
    splits, as "texts that stand".
    """
    facts, lines = read_examples(folder).facts, list(held)
    if left_out := {name: count for name, count in facts["counts"].items() if count and name != "read"}:
        lines.append(f"left out: {shown_counts(left_out)}")
    if leaks := {split: count for split, count in facts["leaks"].items() if count}:
        treated = "left out" if data.on_leak == "drop" else "kept (data.on_leak)"
        lines.append(f"{leaked} in an earlier split too: {shown_counts(leaks)}; {treated}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def list_split_files(data: SplitSources) -> dict[str, list[SourceFile]]:
    """Find the files of each split, and those that belong to none (`further_sources`).

    Raise UserError where two splits hold the same rows, or one is asked for twice.
    """
    files = {split: list_files(getattr(data, split), f"data.{split}") for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        if path := shared_file(files[first], files[second]):
            raise UserError(f"data.{second}", f"holds {path}, which data.{first} holds too")
    for split, share in split_shares(data).items():
        if share and files[split]:
            raise UserError(f"data.{split}_fraction", f"is {share}, without effect beside data.{split}; remove one")
    if (total := sum(split_shares(data).values())) >= 1:
        raise UserError(
            "data.test_fraction", f"and data.validation_fraction are {total:g}: nothing is left to train on"
        )
    further = {name: list_files(sources, f"data.{name}") for name, sources in data.further_sources.items()}
    return files | further


def split_shares(data: SplitSources) -> dict[str, float]:
    """Return the share of the training rows that each other split gets."""
    return {TEST: data.test_fraction, VALIDATION: data.validation_fraction}


def shown_counts(counts: dict[str, int]) -> str:
    """Return counts that are not 0 as a message shows them."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count)
