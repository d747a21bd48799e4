"""Loading of pretrained guides, and building of untrained ones from a seed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from hf_guidance.features.inside import check_is_network, transformer_in
from hf_guidance.guide.configs import config_if_timm_exported, config_of
from hf_guidance.guide.freezing import check_not_wrapped, freeze
from hf_guidance.guide.hub_errors import hub_fault, one_line
from hf_guidance.guide.identity import IDENTITY
from hf_guidance.guide.sharding import built_whole
from hf_guidance.guide.source import (
    check_config,
    check_files,
    check_is_there,
    commit_of,
    damaged_weights,
    in_timm,
    read_config,
    without_pickles,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

AutoClass: TypeAlias = "type[_BaseAutoModelClass]"

logger = logging.getLogger(__name__)

POSSIBLE = (
    "A guide is a local folder with a config.json, a Hub id, a config, a live module, or 'timm/<architecture>' and "
    "untrained=True."
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
SEEDS = -(2**63), 2**64 - 1  # which torch takes
NOT_GIVEN = {  # arguments that would make from_pretrained read pickles, or files from another repository
    "use_safetensors": "use_safetensors is always on: pickled weights can run code when they are read.",
    "weights_only": "weights_only is for pickled weights, and those are never read.",
    "adapter_kwargs": "A guide is one whole network: merge the adapter (merge_and_unload), and pass the module.",
}


def load_guide(
    source: str | os.PathLike[str] | PreTrainedConfig | nn.Module,
    *,
    untrained: bool = False,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    auto_class: AutoClass | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a pretrained network as a guide, build one with random weights, or freeze a module.

    Only JSON and safetensors files of the source are read. Pickles, which can run code, and other repositories are
    refused.

    Args:
        source: Hub id, local folder, `timm/<architecture>`, a transformers config, or an `nn.Module`. A config always
            gives an untrained guide. A module is frozen in place. Of a sentence-transformers model it is the
            transformer inside, without pooling.
        untrained: Draw the weights at random with the architecture's own initialisation, instead of loading them.
        seed: Seed of an untrained guide, and of weights that a checkpoint lacks, such as a pooler. The same seed and
            library versions give the same weights.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run code from the Hub. It is never on by default.
        auto_class: Auto class of a task whose head is needed, as for distillation. By default `AutoModel`, which has no
            head.
        **kwargs: Arguments for `from_pretrained`, such as `dtype`, `device_map`, `quantization_config` and `token`.
            `use_safetensors`, `weights_only` and `adapter_kwargs` are refused.

    Returns:
        The frozen network. It carries its origin for checkpoints and model cards.

    Raises:
        ValueError: If the source is none of these, is not found or damaged, needs pickles or files from elsewhere, or
            does not fit the options. Also if the Hub refuses or does not answer, with what it answered.
    """
    from transformers import AutoModel, PreTrainedConfig

    import hf_guidance.targets  # noqa: F401  registers our own architectures with the Auto classes

    for name in NOT_GIVEN.keys() & kwargs.keys():
        raise ValueError(NOT_GIVEN[name])
    if isinstance(source, nn.Module):
        options = {"untrained": untrained, "seed": seed, "revision": revision, "auto_class": auto_class, **kwargs}
        options |= {"trust_remote_code": trust_remote_code}
        return _as_it_is(source, [name for name, value in options.items() if value])
    for name, value in (("untrained", untrained), ("trust_remote_code", trust_remote_code)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r} ({type(value).__name__}); expected True or False.")
    if type(seed) is int and not SEEDS[0] <= seed <= SEEDS[1]:
        raise ValueError(f"seed is {seed}; expected an integer from {SEEDS[0]} to {SEEDS[1]}.")
    if type(seed) is not int or not (auto_class is None or hasattr(auto_class, "from_pretrained")):
        raise ValueError(f"seed is {seed!r} and auto_class {auto_class!r}; expected a number and an Auto class.")
    if isinstance(source, type):
        check_is_network(source, "source")
    if not isinstance(source, (str, os.PathLike, PreTrainedConfig)):
        raise ValueError(f"Cannot load a guide from a {type(source).__name__}. {POSSIBLE}")
    _or_explain(source, lambda: check_is_there(source))
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(source, PreTrainedConfig):
        name, untrained = source.model_type, True
    else:
        name = Path(source).resolve().name if os.path.isdir(source) else str(source)  # no local path in cards
    if untrained and kwargs:
        raise ValueError(
            f"{sorted(kwargs)} are for loading weights: leave them out, since an untrained guide follows its config."
        )
    auto = auto_class or AutoModel
    with built_whole():
        if untrained:
            guide = _or_explain(source, lambda: _build_seeded(source, seed, auto, **hub))
            by_timm = guide.config.model_type == "timm_wrapper"  # not from the Hub, even if its cache has that name
            commit = None if by_timm else commit_of(source, revision)
        else:
            guide, commit = _or_explain(source, lambda: _load_pretrained(source, seed, auto, **hub, **kwargs))
    origin = {"source": name, "untrained": untrained, "seed": seed if untrained else None, "revision": commit}
    setattr(guide, IDENTITY, origin)
    return freeze(guide)


