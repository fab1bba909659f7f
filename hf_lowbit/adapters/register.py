"""Makes PEFT use this package's LoRA layers on packed ones.

PEFT's hook for layers that it does not know is ``LoraConfig._register_custom_module``: it belongs to one config object
and is not saved. Calling it whenever a config is made covers every way in, those that read a config from a folder
included: ``get_peft_model``, ``PeftModel.from_pretrained``, ``model.load_adapter``, ``AutoPeftModelForCausalLM`` and
``AutoModelForCausalLM.from_pretrained`` of an adapter.
"""

import functools


def register(config) -> None:
    """Wraps ``LoraConfig.__post_init__`` of ``config``, the module ``peft.tuners.lora.config``; once."""
    cls = config.LoraConfig
    original = cls.__post_init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def __post_init__(self):
        original(self)
        from ..embedding import LowBitEmbedding
        from ..linear import LowBitLinear
        from .lora import LoraLowBitEmbedding, LoraLowBitLinear

        self._register_custom_module({LowBitLinear: LoraLowBitLinear, LowBitEmbedding: LoraLowBitEmbedding})

    cls.__post_init__ = __post_init__
