"""A card says what the facts say, and has no section without facts."""

import re
import shlex

import pytest
import yaml
from cards import check_card

from hf_guidance import GuidanceConfig
from hf_guidance.card.markdown import escape, printable, table
from hf_guidance.card.rendering import render

GUIDE = {
    "architecture": "GPT2Model",
    "parameters": 1234567,
    "untrained": True,
    "seed": 3,
    "fingerprint": "sha256:ab",
    "config": {"model_type": "gpt2"},
}
TRAINED = {"untrained": False, "source": "me/guide", "revision": "0123abc"}
GUIDED = {"guide": GUIDE, "guidance": GuidanceConfig().to_dict()}
IMAGES, TEXTS = "FCNForImageClassification", "BertForSequenceClassification"


def card(target=None, **more):
    own = {"architecture": "RNNForCausalLM", "parameters": 5} | (target or {})
    training = {"training": {"steps": 2, "seed": 0}, "versions": {"torch": "2.14"}}
    return check_card(render({"name": "net", "target": own} | training | more))


def headings(body):
    return re.findall(r"^#+ (.*)", body, re.MULTILINE)


def test_a_section_without_facts_is_left_out():
    metadata, body = card()
    assert headings(body) == ["net", "How to use it", "The network", "Training", "Limitations", "Citation"]
    assert "An RNNForCausalLM with 5 parameters, trained for 2 steps.\n" in body
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_guidance", "text-generation"],
    }
    more = {
        "results": {"split": "test", "values": {"loss": 0.5}},
        "cost": {"hardware": "cpu"},
        "command": "python a.py",
    }
    body = card(**GUIDED, **more, data={"name": "rows"}, repository="me/net", example={"text": "Hello"})[1]
    assert headings(body) == [
        *("net", "How to use it", "Target and guide", "Guidance", "Results", "Training", "Cost"),
        *("Data and preprocessing", "Limitations", "How to reproduce it", "Citation"),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a frozen GPT2Model that kept its random weights"),
        (TRAINED, "a frozen GPT2Model that had been trained before"),
        ({"untrained": None}, "a frozen GPT2Model of the user's own"),
        ({"timm": "resnet18"}, "a frozen resnet18 of timm that kept its random weights"),
    ],
)
def test_the_summary_says_which_guide_it_was(changes, words):
    body = card(**GUIDED | {"guide": GUIDE | changes}, data={"name": "My `rows`"})[1]
    assert (
        rf"trained for 2 steps on My \`rows\` and [guided](https://arxiv.org/abs/2410.20035) by {words}: each " in body
    )


def test_a_guide_that_can_be_had_again_comes_with_the_call_that_loads_it():
    call = '`hf_guidance.load_guide_of("me/net")`'
    assert f"`sha256:ab`. {call} builds the same again from its seed.\n" in card(**GUIDED, repository="me/net")[1]
    assert "load_guide_of" not in card(**GUIDED)[1]
    assert "load_guide_of" not in card(**GUIDED | {"guide": GUIDE | {"config": None}}, repository="me/net")[1]
    metadata, body = card(**GUIDED | {"guide": GUIDE | TRAINED}, repository="me/net")
    link = "[me/guide](https://huggingface.co/me/guide/tree/0123abc)"
    assert (
        f"The guide is {link}. Fingerprint of the guide's weights: `sha256:ab`. {call} loads it from there.\n" in body
    )
    assert "@misc{guide,\n  title        = {me/guide},\n  howpublished = {https://huggingface.co/me/guide}," in body
    assert (metadata["guide"], metadata["guide_revision"]) == ("me/guide", "0123abc")


