"""Launches both recipes again and again on two CPU processes and counts the exit codes.

python tests/scripts/exit_codes.py <folder> --times 10
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from images import imagenet_files, write
from launching import CONFIGS, Recipe

TINY = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 16}
TINY |= {"runs": ["alone", "untrained_guide"], "use_cpu": True}
IMAGES = {"streaming": True, "image_size": 16, "width": 16, "depth": 4, "guide": "timm/resnet10t", "eval_size": 8}
IMAGES |= {"untrained_guide": True, "dataloader_num_workers": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=10)
    given = parser.parse_args()
    given.folder = given.folder.resolve()  # the launches have folders of their own
    dataset = write(given.folder / "imagenet", imagenet_files(train=96))
    text = Recipe("rnn_vs_transformer", {**TINY, "eval_size": 32})
    images = Recipe("fcn_vs_resnet", {**TINY, **IMAGES, "dataset": dataset})
    failed = 0
    for name, recipe in (("text", text), ("streamed images", images)):
        codes: collections.Counter[int] = collections.Counter()
        for number in range(given.times):
            process = recipe.launch(given.folder / f"{name}-{number}", "--config_file", str(CONFIGS / "cpu.yaml"))
            printed, _ = process.communicate(timeout=600)
            codes[process.returncode] += 1
            if process.returncode:
                print(printed[-3000:])
        failed += given.times - codes[0]
        print(f"{name}: exit code 0 in {codes[0]} of {given.times} launches; {dict(codes)}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
