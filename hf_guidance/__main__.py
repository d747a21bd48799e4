"""`python -m hf_guidance`, the same as `hf-guidance`."""

import sys

from hf_guidance.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
