"""The guide: loaded or built, frozen, told from others, shown a batch and run on it.

`loading` and `rebuilding` make one, `source` says what it may be read from, `inputs` and `forward` run it, and `cache`
keeps what it showed.
"""

from hf_guidance.guide.loading import load_guide, untrained_network
from hf_guidance.guide.rebuilding import load_guide_of

__all__ = ["load_guide", "load_guide_of", "untrained_network"]
