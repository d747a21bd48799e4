"""The look at the first batch in the recipes' own settings: printed once a guided run, with nothing to warn of."""

import logging

import pytest
from launching import Recipe, trains_parity

from hf_guidance.trainer import first_look

TINY = {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "eval_size": 64, "use_cpu": True, "runs": ["untrained_guide"]}
TEXT, IMAGES = Recipe("rnn_vs_transformer", TINY), Recipe("fcn_vs_resnet", TINY)
SETTINGS = {
    "copy-paste": (TEXT, {"task": "copy_paste"}),
    "copy-paste, trained guide": (TEXT, {"guide_max_steps": 1, "runs": ["guide_itself", "trained_guide"]}),
    "parity": (TEXT, {"task": "parity"}),
    "language modelling": (TEXT, {"task": "language_modeling"}),
    "deep FCN": (IMAGES, {"target": "deep_fcn", "measure": "debiased_cka"}),  # ridge on rows is full from the start
    "wide FCN": (IMAGES, {"target": "wide_fcn", "measure": "debiased_cka"}),
}


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        pytest.param(*setting, id=name, marks=trains_parity if name == "parity" else ())
        for name, setting in SETTINGS.items()
    ],
)
def test_the_settings_of_a_recipe_start_well(recipe, options, tmp_path, monkeypatch, capsys, caplog):
    if options.get("task") == "language_modeling":
        text = tmp_path / "text.txt"
        text.write_text("".join(f"the {n} quick brown foxes jump over {n * n % 97} lazy dogs\n" for n in range(4000)))
        options = {**options, "text_files": [text]}
    caplog.set_level(logging.WARNING, first_look.__name__)
    recipe.run_here(monkeypatch, tmp_path / "out", **options)
    printed = capsys.readouterr().out
    assert printed.count("Guidance on the first batch: ") == 1
    assert ", in the weights that it reaches: not" not in printed
    assert [r.getMessage() for r in caplog.records if r.name == first_look.__name__] == []


def test_in_sample_ridge_on_rows_is_said_to_be_full(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, first_look.__name__)
    IMAGES.run_here(monkeypatch, tmp_path / "out", target="wide_fcn", measure="ridge")
    (words,) = [r.getMessage() for r in caplog.records if r.name == first_look.__name__]
    assert words.startswith("ridge starts at 0.9")
