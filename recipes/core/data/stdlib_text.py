"""Real English text that is on every machine: the language reference and the docstrings inside Python itself."""

import ast
import hashlib
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core.data.clean import units

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}

QUESTION_COLUMNS = ("id", "kind", "question", "context", "answers")
DIALOGUE_COLUMNS = ("id", "messages")
SUMMARY_COLUMNS = ("id", "document", "summary")
FUNCTION_COLUMNS = ("summary", "function")
MODULE_COLUMNS = ("id", "text")
IMPORT_COLUMNS = ("file", "history", "item")
LONGEST_DESCRIPTION = 500  # characters of a function's, behind its summary
LONGEST_SIGNATURE = 300  # characters
MOST_PARAMETERS = 4  # asked about, of a function
FEWEST_SENTENCES, MOST_SENTENCES, FEWEST_WORDS = 3, 12, 3  # of a docstring, and of its summary line
_RETURN = re.compile(r"\breturn(?:s|ing)?\s+(?P<what>[^.,;:]+)", re.IGNORECASE)


def stdlib_files() -> list[Path]:
    """List the source files of the standard library's modules, sorted, without its tests."""
    root = _root()
    files = []
    for name in sorted(sys.stdlib_module_names):
        module, package = root / f"{name}.py", root / name
        files += [module] if module.is_file() else sorted(package.rglob("*.py"))
    return [path for path in files if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]


def stdlib_documents(path: Path) -> Iterator[str]:
    """Yield all docstrings of a file as one document; of the language reference, each topic."""
    tree = _parse(path)
    if tree is None:
        return
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        topics = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
        yield from ast.literal_eval(topics[0]).values()
        return
    if text := "\n\n".join(docstring for docstring, _ in _docstrings(tree)):
        yield text


def stdlib_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each docstring of a file, and what it describes: module, class or function."""
    if tree := _parse(path):
        yield from _docstrings(tree)


def stdlib_questions(path: Path) -> Iterator[dict[str, Any]]:
    """Yield questions on each documented function of a file; the answers follow from what Python's parser sees.

    The context is the signature and the first paragraph of the docstring. What the default of each of the first
    parameters is, which parameter stands behind it, and what the function returns. Without an answer are those for a
    parameter that has no default, or none behind it, and where the paragraph says nothing of returning.
    """
    for found in documented_functions(path):
        context, parameters = f"{found.signature}\n{found.summary}", found.parameters
        returned = _RETURN.search(context, len(found.signature))
        asked = [("return", f"What does {found.name} return?", returned and returned.span("what"))]
        for (name, _, default), behind in zip(parameters[:MOST_PARAMETERS], [*parameters[1:], None], strict=False):
            asked.append(("default", f"What is the default of {name}?", default))
            asked.append(("behind", f"Which parameter stands behind {name}?", behind and behind[1]))
        for number, (kind, question, span) in enumerate(asked):
            answers = [{"start": span[0], "end": span[1]}] if span else []
            values = (f"{path.name}:{found.line}:{number}", kind, question, context, answers)
            yield dict(zip(QUESTION_COLUMNS, values, strict=True))


class Function(NamedTuple):
    """A function with a docstring, of two parameters or more beside `self`."""

    name: str
    line: int
    signature: str
    parameters: list[tuple[str, tuple[int, int], tuple[int, int] | None]]
    """Names, each with its characters in the signature and those of its default."""
    summary: str
    """The docstring's first paragraph."""


def documented_functions(path: Path) -> Iterator[Function]:
    """Yield the documented functions of a file whose signatures are neither trivial nor endless."""
    tree = _parse(path)
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not (docstring := ast.get_docstring(node)):
            continue
        signature, parameters = _signature(node)
        if len(parameters) < 2 or len(signature) > LONGEST_SIGNATURE:  # nothing to choose among, or too much
            continue
        yield Function(node.name, node.lineno, signature, parameters, " ".join(docstring.split(chr(10) * 2)[0].split()))


