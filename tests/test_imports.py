"""Who may import whom: the house's table, held by reading the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("recipes", "launcher", "tools", "ds_configs", "slurm")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/__init__.py") if path.parent.name != "core")
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "pyarrow", "safetensors")


def imported(path: Path) -> set[str]:
    """Return the full names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden(path: Path) -> list[str]:
    """Return the packages that a file of this place must not import."""
    folder, *inner = path.parts
    recipes = [f"bigbatch.recipes.{name}" for name in RECIPES if name not in inner]
    return {
        "ds_configs": ["bigbatch"],
        "slurm": ["bigbatch"],
        "recipes": ["bigbatch.launcher", "bigbatch.tools", *recipes],
        "launcher": ["bigbatch.tools", *recipes, *HEAVY],
        "tools": ["bigbatch.launcher"],
    }[folder]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_place_allows(path):
    for name in imported(path):
        assert not [package for package in forbidden(path) if f"{name}.".startswith(f"{package}.")], name
        # No top-level package of ours exists beside the namespace.
        assert name.split(".")[0] not in FOLDERS


def test_the_run_documents_need_nothing_but_pydantic():
    for path in (Path("recipes/core/config.py"), *(Path("recipes", name, "config.py") for name in RECIPES)):
        outside = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
        assert outside <= {"pydantic", "bigbatch"}, path


def test_the_launcher_loads_without_torch_even_through_others():
    modules = [f"bigbatch.launcher.{path.stem}" for path in FILES if path.parts[0] == "launcher"]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
