"""Loads guides from a local Hub, and prints what came of each and what was unpickled: sources.py <id> …"""

import json
import sys

import torch

from hf_guidance import load_guide
from hf_guidance.guide.identity import IDENTITY

unpickled, load = [], torch.load


def spy(file, *args, **kwargs):
    unpickled.append(str(file))
    return load(file, *args, **kwargs)


torch.load = spy
said = {}
for name in sys.argv[1:]:
    try:
        guide = load_guide(name.removeprefix("untrained:"), untrained=name.startswith("untrained:"))
        said[name], said["commit"] = type(guide).__name__, getattr(guide, IDENTITY)["revision"]
    except Exception as error:
        said[name] = str(error) if isinstance(error, ValueError) else repr(error)
print("RESULT", json.dumps(said | {"unpickled": unpickled}))
