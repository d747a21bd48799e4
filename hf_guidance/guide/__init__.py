"""The guide: loaded or built, frozen, identified, fed and run.

`loading` and `rebuilding` make a guide. `source` restricts what it is read from. `inputs` and `forward` run it, and
`cache` stores its features.
"""

from hf_guidance.guide.loading import load_guide, untrained_network
from hf_guidance.guide.rebuilding import load_guide_of

__all__ = ["load_guide", "load_guide_of", "untrained_network"]
