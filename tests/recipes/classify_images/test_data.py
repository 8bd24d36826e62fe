"""Images from files of every kind, bad ones among them, and how training images are changed."""

import gzip
import io
import struct

import datasets
import numpy as np
import pytest
from PIL import Image

from bigbatch.recipes.classify_images import data as imaging
from bigbatch.recipes.classify_images.augment import augmented
from bigbatch.recipes.classify_images.config import OPERATIONS, AugmentSection, ImageDataSection
from bigbatch.recipes.classify_images.images import draw_shape, open_image
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.errors import UserError


@pytest.fixture
def pictures():
    """Give nine images uint8 [9, 6, 6] and their labels."""
    images = np.random.default_rng(2).integers(0, 256, (9, 6, 6), np.uint8)
    return images, ["a", "b", "c"] * 3


def section(folder, **settings) -> ImageDataSection:
    base = {"image_size": 6, "channels": "grey", "prepared_dir": str(folder / "prepared")}
    base["train"] = settings.pop("train", [{"path": str(folder / "pictures")}])
    return ImageDataSection.model_validate({**base, **settings}, strict=False)


def write_folder(folder, pictures):
    for number, (image, label) in enumerate(zip(*pictures, strict=True)):
        path = folder / "pictures" / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_idx(path, array):
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def content(data, augment=None):
    """Return what the training split holds: pixels by label, in any order."""
    samples = imaging.open_split(imaging.prepare(data), "train", data, augment or AugmentSection(), 1)
    batch = samples.batch(np.arange(samples.num_samples), np.zeros(samples.num_samples, np.int64))
    pixels = np.round((batch["pixels"] + 1) * 127.5).astype(np.uint8)
    return sorted(
        (samples.labels[label], image.tobytes()) for label, image in zip(batch["labels"], pixels, strict=True)
    )


def test_a_folder_an_idx_file_an_npz_file_and_a_hugging_face_set_are_the_same(tmp_path, pictures):
    images, labels = pictures
    expected = sorted((label, image.tobytes()) for label, image in zip(labels, images, strict=True))
    write_folder(tmp_path, pictures)
    assert content(section(tmp_path)) == expected
    numbers = np.array([ord(label) - ord("a") for label in labels])
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", numbers)
    found = content(section(tmp_path, train=[{"path": str(tmp_path / "t-images-idx3-ubyte.gz")}]))
    assert found == sorted((str(ord(label) - ord("a")), image) for label, image in expected)
    np.savez(tmp_path / "all.npz", x=images[..., None], y=np.array(labels))
    keys = {"image_key": "x", "label_key": "y"}
    parts = [{"path": str(tmp_path / "all.npz"), "stop": 4}, {"path": str(tmp_path / "all.npz"), "start": 4}]
    assert content(section(tmp_path, train=parts, **keys)) == expected
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [Image.fromarray(image) for image in images], "label": numbers.tolist()}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    assert content(section(tmp_path, train=[{"path": f"hf:{tmp_path / 'saved'}"}])) == expected


def test_a_file_of_labels_names_images_and_a_missing_one_is_told_with_its_line(tmp_path, pictures, capsys):
    write_folder(tmp_path, pictures)
    table = tmp_path / "labels.csv"
    table.write_text("image,label\na/0.png,x\nb/1.png,y\nb/gone.png,x\n")
    train = [{"path": str(tmp_path / "pictures"), "labels": str(table)}]
    with pytest.raises(UserError) as caught:
        imaging.prepare(section(tmp_path, train=train))
    assert caught.value.where == f"{table}:4"
    assert caught.value.message.startswith(f"there is no file {tmp_path / 'pictures/b/gone.png'}; data.on_error")
    assert [label for label, _ in content(section(tmp_path, train=train, on_error="skip"))] == ["x", "y"]
    assert "left out: 1 unreadable" in capsys.readouterr().err


def test_an_unreadable_image_is_refused_by_name_or_counted(tmp_path, pictures, capsys):
    write_folder(tmp_path, pictures)
    whole = (tmp_path / "pictures/a/0.png").read_bytes()
    (tmp_path / "pictures/a/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pictures/b/text.jpg").write_text("no image")
    (tmp_path / "pictures/b/empty.png").touch()
    with pytest.raises(UserError, match=r"a/cut.png: cannot be read as an image \(.*\); data.on_error 'skip'"):
        imaging.prepare(section(tmp_path))
    assert len(content(section(tmp_path, on_error="skip"))) == 9
    assert "left out: 3 unreadable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "pictures/a/0.png").rename(folder / "pictures/0.png"), "lies in no folder that"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.png")], "holds no image"),
        (lambda folder: [path.unlink() for path in folder.rglob("[bc]/*.png")], "the same label, 'a'"),
    ],
)
def test_a_folder_without_classes_or_images_is_refused(tmp_path, pictures, change, message):
    write_folder(tmp_path, pictures)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        imaging.prepare(section(tmp_path))


def test_a_cut_off_idx_file_and_one_without_labels_are_refused(tmp_path, pictures):
    path = tmp_path / "images-idx3-ubyte"
    write_idx(path, pictures[0])
    with pytest.raises(UserError, match=r"data.train\[0\].labels: there is no .*labels-idx1-ubyte"):
        imaging.prepare(section(tmp_path, train=[{"path": str(path)}]))
    write_idx(tmp_path / "labels-idx1-ubyte", np.arange(8))
    with pytest.raises(UserError, match="holds 9 images and 8 labels"):
        imaging.prepare(section(tmp_path, train=[{"path": str(path)}]))
    path.write_bytes(gzip.decompress(path.read_bytes())[:-1])
    with pytest.raises(UserError, match="images-idx3-ubyte: has 323 bytes, and its head says 324"):
        imaging.prepare(section(tmp_path, train=[{"path": str(path)}]))
    with pytest.raises(UserError, match="start 0 and stop 10 do not lie within"):
        write_idx(path, pictures[0])
        write_idx(tmp_path / "labels-idx1-ubyte", np.arange(9))
        imaging.prepare(section(tmp_path, train=[{"path": str(path), "stop": 10}]))


