"""Profiles of clusters: what is shipped, what is refused, which is found."""

import json
from pathlib import Path

import pytest

import bigbatch.ds_configs
from bigbatch.launcher import profiles
from bigbatch.launcher.cards import card_names
from bigbatch.launcher.profiles import find_profile, load_profile, node_range, parse_profile, time_limit_seconds
from bigbatch.recipes.core.errors import UserError

SHIPPED = sorted(path.name.removesuffix(".v1.json") for path in profiles.SHIPPED.glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_is_valid_and_says_where_it_comes_from(name):
    profile = load_profile(name)
    assert profile.about
    assert profile.about.source
    assert profile.gpus is None or profile.gpus.card is None or profile.gpus.card in card_names()


def test_the_json_schema_of_profiles_is_what_the_code_says():
    from bigbatch.tools.schema import profile_schema

    written = Path(bigbatch.ds_configs.__file__).parent / "schema" / "profile.schema.json"
    assert json.loads(written.read_text()) == profile_schema(), "run python -m bigbatch.tools.schema"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gpu": {"per_node": 4}}, "gpu: unknown key; did you mean 'gpus'?"),
        ({"partition": "a b"}, 'partition: found "a b"'),
        ({"nodes": "4-2"}, "nodes: right is a number of nodes"),
        ({"time_limit": "soon"}, "time_limit: right is a time limit"),
        ({"time_limit": "0:00"}, "time_limit: a job needs some time"),
        ({"gpus": {"per_node": 4}, "ranks_per_node": 2}, "ranks_per_node is gpus.per_node"),
        ({"options": {"time": "3"}}, "options.time is not free"),
        ({"options": {"comment": "two\nlines"}}, "options.comment"),
        ({"environment": {"A": "zero\0"}}, "environment.A: the zero character"),
        ({"container": {"kind": "docker"}}, "container.kind"),
        ({"modules": ["--help"]}, "modules"),
    ],
)
def test_a_mistake_in_a_profile_is_told_with_its_place(settings, told):
    with pytest.raises(UserError) as error:
        parse_profile({"version": 1, **settings})
    assert told in str(error.value)


def test_time_limits_are_read_as_slurm_reads_them():
    limits = {"90": 5400, "12:30": 750, "1:00:00": 3600, "1-2": 93600, "1-2:3": 93780, "1-02:03:04": 93784}
    assert {text: time_limit_seconds(text) for text in limits} == limits


def test_nodes_are_a_number_or_a_range():
    assert (str(node_range("4")), node_range("2-8")) == ("4", (2, 8))
    assert str(node_range("2-8")) == "2-8"


def test_a_users_own_profile_comes_before_a_shipped_one_and_the_newest_version_first(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "OWN", tmp_path)
    assert find_profile("generic").parent == profiles.SHIPPED
    for number in (2, 10):
        (tmp_path / f"generic.v{number}.json").write_text('{"version": 1}')
    assert find_profile("generic") == tmp_path / "generic.v10.json"
    assert find_profile(str(tmp_path / "generic.v2.json")).name == "generic.v2.json"
    with pytest.raises(UserError, match="did you mean 'generic'"):
        find_profile("generik")
