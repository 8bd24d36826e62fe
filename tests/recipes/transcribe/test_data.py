"""Recordings from sources of every kind, bad ones among them, and what becomes of them in a sample."""

import json
import os
import re
import tarfile
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.data.splits import prepared_splits
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.transcribe import data as speech
from bigbatch.recipes.transcribe import recipe
from bigbatch.recipes.transcribe.audio import read_chunks, resampled
from bigbatch.recipes.transcribe.config import TranscribeConfig
from bigbatch.recipes.transcribe.tones import make_tones

ROOT = Path(__file__).parents[3]
RATE = 4000


def config_of(document, **changes) -> TranscribeConfig:
    found = {**document, **{name: {**document.get(name, {}), **value} for name, value in changes.items()}}
    return TranscribeConfig.model_validate_json(json.dumps(found))


@pytest.fixture
def document(tmp_path, make_document):
    return make_document(tmp_path, data={"validation_fraction": 0.0})


def opened(config, split="train"):
    return speech.open_split(speech.prepare(config.data), split, config)


def content(config) -> list[tuple[str, bytes]]:
    """Return what the training split holds, in any order."""
    samples = opened(config)
    ids = np.arange(samples.num_samples)
    batch, units = samples.batch(ids, 0 * ids), samples.texts(Order(ids, 0 * ids))
    texts = [speech.as_text(one.tolist(), samples.alphabet, config.data.unit) for one in units]
    rows = zip(texts, batch["samples"], batch["lengths"], strict=True)
    return sorted((text, row[:length].tobytes()) for text, row, length in rows)


def test_a_folder_an_archive_texts_beside_and_a_manifest_are_the_same(tmp_path, document):
    expected, folder = content(config_of(document)), tmp_path / "letters"
    pattern = document["data"]["train"][0]["pattern"]
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(folder, "in")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"in/{path.name}")
    lines = []
    (tmp_path / "beside").mkdir()
    for path in folder.iterdir():
        text = path.stem.partition("_")[2]
        wave, rate = soundfile.read(path, dtype="int16")
        soundfile.write(tmp_path / "beside" / f"{path.stem}.flac", wave, rate)
        (tmp_path / "beside" / f"{path.stem}.txt").write_text(f" {text.upper()}\n")
        lines.append(json.dumps({"audio": f"letters/{path.name}", "text": text}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    sources = [
        {"path": "all.tar.gz", "pattern": f"in/{pattern}"},
        {"path": "all.zip", "pattern": f"in/{pattern}"},
        {"path": "beside"},
        {"path": "manifest.jsonl"},
    ]
    for source in sources:
        source["path"] = str(tmp_path / source["path"])
        assert content(config_of(document, data={"train": [source]})) == expected, source


def test_parts_of_a_long_recording_are_recordings(tmp_path, document):
    wave = np.arange(4000, dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", wave, RATE)
    rows = [("a", 0, 0.25), ("b", 0.5, 0.5)]
    table = [f"long.wav,{text},{start},{duration}" for text, start, duration in rows]
    (tmp_path / "parts.csv").write_text("\n".join(["audio,text,start,duration", *table]))
    source = {"path": str(tmp_path / "parts.csv")}
    found = content(config_of(document, data={"train": [source]}))
    assert found == [("a", wave[:1000].tobytes()), ("b", wave[2000:].tobytes())]
    (tmp_path / "parts.csv").write_text("\n".join(["audio,text,start,duration", "long.wav,a,0.9,0.2"]))
    with pytest.raises(UserError, match=r"parts.csv:2: has duration '0.2'; the file has 1 seconds"):
        content(config_of(document, data={"train": [source]}))


BAD = {
    "missing": ("gone.wav", "a", "there is no file"),
    "unreadable": ("text.wav", "a", "cannot be read as a recording"),
    "empty": ("empty.wav", "a", "holds no sample"),
    "of another rate": ("fast.wav", "a", "has 8,000 samples a second, data.sample_rate 4,000; data.resample true"),
    "without transcript": ("good.wav", " ", "has no transcript but ' '"),
    "outside the alphabet": ("good.wav", "a!", "has the transcript 'a!', and '!' is not in data.alphabet"),
    "too short for their transcripts": ("good.wav", "aaabbb", "has 5 frames, and CTC needs 10 for 'aaabbb'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_recording_that_cannot_be_taken_is_told_with_its_line_or_counted(tmp_path, document, capsys, kind):
    generator = np.random.default_rng(0)
    for name, rate, count in (("good", RATE, 400), ("fast", 8000, 800), ("empty", RATE, 0)):
        soundfile.write(tmp_path / f"{name}.wav", generator.integers(-99, 99, count).astype(np.int16), rate)
    (tmp_path / "text.wav").write_text("no recording")
    audio, text, message = BAD[kind]
    lines = [{"audio": "good.wav", "text": "ab"}, {"audio": audio, "text": text}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"train": [{"path": str(tmp_path / "m.jsonl")}], "alphabet": "abc"}
    with pytest.raises(UserError) as caught:
        opened(config_of(document, data=changes))
    assert caught.value.where == f"{tmp_path / 'm.jsonl'}:2"
    assert message in caught.value.message
    assert "data.on_error 'skip' leaves such rows out" in caught.value.message
    capsys.readouterr()
    skipping = config_of(document, data={**changes, "on_error": "skip"})
    recipe.prepare(skipping)
    assert recipe.open_data(skipping).train.num_samples == 1
    assert re.search(f"left out.*: 1 {kind}\n", capsys.readouterr().err)


def test_a_cut_off_file_is_unreadable(tmp_path, document):
    wave = np.random.default_rng(1).integers(-999, 999, 4000).astype(np.int16)
    soundfile.write(tmp_path / "x.flac", wave, RATE)
    whole = (tmp_path / "x.flac").read_bytes()
    (tmp_path / "x.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "x.flac", "text": "a"}))
    with pytest.raises(UserError, match=r"m.jsonl:1: (ends at sample|cannot be read)"):
        content(config_of(document, data={"train": [{"path": str(tmp_path / "m.jsonl")}]}))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"path": "letters", "pattern": "x(?P<text>.*)"},
            r"holds 90 recordings.*; the pattern .* matches none",
        ),
        ({"path": "letters", "pattern": "("}, r"data.train\[0\].pattern: '\(' is no regular expression"),
        ({"path": "gone"}, r"data.train\[0\]: '.*gone' is no file or folder here"),
        ({"path": "letters/notes.md"}, "is none of what is read here: a manifest"),
        ({"path": "m.jsonl", "pattern": "x"}, r"data.train\[0\].pattern: has no effect on"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path, document, source, message):
    (tmp_path / "letters/notes.md").touch()
    (tmp_path / "m.jsonl").write_text("{}")
    with pytest.raises(UserError, match=message):
        content(config_of(document, data={"train": [{**source, "path": str(tmp_path / source["path"])}]}))


def test_other_rates_and_channels_are_brought_into_the_form_that_is_asked_for(tmp_path, document):
    times = np.arange(8000) / 16000
    tone = 0.5 * np.sin(2 * np.pi * 440 * times)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, 0 * tone], 1), 16000, "FLOAT")
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "stereo.wav", "text": "a"}))
    changes = {"train": [{"path": str(tmp_path / "m.jsonl")}], "resample": True}
    ((_, found),) = content(config_of(document, data=changes))
    wave = np.frombuffer(found, np.int16) / 2**15
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(2000) / RATE)
    np.testing.assert_allclose(wave[100:-100], expected[100:-100], atol=2e-3)


