"""Mistakes in a document's keys and values, said in the document's own terms."""

from collections.abc import Sequence
from itertools import groupby
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from bigbatch.launcher.problems import Problem, meant, nearest, shown
from bigbatch.recipes.core.config import Section

Loc = tuple[int | str, ...]

# pydantic's name for a mistake -> what would be right.
_RIGHT = {
    "bool_type": "true or false",
    "dict_type": "an object with keys",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "literal_error": "{expected}",
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


def explain(config_class: type[Section], details: Sequence[Any]) -> list[Problem]:
    """Turn pydantic's errors into lines of ours; a value that may be of several kinds is told of as one."""
    # pydantic counts the elements that are right, and tells of the others anyhow.
    real = [d for d in details if d["type"] != "too_short" or len(d["input"]) < d["ctx"]["min_length"]]
    problems = []
    for fork, group in groupby(real, lambda detail: _fork(config_class, detail["loc"])):
        tried = list(group)
        inside = [d for d in tried if len(d["loc"]) > len(fork) + 1 or d["type"] == "value_error"]
        if inside or len(tried) == 1:  # the value is of the kind that it got furthest in
            problems += [_explain(config_class, detail) for detail in inside or tried]
        else:
            right = ", or ".join(dict.fromkeys(map(_right, tried)))
            close = "".join(map(_close_literal, tried))
            found = shown(tried[0]["input"])
            problems.append(Problem(_path(config_class, fork), f"found {found}; right is {right}{close}"))
    return problems


def unknown_path(config_class: type[Section], path: str) -> list[Problem]:
    """Return the problem of a `--set` path that leads to no key, or nothing."""
    sections: list[type[Section]] = [config_class]
    names = path.split(".")
    for depth, name in enumerate(names):
        if not sections:
            return [Problem(f"--set {path}", f"{'.'.join(names[:depth])} has no keys of its own; replace it whole")]
        fields = [section.model_fields[name] for section in sections if name in section.model_fields]
        if not fields:
            return [Problem(f"--set {path}", f"unknown key; {_suggest(config_class, sections, name)}")]
        sections = [section for field in fields for section in _sections(field.annotation)]
    return []


def _explain(config_class: type[Section], detail: Any) -> Problem:
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    where = _path(config_class, loc)
    if kind == "extra_forbidden":
        return Problem(where, f"unknown key; {_right_key(config_class, loc)}")
    if kind == "missing":
        return Problem(where, f"missing{_description(config_class, loc)}")
    if kind == "value_error":  # a rule that a section states of itself
        return Problem(where, str(context["error"]))
    if kind.startswith("union_tag"):
        return _explain_tag(config_class, where, detail)
    right = f"right is {_right(detail)}" if kind in _RIGHT else detail["msg"]
    return Problem(where, f"found {shown(detail['input'])}; {right}{_close_literal(detail)}")


def _explain_tag(config_class: type[Section], where: str, detail: Any) -> Problem:
    """Tell of the key that says which kind an object is of."""
    kinds = [_tag(section) for section in _sections(_at(config_class, detail["loc"]))]
    key, choices = kinds[0][0], [choice for _, choice in kinds]
    if key not in detail["input"]:
        return Problem(f"{where}.{key}", f"missing; right is one of {', '.join(choices)}")
    value = detail["input"][key]
    match = nearest(value, choices) if isinstance(value, str) else None
    close = f"; did you mean {match!r}?" if match else ""
    return Problem(f"{where}.{key}", f"found {shown(value)}; right is one of {', '.join(choices)}{close}")


def _right(detail: Any) -> str:
    return _RIGHT[detail["type"]].format(**detail.get("ctx", {}))


def _right_key(config_class: type[Section], loc: Loc) -> str:
    """Say what an unknown key probably was; of one that another kind of the same object has, say which."""
    name, section = str(loc[-1]), _at(config_class, loc[:-1])
    others = [kind for kind in _sections(_at(config_class, loc[:-2])) if kind is not section]
    owners = [_tag(other)[1] for other in others if name in other.model_fields and section is not config_class]
    if owners:
        key, value = _tag(section)
        return f"it belongs to {key} {' or '.join(owners)}, not to {value}"
    return _suggest(config_class, [section], name)


def _suggest(config_class: type[Section], sections: list[type[Section]], name: str) -> str:
    """Say what an unknown key probably was: a neighbour, or a key of the same name in another section."""
    here = {key for section in sections for key in section.model_fields}
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(_all_paths(config_class))}
    if not nearest(name, here) and name in elsewhere:
        return f"did you mean {elsewhere[name]!r}?"
    return meant(name, here)


