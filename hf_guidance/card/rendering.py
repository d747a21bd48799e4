"""Rendering of a guided target's model card from the facts of its training run. Nothing unmeasured is shown."""

from __future__ import annotations

import json
import math
import re
import shlex
from importlib.resources import files
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FunctionLoader, StrictUndefined

from hf_guidance.card import guidance_sections, result_sections
from hf_guidance.card.contents import RunFacts
from hf_guidance.card.facts import HUB_ID
from hf_guidance.card.markdown import code, count, escape
from hf_guidance.card.redaction import scrub

IMAGE_SIZE = 224  # of an example, where the network's own is not known
PAPER = "arxiv:2410.20035"  # the tag by which the Hub links a paper
# class of the target → (Auto class, the Hub's name of the task)
USES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


def render(facts: RunFacts) -> str:
    """Render the card as markdown, with its metadata in front. A section without facts is left out.

    Args:
        facts: JSON values, as `run_facts` makes them. Texts in them are escaped, and tokens and paths are removed.

    Returns:
        The card.
    """
    command = facts.get("command")
    facts = scrub(facts)
    if command:  # a command is words, not prose
        facts["command"] = shlex.join(map(scrub, shlex.split(command)))
    if not HUB_ID.fullmatch(facts.get("repository") or ""):
        facts.pop("repository", None)
    page = _page()
    text = page.get_template("model_card.md.jinja").render(
        {name: {} for name in RunFacts.__annotations__}
        | facts
        | {
            "metadata": _metadata(facts),
            "usage": _usage(facts, page),
            "tables": _tables(facts),
            "guide_is_on_the_hub": guidance_sections.on_the_hub(facts),
            "a_layer_was_skipped": guidance_sections.a_layer_was_skipped(facts),
            "command_lines": result_sections.command_lines(facts),
        }
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _page() -> Environment:
    """Make the environment of the templates, with the filters that put a value into words or escape it."""
    places = FunctionLoader(lambda name: files("hf_guidance.card").joinpath(name).read_text("utf-8"))
    page = Environment(loader=places, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    page.filters |= {
        "md": escape,
        "count": count,
        "article": guidance_sections.article,
        "network_name": guidance_sections.network_name,
        "paragraph": lambda text: " ".join(text.split()) + "\n",
    }
    return page


def _use(facts: RunFacts) -> tuple[str, str] | None:
    name = facts["target"]["architecture"]
    return next((use for ending, use in USES.items() if name.endswith(ending)), None)


def _metadata(facts: RunFacts) -> str:
    guide, use, data = facts.get("guide"), _use(facts), facts.get("data", {})
    tags = ["hf_guidance", *(["guidance", PAPER] if guide else []), *([use[1]] if use else []), *facts.get("tags", [])]
    results = [
        EvalResult(
            task_type=use[1] if use else "other",
            dataset_type=data.get("id") or data["name"],
            dataset_name=data["name"],
            dataset_split=facts["results"]["split"],
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in facts.get("results", {}).get("values", {}).items()
        if data.get("name") and math.isfinite(value)
    ]
    extra: dict[str, Any] = {}
    if guide and guidance_sections.on_the_hub(facts):
        extra = {"guide": guide["source"], "guide_revision": guide["revision"]}
    values = facts.get("results", {}).get("values", {})
    if math.isfinite(facts.get("emissions") or 0) and facts.get("emissions"):
        extra["co2_eq_emissions"] = {"emissions": facts["emissions"], "source": "codecarbon"}
    content = ModelCardData(
        license=facts.get("license"),
        language=facts.get("language"),
        library_name="transformers",
        pipeline_tag=use[1] if use else None,
        base_model=facts["target"].get("source"),
        tags=list(dict.fromkeys(tags)),
        datasets=[data["id"]] if data.get("id") else None,
        metrics=[name for name, value in values.items() if math.isfinite(value)] or None,
        model_name=facts["name"] if results else None,
        eval_results=results or None,
        **extra,
    )
    return content.to_yaml()


def _usage(facts: RunFacts, page: Environment) -> str:
    """Format the code that loads the network and runs it once."""
    use, place = _use(facts), facts.get("repository") or facts.get("folder") or "."
    example = facts.get("example") or {}
    known_class = facts["target"]["architecture"] if hasattr(transformers, facts["target"]["architecture"]) else None
    lines = page.get_template("usage.md.jinja").render(
        auto_class=use[0] if use else known_class,
        architecture=facts["target"]["architecture"],
        task=use[1] if use else None,
        on_hub="repository" in facts,
        has_processor=bool(example) if not use or use[1] != "image-classification" else _has_images(facts),
        size=facts["target"].get("sizes", {}).get("image size") or IMAGE_SIZE,
        place=json.dumps(place, ensure_ascii=False),
        trust=", trust_remote_code=True" if facts["target"].get("own_code") else "",
        text=json.dumps(example.get("text"), ensure_ascii=False),
        each_position=example.get("copies", False),
    )
    return code("python", lines.strip())


def _has_images(facts: RunFacts) -> bool:
    return "normalised by" in facts.get("data", {})


def _tables(facts: RunFacts) -> dict[str, str]:
    own = {
        "networks": guidance_sections.networks(facts),
        "guidance": guidance_sections.guidance(facts),
        "pairs": guidance_sections.pairs(facts),
        "results": result_sections.results(facts),
    }
    sections: tuple[result_sections.Section, ...] = ("training", "cost", "data")
    return own | {name: result_sections.values(facts, name) for name in sections}
