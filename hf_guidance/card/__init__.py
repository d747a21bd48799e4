"""Model cards: from facts, which are plain values, to markdown and metadata.

Nothing here knows a trainer. `rendering` fills the template from the sections. `facts` are those of the data.
`redaction` removes private values.
"""

from hf_guidance.card.command import published_command
from hf_guidance.card.contents import RunFacts
from hf_guidance.card.facts import (
    EXAMPLES,
    HUB_ID,
    Facts,
    Processing,
    Rows,
    example_of,
    known,
    processing_facts,
    rows_facts,
    task_facts,
)
from hf_guidance.card.redaction import scrub_arguments, scrub_state
from hf_guidance.card.rendering import render
from hf_guidance.card.settings_redaction import scrub_settings

__all__ = [
    "EXAMPLES",
    "HUB_ID",
    "Facts",
    "Processing",
    "Rows",
    "RunFacts",
    "example_of",
    "known",
    "processing_facts",
    "published_command",
    "render",
    "rows_facts",
    "scrub_arguments",
    "scrub_settings",
    "scrub_state",
    "task_facts",
]
