"""Names and colours of runs."""

import pytest

from hf_guidance.analysis.runs import BY_MEANING, OTHERS, colours_of, label_of

TIMM = {"architecture": "TimmWrapperModel", "untrained": False, "config": {"architecture": "resnet18"}}


@pytest.mark.parametrize(
    ("name", "guide", "label"),
    [
        ("alone_equal_time", None, "alone equal time"),
        ("untrained_guide", {"architecture": "GPT2Model", "untrained": True}, "guided by an untrained GPT-2"),
        ("trained_guide_stopped", TIMM, "guided by a trained resnet18, stopped early"),
        ("trained_guide", TIMM | {"config": None}, "guided by a trained network of timm"),
        ("noise_guide", TIMM | {"untrained": True}, "guided by an untrained resnet18 that sees noise"),
        ("reversed_layers", TIMM, "guided by a trained resnet18, layers reversed"),
        ("trained_guide-measure_rsa", TIMM, "guided by a trained resnet18, measure rsa"),
    ],
)
def test_a_label_says_what_the_guide_is(name, guide, label):
    assert label_of({"run": name, "guide": guide}) == label


def test_a_run_has_one_colour_in_every_figure_and_no_two_have_the_same():
    names = ["alone", "untrained_guide", "own_architecture", "trained_guide"]
    colours = colours_of(names)
    assert colours["alone"] == BY_MEANING["alone"]
    assert colours_of(["trained_guide"])["trained_guide"] == colours["trained_guide"]
    assert len(set(colours.values())) == 4
    assert len(colours_of([f"guided-{i}" for i in range(3 * len(OTHERS))])) == 3 * len(OTHERS)
