"""Which tensors of a repo are stored coded, and how they come back while a model is loaded.

``storage="entropy"`` or ``"zstd"`` codes what gets smaller by at least :data:`LEAST_GAIN`: packed weights, their
companions, and what is kept in 16-bit floats. A coded tensor has the name of the one that it stands for and says itself
what it is (:mod:`.entropy`), so that any mixture of raw and coded tensors loads, whatever the config says. What
transformers would rearrange on its way from the file to the model (experts that are fused, for instance) stays raw,
since its operations are not asked about bytes that mean nothing to them.

While loading, :func:`decoded_later` is asked about each tensor of the files before it is read, and puts
:class:`DecodeStored` behind those that may be coded.
"""

import re

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.distributed.utils import is_dtensor

from ..formats import parse_format
from . import entropy, entropy_device

# Formats whose `weight` is planes of whole codes, or ternary lanes.
PLAIN = ("int", "int_columns", "nf", "fp4", "codebook", "ternary")
LEAST_GAIN = 0.02
LEAST_BYTES = 4096  # below which a head is too large a part of it


def store(name: str, tensor: torch.Tensor, bits: float | None, codec: str) -> torch.Tensor:
    """``tensor`` as it is stored: coded, or itself where that does not pay.

    Args:
        name: Of the tensor: ``weight`` and what is added to it for a packed weight.
        tensor: On the CPU.
        bits: Width of the codes of the packed weight that it belongs to, or None for any other tensor.
        codec: "entropy" or "zstd".
    """
    if entropy.is_coded(tensor):  # it only looks like it: coded it comes back as it was
        return entropy.encode(tensor, codec=codec)
    if tensor.dtype not in entropy.DTYPES or tensor.nbytes < LEAST_BYTES:
        return tensor
    suffix = name.rpartition(".")[2].removeprefix("weight")
    symbols = entropy.symbols_for(suffix, tensor.dtype, bits)
    coded = entropy.encode(tensor, symbols, codec)
    return coded if coded.nbytes <= (1 - LEAST_GAIN) * tensor.nbytes else tensor


class Widths:
    """Widths of codes by the names of tensors, from ``layers`` in a config."""

    def __init__(self, layers: dict[str, str], prefix: str = ""):
        self.prefix = prefix
        self.patterns = [
            (re.compile(r"\d+".join(map(re.escape, key.split("*")))), parse_format(text))
            for key, text in layers.items()
        ]

    def __call__(self, name: str) -> float | None:
        """The width of the packed weight that the tensor ``name`` belongs to, or None."""
        module, _, tensor = name.rpartition(".")
        if not tensor.startswith("weight"):
            return None
        names = [module, module.removeprefix(self.prefix + "."), f"{self.prefix}.{module}"]
        format = next((format for pattern, format in self.patterns if any(map(pattern.fullmatch, names))), None)
        return format.bits if format is not None and format.name in PLAIN else None


def store_model(model, layers: dict[str, str], codec: str) -> dict[str, torch.Tensor] | None:
    """The state dict of ``model`` as it is stored, for ``save_pretrained``, or None where it has to save by itself.

    That is where only adapters are saved, or weights are in parts on several devices or not in memory.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return None
    tensors = model.state_dict()
    if any(map(is_dtensor, tensors.values())):
        return None
    conversions = [c.reverse_transform() for c in getattr(model, "_weight_conversions", None) or []]
    converters = [c for c in conversions if not isinstance(c, WeightRenaming)]
    widths, stored = Widths(layers, getattr(model, "base_model_prefix", "")), {}
    done: dict[int, torch.Tensor] = {}  # tied tensors stay one
    streaming = getattr(getattr(model, "hf_quantizer", None), "streaming", None)
    as_stored = streaming.as_stored if streaming is not None else ()
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or name in as_stored or any(c.rename_source_key(name)[1] for c in converters):
            stored[name] = tensor
            continue
        place = tensor.data_ptr()
        if place not in done or not place:
            done[place] = store(name, tensor.detach().cpu(), widths(name), codec)
            if done[place].data_ptr() == place or done[place].dtype != torch.uint8:
                done[place] = tensor
        stored[name] = done[place]
    return stored


# -- loading -----------------------------------------------------------------------------------------------------------


def decoded_later(hf_quantizer, mapping, tensor, dtype: torch.dtype | None) -> bool:
    """Whether ``tensor``, of a file or a state dict, may be coded; then ``mapping`` decodes it, to ``dtype`` if float.

    Raises:
        ValueError: where transformers would rearrange it before.
    """
    if hasattr(tensor, "get_dtype"):
        candidate = tensor.get_dtype() == "U8" and len(tensor.get_shape()) == 1
    else:
        candidate = tensor.dtype == torch.uint8 and tensor.ndim == 1
    if candidate and isinstance(mapping, WeightConverter):
        names = ", ".join(mapping.source_patterns)
        raise ValueError(
            f"{names} may be coded, and transformers would convert it when it is loaded: "
            "write a raw repo with `hf-lowbit decompress SRC DST`, and load that"
        )
    if candidate:
        mapping.quantization_operation = DecodeStored(hf_quantizer, dtype)
    return candidate


class DecodeStored(ConversionOps):
    """The op that decodes one tensor while a model is loaded."""

    def __init__(self, hf_quantizer, dtype: torch.dtype | None):
        self.hf_quantizer, self.dtype = hf_quantizer, dtype

    def convert(self, input_dict, **kwargs):
        """``{name: coded}`` to ``{name: tensor}``; a tensor that is not coded stays as it is."""
        tensors = {}
        for name, found in input_dict.items():
            tensor = found[0] if isinstance(found, list) else found
            if self.hf_quantizer.streaming is not None and name in self.hf_quantizer.streaming.fields:
                tensors[name] = self.hf_quantizer.streaming.placeholder(name)
                continue
            here = tensor.cpu()
            try:
                if not entropy.is_coded(here):
                    tensors[name] = tensor
                    continue
                there = entropy_device.serves(tensor.device)
                decoded = entropy_device.decode_on_device(tensor) if there else entropy.decode_tensor(here)
            except (ValueError, ImportError, MemoryError) as error:
                # See LowBitHfQuantizer.param_needs_quantization: it is raised there.
                self.hf_quantizer.failure = type(error)(f"{name} cannot be decoded: {error}")
                return {name: tensor.new_empty(0, 0)}
            cast = self.dtype if decoded.is_floating_point() else None
            tensors[name] = decoded.to(device=tensor.device, dtype=cast)
        return tensors
