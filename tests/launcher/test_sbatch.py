"""The batch script: the text of each profile, and that every byte of a value arrives where it is meant to."""

import json
import os
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigbatch.launcher import profiles
from bigbatch.launcher.profiles import NodeRange, Profile, load_profile
from bigbatch.launcher.sbatch import JobRequest, render
from bigbatch.recipes.core.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "sbatch"
NODES = NodeRange(2, 2)
REQUEST = JobRequest(Path("/home/ann/runs/gpt-1"), Path("/home/ann"), NODES, "12:00:00", 300, "/opt/venv/bin/python")
FULL = Profile.model_validate_json(
    json.dumps(
        {
            "version": 1,
            "partition": "a,b",
            "account": "project",
            "qos": "high",
            "constraint": "a100&nvlink",
            "reservation": "course",
            "gpus": {"per_node": 8, "ask_by": "gpus-per-task", "type": "a100"},
            "cpus_per_rank": 16,
            "memory": "0",
            "exclusive": True,
            "options": {"hint": "nomultithread", "comment": "say \"it\" 'so' #1", "contiguous": ""},
            "modules": ["cuda/12.8", "gcc"],
            "environment": {"NCCL_DEBUG": "WARN", "WORDS": "$(id) `id` \"two\"\n'lines' \\"},
            "network": {"interface": "ib0", "adapters": "mlx5_0,mlx5_1"},
            "requeue": False,
        }
    )
)
SCRIPTS = {
    **{path.name.removesuffix(".v1.json"): path for path in profiles.SHIPPED.glob("*.json")},
    "everything": FULL,
    "sweep": FULL,
    "chain": FULL,
    "range": profiles.SHIPPED / "perlmutter.v1.json",
}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_the_script_of_each_profile_is_the_one_on_record(name):
    request = REQUEST._replace(run_dir=Path('/data/it\'s 50% "done"')) if SCRIPTS[name] is FULL else REQUEST
    if name == "sweep":
        request = request._replace(members=4, exclude=("n1", "n7"), environment={"BIGBATCH_DATA": "/my data"})
    elif name == "chain":
        request = request._replace(is_chain=True)
    elif name == "range":
        request = request._replace(nodes=NodeRange(2, 8))
    text = render(FULL if SCRIPTS[name] is FULL else load_profile(str(SCRIPTS[name])), request)
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("BIGBATCH_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_range_of_nodes_with_gpus_asked_for_by_task_is_refused():
    with pytest.raises(UserError, match="takes a number, not a range"):
        render(FULL, REQUEST._replace(nodes=NodeRange(2, 8)))


@pytest.fixture(scope="module")
def catcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a program that stands where the interpreter would, and tells what has reached it."""
    path = tmp_path_factory.mktemp("catcher") / 'it\'s $(a) "python"'
    code = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], sys.stdout)"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S -c {shlex.quote(code)} "$@"\n')
    path.chmod(0o755)
    return path


NASTY = st.text(
    st.one_of(
        st.sampled_from(" '\"$`\\,;#!*?[]{}()<>|&%~=\n\r\t-"),
        st.sampled_from(string.ascii_letters),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(value=NASTY, name=NASTY)
@example(value="$(touch gone)\n`touch gone`", name="a, 'b' \"c\" $(d) #e")
@example(value="\r\n@MODULES@", name="@COMMAND@")
@example(value="'", name="a\nb")
@example(value="\\", name="a\\b")
@example(value="é→\x7f\x85", name="a ")
def test_values_arrive_byte_for_byte_or_are_refused(catcher, tmp_path_factory, value, name):
    profile = Profile.model_validate_json(json.dumps({"version": 1, "environment": {"VALUE": value}}))
    run_dir = Path("/runs", name.replace("/", "-").strip(".") or "x")
    request = REQUEST._replace(run_dir=run_dir, python=str(catcher), environment={"FIRST": value})
    try:
        text = render(profile, request)
    except UserError:
        assert set(run_dir.name) & set(map(chr, (*range(32), 92, 127))) or run_dir.name != run_dir.name.rstrip()
        return
    bare = {"PATH": os.environ["PATH"]}
    ended = subprocess.run(["bash", "--norc"], input=text.encode(), capture_output=True, env=bare, check=True)
    arguments, environment = json.loads(ended.stdout)
    assert arguments == ["-P", "-m", "bigbatch.launcher.job", str(run_dir)]
    assert (environment["VALUE"], environment["FIRST"]) == (value, value)
    assert not ended.stderr


def test_a_member_of_a_sweep_gets_its_own_folder(catcher):
    text = render(FULL.model_copy(update={"modules": ()}), REQUEST._replace(python=str(catcher), members=3))
    ended = subprocess.run(
        ["bash"], input=text.encode(), capture_output=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"}, check=True
    )
    assert json.loads(ended.stdout)[0][-1] == "/home/ann/runs/gpt-1/2"


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "blank ", "\udcff"])
def test_a_path_that_slurm_cannot_take_is_refused(name):
    with pytest.raises(UserError, match="Slurm takes no path"):
        render(load_profile("test"), REQUEST._replace(run_dir=Path("/runs", name)))
