"""What a run needs, carried to where there is no network."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from bigbatch.launcher.bundle import bundle, download_wheels, gather, how_to_train, missing, unbundle, verify
from bigbatch.launcher.preflight_cluster import check_run_on
from bigbatch.launcher.resolve import resolve
from bigbatch.recipes.core.data.sources import list_files
from bigbatch.recipes.core.errors import UserError

DATA = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
NO_NETWORK = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
TINY = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "data.sequence_length=16",
    "batch.global_size=4",
    "schedule.total_steps=1",
    "schedule.warmup_steps=0",
    "evaluate.every_steps=100",
    "sample.prompts=[]",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in a folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("BIGBATCH_DATA", raising=False)
    return tmp_path / "work"


def command_line(*arguments: str, before: tuple[str, ...] = (), **environment: str) -> str:
    command = [*before, sys.executable, "-P", "-m", "bigbatch.launcher.cli", *arguments]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def first_loss(run_dir: Path) -> float:
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return next(line["loss"] for line in lines if line.get("kind") == "train")


def test_a_bundle_trains_the_same_elsewhere_without_a_network(tmp_path, monkeypatch):
    if not (DATA / "tinyshakespeare").is_dir():
        pytest.skip(f"no real data in {DATA}")
    if subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no network name space, or has no iproute2")
    settings = [word for setting in TINY for word in ("--set", setting)]
    data = {"BIGBATCH_DATA": str(DATA), "OMP_NUM_THREADS": "1"}
    command_line("train", "gpt/shakespeare_char", "--run-dir", "run", *settings, **data)
    archive, elsewhere = tmp_path / "bundle.tar.gz", tmp_path / "else where"
    command_line("bundle", "gpt/shakespeare_char", str(archive), *settings, **data)
    shutil.rmtree(tmp_path / "work" / "prepared")
    assert "all whole; to train from it: cd " in command_line("unbundle", str(archive), str(elsewhere))
    monkeypatch.chdir(elsewhere)
    (manifest,) = elsewhere.glob("prepared/*/manifest.json")
    before = manifest.stat()
    monkeypatch.setenv("BIGBATCH_OFFLINE", "1")
    findings = check_run_on("document.json", [], "generic", None, None)
    (told,) = (finding.message for finding in findings if finding.rule == "prepared")
    assert told.startswith(f"{manifest.parent.relative_to(elsewhere)} is whole: ")
    offline = {"OMP_NUM_THREADS": "1", "BIGBATCH_DATA": ""}
    command_line("train", "document.json", "--run-dir", "run", before=tuple(NO_NETWORK), **offline)
    assert first_loss(elsewhere / "run") == first_loss(tmp_path / "work" / "run")
    assert manifest.stat() == before  # taken as it was prepared
    assert len(list(elsewhere.glob("prepared/*/manifest.json"))) == 1


def test_every_kind_of_path_leads_to_the_same_files_in_the_bundle(here, tmp_path, monkeypatch):
    root, far = tmp_path / "root", tmp_path / "far"
    for folder, name in ((here, "a/one.txt"), (here, "a/b/two.txt"), (root, "c/three.txt"), (far, "d/four.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    with zipfile.ZipFile(here / "z.zip", "w") as archive:
        archive.writestr("in/five.txt", "five")
    monkeypatch.setenv("BIGBATCH_DATA", str(root))
    tokenizer = far / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    sources = ["a/**/*.txt", "c", f"{far}/d/*.txt", {"path": "z.zip!in/five.txt"}, f"../{far.name}/d/four.txt"]
    settings = [
        f"data.train={json.dumps(sources)}",
        f"data.tokenizer.path={tokenizer}",
        "data.tokenizer.kind=pretrained",
    ]
    resolved = resolve("gpt/quick", [*settings, "data.tokenizer.vocabulary_size=null"])

    def contents(config: object) -> list[str]:
        files = [Path(file.path) for file in list_files(config.data.train)]
        return [file.read_text() if file.is_file() else str(file).rpartition("!")[2] for file in files]

    expected = contents(resolved.config)
    assert len(expected) == 6
    out = tmp_path / "out"
    out.mkdir()
    document = gather(resolved, out)
    (out / "document.json").write_text(json.dumps(document))
    shutil.rmtree(here)
    shutil.rmtree(far)
    monkeypatch.chdir(out)
    monkeypatch.delenv("BIGBATCH_DATA")
    moved = resolve("document.json").config
    assert contents(moved) == expected
    assert Path(moved.data.tokenizer.path).is_file()
    assert not Path(moved.data.tokenizer.path).is_absolute()


def test_both_files_of_a_parallel_source_come_along(here, tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    for path, text in (("pairs.de", "eins"), (f"{tmp_path}/far/pairs.en", "one")):
        Path(path).write_text(text)
    source = {"path": "pairs.de", "target": f"{tmp_path}/far/pairs.en"}
    (tmp_path / "out").mkdir()
    document = gather(resolve("translate/quick", [f"data.train={json.dumps([source])}"]), tmp_path / "out")
    shutil.rmtree(tmp_path / "far")
    monkeypatch.chdir(tmp_path / "out")
    Path("document.json").write_text(json.dumps(document))
    (moved,) = resolve("document.json").config.data.train
    assert [Path(name).read_text() for name in (moved.path, moved.target)] == ["eins", "one"]
    assert not Path(moved.target).is_absolute()


def test_a_model_to_start_from_and_a_deepspeed_document_of_ones_own_come_along(here, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    for folder in (start / "log", out):
        folder.mkdir(parents=True)
    (start / "config.json").write_text("{}")
    (here / "text.csv").write_text("text,kind\na,b\n")
    (here / "own.json").write_text('{"zero_optimization": {"stage": 1}}')
    resolved = resolve("classify/quick", ['data.train=["text.csv"]'])
    model = {**resolved.document["model"], "initialize_from": str(start)}
    changed = {**resolved.document, "model": model, "deepspeed": str(here / "own.json")}
    document = gather(replace(resolved, document=changed), out)
    assert [path.name for path in (out / document["model"]["initialize_from"]).iterdir()] == ["config.json"]
    assert document["deepspeed"] == "deepspeed.json"
    assert (out / "deepspeed.json").read_text() == (here / "own.json").read_text()


@pytest.fixture
def small(here, tmp_path):
    """Give a bundle of a text that is not prepared."""
    (here / "text.txt").write_text("to be or not to be\n" * 1000)
    bundle(resolve("gpt/quick", ['data.train=["text.txt"]']), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_every_file_is_held_to_its_hash_and_what_is_missing_is_found_at_preflight(small, monkeypatch):
    assert verify(small) > 100
    assert {file["path"] for file in json.loads((small / "bundle.json").read_text())["files"]} >= {
        "document.json",
        "data/text.txt",
        "code/bigbatch/recipes/core/train.py",
    }
    (small / "data" / "text.txt").write_text("to be or not to be!\n" * 950)
    with pytest.raises(UserError, match=r"text.txt: is not what was bundled"):
        verify(small)
    monkeypatch.chdir(small)
    assert list(missing(Path())) == []  # of the same size: only a hash tells
    (small / "data" / "text.txt").write_text("short")
    findings = check_run_on("document.json", [], "generic", None, None)
    assert [finding.message for finding in findings if finding.rule == "offline"] == [
        "data/text.txt is not here, or not whole, and bundle.json names it"
    ]
    (small / "data" / "text.txt").unlink()
    with pytest.raises(UserError, match=r"text.txt: is missing"):
        verify(small)


def test_nothing_is_overwritten(small, here):
    with pytest.raises(UserError, match="is there already"):
        bundle(resolve("gpt/quick", ['data.train=["text.txt"]']), small)
    with pytest.raises(UserError, match="is there already"):
        unbundle(here / "none.tar", small)
    assert how_to_train(small).startswith(f"cd {small} && ")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../out.txt"),
        member("/out.txt"),
        member("bundle/../../out.txt"),
        member("bundle/link", tarfile.SYMTYPE, "/etc"),
        member("bundle/hard", tarfile.LNKTYPE, "../../etc/passwd"),
        member("bundle/device", tarfile.CHRTYPE),
    ],
    ids=lambda info: info.name,
)
def test_an_archive_that_would_write_outside_is_refused_whole(tmp_path, bad):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(member("bundle/bundle.json"), io.BytesIO(b""))
        archive.addfile(bad, io.BytesIO(b""))
    with pytest.raises(UserError, match="nothing was unpacked") as error:
        unbundle(path, tmp_path / "new" / "folder")
    assert repr(bad.name) in error.value.message
    assert not (tmp_path / "new").exists()


def test_what_is_no_archive_or_no_bundle_is_refused(tmp_path):
    (tmp_path / "a.tar").write_text("no archive")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unbundle(tmp_path / "a.tar", tmp_path / "folder")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name in ("one/a", "two/b"):
            archive.addfile(member(name), io.BytesIO(b""))
    with pytest.raises(UserError, match="it holds 2 folders, right is one"):
        unbundle(tmp_path / "b.tar", tmp_path / "folder")


def test_wheels_are_those_installed_and_held_to_their_hashes(tmp_path, monkeypatch):
    for version in ("1.0", "2.0"):
        wheel, info = tmp_path / "index" / f"tiny_thing-{version}-py3-none-any.whl", f"tiny_thing-{version}.dist-info"
        wheel.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny_thing.py", f"version = {version!r}\n")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-thing\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(name, value)
    wheels = tmp_path / "wheels"
    download_wheels(wheels, ["tiny-thing>=1"], ["tiny-thing==1.0"])
    (wheel,) = wheels.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert (wheels / "requirements.txt").read_text() == f"tiny_thing==1.0 --hash=sha256:{digest}\n"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels), "--target"]
    command = [*pip, str(tmp_path / "site"), "--require-hashes", "-r", str(wheels / "requirements.txt")]
    subprocess.run(command, check=True)
    assert (tmp_path / "site" / "tiny_thing.py").read_text() == "version = '1.0'\n"
    with pytest.raises(UserError, match="--wheels: pip: "):
        download_wheels(tmp_path / "other", ["no-such-thing"], [])
