"""The diagnosis of a machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bigbatch.tools import doctor


def test_the_diagnosis_tells_what_is_here(capsys):
    doctor.main(["--json"])
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)}
    assert parts["torch"]["detail"].startswith(torch.__version__)
    assert parts["GPU"]["state"] == ("ok" if torch.cuda.is_available() else parts["GPU"]["state"])
    assert parts["DeepSpeed"] == {"name": "DeepSpeed", "state": "ok", "detail": "0.19.8"}
    assert "times the speed of fp32" in parts["precision bf16"]["detail"]
    assert "DeepSpeed cpu_adam" in parts


def test_it_is_printed_as_a_table_with_nothing_of_the_libraries_between(tmp_path):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "doctor"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    columns = [line.split("  ") for line in result.stdout.splitlines()]
    states = {next(cell.strip() for cell in row[1:] if cell.strip()) for row in columns}
    assert states <= {doctor.OK, doctor.ABSENT, doctor.WARNING}
    assert columns[0][0] == "machine"
    assert "Setting accelerator" not in result.stderr


def test_a_build_lock_that_was_left_behind_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert list(doctor._build_locks()) == []
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    (part,) = doctor._build_locks()
    assert (part.name, part.state) == ("build lock cpu_adam", doctor.WARNING)
    assert "held for 60 min" in part.detail
    assert f"rm {lock}" in part.detail


def make_package(folder: Path, name: str, files: dict[str, str], monkeypatch) -> None:
    for path, text in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text)
    monkeypatch.syspath_prepend(folder)
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)


def test_the_unrelated_package_named_apex_is_told_from_nvidias(tmp_path, monkeypatch):
    make_package(tmp_path / "unrelated", "apex", {"__init__.py": ""}, monkeypatch)
    (part,) = doctor._apex()
    assert part.state == doctor.WARNING
    assert "pip uninstall apex" in part.detail
    nvidia = {"__init__.py": "", "optimizers/__init__.py": "class FusedAdam: ..."}
    make_package(tmp_path / "nvidia", "apex", nvidia, monkeypatch)
    (part,) = doctor._apex()
    assert part.state == doctor.OK


def test_a_bitsandbytes_that_does_not_load_is_told_with_the_reason(tmp_path, monkeypatch):
    make_package(
        tmp_path, "bitsandbytes", {"__init__.py": "raise OSError('libcudart.so.13:\\nnot found')"}, monkeypatch
    )
    (part,) = doctor._bitsandbytes()
    assert (part.state, part.detail) == (doctor.WARNING, "installed, but does not load: libcudart.so.13: not found")
