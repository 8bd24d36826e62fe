"""Labeled images: from their sources to a prepared folder, and its splits as samples.

The pixels of all images lie in one table of the folder, in the order they were read; a split names its own there.
N images of a batch, C channels, S pixels a side.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import xxhash

from bigbatch.recipes.classify_images.augment import augmented
from bigbatch.recipes.classify_images.config import AugmentSection, ImageDataSection
from bigbatch.recipes.classify_images.images import read_images
from bigbatch.recipes.core.data.examples import (
    ORIGIN,
    Built,
    Examples,
    read_examples,
    write_split,
)
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.labels import SHOWN_LABELS, is_known, label_names
from bigbatch.recipes.core.data.sampler import Order, random_words
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.data.splits import (
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    check_splits,
    count_leaks,
    cut_splits,
    prepare_splits,
    shown_counts,
    tell_prepared,
)
from bigbatch.recipes.core.errors import UserError

IMAGES = "images"  # the table of all pixels
IMAGES_AT_ONCE = 256
MIXUP, AUGMENT, PARTNER = range(3)  # streams of random numbers; the third is the augmentation of the image mixed in

_PIXELS = pyarrow.schema({"pixels": pyarrow.list_(pyarrow.uint8())})
_SPLIT = pyarrow.schema({"image": pyarrow.int64(), "label": pyarrow.int32(), ORIGIN: pyarrow.string()})


class ImageRow(NamedTuple):
    """What is known of an image beside its pixels."""

    text: str
    """Stands for the pixels."""
    labels: tuple[str]
    origin: str
    place: int
    """Its row in the table of pixels."""


def prepare(data: ImageDataSection) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it."""
    folder = prepare_splits(data, _build)
    tell_prepared(folder, data, _held(folder, data), "images that are")
    return folder


def open_split(
    folder: Path, split: str, data: ImageDataSection, augment: AugmentSection, seed: int
) -> "ImageSamples | None":
    """Open a split of a prepared folder, a training one augmented; None where there is none of this name."""
    if split not in read_examples(folder).splits:
        return None
    return ImageSamples(folder, split, data, augment if split == TRAIN else AugmentSection(), seed)


class ImageSamples:
    """A split as `Samples`."""

    def __init__(self, folder: Path, split: str, data: ImageDataSection, augment: AugmentSection, seed: int) -> None:
        self.examples, self.images = Examples(folder, split), Examples(folder, IMAGES)
        self.augment, self.seed = augment, seed
        self.shape = (data.image_size, data.image_size, data.num_channels)
        self.labels: list[str] = self.examples.facts["labels"]
        self.targets = self.examples.numbers("label").astype(np.int64)
        self.places = self.examples.numbers("image")
        self.num_samples = self.examples.num_rows
        # What stands still is the same whatever the seed.
        own = [augment.model_dump(), seed] if augment != AugmentSection() else []
        content = [self.examples.fingerprint, self.images.fingerprint, self.labels, own]
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return pixels float32 [N, C, S, S] from -1 to 1 and labels int64 [N].

        With mixup also the labels [N] of the images mixed in, and shares float32 [N], what is left of each one's own.
        """
        order, pixels = Order(sample_ids, epochs), self._pixels(sample_ids)
        pixels = self._augmented(pixels, order, AUGMENT)
        found = {"labels": self.targets[sample_ids]}
        if self.augment.mixup:
            shares, partners = self._partners(order)
            others = self._augmented(self._pixels(partners), order, PARTNER)
            own = shares[:, None, None, None]
            pixels = own * pixels + (1 - own) * others
            found |= {"other_labels": self.targets[partners], "shares": shares}
        return {"pixels": normalized(pixels), **found}

    def _pixels(self, ids: np.ndarray) -> np.ndarray:
        """Return the images uint8 [N, S, S, C] as they are prepared."""
        return np.stack(self.images.lists("pixels", self.places[ids])).reshape(-1, *self.shape)

    def _augmented(self, pixels: np.ndarray, order: Order, stream: int) -> np.ndarray:
        section = self.augment
        if not (section.flip or section.random_operations or section.least_area < 1):
            return pixels
        words = random_words(self.seed, order, stream, 1)[:, 0]
        found = zip(pixels, words.tolist(), strict=True)
        return np.stack([augmented(image, section, np.random.default_rng(word)) for image, word in found])

    def _partners(self, order: Order) -> tuple[np.ndarray, np.ndarray]:
        """Return each image's share [N] and the id [N] of the one that is mixed in: any of the split."""
        words = random_words(self.seed, order, MIXUP, 2)
        alpha = self.augment.mixup
        shares = [np.random.default_rng(word).beta(alpha, alpha) for word in words[:, 0].tolist()]
        return np.array(shares, np.float32), (words[:, 1] % np.uint64(self.num_samples)).astype(np.int64)


