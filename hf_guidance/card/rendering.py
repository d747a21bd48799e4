"""Rendering of a guided target's model card from the facts of its training run. Nothing unmeasured is shown."""

from __future__ import annotations

import json
import math
import re
import shlex
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_guidance.card import guidance_sections, result_sections
from hf_guidance.card.contents import RunFacts
from hf_guidance.card.markdown import code, escape
from hf_guidance.card.redaction import scrub

# class of the target → (Auto class, the Hub's name of the task)
USES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}
LABEL = "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"
GENERATED = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
EACH_POSITION = "print(tokenizer.decode(model(**inputs).logits[0].argmax(-1)))"


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
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = environment.from_string(files("hf_guidance.card").joinpath("model_card.md.jinja").read_text("utf-8"))
    text = template.render({name: part(facts) for name, part in PARTS.items()})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _use(facts: RunFacts) -> tuple[str, str] | None:
    name = facts["target"]["architecture"]
    return next((use for ending, use in USES.items() if name.endswith(ending)), None)


def _metadata(facts: RunFacts) -> str:
    guide, use, data = facts.get("guide"), _use(facts), facts.get("data", {})
    tags = ["hf_guidance", *(["guidance"] if guide else []), *([use[1]] if use else []), *facts.get("tags", [])]
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
    if guide and guidance_sections.on_the_hub(guide):
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


def _usage(facts: RunFacts) -> str:
    use, place = _use(facts), facts.get("repository") or facts.get("folder")
    example = facts.get("example") or {}
    if use is None or not place or not (use[1] == "image-classification" or example):
        return ""
    own = ", trust_remote_code=True" if facts["target"].get("own_code") else ""
    load = f"{use[0]}.from_pretrained(name{own}).eval()"
    if use[1] == "image-classification":
        lines = [
            "from PIL import Image",
            f"from transformers import AutoImageProcessor, {use[0]}",
            "",
            f'name = "{place}"',
            "processor = AutoImageProcessor.from_pretrained(name)",
            f"model = {load}",
            'inputs = processor(Image.open("image.png"), return_tensors="pt")',
            LABEL,
        ]
        return code("python", "\n".join(lines))
    show = LABEL if use[1] == "text-classification" else EACH_POSITION if example.get("copies") else GENERATED
    text = json.dumps(example["text"], ensure_ascii=False)
    lines = [
        f"from transformers import {use[0]}, AutoTokenizer",
        "",
        f'name = "{place}"',
        f"tokenizer = AutoTokenizer.from_pretrained(name{own})",  # it reads the config, and would ask otherwise
        f"model = {load}",
        f"text = {text}",
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
        show,
    ]
    return code("python", "\n".join(lines))


def _loading(facts: RunFacts) -> str:
    text = ""
    if not facts.get("repository"):
        text = "This network is in no repository: the command below makes it, in that folder. "
    if facts["target"].get("own_code"):
        text += (
            "`trust_remote_code=True` runs the two Python files beside the weights. Where the package hf_guidance is "
        )
        text += "installed, it is not needed after `import hf_guidance.targets`."
    return text.strip()


PARTS = {
    "metadata": _metadata,
    "name": lambda facts: escape(facts["name"]),
    "summary": guidance_sections.summary,
    "usage": _usage,
    "loading": _loading,
    "networks": guidance_sections.networks,
    "guide": guidance_sections.guide,
    "guidance": guidance_sections.guidance,
    "pairs": guidance_sections.pairs,
    "results": result_sections.results,
    "comparison": result_sections.comparison,
    "figures": result_sections.figures,
    "training": result_sections.rows_of("training"),
    "cost": result_sections.rows_of("cost"),
    "data": result_sections.rows_of("data"),
    "limitations": result_sections.limitations,
    "command": result_sections.command,
    "versions": result_sections.versions,
    "citation": result_sections.citation,
}
