"""Every module with public functions or classes has a test file of its own name, in the room of its name."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import hf_guidance

PACKAGE, TESTS = Path(hf_guidance.__file__).parent, Path(__file__).parent


def public(path: Path) -> set[str]:
    """Return the names of the functions and classes that a file defines for others."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}
    return {name for name in names if not name.startswith("_")}


def mirror_of(path: Path) -> Path:
    """Return the test file of a module."""
    return TESTS / path.relative_to(PACKAGE).parent / f"test_{path.name}"


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.startswith("__") and public(path)]


def mirrors(path: Path, text: str) -> bool:
    """Tell whether a file has tests, and imports the module or what it offers, or names it in code for a process."""
    tree, module = ast.parse(text), ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_guidance"):
            names = {alias.name for alias in node.names}
            used |= names | {str(node.module)} | {f"{node.module}.{name}" for name in names}
        elif isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used |= {word for word in node.value.split() if word.startswith("hf_guidance.")}
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return bool(tests) and bool(used & {module, *public(path)})


def test_the_modules_are_found() -> None:
    assert PACKAGE / "guide" / "freezing.py" in MODULES
    assert len(MODULES) > 80


def test_an_empty_file_or_one_of_something_else_would_not_do() -> None:
    path = PACKAGE / "guide" / "freezing.py"
    assert not mirrors(path, "")
    assert not mirrors(path, "from hf_guidance.guide.freezing import freeze")
    test = "\n\ndef test_something():\n    assert freeze(guide) is guide"
    assert not mirrors(path, test)
    assert not mirrors(path, "from hf_guidance.guide.loading import load_guide" + test)
    for line in ("from hf_guidance.guide.freezing import freeze", "from hf_guidance.guide import freezing"):
        assert mirrors(path, line + test)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_has_a_test_file_of_its_own_name(path: Path) -> None:
    there = mirror_of(path)
    assert there.is_file(), f"{there.relative_to(TESTS.parent)} is missing: it tests {', '.join(sorted(public(path)))}"
    assert mirrors(path, there.read_text()), f"{there.relative_to(TESTS.parent)} tests nothing of {path.stem}"


def test_no_two_test_files_have_one_name() -> None:
    """Without packages among the tests, pytest imports only the first of them."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