def _as_it_is(module: nn.Module, options: list[str]) -> nn.Module:
    if options:
        raise ValueError(f"{', '.join(options)}: a module is used as it is: leave these options out.")
    check_not_wrapped(module, "guide")
    return freeze(transformer_in(module, "guide"))


def _or_explain(source: str | os.PathLike[str] | PreTrainedConfig, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a network's own code may raise anything on such files
        said = f"{one_line(error)}."
        if not isinstance(error, (OSError, ValueError)):
            said = f"{type(error).__name__} {said}"
        if not isinstance(error, (OSError, ValueError, ImportError)):
            said += " Its config may be damaged, or need another version of transformers or timm."
        if not isinstance(source, (str, os.PathLike)):
            raise ValueError(f"Cannot build a guide from this {type(source).__name__}: {said}") from error
        source, is_folder = os.fspath(source), os.path.isdir(source)
        if damage := damaged_weights(source, error):
            said = damage
        elif not is_folder and type(error) is not ValueError and (fault := hub_fault(source, error)):
            said = fault
        elif isinstance(error, OSError) and "safetensors" in str(error):
            said += _about_weights(source)
        known = "" if is_folder or not in_timm(source) else f" timm has it: 'timm/{source}'."
        raise ValueError(f"Cannot load guide {source!r}: {said}{known} {POSSIBLE}") from error


def _about_weights(source: str) -> str:
    """Tell what to do about weights that are missing or pickled."""
    if os.path.isdir(source) and not any(path.suffix in WEIGHTS for path in Path(source).iterdir()):
        return " The folder has no weights: for random ones pass untrained=True."
    return " Weights must be safetensors: pickled ones are refused."


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's random state, from which weights are drawn, inside this context. Restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _load_pretrained(source: str, seed: int, auto_class: AutoClass, **kwargs: Any) -> tuple[nn.Module, str | None]:
    """Load a network from safetensors. Return it with its commit on the Hub."""
    from transformers import PreTrainedConfig
    from transformers.utils import logging as reports

    written = read_config(source, **kwargs)
    if commit := commit_of(source, kwargs["revision"], kwargs.get("cache_dir"), kwargs.get("subfolder")):
        kwargs["revision"] = commit  # load the commit that was checked
    if (config := kwargs.get("config")) is not None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config is a {type(config).__name__}; expected a transformers config.")
        written = config.to_dict()
        check_config(written, kwargs, source)
    elif exported := config_if_timm_exported(source, written, **kwargs):
        kwargs["config"] = exported
    check_files(source, written.get("transformers_weights"), kwargs)
    own_code = nullcontext() if kwargs["trust_remote_code"] else without_pickles()
    verbosity = reports.get_verbosity()
    reports.set_verbosity_error()  # otherwise it reports the unused task head of every guide
    try:
        with _seeded(seed), own_code:
            guide, report = auto_class.from_pretrained(source, output_loading_info=True, use_safetensors=True, **kwargs)
    finally:
        reports.set_verbosity(verbosity)
    if report["missing_keys"]:
        logger.warning(
            "Guide %s has no weights for %s: they are drawn with seed %d.", source, sorted(report["missing_keys"]), seed
        )
    return guide, commit


def untrained_network(
    source: str | PreTrainedConfig, auto_class: AutoClass, trust_remote_code: bool = False, **changes: Any
) -> Any:
    """Build a network with random weights, to be trained. They are drawn from torch's random state.

    Args:
        source: As in `load_guide`, but no module.
        auto_class: Auto class of the task, such as `AutoModelForImageClassification`.
        trust_remote_code: As in `load_guide`.
        **changes: Config fields to change, such as `num_labels`.

    Returns:
        The network.

    Raises:
        ValueError: As in `load_guide`.
    """

    def build() -> Any:
        config = config_of(source, trust_remote_code=trust_remote_code)
        for name, value in changes.items():
            setattr(config, name, value)
        return _build(config, auto_class, trust_remote_code)

    return _or_explain(source, build)


def _build_seeded(source: str | PreTrainedConfig, seed: int, auto_class: AutoClass, **hub: Any) -> nn.Module:
    config = config_of(source, **hub)
    with _seeded(seed):
        network: nn.Module = _build(config, auto_class, hub["trust_remote_code"])
    return network


def _build(config: Any, auto_class: AutoClass, trust_remote_code: bool) -> Any:
    """Build a network with random weights, drawn by the architecture's own initialisation."""
    state = torch.random.get_rng_state()
    with torch.device("cpu"):
        network = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    if config.model_type == "timm_wrapper":  # transformers replaces timm's initialisation by its generic one
        import timm

        classes = network.timm_model.num_classes
        torch.random.set_rng_state(state)
        with torch.device("cpu"):
            own = timm.create_model(config.architecture, num_classes=classes, **(config.model_args or {}))
        network.timm_model.load_state_dict(own.state_dict())
    return network
