"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

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
