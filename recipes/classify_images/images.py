"""Images one by one, whatever holds them, each with its label: opened by Pillow and brought into one form."""

import gzip
import io
import math
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from bigbatch.recipes.classify_images.config import ImageDataSection
from bigbatch.recipes.core.config import TableSource
from bigbatch.recipes.core.data.rows import read_rows
from bigbatch.recipes.core.data.sources import (
    SourceFile,
    first_line,
    format_of,
    idx_labels,
    load_hugging_face,
    locate,
    parts_of,
)
from bigbatch.recipes.core.errors import UserError

IDX_BYTES = 8  # the code of unsigned bytes, which images and labels are
SHAPE_NAMES = ("circle", "cross", "ring", "square", "star", "triangle")
SHAPES_EACH, SHAPE_SIDE, DRAWN_LARGER = 500, 32, 4
_FAILED = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Labeled(NamedTuple):
    """An image in the form of `data`."""

    pixels: np.ndarray  # uint8 [S, S, C]
    label: str
    origin: str


def read_images(file: SourceFile, data: ImageDataSection, counts: Counter[str]) -> Iterator[Labeled]:
    """Yield the images of a source, always in the same order, without unreadable ones that are to be left out."""
    for image, label, origin in _READERS[file.format](file, data):
        counts["read"] += 1
        try:
            pixels = open_image(image, data, origin)
        except UserError as error:
            if data.on_error == "fail":
                raise UserError(error.where, f"{error.message}; data.on_error 'skip' leaves such out") from None
            counts["unreadable"] += 1
            continue
        if not label:
            raise UserError(origin, "has no label")
        yield Labeled(pixels, label, origin)


