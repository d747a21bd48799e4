"""Running a recipe as a user does, here or in processes of its own."""

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "recipes" / "accelerate"


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
        """Run in this process; what stands in results.json."""
        monkeypatch.setattr(sys, "argv", [str(self.path), *self.flags(folder, **options)])
        runpy.run_path(str(self.path), run_name="__main__")
        return json.loads((folder / "results.json").read_text())

    def launch(self, folder, *launcher, env=None, **options):
        """Start by accelerate, as a process group of its own."""
        # a shell that runs the tests in the background has them ignore Ctrl-C, and what they start after them
        interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
        port = ["--main_process_port", "0"] if "--multi_gpu" in launcher else []  # any free one
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *port, str(self.path)]
        try:
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
