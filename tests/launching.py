"""Running a recipe as a user does, here or in processes of its own."""

import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import ModernBertConfig, Trainer

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "recipes" / "accelerate"


# earlier Trainers load the optimizer's state to the device `cpu:0` there, which torch does not know
resumes_on_several_cpus = pytest.mark.skipif(
    "map_location = self.args.device if self.args.world_size > 1" in inspect.getsource(Trainer),
    reason="this Trainer does not resume on several CPU processes",
)


def _builds_parity() -> bool:
    try:
        ModernBertConfig(num_hidden_layers=1)
    except StrictDataclassFieldValidationError:
        return False
    return True


trains_parity = pytest.mark.skipif(not _builds_parity(), reason="this transformers has no ModernBERT of one layer")


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Leave what runs or starts in this context one CPU, another one in each worker of pytest-xdist.

    A recipe takes a thread for every CPU that it may use. Several workers would then have more threads than there are
    CPUs, which wait for each other most of the time.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    worker, before = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_processes(script: Path, folder: Path, *arguments: object, suffix: str = "pt") -> list[Path]:
    """Run a script of tests/scripts in two processes on CPUs, and return the file `rank<n>` that each wrote.

    The exit status says nothing: gloo may abort after success.
    """
    tests = REPOSITORY / "tests"
    paths = os.pathsep.join(map(str, (tests, tests / "trainer", REPOSITORY, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command = [*launch, *map(str, arguments), str(folder), "--use_cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    files = [folder / f"rank{rank}.{suffix}" for rank in (0, 1)]
    if not all(file.exists() for file in files):
        pytest.fail(f"the launch left {sorted(f.name for f in folder.iterdir())}:\n{done.stdout}\n{done.stderr}")
    return files


class Recipe:
    """One recipe, in a size of seconds.

    Args:
        name: of its file.
        tiny: flags that make it small.
    """

    def __init__(self, name, tiny):
        self.path, self.tiny = REPOSITORY / "recipes" / f"{name}.py", tiny

    def flags(self, folder, **options):
        words = []
        given = {**self.tiny, "output_dir": folder, **options}
        for name, value in ((name, value) for name, value in given.items() if value != []):  # an empty list: left out
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    def run_here(self, monkeypatch, folder, **options):
        """Run in this process, and return the content of results.json, if the recipe writes one."""
        monkeypatch.setattr(sys, "argv", [str(self.path), *self.flags(folder, **options)])
        with on_one_cpu():
            runpy.run_path(str(self.path), run_name="__main__")
        results = folder / "results.json"
        return json.loads(results.read_text()) if results.is_file() else None

    def launch(self, folder, *launcher, env=None, **options):
        """Start by accelerate, as a process group of its own; on one CPU if it is to be one process."""
        # a shell that runs the tests in the background has them ignore Ctrl-C, and what they start after them
        interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
        port = ["--main_process_port", "0"] if "--multi_gpu" in launcher else []  # any free one
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *port, str(self.path)]
        try:
            with nullcontext() if launcher else on_one_cpu():
                return subprocess.Popen(
                    [*command, *self.flags(folder, **options)],
                    cwd=folder.parent,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
        finally:
            signal.signal(signal.SIGINT, interrupts)
