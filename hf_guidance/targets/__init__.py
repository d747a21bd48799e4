"""Architectures that hardly train on their own: the targets of guidance, registered with transformers' Auto classes.

After an import of this package, `AutoModelForCausalLM.from_pretrained` and its siblings load a target like any other
model. A saved target also carries its own code, so `trust_remote_code=True` loads it without this package.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_fcn import FCNConfig
from .configuration_plain_resnet import PlainResNetConfig
from .configuration_plain_rnn import RNNConfig
from .modeling_fcn import FCNForImageClassification, FCNModel
from .modeling_plain_resnet import PlainResNetForImageClassification, PlainResNetModel
from .modeling_plain_rnn import RNNCache, RNNForCausalLM, RNNForSequenceClassification, RNNModel
from .vision import VISION_TARGETS, vision_target

__all__ = [
    "VISION_TARGETS",
    "FCNConfig",
    "FCNForImageClassification",
    "FCNModel",
    "PlainResNetConfig",
    "PlainResNetForImageClassification",
    "PlainResNetModel",
    "RNNCache",
    "RNNConfig",
    "RNNForCausalLM",
    "RNNForSequenceClassification",
    "RNNModel",
    "vision_target",
]

# Trainer reads here whether it has to shift labels that it smooths; `register` below does not write it
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RNNConfig.model_type] = RNNForCausalLM.__name__

for config_class in (FCNConfig, PlainResNetConfig, RNNConfig):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, FCNModel),
    (AutoModel, PlainResNetModel),
    (AutoModel, RNNModel),
    (AutoModelForCausalLM, RNNForCausalLM),
    (AutoModelForImageClassification, FCNForImageClassification),
    (AutoModelForImageClassification, PlainResNetForImageClassification),
    (AutoModelForSequenceClassification, RNNForSequenceClassification),
):
    auto_class.register(model_class.config_class, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
