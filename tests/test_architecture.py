"""The house rules that a linter cannot say: sizes, names, docstrings on modules, one class in the entry."""

import ast
import statistics
from pathlib import Path

import pytest

FILES = sorted(path for top in ("handler", "training", "serving") for path in Path(top).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
BANNED = {"utils", "helpers", "common", "base"}


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return lines - ((first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_fits_in_one_reading(path: Path) -> None:
    limit = 180 if path.parts[0] == "handler" else 260
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_says_what_it_is(path: Path) -> None:
    assert path.stem not in BANNED
    assert ast.get_docstring(TREES[path]), "a module begins with what it is"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_are_short(path: Path) -> None:
    assert {f.name: length(f) for f in functions(TREES[path]) if length(f) > 40} == {}


def test_most_functions_are_very_short() -> None:
    assert statistics.median(length(f) for tree in TREES.values() for f in functions(tree)) <= 10


def test_the_entry_has_one_class_as_torchserve_demands() -> None:
    tree = TREES[Path("handler/student_handler.py")]
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["StudentHandler"]


def test_only_command_lines_print() -> None:
    for path, tree in TREES.items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        printed = [call for call in calls if getattr(call.func, "id", "") == "print"]
        assert not printed or path.name in ("__main__.py", "replay.py"), path
