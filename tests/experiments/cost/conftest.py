"""A guide, and one measured cost, for all tests of this folder."""

import pytest
from builders import arguments
from costs import CONVS, fcn

from hf_guidance import load_guide
from hf_guidance.experiments.cost.measuring import Plan, measure_cost
from hf_guidance.experiments.cost.random_rows import random_images


@pytest.fixture(scope="package")
def resnet():
    return load_guide("timm/resnet10t", untrained=True)


@pytest.fixture(scope="package")
def measured(tmp_path_factory, resnet):
    args = arguments(tmp_path_factory.mktemp("cost"))
    plan = Plan(rounds=2, steps=2, arithmetic=True)
    return measure_cost(fcn(), resnet, random_images(8, 32, 4), args, CONVS, plan)
