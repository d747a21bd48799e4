"""Walk with a batch: the files that a guided step passes, from `GuidanceLoss.watch` to the logged number.

    python tests/scripts/walk.py

It counts the files in which a function runs in the second step of a tiny run, and the stops: each change of file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import gpt2, llama
from trainers import make_trainer
from transformers import Trainer

import hf_guidance

PACKAGE = Path(hf_guidance.__file__).parent


def walk(**settings: Any) -> tuple[list[str], int]:
    """Return the files that the second guided step passes, in the order of the first visit, and the number of stops."""
    stops: list[str] = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)):
            name = os.path.relpath(file, PACKAGE)
            if not stops or stops[-1] != name:
                stops.append(name)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), gpt2(), llama(), max_steps=2, **settings)
        loss = trainer.guidance_loss
        watch, log = loss.watch, Trainer.log

        def begin(*args: Any, **place: Any) -> Any:
            if trainer.state.global_step == 1:
                sys.setprofile(look)
            return watch(*args, **place)

        def end(*args: Any) -> None:
            sys.setprofile(None)
            log(*args)

        with patch.object(loss, "watch", begin), patch.object(Trainer, "log", end):
            trainer.train()
    return list(dict.fromkeys(stops)), len(stops)


if __name__ == "__main__":
    for measure, axis in product(("auto", "linear_cka"), ("sequence", "token")):
        files, stops = walk(measure=measure, sample_axis=axis)
        print(f"{measure}, {axis}: {len(files)} files, {stops} stops")
        print("  " + " → ".join(files))
