"""Mistakes in a document's keys and values, said in the document's own terms."""

from typing import Any, get_args

from bigbatch.launcher.problems import Problem, meant, nearest, shown
from bigbatch.recipes.core.config import RunConfig, Section

# pydantic's name for a mistake -> what would be right.
_RIGHT = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "tuple_type": "a list",
    "model_type": "an object with keys",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "too_short": "{min_length} or more elements",
    "too_long": "{max_length} elements",
}


def explain(config_class: type[RunConfig], detail: Any) -> Problem:
    """Turn one of pydantic's errors into a line of ours."""
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if kind == "extra_forbidden":
        return Problem(where, f"unknown key; {_suggest(config_class, loc[:-1], str(loc[-1]))}")
    if kind == "missing":
        return Problem(where, f"missing{_description(config_class, loc)}")
    if kind == "value_error":  # a rule that a section states of itself
        return Problem(where, str(context["error"]))
    found = shown(detail["input"])
    if kind == "literal_error":
        return Problem(where, f"found {found}; right is {context['expected']}{_close_literal(detail)}")
    if kind in _RIGHT:
        return Problem(where, f"found {found}; right is {_RIGHT[kind].format(**context)}")
    return Problem(where, f"found {found}; {detail['msg']}")


def unknown_path(config_class: type[Section], path: str) -> list[Problem]:
    """Return the problem of a `--set` path that leads to no key, or nothing."""
    section: type[Section] | None = config_class
    names = path.split(".")
    for depth, name in enumerate(names):
        if section is None:
            return [Problem(f"--set {path}", f"{'.'.join(names[:depth])} has no keys of its own; replace it whole")]
        if name not in section.model_fields:
            return [Problem(f"--set {path}", f"unknown key; {_suggest(config_class, tuple(names[:depth]), name)}")]
        section = _section_of(section, name)
    return []


def _section_of(section: type[Section], name: str) -> type[Section] | None:
    """Return the class of a field that is a section, or is one or null."""
    annotation = section.model_fields[name].annotation
    for alternative in (annotation, *get_args(annotation)):
        if isinstance(alternative, type) and issubclass(alternative, Section):
            return alternative
    return None


def _section_at(config_class: type[Section], path: tuple[int | str, ...]) -> type[Section]:
    section: type[Section] = config_class
    for name in path:
        if isinstance(name, str):
            section = _section_of(section, name) or _element_of(section, name)
    return section


def _element_of(section: type[Section], name: str) -> type[Section]:
    """Return the section class that a list is made of."""
    return next(arg for arg in get_args(section.model_fields[name].annotation) if arg is not Ellipsis)


def _suggest(config_class: type[RunConfig] | type[Section], parents: tuple[int | str, ...], name: str) -> str:
    """Say what an unknown key probably was: a neighbour, or a key of the same name in another section."""
    here = _section_at(config_class, parents).model_fields
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(_all_paths(config_class))}
    if not nearest(name, here) and name in elsewhere:
        return f"did you mean {elsewhere[name]!r}?"
    return meant(name, here)


def _all_paths(section: type[Section]) -> list[str]:
    paths = []
    for name in section.model_fields:
        inner = _section_of(section, name)
        paths += [f"{name}.{path}" for path in _all_paths(inner)] if inner else [name]
    return paths


def _close_literal(detail: Any) -> str:
    choices = [choice.strip("' ") for choice in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
    match = nearest(detail["input"], choices) if isinstance(detail["input"], str) else None
    return f"; did you mean {match!r}?" if match else ""


def _description(config_class: type[RunConfig], loc: tuple[int | str, ...]) -> str:
    if isinstance(loc[-1], int):
        return "; the list is too short"
    text = _section_at(config_class, loc[:-1]).model_fields[loc[-1]].description
    return f"; it is: {text}" if text else ""
