"""Every example in a docstring runs."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import hf_guidance

MODULES = ["hf_guidance", *(module.name for module in pkgutil.walk_packages(hf_guidance.__path__, "hf_guidance."))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_there_are_examples_and_a_wrong_one_would_be_found() -> None:
    examples = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(len(test.examples) for tests in examples for test in tests) > 0
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1


FILES = sorted(Path(hf_guidance.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FILES[0].parent)))
def test_docstrings_are_sentences_that_begin_with_a_verb_or_a_noun(path: Path) -> None:
    kinds = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    for text in filter(None, map(ast.get_docstring, nodes)):
        assert not text.startswith(("What ", "Whether ")), text
        assert "``" not in text, text
        assert text.split("\n\n")[0].rstrip().endswith((".", ":", "?", "»")), text
