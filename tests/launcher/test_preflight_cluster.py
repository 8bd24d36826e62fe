"""What a login node can know of a run before the queue."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch.launcher import storage
from bigbatch.launcher.preflight_cluster import ask, check_on, check_run_on
from bigbatch.launcher.prepared import find_prepared
from bigbatch.launcher.profiles import parse_profile
from bigbatch.launcher.resolve import resolve
from bigbatch.launcher.storage import Mount, find_mount, find_room, parse_quota, quota_lines

TEXT = ['data.train=["text.txt"]']
GPUS = {"gpus": {"per_node": 4, "card": "A100"}, "check_nodes": False}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in a folder with a text and a folder of commands that come before the system's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BIGBATCH_DATA", raising=False)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 1000)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def command(here):
    """Give a function that makes a command of this name out of a script."""

    def make(name: str, script: str) -> None:
        path = here / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


def findings_of(profile: dict, *overrides: str, run="gpt/quick", nodes=None, time_limit=None):
    settings = parse_profile({"version": 1, **profile})
    return check_on(ask(resolve(run, [*TEXT, *overrides]), settings, nodes, time_limit))


def told(findings, *rules):
    return [f"{f.severity} {f.path}: {f.message}" for f in findings if f.rule in rules]


def test_batch_and_plan_are_checked_for_the_ranks_of_all_nodes_and_plans_are_offered():
    findings = findings_of(GPUS, "batch.global_size=64", nodes="2")
    assert told(findings, "batch") == [
        "info batch.global_size: 64 samples = 8 a forward pass x 1 accumulated x 8 ranks"
    ]
    findings = findings_of(GPUS, "batch.global_size=60", nodes="2")
    assert told(findings, "batch")[0].startswith("error batch.global_size: 60 samples do not divide over 8 data ranks")
    offered = [finding.message for finding in findings if finding.rule == "plan"]
    assert offered
    for message in offered:  # each is right
        settings = message.removeprefix("would fit: --set ").split(" --set ")
        assert told(findings_of(GPUS, "batch.global_size=60", *settings, nodes="2"), "batch")[0].startswith("info")


def test_of_a_range_of_nodes_those_that_the_batch_does_not_divide_over_are_named():
    findings = findings_of(GPUS, "batch.global_size=64", nodes="1-4")
    assert told(findings, "range") == ["warning --nodes: batch and plan do not divide over 3 of 1-4 nodes"]
    assert told(findings_of(GPUS | {"nodes": "2-3"}, "batch.global_size=64"), "range", "batch") == [
        "warning profile.nodes: batch and plan do not divide over 3 of 2-3 nodes",
        "info batch.global_size: 64 samples = 8 a forward pass x 1 accumulated x 8 ranks",
    ]


def test_predicted_memory_is_compared_with_the_cards():
    fits = findings_of(GPUS, "parallel.zero_stage=null", run="gpt/7b", nodes="8")
    assert told(fits, "memory")[0].startswith("info batch.micro_size: about ")
    small = findings_of(
        {"gpus": {"per_node": 4, "card": "V100"}}, "precision.dtype=fp16", "deepspeed=zero1", run="gpt/7b", nodes="1"
    )
    assert told(small, "memory")[0].endswith(" of the 32 GiB of a V100 (within 10%)")
    assert told(small, "memory")[0].startswith("error")
    unknown = findings_of({"gpus": {"per_node": 4, "type": "odd"}}, nodes="1")
    assert told(unknown, "memory") == [
        "info profile.gpus.card: neither memory nor time is predicted: the profile does not say which card"
    ]
    wrong = findings_of({"gpus": {"per_node": 4, "card": "A1000"}}, nodes="1")
    assert told(wrong, "memory")[0].startswith("error profile.gpus.card: found 'A1000'; there are: V100")


def test_memory_is_that_of_the_plan(here):
    def needed(*overrides: str) -> float:
        findings = findings_of(GPUS, "batch.micro_size=1", *overrides, run="gpt/7b", nodes="2")
        return float(told(findings, "memory")[0].split("about ")[1].split()[0])

    whole = needed("deepspeed=zero1")
    assert needed("deepspeed=zero1", "parallel.tensor=4") < 0.6 * whole
    assert needed("deepspeed=zero1", "parallel.sequence=4") < whole
    assert needed("deepspeed=zero3") < 0.8 * whole


def test_what_needs_a_gpu_is_refused_on_nodes_without():
    quantized = ["deepspeed=zero3_quantized", "parallel.zero_stage=null", "precision.dtype=fp16"]
    assert told(findings_of({}, *quantized), "gpu")[0].startswith("error zero_optimization.zero_quantized_")
    assert told(findings_of(GPUS, *quantized), "gpu", "device") == []


def test_the_copies_of_asynchronous_saves_have_to_fit_in_the_memory_asked_for():
    findings = findings_of(GPUS | {"memory": "10G"}, "parallel.zero_stage=null", run="gpt/7b", nodes="8")
    assert told(findings, "host-memory")[0].endswith("and 10 are asked")
    assert told(findings_of(GPUS | {"memory": "0"}, run="gpt/7b", nodes="8"), "host-memory") == []


def test_the_time_of_the_run_is_compared_with_that_of_a_job():
    large = {**GPUS, "time_limit": "24:00:00"}
    again = findings_of(large, run="gpt/1.3b", nodes="2")
    assert any(line.endswith(" starts of 24:00:00 each") for line in told(again, "time"))
    never = findings_of({**large, "requeue": False}, run="gpt/1.3b", nodes="2")
    assert [f.severity for f in never if f.advice.startswith("submit with --chain ")] == ["warning"]
    assert told(findings_of(large, nodes="1"), "time")[0].endswith("within the 24:00:00 of one job")
    rare = findings_of(large, "checkpoint.every_steps=100000", run="gpt/1.3b", nodes="1")
    assert any(": a crash costs up to " in line for line in told(rare, "time"))


def test_a_job_that_is_too_short_for_its_own_last_save_is_refused():
    findings = findings_of({**GPUS, "save_seconds": 300}, time_limit="5")
    assert told(findings, "lead")[0].startswith("error --time: of 5 min, 10.2 min are for the last save")
    findings = findings_of({**GPUS, "save_seconds": 1}, "parallel.zero_stage=null", run="gpt/7b", nodes="2")
    assert told(findings, "lead") == ["warning profile.save_seconds: 80.9 GB in 1 s are 80.9 GB/s"]


def test_options_that_are_no_numbers_of_nodes_or_times_are_refused_in_a_line():
    assert [f"{f.path}: {f.message}" for f in check_run_on("gpt/quick", TEXT, "test", "x", None)] == [
        "--nodes: found 'x'; right is a number of nodes, or a range such as 2-8"
    ]
    assert check_run_on("gpt/quick", TEXT, "test", None, "soon")[0].path == "--time"


def test_every_mistake_in_run_and_profile_is_a_finding(here):
    (here / "p.json").write_text(json.dumps({"version": 1, "gpus": {"per_node": 0}, "partitoin": "gpu"}))
    findings = check_run_on("gpt/quick", ["seed=-1"], "p.json", None, None)
    assert [finding.path for finding in findings] == ["seed", "profile.gpus.per_node", "profile.partitoin"]
    assert check_run_on("gpt/quick", TEXT, "nowhere", None, None)[0].path == "--profile"


def test_the_software_that_a_profile_names_has_to_be_there(here, command):
    command("module", 'case "$2" in cuda/12) exit 0;; *) exit 1;; esac')
    findings = findings_of({"modules": ["cuda/12", "cuda/13"], "python": "/nowhere/bin/python"})
    assert told(findings, "modules") == ["error profile.modules[1]: there is no module cuda/13"]
    assert told(findings, "environment") == ["error profile.python: there is no program /nowhere/bin/python"]
    container = {"kind": "pyxis", "image": "/nowhere/image.sqsh", "mounts": [f"{here}:/work", "/nowhere:/data"]}
    findings = findings_of({"container": container, "python": "/nowhere/bin/python"})
    assert told(findings, "container", "environment") == [
        "error profile.container.image: there is no file /nowhere/image.sqsh",
        "error profile.container.mounts[1]: there is no /nowhere",
    ]


def test_modules_without_a_module_command_are_warned_of():
    if Path("/etc/profile.d/modules.sh").exists() or Path("/etc/profile.d/lmod.sh").exists():
        pytest.skip("this machine has a module command")
    assert told(findings_of({"modules": ["cuda/12"]}), "modules")[0].startswith(
        "warning profile.modules[0]: there is no"
    )


def test_a_scratch_folder_of_an_unknown_variable_is_refused(monkeypatch, here):
    monkeypatch.delenv("NO_SUCH_SCRATCH", raising=False)
    assert told(findings_of({"scratch": "$NO_SUCH_SCRATCH/runs"}), "run-folder") == [
        "error profile.scratch: $NO_SUCH_SCRATCH/runs names a variable that is not set here"
    ]
    monkeypatch.setenv("NO_SUCH_SCRATCH", str(here))
    assert told(findings_of({"scratch": "$NO_SUCH_SCRATCH/runs"}), "run-folder") == []


def test_a_path_that_slurm_cannot_carry_is_a_finding(monkeypatch, here):
    folder = here / "odd\\name"
    folder.mkdir()
    (folder / "text.txt").write_text("to be or not to be\n" * 1000)
    monkeypatch.chdir(folder)
    assert "Slurm takes no path with a control character or a backslash" in told(findings_of({}), "script")[0]


# ----------------------------------------------------------------------------------------------------- data and storage


def prepared_of(*overrides: str):
    return find_prepared(resolve("gpt/quick", [*TEXT, *overrides]).config.data)


def test_prepared_data_are_found_whole_and_their_changes_named(here, run_module):
    settings = [*TEXT, "data.tokenizer.vocabulary_size=300", "data.validation_fraction=0", "data.validation=[]"]
    assert find_prepared(resolve("gpt/quick", settings).config.data) is None
    overrides = [word for setting in settings for word in ("--set", setting)]
    run_module("bigbatch.launcher.cli", "prepare", "gpt/quick", *overrides)
    data = resolve("gpt/quick", settings).config.data
    found = find_prepared(data)
    assert (found.stale, found.damage) == ("", "")
    assert found.size_bytes == sum(path.stat().st_size for path in found.folder.glob("*/*.*")) > 0
    assert find_prepared(resolve("gpt/quick", [*settings, "data.unit=line"]).config.data) is None
    assert find_prepared(resolve("gpt/quick", [*settings, "data.sequence_length=32"]).config.data) == found
    findings = findings_of({}, *settings[1:])
    assert told(findings, "prepared")[0].startswith(f"info data.prepared_dir: {found.folder} is whole: ")
    (here / "text.txt").write_text("something else\n" * 1000)
    assert find_prepared(data).stale == f"{here}/text.txt is not what it was"
    assert told(findings_of({}, *settings[1:]), "prepared")[0].startswith("warning data.prepared_dir: ")
    shard = next(found.folder.glob("*/*.bin"))
    os.truncate(shard, 10)
    assert find_prepared(data).damage == str(shard)
    assert told(findings_of({}, *settings[1:]), "prepared")[0].startswith(
        f"error data.prepared_dir: {shard} is missing"
    )


@pytest.fixture
def run_module(here):
    """Give a function that runs a module to its end."""

    def run(name: str, *arguments: str) -> str:
        command = [sys.executable, "-P", "-m", name, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


def test_data_from_the_hub_have_to_be_in_the_cache_of_an_offline_job(here):
    offline = {"environment": {"BIGBATCH_OFFLINE": "1", "HF_HOME": str(here / "hf")}}
    source = 'data.train=["hf:some/set"]'
    assert told(findings_of(offline, source), "offline") == [
        "error data.train[0]: hf:some/set is neither here nor in the cache, and the job has no network"
    ]
    (here / "hf" / "datasets" / "some___set").mkdir(parents=True)
    assert told(findings_of(offline, source), "offline") == []


def test_a_quota_that_checkpoints_pass_is_a_finding(here, command):
    target = find_mount(here).target
    # What quota 4.06 prints with -w -p, where the grace of a passed limit is a time.
    lines = "Disk quotas for user x (uid 1): \\n Filesystem blocks quota limit grace files quota limit grace"
    command("quota", f'printf "{lines}\\n%s 900000* 890000 1000000 1700000000 995 1000 1000 0\\n" {target}')
    room = find_room(here)
    assert (room.free_bytes, room.free_files, room.has_quota) == (102_400_000, 5, True)
    findings = findings_of({})
    assert told(findings, "quota") == ["warning runs: 153 MB at most, and the quota leaves 102 MB"]
    assert told(findings, "inodes") == [f"error runs: 12 files at most, and 5 more may be made in {here}"]


def test_quotas_on_lustre_are_those_of_user_and_group(command):
    command("lfs", 'case $4 in *[a-z]*) echo "/l 10 0 0 - 2 0 0 -";; *) printf "/l\\n 10 20 30* - 2 0 5 -";; esac')
    assert quota_lines(Mount("a@tcp:/l", "/l", "lustre")) == ["/l 10 0 0 - 2 0 0 -", "/l 10 20 30* - 2 0 5 -"]
    assert parse_quota("/l 10 0 0 - 2 0 0 -") == (float("inf"), float("inf"))
    assert parse_quota("/l 10 20 30* - 2 0 5 -") == (20 * 1024, 3)


def test_the_file_system_of_a_folder_is_the_nearest_mount(here, tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/a / ext4 rw 0 0\nserver:/x {here}/with\\040blank nfs rw 0 0\n/dev/b {here}/w ext4 rw 0 0\n"
    )
    (here / "with blank" / "in").mkdir(parents=True)
    assert find_mount(here / "with blank" / "in", mounts).source == "server:/x"
    assert find_mount(here, mounts) == Mount("/dev/a", "/", "ext4")


def test_a_quota_command_that_hangs_is_left(here, command, monkeypatch):
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.2)
    command("quota", "exec sleep 60")
    assert find_room(here).has_quota is False


# ---------------------------------------------------------------------------------------------------------- the cluster


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_profile_is_compared_with_the_cluster_at_hand():
    fine = {"partition": "low", "nodes": "4", "ranks_per_node": 4, "memory": "4000", "time_limit": "5"}
    assert told(findings_of(fine), "cluster") == []
    wrong = {
        "partition": ("nowhere", "error profile.partition: found 'nowhere'; this cluster has: "),
        "nodes": ("5", "error profile.nodes: 5 nodes, and low has 4 of this kind"),
        "cpus_per_rank": (2, "error profile.cpus_per_rank: 8 cores a node: it has 4, nor another node of low"),
        "memory": ("8G", "error profile.memory: 8G a node: it has 4000 MB, nor another node of low"),
        "constraint": ("fast", "error profile.constraint: fast: it has the features none, nor another node of low"),
    }
    for key, (value, message) in wrong.items():
        assert told(findings_of(fine | {key: value}), "cluster")[0].startswith(message), key
    gpus = fine | {"gpus": {"per_node": 2}}
    del gpus["ranks_per_node"]
    assert told(findings_of(gpus), "cluster") == []
    for key, value in (("per_node", 3), ("type", "a100")):
        changed = gpus | {"gpus": gpus["gpus"] | {key: value}}
        assert told(findings_of(changed), "cluster")[0].startswith(f"error profile.gpus.{key}: "), key


# ------------------------------------------------------------------------------------------------------ the command


def test_check_needs_no_torch_and_little_time(here):
    code = "import sys; from bigbatch.launcher.cli import main; status = main(sys.argv[1:]); "
    code += "print(sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    arguments = ["check", "gpt/quick", "--set", TEXT[0], "--profile", "generic", "--nodes", "2", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stderr.splitlines()[-1] == "[]"
    assert {"rule", "severity", "path", "message", "advice"} == set(json.loads(ended.stdout)[0])
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # a loaded machine takes longer


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        (["--nodes", "2"], "--nodes: says nothing without --profile"),
        (["--profile", "test", "--ranks", "2"], "--ranks: are as many a node as the profile says"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, arguments, mistake):
    from bigbatch.launcher.cli import main

    assert main(["check", "gpt/quick", *arguments]) == 2
    assert mistake in capsys.readouterr().err
