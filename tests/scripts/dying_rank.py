"""Guided training on two processes, the second of which dies in its second step; `test_trouble.py` judges.

accelerate launch --config_file recipes/accelerate/cpu.yaml tests/scripts/dying_rank.py <folder> raise|kill
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from builders import gpt2, llama
from trainers import make_trainer
from transformers import TrainerCallback


class Die(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            Path(args.output_dir, "died").write_text(str(time.time()))
            if sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the second rank has had enough")


if __name__ == "__main__":
    settings = {"max_steps": 10**6, "ddp_find_unused_parameters": False, "logging_steps": 10**6}
    make_trainer(Path(sys.argv[1]), gpt2(), llama(), callbacks=[Die()], **settings).train()
