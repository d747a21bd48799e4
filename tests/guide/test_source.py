"""Sources of a guide: one place, JSON and safetensors; those that ask for more are refused unread."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gpt2
from hub import Hub
from safetensors.torch import save_file
from transformers import DPTConfig, GPT2Config, GPT2Model, TimmWrapperConfig

from hf_guidance import load_guide
from hf_guidance.guide.source import without_pickles

SCRIPT = Path(__file__).parents[1] / "scripts" / "sources.py"
OTHER = "other/base"  # a repository that nobody asked for


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def index_of_a_pickle(folder: Path) -> None:
    gpt2().config.save_pretrained(folder)
    state = gpt2().state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    weights = {"metadata": {}, "weight_map": dict.fromkeys(state, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


def index_of_another_folder(folder: Path) -> None:
    index_of_a_pickle(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("pytorch_model.bin", "../elsewhere/model.safetensors"))


def adapter(folder: Path) -> None:
    values = {"peft_type": "LORA", "base_model_name_or_path": OTHER, "r": 1, "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    torch.save({}, folder / "adapter_model.bin")


def adapter_beside_a_network(folder: Path) -> None:
    gpt2().save_pretrained(folder)
    adapter(folder)


def explicit_pickle(folder: Path) -> None:
    gpt2().config.save_pretrained(folder)
    change(folder, transformers_weights="adapter_model.bin")
    torch.save(gpt2().state_dict(), folder / "adapter_model.bin")


def explicit_index_of_a_pickle(folder: Path) -> None:
    index_of_a_pickle(folder)
    (folder / "model.safetensors.index.json").rename(folder / "own.safetensors.index.json")
    change(folder, transformers_weights="own.safetensors.index.json")


def timm_network(folder: Path, **values: Any) -> None:
    TimmWrapperConfig(architecture="test_resnet").save_pretrained(folder)
    change(folder, **values)
    save_file({"timm_model.conv1.weight": torch.zeros(1)}, folder / "model.safetensors")


def timm_checkpoint(folder: Path) -> None:
    timm_network(folder, model_args={"checkpoint_path": str(folder / "weights.pth")})
    torch.save({}, folder / "weights.pth")


def timm_from_elsewhere(folder: Path) -> None:
    timm_network(folder, architecture=f"hf-hub:{OTHER}")


def backbone_from_elsewhere(folder: Path) -> None:
    DPTConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(folder)
    change(folder, is_hybrid=False, backbone_config=None, backbone=OTHER)


def kernel_from_elsewhere(folder: Path) -> None:
    gpt2().save_pretrained(folder)
    change(folder, attn_implementation=OTHER)


REFUSED: dict[Callable[[Path], None], str] = {
    index_of_a_pickle: r"its model\.safetensors\.index\.json names 'pytorch_model\.bin'; weights must be safetensors",
    index_of_another_folder: r"names '\.\./elsewhere/model\.safetensors'; weights must be safetensors beside it",
    adapter: r"it is an adapter of 'other/base', .* Load it with PEFT, merge it",
    adapter_beside_a_network: r"it is an adapter of 'other/base', .* Load it with PEFT, merge it",
    explicit_pickle: r"its config names the weights 'adapter_model\.bin'; only safetensors are read",
    explicit_index_of_a_pickle: r"its own\.safetensors\.index\.json names 'pytorch_model\.bin'",
    timm_checkpoint: "gives timm the model_args checkpoint_path, which make it read other files",
    timm_from_elsewhere: "names the architecture 'hf-hub:other/base', which is not in this version of timm",
    backbone_from_elsewhere: "takes the backbone 'other/base' from elsewhere",
    kernel_from_elsewhere: "takes attn_implementation 'other/base' from elsewhere.* attn_implementation='eager'",
}
UNTRAINED = (timm_checkpoint, timm_from_elsewhere, backbone_from_elsewhere, kernel_from_elsewhere)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the arguments of `torch.load`."""
    calls: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (calls.append(args), load(*args, **kwargs))[1])
    return calls


