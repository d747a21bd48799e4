"""Speed of the recipe's loader beside a plain loop of the same operations; see CONTRIBUTING.md."""

import io
import time
from itertools import islice

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as T
from images import parquet, write
from torch.utils.data import DataLoader, Dataset

from hf_guidance.tasks import image_classification
from hf_guidance.tasks.image_decoding import PixelFormat

TARGET = PixelFormat(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GUIDE = PixelFormat(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
COUNT, BATCH, ROUNDS = 512, 64, 5


def photograph(number):
    """A JPEG of ImageNet's mean size in pixels and about its mean size in bytes."""
    generator = np.random.default_rng(number)
    coarse = PIL.Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
    noisy = np.asarray(coarse).astype(int) + generator.normal(scale=18, size=(375, 500, 3)).astype(int)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


class PlainLoop(Dataset):
    """The operations alone, on files in memory, which are gone through again and again."""

    def __init__(self, files):
        self.files = files
        self.crop = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor()])
        self.normalise = [T.Normalize(list(form.mean), list(form.std)) for form in (TARGET, GUIDE)]

    def __len__(self):
        return 1000 * len(self.files)

    def __getitem__(self, index):
        pixels = self.crop(PIL.Image.open(io.BytesIO(self.files[index % len(self.files)])).convert("RGB"))
        return {"pixel_values": self.normalise[0](pixels), "guide_pixel_values": self.normalise[1](pixels), "labels": 0}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_streaming_loader_reaches_nine_tenths_of_a_plain_loop(workers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    files = [photograph(number) for number in range(COUNT)]
    rows = [{"image": {"bytes": file, "path": f"{i}.JPEG"}, "label": i} for i, file in enumerate(files)]
    names = [f"data/train-{i:05d}-of-00008.parquet" for i in range(8)] + ["data/validation-00000-of-00001.parquet"]
    folder = write(tmp_path, {name: parquet(rows[i % 8 :: 8]) for i, name in enumerate(names)})
    task = image_classification(
        folder, streaming=True, target=TARGET, guide=GUIDE, augmentation="crop_flip", shuffle_buffer=64, eval_size=2
    )
    options = {"batch_size": BATCH, "num_workers": workers}
    loaders = {
        "plain loop": DataLoader(PlainLoop(files), **options),
        "recipe": DataLoader(task.train_dataset, collate_fn=task.data_collator, **options),
    }
    clock = time.perf_counter if workers else time.process_time
    seconds = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            batches = iter(loader)
            for batch in islice(batches, COUNT // BATCH):  # starts workers and fills buffers
                assert batch["pixel_values"].shape == batch["guide_pixel_values"].shape == (BATCH, 3, 224, 224)
            began = clock()
            count = sum(len(batch["labels"]) for batch in islice(batches, COUNT // BATCH))
            seconds[name].append(clock() - began)
            assert count == COUNT, "a stream that ended would be fast"
            del batches  # the workers of the other have the machine for themselves
    rates = {name: COUNT / min(times) for name, times in seconds.items()}
    ratio = rates["recipe"] / rates["plain loop"]
    kilobytes = sum(map(len, files)) / COUNT / 1000
    with capsys.disabled():
        print(f"\n{workers} workers, images of {kilobytes:.0f} kB: ", end="")
        print(", ".join(f"{name} {rate:.0f} images/s" for name, rate in rates.items()), f"ratio {ratio:.2f}")
    assert ratio >= 0.9


torch.set_num_threads(1)
