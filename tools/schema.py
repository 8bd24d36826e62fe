"""Write ds_configs/schema: the JSON Schema of each recipe's run document, and the table of DeepSpeed's keys.

    python -m bigbatch.tools.schema

DeepSpeed's top level ignores a key that it does not know, so the table is what makes its documents closed. Most nested
blocks are pydantic models and are read off; everything else is learned by giving DeepSpeed's own parser a dictionary
that writes down each key it is asked for.
"""

import importlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

import bigbatch.ds_configs
from bigbatch.recipes.core.recipe import find_config, recipe_names

FOLDER = Path(bigbatch.ds_configs.__file__).parent / "schema"
LIMITS = ("enum", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
PROBE = "__probe__"  # no block knows this key, so a pydantic model that meets it says its name

# Keys that DeepSpeed 0.19.8 reads elsewhere than in its parser, or hands on unseen.
READ_ELSEWHERE: dict[str, dict[str, Any]] = {
    "sequence_parallel_size": {"type": ["integer"]},  # runtime/config.py, once process groups exist
    "optimizer.params": {"open": True},  # keyword arguments of the optimizer's class
    "scheduler.params": {"open": True},
    "pipeline.use_reentrant": {"type": ["boolean"]},  # runtime/pipe/engine.py
    "data_efficiency.data_sampling.dynamic_batching.metrics_path": {"type": ["string"]},
    "data_efficiency.data_sampling.dynamic_batching.max_tokens": {"type": ["integer"]},
    "data_efficiency.data_sampling.curriculum_learning": {
        "open": True
    },  # runtime/data_pipeline/curriculum_scheduler.py
    "data_efficiency.data_routing.random_ltd": {"open": True},  # runtime/data_pipeline/data_routing/
}
# Without these a block is not looked into any further.
PROBE_CONTENT: dict[str, dict[str, Any]] = {"optimizer": {"type": "adam"}, "scheduler": {"type": "WarmupLR"}}


def main() -> None:
    """Write every generated file of ds_configs/schema."""
    for name in recipe_names():
        write_json(FOLDER / f"{name}.schema.json", run_document_schema(name))
    write_json(FOLDER / "profile.schema.json", profile_schema())
    table = deepspeed_table()
    write_json(FOLDER / f"deepspeed_{table['deepspeed']}.json", table)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document as the shipped files are written."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def run_document_schema(recipe: str) -> dict[str, Any]:
    """Return the JSON Schema of a recipe's run document as a file.

    A file may take anything but its version from the document that it extends, so nothing else is required; nor that a
    section of several kinds says which one it is, so that it may look like more than one.
    """
    schema = find_config(recipe).model_json_schema()
    for definition in [schema, *schema["$defs"].values()]:
        definition.pop("required", None)
        for value in definition["properties"].values():
            if value.pop("discriminator", None):
                value["anyOf"] = value.pop("oneOf")
    schema["properties"] = {
        "version": schema["properties"].pop("version"),
        "extends": {"type": "string", "description": "Name or path of the run document that this one changes."},
        **schema["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "required": ["version"],
        **schema,
        "title": f"Run document of the recipe {recipe}",
    }


def profile_schema() -> dict[str, Any]:
    """Return the JSON Schema of a cluster's profile."""
    # By name: this is the one thing of the launcher's that is written down here.
    profile = importlib.import_module("bigbatch.launcher.profiles").Profile
    schema = profile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Profile of a cluster"}


def deepspeed_table() -> dict[str, Any]:
    """Return every key that the installed DeepSpeed understands, nested, with types where they can be found."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    keys = _keys_at(())
    for path, node in READ_ELSEWHERE.items():
        *parents, name = path.split(".")
        level = keys
        for parent in parents:
            level = level[parent]["keys"]
        level[name] = node
    removed = [*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS)]
    for path in removed:
        (keys["zero_optimization"]["keys"] if "." in path else keys).pop(path.rpartition(".")[2], None)
    return {
        "version": 1,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "removed": sorted(removed),
        "keys": _sorted_keys(keys),
    }


class _Recorder(dict[str, Any]):
    """A dictionary that writes down the keys it is asked for, and the defaults."""

    def __init__(self, content: dict[str, Any], asked: dict[str, Any] | None = None) -> None:
        super().__init__(content)
        self.asked: dict[str, Any] = {} if asked is None else asked
        self.walked = False

    def get(self, key: str, default: Any = None) -> Any:
        if self.asked.get(key) is None:
            self.asked[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def keys(self) -> Any:  # `key in document.keys()` asks too
        return _RecordedKeys(self)

    def items(self) -> Any:
        self.walked = True
        return super().items()

    def __iter__(self) -> Iterator[str]:  # being overridden, `**recorder` goes through `keys`
        return super().__iter__()

    def __copy__(self) -> "_Recorder":
        return _Recorder(dict(super().items()), self.asked)


class _RecordedKeys:
    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __contains__(self, key: object) -> bool:
        return key in self.recorder

    def __iter__(self) -> Iterator[str]:
        return iter(self.recorder)


def _keys_at(path: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys that DeepSpeed's parser asks for in the block at this path."""
    recorder, _ = _parse_with_probe(path)
    keys = {}
    for name, default in recorder.asked.items():
        if name != PROBE:
            keys[name] = _explore((*path, name), default)
    return keys


def _explore(path: tuple[str, ...], default: Any) -> dict[str, Any]:
    recorder, error = _parse_with_probe(path)
    if error is not None:
        for detail in error.errors():
            if detail["type"] == "extra_forbidden" and detail["loc"][-1] == PROBE:
                return _model_node(error.title, detail["loc"][:-1])
    if recorder.walked:
        return _walked_node(path)
    if set(recorder.asked) - {PROBE}:
        return {"type": ["object"], "keys": _keys_at(path)}
    return _type_of(default)


def _parse_with_probe(path: tuple[str, ...]) -> tuple[_Recorder, ValidationError | None]:
    """Parse a document whose block at this path records; return the record and what a pydantic model said to it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = _Recorder({PROBE: 0, **PROBE_CONTENT.get(".".join(path), {})} if path else {})
    document: dict[str, Any] = recorder
    for name in reversed(path):
        document = {name: document}
    document.setdefault("train_batch_size", 1)
    try:
        DeepSpeedConfig(document)
    except ValidationError as error:
        return recorder, error
    except Exception:  # a dictionary stood where a number belongs
        return recorder, None
    return recorder, None


def _walked_node(path: tuple[str, ...]) -> dict[str, Any]:
    """Return the node of a block that DeepSpeed copies over its defaults, or whole, without asking for a key."""
    from deepspeed.runtime.config import DeepSpeedConfig

    defaults = getattr(DeepSpeedConfig({"train_batch_size": 1}), path[-1], None)
    if defaults is None:
        return {"open": True}
    return {"type": ["object"], "keys": {name: _type_of(value) for name, value in defaults.items()}}


def _type_of(default: Any) -> dict[str, Any]:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    if default == "auto" or type(default) not in names:  # "auto" may stand for a number or a list
        return {}
    return {"type": [names[type(default)]]}


class _LenientSchema(GenerateJsonSchema):
    """Writes `anything` for what JSON cannot hold (torch.dtype, process groups)."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


def _model_node(title: str, loc: tuple[int | str, ...]) -> dict[str, Any]:
    """Return the node of the block at `loc` inside the DeepSpeed model of this name."""
    node = _model_keys(next(model for model in _models() if model.__name__ == title))
    for name in loc:
        node = node["keys"][name]
    return node


def _models() -> Iterator[type[BaseModel]]:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    pending = DeepSpeedConfigModel.__subclasses__()
    while pending:
        model = pending.pop()
        yield model
        pending += model.__subclasses__()


def _model_keys(model: type[BaseModel]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        # DeepSpeed takes a field by its own name too.
        keys[field.alias or name] = keys[name] = _field_node(field)
    return {"type": ["object"], "keys": keys}


def _field_node(field: FieldInfo) -> dict[str, Any]:
    alternatives = get_args(field.annotation) or (field.annotation,)
    for alternative in alternatives:
        if isinstance(alternative, type) and issubclass(alternative, BaseModel):
            node = _model_keys(alternative)
            return {**node, "type": ["object", "null"]} if type(None) in alternatives else node
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    schema = TypeAdapter(annotation, config={"arbitrary_types_allowed": True}).json_schema(
        schema_generator=_LenientSchema
    )
    return _plain_node(schema, schema.get("$defs", {}))


def _plain_node(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Reduce a JSON Schema without nested objects to types, values and limits."""
    if "$ref" in schema:
        return _plain_node(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        parts = [_plain_node(part, definitions) for part in schema["anyOf"]]
        if any("type" not in part for part in parts):
            return {}
        merged = {key: value for part in parts for key, value in part.items()}
        return {**merged, "type": [name for part in parts for name in part["type"]]}
    node = {key: schema[key] for key in LIMITS if key in schema}
    if "enum" in node:
        node["enum"] = list(dict.fromkeys(node["enum"]))  # an enumeration may have two names for one value
    return {"type": [schema["type"]], **node} if "type" in schema else node


def _sorted_keys(keys: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {**node, "keys": _sorted_keys(node["keys"])} if "keys" in node else node
        for name, node in sorted(keys.items())
    }


if __name__ == "__main__":
    main()