def test_words_may_be_the_units(document):
    source = {**document["data"]["train"][0], "words": {"a": "big apple"}}
    config = config_of(document, data={"train": [source], "unit": "word"})
    samples = opened(config)
    assert {"big", "apple", "b"} <= set(samples.alphabet)
    assert "a" not in samples.alphabet
    texts = [text for text, _ in content(config)]
    assert texts.count("big apple") == 9  # the recordings called N_a


def test_a_sample_of_several_recordings_is_those_one_behind_the_other(document):
    single, config = opened(config_of(document)), config_of(document, data={"concatenate": {"least": 2, "most": 4}})
    samples, ids = opened(config), np.arange(20)
    order = Order(ids, 0 * ids)
    batch = samples.batch(*order)
    for row, pieces in enumerate(samples._pieces(order)):
        assert pieces[0] == row
        assert 2 <= len(pieces) <= 4
        alone = single.batch(pieces, 0 * pieces)
        waves = [wave[:length] for wave, length in zip(alone["samples"], alone["lengths"], strict=True)]
        assert np.array_equal(batch["samples"][row, : batch["lengths"][row]], np.concatenate(waves))
        texts = ["".join(single.alphabet[unit - 1] for unit in one) for one in single.texts(Order(pieces, 0 * pieces))]
        found = batch["units"][row, : batch["unit_lengths"][row]]
        assert speech.as_text(found.tolist(), samples.alphabet, "character") == " ".join(texts)
    lengths = {len(pieces) for pieces in samples._pieces(Order(ids, ids))}
    assert lengths == {2, 3, 4}


AUGMENT = {"speeds": [0.9, 1.1], "gain_decibels": 6.0, "time_masks": 2, "band_masks": 1, "band_mask_width": 3}


