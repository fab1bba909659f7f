"""Transformers' hooks, and nothing else: how a model is quantized or loaded by ``from_pretrained``.

The order in which transformers calls them:

1. ``__init__`` and ``validate_environment`` refuse what cannot work, before anything is read.
2. ``_process_model_before_weight_loading`` gets the model on the ``meta`` device. A plan is made (:mod:`.plan`) and
   every module in it is replaced by an empty packed one (:mod:`.linear`, :mod:`.embedding`). For a packed repo the
   headers of its files are compared with these modules here, before a byte of a weight is read.
   A method that needs calibration runs through the checkpoint's files before they are read for loading, see
   :mod:`.quantization`, and what it decided is taken in step 3.
3. While the checkpoint streams in, ``param_needs_quantization`` picks the weights of packed modules, and the op from
   ``get_quantize_ops`` turns each into its packed tensors, on its own device. One float weight is alive at a time.
4. ``_process_model_after_weight_loading`` checks that nothing is missing, gives modules that the checkpoint does not
   have (a new head) their float form back, freezes what was loaded and reports the coverage.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from .backends import select
from .budgets import check_present, read_budgets
from .config import QUANT_METHOD, LowBitConfig
from .distributed import keep_codes_from_ddp
from .formats import OutlierFormat
from .low_rank import NAMES
from .memory import FreedMemory
from .nesting import check_load_bits, leave_unread, runs_as, unnest
from .plan import Kept, Packed, Plan, ends_of, make_plan
from .storage.headers import check_checkpoint
from .storage.stored import decoded_later, store_model
from .swap import keep_packed_layout, refuse_resizing, replace_modules, restore_modules
from .version import __version__

if TYPE_CHECKING:
    from .streaming import Streaming

register_quantization_config(QUANT_METHOD)(LowBitConfig)
logger = logging.get_logger("transformers.hf_lowbit")  # follows transformers' verbosity


@register_quantizer(QUANT_METHOD)
class LowBitHfQuantizer(HfQuantizer):
    """Quantizes while loading, or loads what is packed.

    Attributes:
        plan: What is packed and what is kept, after loading has begun.
        coverage: The same as totals, see :meth:`hf_lowbit.plan.Plan.coverage`.
        streaming: Layers that stay on disk, if ``max_memory_bytes`` was given; its ``report()`` says what was read.
    """

    requires_calibration = False
    quantization_config: LowBitConfig
    # The companions of a packed weight, for tensor- and expert-parallel plans.
    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": [
            "weight",
            "weight_scales",
            "weight_scales_range",
            "weight_zeros",
            "weight_codebook",
            "weight_columns",
            "weight_outliers",
            "weight_outlier_index",
            "weight_like",
            *(f"weight_levels{bits}" for bits in range(2, 9)),
            *(f"weight_bit{bits}" for bits in range(3, 9)),
            *NAMES,
        ]
    }

    def __init__(self, quantization_config: LowBitConfig, **kwargs):
        # A copy: what is written into it below must not reach the next model that the user loads with the same one.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        quantization_config = self.quantization_config
        self.plan: Plan | None = None
        self.failure: Exception | None = None
        self.coded = False  # whether the checkpoint has coded tensors
        self.freed = FreedMemory()
        self.trains_scales = False  # set by hf_lowbit.adapters.scales
        self.streaming: Streaming | None = None
        self.tuned = {}  # and what they made of parameters that are not packed
        self.solved = None  # what calibrated methods decided, by module name
        if self.pre_quantized:
            quantization_config.check_requested()
            if quantization_config.layers is None:
                raise ValueError("the repo's quantization_config has no 'layers': it was not written by hf_lowbit")
        else:
            quantization_config.layers = quantization_config.low_rank = quantization_config.folded = None
        check_load_bits(quantization_config, self.pre_quantized)

    @property
    def coverage(self) -> dict:
        """Totals of what was packed and kept."""
        return self.plan.coverage() if self.plan is not None else {}

    def validate_environment(self, *args, device_map=None, **kwargs):
        if not self.pre_quantized:
            self.quantization_config.check_calibration()
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not self.pre_quantized and "disk" in places:
            raise ValueError(
                "quantizing on the fly to a 'disk' device is not possible: quantize to a folder first "
                "(`hf-lowbit quantize SRC DST`), then load that folder with the same device_map"
            )
        if self.quantization_config.dequantize and "disk" in places:
            raise ValueError("dequantizing to a 'disk' device is not possible: load without offloading, and save")
        if self.quantization_config.max_memory_bytes is None:
            return
        if not self.pre_quantized:
            raise ValueError(
                "max_memory_bytes= reads packed layers from disk: quantize to a folder first (`hf-lowbit quantize SRC "
                "DST`), then load that folder with it"
            )
        if elsewhere := [str(place) for place in places if str(place) not in ("None", "cpu")]:
            raise ValueError(
                f"max_memory_bytes= says itself where layers are, and device_map sends them to {elsewhere[0]!r}: drop "
                "device_map, and name accelerators as in max_memory_bytes={'cpu': '300MB', 0: '2GB'}"
            )
        check_present(list(read_budgets(self.quantization_config.max_memory_bytes)))

    # -- before loading ------------------------------------------------------------------------------------------------

    def check_backend(self, device_map) -> None:
        """Refuses a forced backend that cannot run the planned formats, before anything is loaded.

        Raises:
            RuntimeError: for a backend, with its reasons.
            ValueError: for 8-bit activations on anything but a CPU.
        """
        config = self.quantization_config
        op = "linear" if config.activations == "float" else "linear_int8"
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
        budgets = set(read_budgets(config.max_memory_bytes))
        places = (budgets - {"cpu"}) or places
        devices = {
            torch.device(p if isinstance(p, (str, torch.device)) else f"cuda:{p}").type
            for p in places
            if p not in ("disk", "auto", "balanced", "balanced_low_0", "sequential")
        }
        formats = (runs_as(p.format) if self.pre_quantized else p.format for p in self.plan.packed.values())
        for spec in dict.fromkeys(format.multiplied.spec for format in formats):
            for device in devices:
                if op == "linear_int8" and device not in ("cpu", "meta"):
                    raise ValueError(
                        f"activations='int8' is for CPUs, and this model goes to {device!r}: load it without, or with "
                        "device_map='cpu'"
                    )
                select(op, spec, device, torch.float32, config.backend)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        refuse_tensor_parallelism(model.config)
        if self.quantization_config.seeks_allocation:
            self._spend_budget(model, checkpoint_files)
        self.plan = make_plan(model, self.quantization_config)
        if not self.plan.packed:
            logger.warning(
                "hf_lowbit found nothing to pack in %s: there is no nn.Linear or Conv1D", type(model).__name__
            )
        self.check_backend(device_map)
        if not self.pre_quantized and self.quantization_config.needs_calibration:
            from .quantization import solve_checkpoint

            self.solved, self.tuned = solve_checkpoint(model, checkpoint_files, device_map, self.quantization_config)
            self.plan = make_plan(model, self.quantization_config)
        replace_modules(model, self.plan, self.quantization_config.backend, self.quantization_config.activations)
        self.coded = check_checkpoint(model, self.plan, checkpoint_files)
        self.refuse_offloading(device_map)
        if self.pre_quantized:
            leave_unread(model, self.plan)
        if budgets := read_budgets(self.quantization_config.max_memory_bytes):
            from .storage.scratch import find_folder
            from .streaming import Streaming

            folder = find_folder(self.quantization_config.offload_folder)
            self.streaming = Streaming(model, checkpoint_files, budgets, folder)
        return model

    def _spend_budget(self, model, checkpoint_files) -> None:
        """Searches widths for the checkpoint that is about to be loaded."""
        from .allocation.budget import settle  # which imports this module

        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(
                f"bits={self.quantization_config.bits} is a budget, which is searched on safetensors files, and there "
                "are none: save the model by save_pretrained, and load that folder"
            )
        folder = Path(checkpoint_files[0]).parent
        self.quantization_config = settle(folder, self.quantization_config, model.config.dtype)

    # -- while loading -------------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        if self.failure is not None:
            # Transformers turns an exception inside an op into a log line, and asks this question right after one that
            # returned a tensor of another shape: the place to stop the load with the error itself.
            failure, self.failure = self.failure, None
            raise failure
        module, _, tensor = param_name.rpartition(".")
        return not self.pre_quantized and tensor == "weight" and module in self.plan.packed

    def get_new_dtype(self, converter, param, dtype):
        # Asked for every tensor of a packed repo before it is read: the place to say that it is decoded afterwards.
        if decoded_later(self, converter, param, dtype):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self):
        return LowBitQuantize(self)

    # -- after loading -------------------------------------------------------------------------------------------------

    def refuse_offloading(self, device_map) -> None:
        """Refuses to leave coded tensors to transformers' disk offload, which would read them as they are."""
        if self.coded and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "the tensors of this repo are coded and cannot be offloaded to disk: write a raw repo with `hf-lowbit "
                "decompress SRC DST`, and load that"
            )

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.refuse_offloading(getattr(model, "hf_device_map", None))
        new = [name for name in self.plan.packed if not self.is_loaded(model, name)]
        for name in new:
            weight = self.plan.packed.pop(name).shape
            nbytes = weight[0] * weight[1] * model.dtype.itemsize
            self.plan.kept.append(Kept(name, nbytes, "new: not in the checkpoint"))
        if new:
            restore_modules(model, model.dtype, new)
            model.initialize_weights()  # of what is not initialised yet
        for name, value in self.tuned.items():
            model.get_parameter(name).data.copy_(value)
        if self.pre_quantized:
            unnest(model, self.plan, self.quantization_config)
        if self.quantization_config.unpacks_embeddings:
            self._unpack_embeddings(model)
        if not self.pre_quantized:
            self.quantization_config.layers = self.plan.layers()
            self.quantization_config.low_rank = self.plan.low_rank()
        self.freed.give_back()
        keep_packed_layout(model)
        keep_codes_from_ddp(model)
        refuse_resizing(model)
        unexpected = [k for k in self.plan.kept if not k.expected]
        log = logger.warning_once if unexpected else logger.info
        log(self.plan.report())
        if self.streaming is not None:
            self.streaming.start(model)
        if self.quantization_config.dequantize:
            restore_modules(model, model.config.dtype)
            self.remove_quantization_config(model)
        return model

    def _unpack_embeddings(self, model) -> None:
        """Dequantizes the input embedding and the output head of a packed repo."""
        ends = ends_of(model)
        names = [name for name in self.plan.packed if name in ends]
        restore_modules(model, model.dtype, names)
        for name in names:
            rows, columns = self.plan.packed.pop(name).shape
            if self.plan.tied.pop(name, None) is None:
                nbytes = rows * columns * model.dtype.itemsize
                self.plan.kept.append(Kept(name, nbytes, "embeddings='float', dequantized"))
        self.quantization_config.embeddings = "float"
        self.quantization_config.layers = self.plan.layers()
        self.quantization_config.low_rank = self.plan.low_rank()

    def is_loaded(self, model, name: str) -> bool:
        """Whether the module ``name`` came whole from the checkpoint; False for one that the checkpoint lacks.

        Raises:
            ValueError: for one of which a part is missing or has another dtype, naming it.
        """
        module = model.get_submodule(name)
        missing = []
        for suffix, (_, dtype) in module.format.tensors(module.packed_shape).items():
            parameter = getattr(module, "weight" + suffix)
            if parameter.device.type == "meta":  # offloaded
                continue
            if not getattr(parameter, "_is_hf_initialized", False):
                missing.append("weight" + suffix)
            elif parameter.dtype != dtype and parameter.dtype != torch.float32:
                raise ValueError(f"{name}.weight{suffix} is {parameter.dtype} in the checkpoint, not {dtype}")
            else:
                # Where a model keeps a module in float32, transformers casts its scales, which loses nothing.
                parameter.data = parameter.data.to(dtype)
        for factor, tensor in zip(NAMES, module.factors(), strict=False):
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False):
                missing.append(factor)
        if missing and (self.pre_quantized or "weight" not in missing):
            raise ValueError(f"the checkpoint has no tensor {name}.{missing[0]}: it is incomplete")
        bias = getattr(module, "bias", None)
        if bias is not None and bias.device.type != "meta" and not getattr(bias, "_is_hf_initialized", False):
            torch.nn.init.zeros_(bias)  # as transformers does, which has warned of it
        module.freeze_packed()
        return not missing

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        restore_modules(model, dtype)
        return model if dtype is None else model.to(dtype)

    # -- what transformers asks ----------------------------------------------------------------------------------------

    def param_element_size(self, model, param_name, param):
        # Sizes for device maps: packed parameters have their final shape and dtype already.
        return param.element_size()

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer may train the model without an adapter: once its scales are trainable."""
        return self.trains_scales

    @property
    def is_compileable(self) -> bool:
        return self.streaming is None or not self.streaming.streams

    def get_state_dict_and_metadata(self, model):
        config, metadata = self.quantization_config, {"quantized_with": f"hf_lowbit {__version__}"}
        stored = None if config.storage == "raw" else store_model(model, config.layers or {}, config.storage)
        return stored, metadata


def refuse_tensor_parallelism(config) -> None:
    """Refuses to split packed tensors over processes, which transformers would do while it reads them.

    Raises:
        ValueError: if ``config`` says that the model is distributed by a tensor parallel plan.
    """
    distributed = getattr(config, "distributed_config", None)
    size = getattr(distributed, "tp_size", None) or 1
    if size > 1 or getattr(distributed, "tp_plan", None):
        raise ValueError(
            "packed layers cannot be split over processes (tensor parallelism): load without tp_plan= and tp_size=; "
            "device_map='auto' spreads whole layers over the devices of one process"
        )


class LowBitQuantize(ConversionOps):
    """The op that turns one float weight into its packed tensors while a checkpoint is loaded."""

    def __init__(self, hf_quantizer: LowBitHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, model=None, **kwargs):
        """``{full name: weight}`` to ``{full name + suffix: packed tensor}``."""
        tensors = {}
        for name, weight in input_dict.items():  # several where a checkpoint fuses what the model has apart
            weight = weight[0] if isinstance(weight, list) else weight
            planned = self.hf_quantizer.plan.packed.get(name.removesuffix(".weight"))
            if planned is None:
                tensors[name] = weight
                continue
            module = model.get_submodule(planned.name)
            try:
                solved = None if self.hf_quantizer.solved is None else self.hf_quantizer.solved(planned.name)
                if solved is None:
                    solved = quantize_weight(
                        weight.T if getattr(module, "transposed", False) else weight, planned, name
                    )
                packed = {suffix: tensor.to(weight.device) for suffix, tensor in solved.items()}
            except Exception as error:
                self.hf_quantizer.failure = error  # raised by param_needs_quantization, see there
                return {name: weight.new_empty(0)}
            tensors.update({name + suffix: tensor for suffix, tensor in packed.items()})
            self.hf_quantizer.freed.add(weight.nbytes)
            if hasattr(module, "weight_like"):
                tensors[name + "_like"] = weight.new_empty(0)
        return tensors


@torch.no_grad()
def quantize_weight(weight: torch.Tensor, planned: Packed, name: str, statistics=None) -> dict[str, torch.Tensor]:
    """Packs ``weight`` (N, K), floating point, as ``planned``.

    Args:
        weight: The weight.
        planned: Format, method and shape.
        name: For messages.
        statistics: The :class:`~hf_lowbit.calibration.Moments` of its inputs, which a calibrated method needs.

    Returns:
        The packed tensors by suffix, on the device of ``weight``.

    Raises:
        ValueError: for a weight that is not float, not finite, or of another shape than planned, or for a method that
            lacks calibration, naming ``name``.
    """
    if statistics is None and planned.method is not None and planned.method.needs_calibration:
        raise ValueError(
            f"{name}: method {planned.method.name!r} needs calibration data: give calibration=, such as a list of "
            "texts, or use another method"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"{name} is {weight.dtype}, not floating point: is this repo quantized already, by something else?"
        )
    if tuple(weight.shape) != tuple(planned.shape):
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)} in the checkpoint, the config says {tuple(planned.shape)}"
        )
    if not torch.isfinite(weight.sum(dtype=torch.float64)):  # NaN and infinities survive a sum, which needs no memory
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite values: the checkpoint is damaged, or overflowed in its dtype"
        )
    try:
        format, kept = planned.format, {}
        if isinstance(format, OutlierFormat):
            weight, kept = format.take_out(weight, None if statistics is None else statistics.square.diagonal())
        if format.inner is not format:
            weight, statistics = format.turn(weight.float()), None if statistics is None else statistics.turned(format)
        weight = planned.method.prepared(weight, format.inner, statistics)
        return {**format.pack(planned.method.quantize(weight, format.inner, statistics)), **kept}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