def normalized(pixels: np.ndarray) -> np.ndarray:
    """Return images [N, S, S, C] of 0 to 255 as float32 [N, C, S, S] from -1 to 1."""
    return np.ascontiguousarray((pixels.astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2))


def _build(folder: Path, files: dict[str, list[SourceFile]], data: ImageDataSection) -> Built:
    counts: Counter[str] = Counter()
    rows: dict[str, list[ImageRow]] = {split: [] for split in SPLITS}
    written = {IMAGES: write_split(folder, IMAGES, _PIXELS, _read(data, files, rows, counts))}
    rows = cut_splits(data, rows)
    labels = label_names(rows[TRAIN], data.labels, counts)
    for split in (VALIDATION, TEST):
        rows[split] = [row for row in rows[split] if is_known(row, labels, data.on_error, counts)]
    leaks = count_leaks(data, rows)
    check_splits(data, rows, counts)
    numbers = {label: number for number, label in enumerate(labels)}
    for split, found in rows.items():
        if found:
            listed = [{"image": row.place, "label": numbers[row.labels[0]], ORIGIN: row.origin} for row in found]
            table = pyarrow.Table.from_pylist(listed, _SPLIT)
            written[split] = write_split(folder, split, _SPLIT, table.to_batches())
    tallies = {split: Counter(row.labels[0] for row in found) for split, found in rows.items() if found}
    class_counts = {split: [tally[label] for label in labels] for split, tally in tallies.items()}
    return Built(written, {"labels": labels, "class_counts": class_counts, "counts": dict(+counts), "leaks": leaks})


def _read(
    data: ImageDataSection, files: dict[str, list[SourceFile]], rows: dict[str, list[ImageRow]], counts: Counter[str]
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the pixels of all images, and note in `rows` what else is known of them."""
    waiting: list[np.ndarray] = []
    place = 0
    for split, file in ((split, file) for split, found in files.items() for file in found):
        for image in read_images(file, data, counts):
            text = xxhash.xxh3_128_hexdigest(image.pixels.tobytes())
            rows[split].append(ImageRow(text, (image.label,), image.origin, place))
            waiting.append(image.pixels.ravel())
            place += 1
            if len(waiting) == IMAGES_AT_ONCE:
                yield _chunk(waiting)
                waiting = []
    if not place:
        raise UserError("data.train", f"no image is left to train on ({shown_counts(counts)})")
    if waiting:
        yield _chunk(waiting)


def _chunk(images: list[np.ndarray]) -> pyarrow.RecordBatch:
    ends = np.arange(len(images) + 1, dtype=np.int32) * np.int32(images[0].size)
    return pyarrow.record_batch([pyarrow.ListArray.from_arrays(ends, np.concatenate(images))], schema=_PIXELS)


def _held(folder: Path, data: ImageDataSection) -> Iterator[str]:
    """Yield what a prepared folder holds, a line each."""
    facts = read_examples(folder).facts
    for split, tally in facts["class_counts"].items():
        counts = sorted(zip(tally, facts["labels"], strict=True), key=lambda pair: -pair[0])
        most = ", ".join(f"{label} {count:,}" for count, label in counts[:SHOWN_LABELS])
        more = f" and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
        yield f"{split}: {sum(tally):,} images: {most}{more}"
