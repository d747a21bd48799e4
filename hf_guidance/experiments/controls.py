"""The matched runs for which a user's function makes trainers: alone, guided, and guided as a control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import Trainer

from hf_guidance.config import GuidanceConfig

ALONE, GUIDED = "alone", "guided"
CONTROLS: dict[str, dict[str, str]] = {
    "shuffled_guide": {"guide_input": "shuffled"},
    "reversed_layers": {"layer_mapping": "reversed"},
    "noise_guide": {"guide_input": "noise"},
}


@dataclass(frozen=True)
class MatchedRun:
    """One of the matched runs, for which a trainer is asked.

    Attributes:
        name: Name of its row in the table.
        seed: Seed; pass it to `TrainingArguments`. It is set before the trainer is made, so that weights follow it.
        guided: Whether the run has a guide.
        output_dir: Folder for `TrainingArguments`.
        max_steps: Steps of a run that is longer than the others; None for the usual ones.
        control: Name of the control; None if it is none.
    """

    name: str
    seed: int
    guided: bool
    output_dir: str
    max_steps: int | None = None
    control: str | None = None

    def guidance(self, config: GuidanceConfig) -> GuidanceConfig:
        """Return the setting for this run: with the fields of its control, or without guidance.

        Args:
            config: The setting of the guided run.

        Raises:
            ValueError: If the control does not go with the setting.
        """
        if not self.guided:
            return GuidanceConfig(guidance_weight=0.0, on_non_finite=config.on_non_finite)
        if self.control == "reversed_layers" and config.layer_pairs is not None:
            raise ValueError(
                "the control reversed_layers reverses the mapping of layers, but layer_pairs names the pairs: leave "
                "one of the two out."
            )
        fields: dict[str, Any] = dict(CONTROLS[self.control]) if self.control else {}
        return replace(config, **fields)


def check_follows(trainer: Any, run: MatchedRun) -> None:
    """Raise ValueError if a trainer is not that of its run."""
    what = f"make_trainer, for the run {run.name!r} of seed {run.seed}, returned"
    if not isinstance(trainer, Trainer):
        raise ValueError(f"{what} a {type(trainer).__name__}; expected a Trainer.")
    if getattr(trainer, "guide", None) is None if run.guided else getattr(trainer, "guide", None) is not None:
        wanted = (
            "a guide: pass one where run.guided is true"
            if run.guided
            else "no guide: pass None where run.guided is false"
        )
        raise ValueError(f"{what} a trainer with{'out' if run.guided else ''} a guide; expected {wanted}.")
    if trainer.eval_dataset is None:
        raise ValueError(f"{what} a trainer without eval_dataset, by which runs are compared: pass one.")
    asked = {"output_dir": run.output_dir, "seed": run.seed}
    if run.max_steps is not None:
        asked["max_steps"] = run.max_steps
    for name, value in asked.items():
        if (given := getattr(trainer.args, name)) != value:
            raise ValueError(
                f"{what} a trainer with {name}={given!r}; expected {value!r}: pass {name}=run.{name} to "
                "TrainingArguments" + (" where it is not None." if name == "max_steps" else ".")
            )
    guidance: Any = getattr(trainer, "guidance", None)
    for name, value in CONTROLS.get(run.control or "", {}).items():
        if getattr(guidance, name) != value:
            raise ValueError(
                f"{what} a trainer with {name}={getattr(guidance, name)!r}; expected {value!r}: pass "
                "guidance=run.guidance(config)."
            )
