"""Architectures that hardly train on their own: the targets of guidance, known to transformers' Auto classes.

Importing this package lets `AutoModelForCausalLM.from_pretrained` and its siblings load a target as any other model;
a saved target also carries its own code, so that `trust_remote_code=True` loads it where this package is missing.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_plain_rnn import RNNConfig
from .modeling_plain_rnn import RNNCache, RNNForCausalLM, RNNForSequenceClassification, RNNModel

__all__ = ["RNNCache", "RNNConfig", "RNNForCausalLM", "RNNForSequenceClassification", "RNNModel"]

AutoConfig.register(RNNConfig.model_type, RNNConfig, exist_ok=True)
RNNConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, RNNModel),
    (AutoModelForCausalLM, RNNForCausalLM),
    (AutoModelForSequenceClassification, RNNForSequenceClassification),
):
    auto_class.register(RNNConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
