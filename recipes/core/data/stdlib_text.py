"""Real English text that is on every machine: the language reference and the docstrings inside Python itself."""

import ast
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_files() -> list[Path]:
    """List the source files of the standard library's modules, sorted, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
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


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, str]]:
    if docstring := ast.get_docstring(node):
        kinds = {ast.Module: "module", ast.ClassDef: "class"}
        yield docstring, kinds.get(type(node), "function")
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)


def _parse(path: Path) -> ast.Module | None:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold escapes that newer Pythons frown upon
            return ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):  # some are broken on purpose, templates of lib2to3 for one
        return None