@pytest.mark.parametrize(
    ("architecture", "example", "words"),
    [
        (IMAGES, "image", "AutoImageProcessor.from_pretrained(name)\nmodel = AutoModelForImageClassification."),
        ("RNNForCausalLM", {"text": 'say "a"'}, 'text = "say \\"a\\""\n'),
        ("RNNForCausalLM", {"text": "a"}, "model.generate(**inputs, max_new_tokens=20)"),
        (
            "RNNForCausalLM",
            {"text": "a", "copies": True},
            "print(tokenizer.decode(model(**inputs).logits[0].argmax(-1)))",
        ),
        (TEXTS, {"text": "a"}, "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"),
    ],
)
def test_the_code_that_uses_the_network_is_python_for_its_kind(architecture, example, words):
    facts = {"example": example} if example != "image" else {"data": {"normalised by": "mean 0, std 1"}}
    body = card({"architecture": architecture}, repository="me/net", **facts)[1]
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert 'name = "me/net"\n' in code
    assert words in code
    assert "trust_remote_code" not in body


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        (IMAGES, 'inputs = {"pixel_values": torch.rand(1, 3, 224, 224)}'),
        ("RNNForCausalLM", 'inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}'),
        ("T5ForConditionalGeneration", 'model = T5ForConditionalGeneration.from_pretrained("me/net").eval()'),
        ("OwnNetwork", 'weights = load_file(f"{folder}/model.safetensors")'),
    ],
)
def test_a_network_without_tokenizer_or_processor_or_auto_class_has_code_too(architecture, words):
    body = card({"architecture": architecture}, repository="me/net")[1]
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert words in code
    assert "Tokenizer" not in code
    assert "Processor" not in code


def test_debiased_cka_stands_beside_the_measure_and_the_curves_are_linked():
    rows = [{"target": "a", "guide": "b", "first": 0.5, "last": 0.75, "debiased": 0.125}]
    pairs = {"first": 1, "before_last": 1, "last": 2, "rows": rows}
    place = "https://huggingface.co/spaces/me/curves"
    metadata, body = card(**GUIDED, pairs=pairs, dashboard=place)
    assert re.search(r"\| similarity in training, step 1 +\| step 2 +\| debiased CKA then +\|", body)
    assert re.search(r"^\| a +\| b +\| 0\.5(00)? +\| 0\.75(0)? +\| 0\.125 +\|$", body, re.MULTILINE)
    assert f"[Its curves on trackio]({place})" in body
    assert "arxiv:2410.20035" in metadata["tags"]


def test_code_of_the_networks_own_is_trusted_by_a_flag_and_a_network_in_no_repository_says_so():
    body = card({"own_code": True}, folder="outputs/net", example={"text": "a"})[1]
    assert body.count("(name, trust_remote_code=True)") == 2
    assert "in no repository: the command below makes it, in that folder. `trust_remote_code=True` runs the two" in body


def test_weights_of_the_best_step_and_skipped_layers_are_told():
    results = {"split": "validation", "values": {"loss": 0.5}}
    assert "those of step 0, the best" in card(results=results | {"best_step": 0})[1]
    assert "the best" not in card(results=results | {"best_step": None})[1]
    rows = [{"target": "a", "guide": "b", "first": 0.5, "last": None}]
    pairs = {"first": 1, "before_last": 1, "last": 2, "rows": rows}
    assert "LayerDrop skipped" in card(**GUIDED, pairs=pairs)[1]
    assert "LayerDrop" not in card(**GUIDED, pairs=pairs | {"rows": [rows[0] | {"last": 0.5}]})[1]


def test_only_an_untrained_target_has_learnt_from_nothing_else():
    data = {"data": {"rows": 3}}
    assert "on nothing else" in card({"untrained": True, "seed": 0}, **data)[1]
    assert "on nothing else" not in card({"source": "me/net"}, **data)[1]
    assert "not named here" in card({"untrained": True, "seed": 0})[1]


def test_seeds_and_tests_are_counted_in_the_limitations():
    assert card()[1].count("It was not tested. One seed.\n") == 1
    comparison = {"text": "Matched *runs*.", "table": "| a | b |", "seeds": 3}
    body = card(results={"split": "test", "values": {"loss": 1}}, comparison=comparison)[1]
    assert "It was tested on no other data. The figures are of 3 seeds.\n" in body
    assert "\n\nMatched \\*runs\\*.\n\n| a | b |\n\n" in body


