"""Modules of the rooms that are mirrored have a test file of their own name, which imports them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_guidance

PACKAGE = Path(hf_guidance.__file__).parent
TESTS = Path(__file__).parent
MIRRORED = ("card", "analysis", "experiments")
MODULES = [
    path.relative_to(PACKAGE)
    for room in MIRRORED
    for path in sorted((PACKAGE / room).rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_a_test_file_of_its_name_that_imports_it(module: Path) -> None:
    text = (TESTS / module.parent / f"test_{module.name}").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    whole = ".".join(("hf_guidance", *module.with_suffix("").parts))
    assert any(name == whole or name.startswith(f"{whole}.") for name in names), names
    assert "def test_" in text
