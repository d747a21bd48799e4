"""The words of the command line, and the command they ask for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_guidance.commands import comparing, inspecting, listing

DESCRIPTION = """\
compare A B --data D    similarity of all layers of two networks over a dataset
inspect TARGET GUIDE --data D
                        guidance measured over some batches, and a setting proposed
layers MODEL            what of a network can be compared, with shapes

A network is a Hub id, a folder, or timm/<architecture>.
"""
ERRORS = (ValueError, OSError, ImportError)  # whose words are for the user


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: The command line without the program; None for that of this process.

    Returns:
        The exit status: 0; 1 after an error, which is told in one line; 130 after an interrupt.
    """
    parser = argparse.ArgumentParser(
        prog="hf-guidance", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    comparing.add_command(commands)
    inspecting.add_command(commands)
    listing.add_command(commands)
    given = parser.parse_args(words)
    try:
        given.run(given)
    except ERRORS as error:
        print(f"hf-guidance {given.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return 0