def stdlib_dialogues(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a dialogue about each documented function of a file: its purpose, then what its signature says."""
    tree = _parse(path)
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not (docstring := ast.get_docstring(node)):
            continue
        signature, parameters = _signature(node)
        purpose = " ".join(docstring.split(chr(10) * 2)[0].split())
        if not purpose or len(signature) > LONGEST_SIGNATURE or len(purpose) > LONGEST_SIGNATURE:
            continue
        names = [name for name, _, _ in parameters]
        listed = f"It takes {', '.join(names)}." if names else "It takes no parameters."
        turns = [(f"What does {signature} do?", purpose), ("Which parameters does it take?", listed)]
        if defaults := [(name, signature[slice(*span)]) for name, _, span in parameters if span]:
            name, value = defaults[0]
            turns.append((f"What is the default of {name}?", f"The default of {name} is {value}."))
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        yield {"id": f"{path.name}:{node.lineno}", "messages": messages}


def stdlib_summaries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the sentences of each longer docstring of a file, in an order that their texts decide, and its summary.

    The summary is the docstring's first sentence, which says what all of it is about (PEP 257).
    """
    tree = _parse(path)
    for number, (docstring, _) in enumerate(_docstrings(tree) if tree else ()):
        sentences = [" ".join(sentence.split()) for sentence in units(docstring, "sentence")]
        is_long = FEWEST_SENTENCES <= len(sentences) <= MOST_SENTENCES
        if is_long and len(sentences[0].split()) >= FEWEST_WORDS and not sentences[0].startswith(">>>"):
            shuffled = sorted(sentences, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())
            yield dict(zip(SUMMARY_COLUMNS, (f"{path.name}:{number}", shuffled, sentences[0]), strict=True))


def stdlib_functions(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each documented public function of a file: what it does in short, and its signature with the rest."""
    tree = _parse(path)
    module = ".".join(path.relative_to(_root()).with_suffix("").parts).removesuffix(".__init__")
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
        signature, _ = _signature(node)
        if len(summary.split()) > 2 and len(signature) <= LONGEST_SIGNATURE:
            described = f"{module}.{signature}\n{' '.join(rest.split())[:LONGEST_DESCRIPTION]}".strip()
            yield {"summary": " ".join(summary.split()), "function": described}


def stdlib_modules(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the module or package that a file is, unless it is a part of one: its name, and what its docstring says."""
    parts = path.relative_to(_root()).with_suffix("").parts
    if len(parts) == 1 or parts[1:] == ("__init__",):
        tree = _parse(path)
        summary = ((tree and ast.get_docstring(tree)) or "").partition("\n\n")[0]
        yield {"id": parts[0], "text": f"{parts[0]}\n{' '.join(summary.split())}".strip()}


def stdlib_imports(path: Path) -> Iterator[dict[str, Any]]:
    """Yield, for each module of `stdlib_modules` that a file imports, which others it imports besides, if any."""
    tree, root = _parse(path), _root()
    names = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
    inner = path.relative_to(root)
    names = sorted(name for name in names - {inner.parts[0], inner.stem} if _is_module(root, name))
    for item in names if len(names) > 1 else ():
        yield {"file": inner.as_posix(), "history": [name for name in names if name != item], "item": item}


def _is_module(root: Path, name: str) -> bool:
    """Tell whether `stdlib_modules` has it: sources leave empty files out."""
    paths = (root / f"{name}.py", root / name / "__init__.py")
    return name in sys.stdlib_module_names and any(path.is_file() and path.stat().st_size for path in paths)


def _signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
) -> tuple[str, list[tuple[str, tuple[int, int], tuple[int, int] | None]]]:
    """Return a function's signature, and each parameter's name with the characters of it and of its default."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip([*positional, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], strict=True))
    text, parameters = f"{node.name}(", []
    for number, (parameter, default) in enumerate(pairs):
        name = (len(text), len(text) + len(parameter.arg))
        text += parameter.arg
        span = None
        if default is not None:
            shown = ast.unparse(default)
            span = (len(text) + 1, len(text) + 1 + len(shown))
            text += f"={shown}"
        text += ", " if number + 1 < len(pairs) else ""
        if parameter.arg not in ("self", "cls"):
            parameters.append((parameter.arg, name, span))
    return f"{text})", parameters


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, str]]:
    if docstring := ast.get_docstring(node):
        kinds = {ast.Module: "module", ast.ClassDef: "class"}
        yield docstring, kinds.get(type(node), "function")
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _parse(path: Path) -> ast.Module | None:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold escapes that newer Pythons frown upon
            return ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):  # some are broken on purpose, templates of lib2to3 for one
        return None
