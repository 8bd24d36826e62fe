"""The JSON Schema that an editor checks run documents with."""

from bigbatch.tools.schema import run_document_schema


def kinds_that_take(schema: dict, place: dict, value: dict) -> list[str]:
    """Name the alternatives at a place whose keys and constants allow an object, as a validator would."""
    kinds = {}
    for alternative in place["anyOf"]:
        name = alternative.get("$ref", "").rpartition("/")[2]
        kinds[name or alternative["type"]] = schema["$defs"].get(name)
    return [
        name
        for name, kind in kinds.items()
        if kind
        and not kind["additionalProperties"]
        and value.keys() <= kind["properties"].keys()
        and all(kind["properties"][key].get("const", item) == item for key, item in value.items())
    ]


def test_a_section_of_several_kinds_may_leave_its_kind_to_what_the_file_extends():
    schema = run_document_schema("classify")
    model = schema["properties"]["model"]
    assert model.keys() & {"oneOf", "discriminator"} == set()  # the first takes no value that two kinds take
    assert kinds_that_take(schema, model, {"num_layers": 2}) == ["AttentionBackboneSection", "RecurrentBackboneSection"]
    assert kinds_that_take(schema, model, {"backbone": "rnn", "num_layers": 2}) == ["RecurrentBackboneSection"]
    assert kinds_that_take(schema, model, {"backbone": "rnn", "num_heads": 2}) == []


def test_a_source_is_a_string_or_an_object_that_says_how_to_read_it():
    for recipe, section in (("gpt", "TokenDataSection"), ("classify", "LabeledDataSection")):
        schema = run_document_schema(recipe)
        items = schema["$defs"][section]["properties"]["train"]["items"]
        assert {"type": "string"} in items["anyOf"]
        assert kinds_that_take(schema, items, {"path": "a.txt", "format": "lines"}) == ["TableSource"]
        assert kinds_that_take(schema, items, {"pth": "a.txt"}) == []
