"""The model card: from facts, which are plain values, to markdown and metadata.

It knows no trainer. `rendering` fills the template from the sections, `facts` are those of the data, and `redaction`
takes out what must not leave the machine.
"""

from hf_guidance.card.rendering import render

__all__ = ["render"]