def open_image(source: Any, data: ImageDataSection, origin: str) -> np.ndarray:
    """Return an image's pixels uint8 [S, S, C], from a path, the bytes of a file, or an array [H, W] or [H, W, C].

    Turned as its EXIF data say, then cut or stretched, then resized. Raises UserError where it cannot be read.
    """
    if isinstance(source, Path) and not source.is_file():
        raise UserError(origin, f"there is no file {source}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, np.ndarray):
                return _in_form(Image.fromarray(source.squeeze(-1) if source.shape[2:] == (1,) else source), data)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return _in_form(ImageOps.exif_transpose(image), data)
    except (*_FAILED, Image.DecompressionBombWarning, TypeError) as error:
        what = f"{source} " if isinstance(source, Path) and str(source) != origin else ""
        raise UserError(origin, f"{what}cannot be read as an image ({first_line(error)})") from None


def _in_form(image: Image.Image, data: ImageDataSection) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits a pixel, which Pillow would cut off at 255
        values = np.asarray(image).astype(np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:  # what shows through is white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image, size = image.convert("L" if data.channels == "grey" else "RGB"), (data.image_size, data.image_size)
    if image.size != size:
        image = image.resize(size, _BILINEAR) if data.resize == "stretch" else ImageOps.fit(image, size, _BILINEAR)
    return np.asarray(image).reshape(*size, data.num_channels)


_BILINEAR = Image.Resampling.BILINEAR
Found = tuple[Any, str, str]  # what `open_image` takes, label, origin


def _read_folder(file: SourceFile, data: ImageDataSection) -> Iterator[Found]:
    """Take the first folder below the source's for the class."""
    below = Path(file.path).relative_to(locate(file.table.path).absolute()).parts
    for path in parts_of(file)[1:]:
        if not below:
            hint = "right is a folder a class, or `labels`, a file that tells"
            raise UserError(str(path), f"lies in no folder that would name its class; {hint}")
        yield path, below[0], str(path)


def _read_list(file: SourceFile, data: ImageDataSection) -> Iterator[Found]:
    folder, form = locate(file.table.path), format_of(file.path)
    rows = file._replace(format=str(form), table=TableSource(path=file.path))
    for row in read_rows(rows, {data.image_key: "data.image_key", data.label_key: "data.label_key"}):
        name = row.values[data.image_key]
        if not isinstance(name, str) or not name:
            raise UserError(row.origin, f"names no image in column {data.image_key!r}")
        yield folder / name, _label(row.values[data.label_key], row.origin), row.origin


def _read_idx(file: SourceFile, data: ImageDataSection) -> Iterator[Found]:
    images, labels = (_idx(path) for path in (Path(file.path), idx_labels(file.table)))
    if images.ndim not in (3, 4) or labels.ndim != 1:
        raise UserError(file.path, f"holds {images.ndim} dimensions, and its labels {labels.ndim}; right is 3 and 1")
    yield from _of_arrays(images, labels, file)


def _idx(path: Path) -> np.ndarray:
    """Read a file of the idx format: two zeros, type, number of dimensions, sizes, numbers; http://yann.lecun.com."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        zeros, kind, num_dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{num_dimensions}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UserError(str(path), f"cannot be read as an idx file ({first_line(error)})") from None
    numbers = np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions)
    if zeros or kind != IDX_BYTES:
        raise UserError(str(path), "is no idx file of bytes: it begins otherwise")
    if len(numbers) != math.prod(shape):
        raise UserError(str(path), f"has {len(numbers):,} bytes, and its head says {math.prod(shape):,}")
    return numbers.reshape(shape)


def _read_npz(file: SourceFile, data: ImageDataSection) -> Iterator[Found]:
    try:
        with np.load(file.path, allow_pickle=False) as arrays:
            for key, setting in ((data.image_key, "data.image_key"), (data.label_key, "data.label_key")):
                if key not in arrays:
                    raise UserError(setting, f"{file.path} has no array {key!r}; there are: {', '.join(arrays.files)}")
            images, labels = arrays[data.image_key], arrays[data.label_key]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(file.path, f"cannot be read as an .npz file ({first_line(error)})") from None
    labels = labels.reshape(len(labels), -1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape[1] != 1:
        told = f"images {images.dtype} {images.shape}, labels of shape {labels.shape}"
        raise UserError(file.path, f"holds {told}; right is uint8 [N, H, W] or [N, H, W, C], and a label each")
    yield from _of_arrays(images, labels[:, 0], file)


def _of_arrays(images: np.ndarray, labels: np.ndarray, file: SourceFile) -> Iterator[Found]:
    if len(images) != len(labels):
        raise UserError(file.path, f"holds {len(images):,} images and {len(labels):,} labels")
    for place in range(*_range(len(images), file)):
        origin = f"{file.path}:{place}"
        yield images[place], _label(labels[place].item(), origin), origin


def _range(count: int, file: SourceFile) -> tuple[int, int]:
    """Return the first image to take and the one behind the last; raise UserError for more than there are."""
    start, stop = file.table.start, file.table.stop or count
    if not start < stop <= count:
        raise UserError(file.path, f"holds {count:,} images; start {start:,} and stop {stop:,} do not lie within")
    return start, stop


def _read_hugging_face(file: SourceFile, data: ImageDataSection) -> Iterator[Found]:
    import datasets  # noqa: PLC0415 - takes a second, and most runs read plain files

    rows = load_hugging_face(file.path, file.path)
    for key, setting in ((data.image_key, "data.image_key"), (data.label_key, "data.label_key")):
        if key not in rows.features:
            raise UserError(setting, f"{file.path} has no column {key!r}; there are: {', '.join(rows.features)}")
    if not isinstance(rows.features[data.image_key], datasets.Image):
        raise UserError("data.image_key", f"{data.image_key!r} of {file.path} holds no images")
    names = rows.features[data.label_key]
    rows = rows.cast_column(data.image_key, datasets.Image(decode=False))
    for place in range(*_range(len(rows), file)):
        row, origin = rows[place], f"{file.path}:{place}"
        image, label = row[data.image_key] or {}, row[data.label_key]
        if isinstance(names, datasets.ClassLabel) and isinstance(label, int):
            label = names.int2str(label) if label >= 0 else None
        yield image.get("bytes") or Path(image.get("path") or ""), _label(label, origin), origin


def _label(value: Any, origin: str) -> str:
    """Return a label's name; a null has none."""
    if isinstance(value, str) or value is None:
        return (value or "").strip()
    if not isinstance(value, int):
        raise UserError(origin, f"has {value!r} for a label; right is a text or a whole number")
    return str(value)


# ------------------------------------------------------------------------------------------------------------ shapes


def _draw_shapes(file: SourceFile, data: ImageDataSection) -> Iterator[Found]:
    for number in range(SHAPES_EACH * len(SHAPE_NAMES)):
        name = SHAPE_NAMES[number % len(SHAPE_NAMES)]
        yield draw_shape(name, np.random.default_rng(number)), name, f"{file.path}:{number}"


def draw_shape(name: str, generator: np.random.Generator) -> np.ndarray:
    """Draw a shape uint8 [32, 32, 3] somewhere, tilted, of some size and color on a dark ground, under noise."""
    side = SHAPE_SIDE * DRAWN_LARGER
    radius, angle = generator.uniform(0.28, 0.42) * side, generator.uniform(-0.4, 0.4)
    x, y = side / 2 + generator.uniform(-0.12, 0.12, 2) * side
    ground, color = generator.integers(0, 100, 3), generator.integers(130, 256, 3)
    image = Image.new("RGB", (side, side), tuple(ground.tolist()))
    draw, fill = ImageDraw.Draw(image), tuple(color.tolist())
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        draw.ellipse(box, fill)
    elif name == "ring":
        draw.ellipse(box, None, fill, round(radius / 2.5))
    else:
        draw.polygon(
            [(x + radius * r * math.cos(a), y + radius * r * math.sin(a)) for r, a in _corners(name, angle)], fill
        )
    small = np.asarray(image.resize((SHAPE_SIDE, SHAPE_SIDE), Image.Resampling.BOX)).astype(np.float64)
    return (small + generator.normal(0, 25, small.shape)).clip(0, 255).astype(np.uint8)


def _corners(name: str, angle: float) -> list[tuple[float, float]]:
    """Return distance, as a part of the radius, and direction of each corner."""
    if name == "cross":  # twelve corners, three to an arm
        thin = math.atan(0.3)
        arms = [(1.0, -thin), (1.0, thin), (0.42, math.pi / 4)]
        return [(r, angle + quarter * math.pi / 2 + a) for quarter in range(4) for r, a in arms]
    radii = {"square": (1.0,), "triangle": (1.0,), "star": (1.0, 0.4)}[name]
    count = {"square": 4, "triangle": 3, "star": 10}[name]
    return [(radii[corner % len(radii)], angle + 2 * math.pi * corner / count) for corner in range(count)]


_READERS = {
    "image_folder": _read_folder,
    "image_list": _read_list,
    "idx": _read_idx,
    "npz": _read_npz,
    "hf_images": _read_hugging_face,
    "shapes": _draw_shapes,
}