@pytest.mark.parametrize("make", REFUSED)
def test_a_folder_that_asks_for_pickles_or_another_place_is_refused_unread(
    make: Callable[[Path], None], tmp_path: Path, loaded: list[Any]
) -> None:
    make(tmp_path)
    for untrained in (False, True) if make in UNTRAINED else (False,):
        with pytest.raises(ValueError, match=rf"^Cannot load guide '.*{REFUSED[make]}"):
            load_guide(tmp_path, untrained=untrained)
    assert not loaded


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """Every refused source on a Hub: what `load_guide` says of it, and what the clients have asked the Hub for."""
    folder = tmp_path_factory.mktemp("sources")
    with Hub(folder / "hub") as hub:
        names = []
        for make in REFUSED:
            (place := folder / make.__name__).mkdir()
            make(place)
            hub.store.add(f"model/evil/{make.__name__}", {p.name: p.read_bytes() for p in place.iterdir()})
            names.append(f"evil/{make.__name__}")
        gpt2().save_pretrained(folder / "good")
        good = {path.name: path.read_bytes() for path in (folder / "good").iterdir()}
        hub.store.add(f"model/{OTHER}", good)
        hub.store.add("model/me/good", good | {"model.safetensors.index.json": b'{"weight_map": {}}'})
        environment = os.environ | hub.environment(folder / "home")
        untrained = [f"untrained:{name}" for name in names if any(name.endswith(m.__name__) for m in UNTRAINED)]
        command = [sys.executable, str(SCRIPT), *names, *untrained, "me/good"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert "RESULT" in done.stdout, done.stderr[-3000:]
        yield json.loads(done.stdout.split("RESULT")[1].splitlines()[0]), list(hub.requests)


@pytest.mark.parametrize("make", REFUSED)
def test_a_repository_that_asks_for_pickles_or_another_place_is_refused_unread(
    make: Callable[[Path], None], from_hub: tuple[dict[str, Any], list[tuple[str, str]]]
) -> None:
    said, requests = from_hub
    for name in [make.__name__, *([] if make not in UNTRAINED else [f"untrained:{make.__name__}"])]:
        kind, _, bare = name.rpartition(":")
        assert re.match(rf"Cannot load guide 'evil/{bare}': .*{REFUSED[make]}", said[f"{kind}:evil/{bare}".lstrip(":")])
    fetched = [path for method, path in requests if method == "GET" and f"evil/{make.__name__}/resolve" in path]
    assert all(path.endswith(".json") for path in fetched), fetched


def test_nothing_is_unpickled_and_no_other_repository_is_asked_for(
    from_hub: tuple[dict[str, Any], list[tuple[str, str]]],
) -> None:
    said, requests = from_hub
    assert said["unpickled"] == []
    assert not [path for _, path in requests if OTHER in path]
    assert said["me/good"] == "GPT2Model"
    assert re.fullmatch("[0-9a-f]{40}", said["commit"])


def test_what_a_networks_own_code_unpickles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2().save_pretrained(tmp_path / "guide")
    torch.save({}, tmp_path / "extra.pt")
    own = GPT2Model.from_pretrained.__func__

    def with_a_pickle(cls: Any, *args: Any, **kwargs: Any) -> Any:  # as Qwen2.5-Omni's, of its speakers
        torch.load(tmp_path / "extra.pt")
        return own(cls, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "from_pretrained", classmethod(with_a_pickle))
    with pytest.raises(ValueError, match=r"it reads 'extra\.pt', a pickle; only safetensors are read"):
        load_guide(tmp_path / "guide")
    assert torch.load(tmp_path / "extra.pt") == {}
    with without_pickles(), pytest.raises(ValueError, match="a pickle"):
        torch.load(tmp_path / "extra.pt")


@pytest.mark.parametrize("name", ["use_safetensors", "weights_only", "adapter_kwargs"])
def test_options_that_would_read_pickles_or_another_place_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is always on|never read|one whole network: merge the adapter"):
        load_guide(tmp_path, **{name: False})


# ---------------------------------------------------------------------------------------------------------- modules


def test_a_config_that_names_pickles_is_refused_by_its_class() -> None:
    with pytest.raises(ValueError, match=r"guide from this GPT2Config: its config names the weights 'x\.bin'; only"):
        load_guide(GPT2Config(transformers_weights="x.bin"))