def test_a_training_sample_depends_on_seed_id_and_epoch_alone_and_validation_on_the_id(document):
    config = config_of(document, data={"validation_fraction": 0.3, "concatenate": {"most": 3}}, augment=AUGMENT)
    samples, ids = opened(config), np.arange(12)
    whole = samples.batch(ids, ids + 2)
    for some in ([4, 2], [8], [0, 1, 2]):
        part = samples.batch(ids[some], ids[some] + 2)
        for name, array in part.items():
            full = whole[name][some]
            assert np.array_equal(array, full[:, : array.shape[1]] if full.ndim == 2 else full)
    assert whole["time_masks"].shape == (12, 2, 2)
    assert whole["band_masks"].shape == (12, 1, 2)
    assert not np.array_equal(samples.batch(ids, ids + 3)["lengths"], whole["lengths"])
    other = speech.open_split(prepared_splits(config.data), "train", config.model_copy(update={"seed": 9}))
    assert other.fingerprint != samples.fingerprint
    held = [
        speech.open_split(prepared_splits(config.data), "validation", config.model_copy(update={"seed": seed}))
        for seed in (1, 2)
    ]
    first, second = (one.batch(ids, 0 * ids) for one in held)
    assert first.keys() == {"samples", "lengths", "units", "unit_lengths"}
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert held[0].fingerprint == held[1].fingerprint


def test_a_faster_recording_is_shorter_and_higher():
    times = np.arange(4000) / RATE
    wave = (9000 * np.sin(2 * np.pi * 400 * times)).astype(np.int16)
    found = resampled(wave, speech.speed_ratio(1.25))
    assert len(found) == 3200
    expected = 9000 * np.sin(2 * np.pi * 500 * np.arange(3200) / RATE)
    np.testing.assert_allclose(found[50:-50], expected[50:-50], atol=40)
    assert resampled(wave, Fraction(1)) is wave


def test_equal_recordings_of_two_splits_are_counted(tmp_path, document, capsys):
    sources = {"train": document["data"]["train"], "test": [{"path": str(tmp_path / "m.jsonl")}]}
    names = [path.name for path in sorted((tmp_path / "letters").iterdir())[:2]]
    lines = [json.dumps({"audio": f"letters/{name}", "text": "a"}) for name in names]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    opened(config_of(document, data=sources))
    assert "recordings that are in an earlier split too: 2 test; kept" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [RATE, 6000, 11025])
def test_a_file_in_chunks_has_the_samples_of_the_whole(tmp_path, document, rate):
    config = config_of(document)
    wave = np.random.default_rng(4).normal(0, 3000, rate * 3).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", wave, rate)
    whole = resampled(wave, Fraction(RATE, rate))
    frame, begin = config.frame_samples, 0
    for chunk in read_chunks(tmp_path / "x.wav", config.data.model_copy(update={"resample": True}), frame, 0.6, 0.4):
        first = (begin - chunk.before) * frame
        own = slice(chunk.before * frame, (chunk.before + chunk.count) * frame)
        expected = whole[first : first + len(chunk.samples)]
        np.testing.assert_allclose(chunk.samples[own], expected[own], atol=2)
        begin += chunk.count
    assert begin == len(whole) // frame


def test_the_phrases_made_here_are_always_the_same():
    for (text, samples), (again, _), _ in zip(make_tones(), make_tones(), range(20), strict=False):
        assert text == again
        assert 0.03 * len(text) * 8000 < len(samples) < 0.09 * len(text) * 8000


def test_the_spoken_digits_are_split_by_their_numbers(tmp_path, monkeypatch):
    data = Path(os.environ.get("BIGBATCH_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "fsdd").is_dir():
        pytest.skip(f"NO REAL DATA: {data / 'fsdd'} does not exist; set BIGBATCH_TEST_DATA")
    monkeypatch.setenv("BIGBATCH_DATA", str(data))
    config = config_of(json.loads((ROOT / "ds_configs/transcribe/fsdd.v1.json").read_text()))
    config = config.model_copy(update={"data": config.data.model_copy(update={"prepared_dir": str(tmp_path)})})
    recipe.prepare(config)
    splits = recipe.open_data(config)
    assert [split.num_samples for split in (splits.train, splits.validation, splits.test)] == [1620, 180, 200]
    assert "".join(splits.facts["alphabet"]) == " efghinorstuvwxz"
    origins = splits.test.examples.table["origin"].to_pylist()
    assert all(re.search(r"/[0-9]_[a-z]+_[0-4]\.wav$", origin) for origin in origins)
    ids = np.arange(200)
    texts = [
        speech.as_text(units.tolist(), splits.facts["alphabet"], "character")
        for units in splits.test.texts(Order(ids, 0 * ids))
    ]
    words = [len(text.split()) for text in texts]
    assert (min(words), max(words)) == (1, 7)
    assert set(" ".join(texts).split()) == set(config.data.test[0].words.values())