def test_images_of_any_size_and_mode_become_one_form(tmp_path):
    grey, color = section(tmp_path, image_size=4), section(tmp_path, image_size=4, channels="color")
    halves = np.zeros((8, 16), np.uint8)
    halves[:, 8:] = 200
    stretched = grey.model_copy(update={"resize": "stretch"})
    assert open_image(halves, stretched, "x")[0, :, 0].tolist()[::3] == [0, 200]
    assert open_image(np.full((9, 5, 3), 7, np.uint8), grey, "x").tolist() == np.full((4, 4, 1), 7).tolist()
    assert open_image(np.full((5, 5), 9, np.uint8), color, "x").tolist() == np.full((4, 4, 3), 9).tolist()
    assert (open_image(np.full((4, 4), 65535, np.uint16), grey, "x") == 255).all()
    clear = np.zeros((4, 4, 4), np.uint8)  # black, and wholly transparent
    assert (open_image(clear, color, "x") == 255).all()
    turned = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    assert open_image(stream.getvalue(), grey, "x")[..., 0].ravel().tolist() == list(range(15, -1, -1))


def test_equal_images_of_two_splits_are_counted(tmp_path, pictures, capsys):
    images, labels = pictures
    np.savez(tmp_path / "train.npz", image=images, label=np.array(labels))
    np.savez(
        tmp_path / "test.npz",
        image=(images[[0, 1, 1]] // [[[1]], [[1]], [[2]]]).astype(np.uint8),
        label=np.array(["a", "b", "b"]),
    )
    sources = {"train": [{"path": str(tmp_path / "train.npz")}], "test": [{"path": str(tmp_path / "test.npz")}]}
    imaging.prepare(section(tmp_path, **sources))
    assert "in an earlier split too: 2 test; kept" in capsys.readouterr().err
    folder = imaging.prepare(section(tmp_path, **sources, on_leak="drop"))
    assert imaging.open_split(folder, "test", section(tmp_path), AugmentSection(), 0).num_samples == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_the_form_and_does_more_by_magnitude(name, channels):
    pixels = np.random.default_rng(3).integers(10, 246, (16, 16, channels), np.uint8)

    def distance(magnitude):
        settings = AugmentSection(random_operations=1, magnitude=magnitude, operations=(name,))
        found = augmented(pixels, settings, np.random.default_rng(4))
        assert found.shape == pixels.shape
        assert found.dtype == np.uint8
        return np.abs(found.astype(int) - pixels).mean()

    if name in ("identity", "auto_contrast", "equalize") or (name == "color" and channels == 1):
        assert distance(2.0) == distance(9.0)
    else:
        assert distance(0.0) == 0
        assert distance(9.0) > distance(2.0) * 0.99 > 0


def test_a_training_image_depends_on_seed_id_and_epoch_alone(tmp_path, pictures):
    np.savez(tmp_path / "all.npz", image=pictures[0], label=np.array(pictures[1]))
    data = section(tmp_path, train=[{"path": str(tmp_path / "all.npz")}])
    folder = imaging.prepare(data)
    settings = AugmentSection(flip=True, least_area=0.5, random_operations=2, mixup=0.4)
    samples = imaging.open_split(folder, "train", data, settings, 7)
    ids, epochs = np.arange(9), np.full(9, 2)
    whole = samples.batch(ids, epochs)
    for some in ([4, 2], [8], [0, 1, 2]):
        part = samples.batch(ids[some], epochs[some])
        assert all(np.array_equal(part[name], whole[name][some]) for name in whole)
    assert not np.array_equal(samples.batch(ids, epochs + 1)["pixels"], whole["pixels"])
    other = imaging.open_split(folder, "train", data, settings, 8)
    assert not np.array_equal(other.batch(ids, epochs)["pixels"], whole["pixels"])
    assert other.fingerprint != samples.fingerprint


def test_mixup_adds_up_two_images_by_their_shares(tmp_path, pictures):
    np.savez(tmp_path / "all.npz", image=pictures[0], label=np.array(pictures[1]))
    data = section(tmp_path, train=[{"path": str(tmp_path / "all.npz")}])
    samples = imaging.open_split(imaging.prepare(data), "train", data, AugmentSection(mixup=0.4), 7)
    ids = np.arange(9)
    batch, plain = samples.batch(ids, np.zeros(9, np.int64)), imaging.normalized(pictures[0][..., None])
    partners = samples._partners(Order(ids, np.zeros(9, np.int64)))[1]
    shares = batch["shares"][:, None, None, None]
    np.testing.assert_allclose(batch["pixels"], shares * plain + (1 - shares) * plain[partners], atol=1e-5)
    assert (batch["other_labels"] == samples.targets[partners]).all()
    many = np.concatenate([samples.batch(ids, np.full(9, epoch))["shares"] for epoch in range(100)])
    assert many.mean() == pytest.approx(0.5, abs=0.04)
    assert many.var() == pytest.approx(1 / (4 * 1.8), abs=0.015)  # of Beta(0.4, 0.4)


def test_shapes_are_drawn_the_same_every_time_and_stand_out():
    for name in ("circle", "cross", "ring", "square", "star", "triangle"):
        first, again = (draw_shape(name, np.random.default_rng(11)) for _ in range(2))
        assert first.shape == (32, 32, 3)
        assert np.array_equal(first, again)
        assert first.astype(float).std() > 25  # more than the noise
