"""A run, resolved once: name or path -> extends -> --set -> validated RunConfig and DeepSpeed document. No torch."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from bigbatch.launcher.deepspeed_keys import check_deepspeed
from bigbatch.launcher.documents import DEEPSPEED_FOLDER, find_document, finite, fix_deepspeed_path, load_run, read_json
from bigbatch.launcher.explain import explain, unknown_path
from bigbatch.launcher.problems import InvalidDocumentError, Problem, shown
from bigbatch.launcher.rules import broken_rules
from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import find_config, recipe_names

# What may differ between two runs with the same content id: it changes no weight. `deepspeed` is there by its content.
OUTSIDE_CONTENT_ID = ("about", "checkpoint", "deepspeed", "evaluate", "report")


Kind = Literal["harmless", "changes_optimization", "impossible"]

# Half of a character written in two, and what Python makes of bytes that are not UTF-8.
_SURROGATE = re.compile("[\ud800-\udfff]")

# The longest path that a changed one begins with decides; a path not here is harmless.
_KINDS: dict[str, Kind] = {
    "recipe": "impossible",
    "seed": "impossible",
    "model": "impossible",
    "model.recompute_activations": "harmless",
    "data": "impossible",
    "data.prepared_dir": "harmless",
    "data.shard_tokens": "harmless",
    "optimizer": "changes_optimization",
    "schedule": "changes_optimization",
    "schedule.stop_step": "harmless",
    "precision.dtype": "changes_optimization",
    "parallel.sync": "changes_optimization",
    "parallel.local_sgd": "changes_optimization",
    "batch.global_size": "changes_optimization",
    "batch.ramp": "changes_optimization",
}


@dataclass(frozen=True)
class Resolved:
    """A run document with nothing left open."""

    document: dict[str, Any]
    """All settings, defaults filled in: the content of run.json."""
    config: RunConfig
    deepspeed: dict[str, Any]
    """The native DeepSpeed document, checked, before the run's own settings complete it."""
    content_id: str
    """12 hexadecimal characters that change when anything does that the weights depend on."""


class Change(NamedTuple):
    """One setting that differs; None where a document does not have it."""

    path: str
    old: Any
    new: Any
    kind: Kind


def resolve(run: str, overrides: Sequence[str] = ()) -> Resolved:
    """Resolve a run by name or path with `a.b=value` overrides; raise InvalidDocumentError with every problem found."""
    document = load_run(run)
    settings = [_parse_override(override) for override in overrides]
    recipe = dict(settings).get("recipe", document.get("recipe"))
    if not isinstance(recipe, str):
        raise UserError("recipe", f"missing; there are: {', '.join(recipe_names())}")
    config_class = find_config(recipe)
    problems = [problem for path, _ in settings for problem in unknown_path(config_class, path)]
    if problems:
        raise InvalidDocumentError(problems)
    for path, value in settings:
        _set_value(document, path, value)
    fix_deepspeed_path(document, Path())
    return _finish(config_class, document)


def content_id(document: dict[str, Any], deepspeed: dict[str, Any]) -> str:
    """Return the id of a resolved document together with its DeepSpeed document."""
    content = {key: value for key, value in document.items() if key not in OUTSIDE_CONTENT_ID}
    content["schedule"] = {key: value for key, value in content["schedule"].items() if key != "stop_step"}
    canonical = json.dumps([content, deepspeed], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """List what differs between two resolved documents, and what a run that resumes makes of it.

    `harmless` changes no weight; `changes_optimization` is for the user to ask for by name; `impossible` needs a new
    run.
    """
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    paths = sorted(before.keys() | after.keys())
    changed = [path for path in paths if before.get(path) != after.get(path)]
    return [Change(path, before.get(path), after.get(path), _kind(path)) for path in changed]


def _finish(config_class: type[RunConfig], document: dict[str, Any]) -> Resolved:
    config, problems = _validate(config_class, document)
    native, native_problems = _load_deepspeed(document, config)
    problems += native_problems
    if config is not None:
        problems += broken_rules(config)
    if config is None or problems:
        raise InvalidDocumentError(problems)
    full = config.model_dump(mode="json")
    return Resolved(full, config, native, content_id(full, native))


def _validate(config_class: type[RunConfig], document: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    for path, value in _leaves(document, ""):
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            return None, [Problem(path, f"found {shown(value)}, which is not Unicode: half a character, or bytes")]
    try:
        # From JSON, so that a list may become a tuple although types are strict.
        return config_class.model_validate_json(json.dumps(document)), []
    except ValidationError as error:
        return None, explain(config_class, error.errors())


def _load_deepspeed(document: dict[str, Any], config: RunConfig | None) -> tuple[dict[str, Any], list[Problem]]:
    name = document.get("deepspeed")
    if not isinstance(name, str):  # absent, or a wrong type that validation tells
        return {}, []
    try:
        path = find_document(name, Path(), DEEPSPEED_FOLDER)
        return check_deepspeed(read_json(path), path.name, config)
    except UserError as error:
        return {}, [Problem(f"deepspeed {error.where}", error.message)]


def _parse_override(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError("--set", f"{text!r} has no value; right is section.key=value")
    try:
        return path, json.loads(value, parse_constant=_not_a_number, parse_float=finite)
    except ValueError:
        return path, value


def _not_a_number(name: str) -> Any:
    raise ValueError(name)


def _set_value(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not isinstance(document.get(parent), dict):
            document[parent] = {}
        document = document[parent]
    document[name] = value


def _leaves(document: dict[str, Any], parent: str) -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        path = f"{parent}.{name}" if parent else name
        if isinstance(value, dict):
            yield from _leaves(value, path)
        else:
            yield path, value


def _kind(path: str) -> Kind:
    while path:
        if path in _KINDS:
            return _KINDS[path]
        path = path.rpartition(".")[0]
    return "harmless"
