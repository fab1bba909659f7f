"""Makes PEFT use this package's LoRA layers on packed ones, and its rounding in other tuners.

PEFT's hook for layers that it does not know is ``LoraConfig._register_custom_module``: it belongs to one config object
and is not saved. Calling it whenever a config is made covers every way in, those that read a config from a folder
included: ``get_peft_model``, ``PeftModel.from_pretrained``, ``model.load_adapter``, ``AutoPeftModelForCausalLM`` and
``AutoModelForCausalLM.from_pretrained`` of an adapter.

The same configs write and read the file that says to which base an adapter belongs (:mod:`.base`).

Five other tuners find out how to read a quantized weight by one function of PEFT's, and all of them ask one method
whether an adapter may be added and another whether merging is allowed: all three learn of packed layers here.

Every function in HOOKS is called with the module of PEFT that it is for, once that has been imported, and does nothing
when called again. Nothing of this package is imported before a packed layer can exist.
"""

import functools
import sys


def _replaced(original) -> bool:
    return hasattr(original, "__wrapped__")


def register_lora(config) -> None:
    """For ``peft.tuners.lora.config``."""
    original = config.LoraConfig.__post_init__
    if _replaced(original):
        return

    @functools.wraps(original)
    def __post_init__(self):
        original(self)
        from ..embedding import LowBitEmbedding
        from ..linear import LowBitLinear
        from .lora import LoraLowBitEmbedding, LoraLowBitLinear

        self._register_custom_module({LowBitLinear: LoraLowBitLinear, LowBitEmbedding: LoraLowBitEmbedding})

    save = config.LoraConfig.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self, save_directory, **kwargs):
        save(self, save_directory, **kwargs)
        if "lowbit_layers" in self.__dict__:
            from .base import write_layers

            write_layers(self, save_directory)

    load = config.PeftConfig.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        loaded = load(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        options = {key: kwargs[key] for key in ("revision", "cache_dir") if kwargs.get(key) is not None}
        loaded.lowbit_origin = (pretrained_model_name_or_path, subfolder, options)
        return loaded

    config.LoraConfig.__post_init__ = __post_init__
    config.LoraConfig.save_pretrained = save_pretrained
    config.PeftConfig.from_pretrained = classmethod(from_pretrained)


def register_backend(utils) -> None:
    """For ``peft.utils.quantization_utils``."""
    name = "resolve_quantization_backend"
    original = getattr(utils, name)
    if _replaced(original):
        return

    @functools.wraps(original)
    def resolve_quantization_backend(base_layer, **kwargs):
        packed = sys.modules.get("hf_lowbit.packed")
        if packed is None or not isinstance(base_layer, packed.PackedMixin):
            return original(base_layer, **kwargs)
        from .backend import LowBitBackend

        return LowBitBackend()

    for module in [m for key, m in sys.modules.items() if key.startswith("peft.")]:
        if vars(module).get(name) is original:  # imported from there already
            setattr(module, name, resolve_quantization_backend)


def register_guard(tuners) -> None:
    """For ``peft.tuners.tuners_utils``."""
    original = tuners.BaseTuner._check_merge_allowed
    if _replaced(original):
        return

    @functools.wraps(original)
    def _check_merge_allowed(self):
        original(self)
        if "hf_lowbit.packed" in sys.modules:
            from .backend import check_merge

            check_merge(self.model)

    first = tuners.BaseTuner._check_new_adapter_config

    @functools.wraps(first)
    def _check_new_adapter_config(self, config):
        first(self, config)
        if "hf_lowbit.packed" in sys.modules:
            from .backend import check_config

            check_config(self.model, config)

    tuners.BaseTuner._check_merge_allowed = _check_merge_allowed
    tuners.BaseTuner._check_new_adapter_config = _check_new_adapter_config


HOOKS = {
    "peft.tuners.lora.config": register_lora,
    "peft.utils.quantization_utils": register_backend,
    "peft.tuners.tuners_utils": register_guard,
}
