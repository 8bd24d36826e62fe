"""Every JSON that is shipped, by itself."""

import json
from pathlib import Path

import pytest

import bigbatch.ds_configs
from bigbatch.launcher.documents import document_names
from bigbatch.launcher.resolve import resolve
from bigbatch.recipes.core.batch import check_batch
from bigbatch.recipes.core.recipe import recipe_names

FOLDER = Path(bigbatch.ds_configs.__file__).parent


@pytest.mark.parametrize("file", sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.json")))
def test_every_shipped_file_is_json_and_is_found_by_somebody(file):
    document = json.loads((FOLDER / file).read_text())
    folder = Path(file).parts[0]
    assert folder == "schema" or document["version"] == 1
    if folder != "schema":
        name = file.removesuffix(".v1.json")
        assert name in [*document_names(), *(f"deepspeed/{name}" for name in document_names("deepspeed"))]


@pytest.mark.parametrize("name", document_names())
def test_every_shipped_run_resolves_and_says_what_it_is(name):
    resolved = resolve(name)
    assert resolved.config.about.source
    assert name.startswith(f"{resolved.config.recipe}/")
    for ranks in (1, 2, 4, 8):
        assert check_batch(resolved.config.batch, ranks).data_ranks == ranks


@pytest.mark.parametrize("name", document_names("deepspeed"))
def test_every_shipped_deepspeed_document_is_taken_by_a_run(name):
    resolved = resolve("gpt/quick", ["parallel.zero_stage=null", f"deepspeed={name}"])
    assert resolved.deepspeed["zero_optimization"]["stage"] == int(name[len("zero")])


def test_every_recipe_has_a_quick_run():
    assert [name for name in document_names() if name.endswith("/quick")] == [
        f"{name}/quick" for name in recipe_names()
    ]


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_json_schema_is_what_the_code_says(recipe):
    from bigbatch.tools.schema import run_document_schema

    written = json.loads((FOLDER / "schema" / f"{recipe}.schema.json").read_text())
    assert written == run_document_schema(recipe), "run python -m bigbatch.tools.schema"


def test_the_json_schema_allows_a_file_that_extends_and_nothing_unknown():
    schema = json.loads((FOLDER / "schema" / "gpt.schema.json").read_text())
    assert schema["required"] == ["version"]
    assert "extends" in schema["properties"]
    objects = [schema, *(definition for definition in schema["$defs"].values())]
    assert all(definition["additionalProperties"] is False for definition in objects)
    assert not any("required" in definition for definition in schema["$defs"].values())
