"""Errors in words for the user of a recipe, told in one line and once; any other error keeps its traceback."""

from __future__ import annotations

import dis
import os
import sys
import time
from pathlib import Path
from types import TracebackType

PACKAGE = str(Path(__file__).parents[1])
WAIT = 5.0  # seconds in which the launcher ends the other processes, after that of rank 0 has told the error


def tell_in_one_line() -> None:
    """Let an uncaught error that this package or the recipe words itself end the process with one line, and code 1.

    Of several processes with the same error the first one tells it.
    """
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not is_for_the_user(error):
            before(kind, error, trace)
            return
        if os.environ.get("RANK", "0") != "0":
            time.sleep(WAIT)  # an error of this process alone is told after it
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

    sys.excepthook = tell


def is_for_the_user(error: BaseException) -> bool:
    """Tell whether an error comes from a `raise` of this package or of the recipe, so that its words are for users."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, AssertionError):
        return False
    code = trace.tb_frame.f_code
    own = code.co_filename.startswith(PACKAGE) or code.co_filename == getattr(sys.modules["__main__"], "__file__", "")
    return own and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