def _all_paths(section: type[Section]) -> list[str]:
    paths = []
    for name, field in section.model_fields.items():
        inner = [path for kind in _sections(field.annotation) for path in _all_paths(kind)]
        paths += [f"{name}.{path}" for path in inner] or [name]
    return paths


def _close_literal(detail: Any) -> str:
    if detail["type"] != "literal_error":
        return ""
    choices = [choice.strip("' ") for choice in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
    match = nearest(detail["input"], choices) if isinstance(detail["input"], str) else None
    return f"; did you mean {match!r}?" if match else ""


def _description(config_class: type[Section], loc: Loc) -> str:
    if isinstance(loc[-1], int):
        return "; the list is too short"
    text = _at(config_class, loc[:-1]).model_fields[loc[-1]].description
    return f"; it is: {text}" if text else ""


# --------------------------------------------------------------- from pydantic's places to the document's own


def _path(config_class: type[Section], loc: Loc) -> str:
    """Return the JSON path: pydantic's place without the names of the kinds that it tried."""
    parts = [part for part, (is_kind, _) in zip(loc, _walk(config_class, loc), strict=True) if not is_kind]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _fork(config_class: type[Section], loc: Loc) -> Loc:
    """Return the place up to where a value may be of several kinds; all of it where there is no choice."""
    return next((loc[:index] for index, (is_kind, _) in enumerate(_walk(config_class, loc)) if is_kind), loc)


def _at(config_class: type[Section], loc: Loc) -> Any:
    """Return the type that stands at a place, null aside."""
    annotation = _walk(config_class, loc)[-1][1] if loc else config_class
    kinds = _kinds(annotation)
    return kinds[0] if len(kinds) == 1 else annotation


def _walk(annotation: Any, loc: Loc) -> list[tuple[bool, Any]]:
    """Return for each part of a place whether it names a kind instead of a key, and the type that stands there."""
    steps = []
    for part in loc:
        kinds = _kinds(annotation)
        if len(kinds) > 1:
            annotation = next((kind for kind in kinds if _is_called(kind, str(part))), None)
        else:
            annotation = _inner(kinds[0], part)
        steps.append((len(kinds) > 1, annotation))
    return steps


def _kinds(annotation: Any) -> list[Any]:
    """List the types that a value may be of, null aside."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) if part is not NoneType for kind in _kinds(part)]
    return [annotation]


def _sections(annotation: Any) -> list[type[Section]]:
    return [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, Section)]


def _is_called(kind: Any, name: str) -> bool:
    """Tell whether pydantic calls a kind so: by its tag, its class, or as in `dict[str,int]`."""
    if isinstance(kind, type) and issubclass(kind, Section) and _tag(kind)[1] == name:
        return True
    return (get_origin(kind) or kind).__name__.lower() == name.partition("[")[0].lower()


def _tag(section: type[Section]) -> tuple[str, str]:
    """Return the key that tells a section from others in its place, and its value there: backbone, rnn."""
    for name, field in section.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return name, str(get_args(field.annotation)[0])
    return "", ""


def _inner(kind: Any, part: int | str) -> Any:
    """Return the type of a section's field, a list's element or an object's value; None where there is none."""
    if isinstance(kind, type) and issubclass(kind, Section):
        field = kind.model_fields.get(str(part))
        return field.annotation if field else None
    arguments = get_args(kind)
    if get_origin(kind) is tuple and isinstance(part, int):
        return arguments[0] if arguments[-1] is Ellipsis else arguments[part]
    return arguments[-1] if get_origin(kind) is dict else None