def test_texts_are_escaped_and_private_ones_removed():
    figure = {"file": "c.png", "caption": "a [b]"}
    command = "python /home/me/train.py --output_dir /home/me/out"
    body = card(name="<net>", figures=[figure], command=command, command_is_cut=True)[1]
    assert "# &lt;net&gt;\n" in body
    assert r"![a \[b\]](c.png)" in body
    assert (
        "```sh\npython train.py --output_dir out\n```\n\nArguments other than the known training settings are" in body
    )


def test_metadata_has_the_finite_values_of_named_data():
    results = {"split": "test", "values": {"loss": float("nan"), "top_5": 0.5}}
    metadata = card(results=results, data={"name": "rows", "id": "me/rows"}, emissions=1.5, tags=["x: y"])[0]
    assert metadata["metrics"] == ["top_5"]
    result = metadata["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "top_5", "value": 0.5, "name": "top 5"}]
    assert result["dataset"] == {"name": "rows", "type": "me/rows", "split": "test"}
    assert metadata["co2_eq_emissions"] == {"emissions": 1.5, "source": "codecarbon"}
    assert metadata["tags"][-1] == "x: y"
    assert "model-index" not in card(results=results)[0]


FOREIGN = "a\x1b[31m\u202eb http://evil.test www.evil.test @octocat me@evil.test $x$ `c` <img> | [d](e) *f*\n# g\n---"
CODE = re.compile(r"^(```+).*?^\1$|(?<!\\)`[^`\n]+`", re.MULTILINE | re.DOTALL)


def hostile(value):
    """Put foreign text in place of every name and text of some facts."""
    if isinstance(value, dict):
        return {f"{FOREIGN} {name}" if name.startswith("own ") else name: hostile(part) for name, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return FOREIGN if isinstance(value, str) else value


def test_foreign_text_is_shown_as_it_is_wherever_it_enters():
    network = {"architecture": "x", "parameters": 5, "sizes": {"own size": "x"}, "source": "x", "revision": "x"}
    pairs = [{"target": "x", "guide": "x", "first": 0.1, "last": 0.2}]
    facts = {
        "name": "x",
        "license": "x",
        "language": ["x"],
        "tags": ["x"],
        "folder": "x",
        "target": {**network, "untrained": False},
        "guide": {**network, "untrained": False, "fingerprint": "x", "timm": "x"},
        "pairs": {"first": 1, "before_last": 2, "last": 3, "rows": pairs},
        "results": {"split": "x", "values": {"own loss": 0.5}},
        "comparison": {"text": "x", "seeds": 1},
        "figures": [{"file": "curves.png", "caption": "x"}],
        "training": {"own setting": "x"},
        "cost": {"own cost": "x"},
        "data": {"name": "x", "task": "x", "own option": "x"},
        "example": {"text": "x"},
        "versions": {"own package": "x"},
    }
    layer = re.sub("[@*]", "", FOREIGN)  # signs that have a meaning in a pair
    given = hostile(facts) | {"guidance": GuidanceConfig(layer_pairs=[f"{layer}~{layer}"]).to_dict()}
    given["comparison"]["table"] = table(["run"], [[FOREIGN]])
    given["training"]["steps"], given["figures"][0]["file"] = 2, "curves.png"
    given["guide"]["fingerprint"] = "sha256:ab"
    for network in ("target", "guide"):
        given[network]["architecture"] = "RNNForCausalLM"
    shlexed = shlex.join(["python", "a.py", "--text", FOREIGN])
    text = render({**given, "command": shlexed, "repository": FOREIGN})
    metadata, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    assert yaml.safe_load(metadata)["license"].startswith("ab http://evil.test")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)
    prose = CODE.sub("", body)
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", prose)
    assert set(links) == {"https://arxiv.org/abs/2410.20035", "curves.png"}
    prose = prose.replace(links[0], "")
    assert not re.search(r"(?<=\w)://|www\.|@\w|(?<!\\)\$|<(?!!-- -->)|(?<!\\)\*", prose), prose
    assert [line for line in prose.splitlines() if line.startswith("# ")] == [f"# {escape(printable(FOREIGN))}"]
    assert prose.count("octocat") > 20
