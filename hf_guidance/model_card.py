"""The model card of a guided target: facts of a training run in, markdown out, and nothing that was not measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_guidance.config import GuidanceConfig

PAPER = "https://arxiv.org/abs/2410.20035"
CITATION = """@inproceedings{subramaniam2025guidance,
  title     = {Training the Untrainable: Introducing Inductive Bias via Representational Alignment},
  author    = {Subramaniam, Vighnesh and Mayo, David and Conwell, Colin and Poggio, Tomaso and Katz, Boris and Cheung, Brian and Barbu, Andrei},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025}
}"""  # noqa: E501
# class of the target → (Auto class, the Hub's name of the task, how it is called)
USES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}
SEEN = {
    "batch": "what the target saw",
    "noise": "noise",
    "prealign_noise": "noise while pre-aligning, then what the target saw",
    "shuffled": "another row's input (a control)",
}
Facts = dict[str, Any]


def render(facts: Facts) -> str:
    """The card as markdown with its metadata in front; a section without facts is left out.

    Args:
        facts: of `run_facts`, JSON values only. Whatever text is in them is escaped.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = environment.from_string(
        files("hf_guidance").joinpath("templates/model_card.md.jinja").read_text("utf-8")
    )
    text = template.render({name: part(facts) for name, part in PARTS.items()})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape(text: Any) -> str:
    """Text that shows as it is, in a table cell too: markdown's and HTML's signs lose their meaning."""
    text = re.sub(r"\s+", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~{}])", r"\\\1", text)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table; cells are escaped."""
    lines = [[escape(cell) for cell in line] for line in [header, *rows]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def count(number: int) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,}"


# -------------------------------------------------------------------------------------------------- parts of a card


def _use(facts: Facts) -> tuple[str, str] | None:
    name = facts["target"]["architecture"]
    return next((use for ending, use in USES.items() if name.endswith(ending)), None)


def _metadata(facts: Facts) -> str:
    guide, use, data = facts.get("guide"), _use(facts), facts.get("data", {})
    tags = ["hf_guidance", *(["guidance"] if guide else []), *facts.get("tags", [])]
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
        if data.get("name")
    ]
    extra = {"guide": guide["source"]} if guide and guide.get("source") else {}
    extra |= {"guide_revision": guide["revision"]} if guide and guide.get("revision") else {}
    content = ModelCardData(
        license=facts.get("license"),
        language=facts.get("language"),
        library_name="transformers",
        pipeline_tag=use[1] if use else None,
        base_model=facts["target"].get("source"),
        tags=list(dict.fromkeys(tags)),
        datasets=[data["id"]] if data.get("id") else None,
        metrics=list(facts.get("results", {}).get("values", {})) or None,
        model_name=facts["name"] if results else None,
        eval_results=results or None,
        **extra,
    )
    return content.to_yaml()


def _summary(facts: Facts) -> str:
    target, guide = facts["target"], facts.get("guide")
    data = f" on {escape(facts['data']['name'])}" if facts.get("data", {}).get("name") else ""
    text = f"{_a(target['architecture'])} with {count(target['parameters'])} parameters, trained for "
    text += f"{facts['training']['steps']} steps{data}"
    if not guide:
        return text + "."
    kind = "that kept its random weights" if guide["untrained"] else "that had been trained before"
    if guide["untrained"] is None:
        kind = "of the user's own"
    text += (
        f" and steered by [guidance]({PAPER}): a frozen {escape(guide['architecture'])} {kind} stood beside it, and "
    )
    text += "each pair of layers, one of either network, added one minus its similarity to the loss. The guide is not "
    return text + "needed to use the network and is not part of this repository."


def _a(name: str) -> str:
    return ("An " if name[:1] in "AEIOF" and name[:2].isupper() else "A ") + escape(name)


def _usage(facts: Facts) -> str:
    use, repository = _use(facts), facts.get("repository")
    if use is None or not repository:
        return ""
    own = ", trust_remote_code=True" if facts["target"].get("own_code") else ""
    load = f'{use[0]}.from_pretrained("{repository}"{own})'
    if use[1] == "image-classification":
        return (
            f"from PIL import Image\nfrom transformers import AutoImageProcessor, {use[0]}\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{repository}")\nmodel = {load}\n'
            'inputs = processor(Image.open("image.png"), return_tensors="pt")\n'
            "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"
        )
    call = 'inputs = tokenizer({text!r}, return_tensors="pt", add_special_tokens=False)\n'
    call = call.format(text=facts.get("example", "Once upon a time"))
    show = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
    if use[1] == "text-classification":
        show = "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"
    imports = f"from transformers import AutoTokenizer, {use[0]}"
    return f'{imports}\n\ntokenizer = AutoTokenizer.from_pretrained("{repository}")\nmodel = {load}\n{call}{show}'


def _loading(facts: Facts) -> str:
    if not facts["target"].get("own_code"):
        return ""
    return (
        "`trust_remote_code=True` runs the two Python files of this repository. With `pip install hf_guidance` and "
        "`import hf_guidance.targets` it is not needed."
    )


