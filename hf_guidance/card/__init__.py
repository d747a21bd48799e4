"""Model cards: from facts, which are plain values, to markdown and metadata.

Nothing here knows a trainer. `rendering` fills the template from the sections. `facts` are those of the data.
`redaction` removes private values.
"""

from hf_guidance.card.rendering import render

__all__ = ["render"]