def _networks(facts: Facts) -> str:
    sides = [facts["target"], *([facts["guide"]] if facts.get("guide") else [])]
    rows: list[list[Any]] = [["architecture", *(side["architecture"] for side in sides)]]
    rows.append(["parameters", *(count(side["parameters"]) for side in sides)])
    rows.append(["weights before training", *(_origin(side) for side in sides)])
    if all(side.get("sizes") for side in sides):
        rows.append(["sizes", *(", ".join(f"{k} {v}" for k, v in side["sizes"].items()) for side in sides)])
    return table(["", "target", "guide"][: len(sides) + 1], rows)


def _origin(side: Facts) -> str:
    if side.get("untrained"):
        return f"random, seed {side['seed']}"
    source = side.get("source") or ("a module of the user's own" if "fingerprint" in side else "as the user gave them")
    return source + (f" at {side['revision']}" if side.get("revision") else "")


def _guide(facts: Facts) -> str:
    guide = facts.get("guide")
    if not guide:
        return ""
    text = f"Fingerprint of the guide's weights: `{guide['fingerprint']}`."
    if facts.get("repository") and guide.get("source"):
        text += f' `hf_guidance.load_guide_of("{facts["repository"]}")` '
        text += "builds the same again from its seed." if guide["untrained"] else "loads it where it is to be had."
    return text


def _guidance(facts: Facts) -> str:
    if not facts.get("guide"):
        return ""
    config = GuidanceConfig.from_dict(facts["guidance"])
    schedule = {"constant": "constant", "linear": "linear decay", "cosine": "cosine decay"}[config.guidance_schedule]
    if config.prealign_steps:
        schedule = f"{config.prealign_steps} steps of pre-alignment, then {schedule}"
    if config.guidance_stop_step is not None:
        schedule += f", ending at step {config.guidance_stop_step}"
    one = "a row of the batch, its positions flattened"
    if config.sample_axis == "token":
        one = f"a token, at most {config.max_tokens} of a batch"
    rows = [
        ["similarity", config.measure],
        ["weight", f"{config.guidance_weight:g}, on the {config.guidance_reduction} over the pairs"],
        ["schedule", schedule],
        ["one sample", one],
        ["the guide saw", SEEN[config.guide_input]],
    ]
    if facts["guide"].get("batch_norm"):
        rows.append(["the guide's batch norm", config.guide_batch_norm])
    return table(["guidance", ""], rows)


def _pairs(facts: Facts) -> str:
    pairs = facts.get("pairs")
    if not pairs:
        return ""
    header = ["target layer", "guide layer", f"similarity at step {pairs['first']}", f"at step {pairs['last']}"]
    rows = [[p["target"], p["guide"], f"{p['first']:.3f}", f"{p['last']:.3f}"] for p in pairs["rows"]]
    return table(header, rows)


def _results(facts: Facts) -> str:
    results = facts.get("results")
    if not results:
        return ""
    rows = [[name.replace("_", " "), f"{value:.4f}"] for name, value in results["values"].items()]
    return table(["metric", f"{results['split']} data"], rows)


def _comparison(facts: Facts) -> str:
    comparison = facts.get("comparison")
    return f"{comparison['text']}\n\n{comparison['table']}" if comparison else ""


def _rows(name: str) -> Any:
    def part(facts: Facts) -> str:
        rows = [[k.replace("_", " "), v] for k, v in facts.get(name, {}).items() if v is not None and k != "id"]
        return table([name, ""], rows) if rows else ""

    return part


def _limitations(facts: Facts) -> str:
    text = "A network for the study of training, not for use: it has learnt from the data above and from nothing else, "
    text += "and was tested on no other. "
    if facts.get("guide"):
        text += "What of the guide's behaviour it has taken on beside the similarity was not measured. "
    seeds = facts.get("comparison", {}).get("seeds")
    return text + (f"The figures are of {seeds} seed{'s' if seeds > 1 else ''}." if seeds else "One seed.")


def _versions(facts: Facts) -> str:
    return "Made with " + ", ".join(f"{escape(k)} {escape(v)}" for k, v in facts["versions"].items()) + "."


PARTS = {
    "metadata": _metadata,
    "name": lambda facts: escape(facts["name"]),
    "summary": _summary,
    "usage": _usage,
    "loading": _loading,
    "networks": _networks,
    "guide": _guide,
    "guidance": _guidance,
    "pairs": _pairs,
    "results": _results,
    "comparison": _comparison,
    "figures": lambda facts: [f"![{escape(f['caption'])}]({f['file']})" for f in facts.get("figures", [])],
    "training": _rows("training"),
    "cost": _rows("cost"),
    "data": _rows("data"),
    "limitations": _limitations,
    "command": lambda facts: facts.get("command") or "",
    "versions": _versions,
    "citation": lambda facts: CITATION,
}
