"""Compiled decoding: single tokens in one graph of C++, prompts as they are.

    compile_decoding(model)
    model.generate(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=512))

Of a token's time in a small model most is Python: transformers' modules, torch's dispatcher, and the guards of a graph.
``torch.compile`` takes away the modules. On CPUs with this package's kernels it is told two things more. Its C++
wrapper calls a packed layer by a function of the library (``kernels/cpu/graph.cpp``), with no Python and no dispatcher
between; and guards on scales, zero points and tables are left out, which with those on this package's modules take
most of the time of all guards, two milliseconds a token in a model of 30 layers: the library looks at what it is given.
All other guards stay, so that a model that is changed (by an adapter, for instance) is compiled again; they are asked
where something has changed (:mod:`.repeated`). Products that share their input are one call (:mod:`.graph_passes`).

Elsewhere it is plain ``torch.compile``. Left out: graphs for prompts, whose time is in the products.
"""

import ctypes
import functools
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx
from transformers.utils import logging

from . import ops  # noqa: F401 (defines the ops)
from .backends import select
from .decoding import GRAPH
from .formats.columns import PREFIX
from .formats.outliers import PREFIX as OUTLIERS
from .formats.rotated import PREFIX as ROTATED
from .graph_passes import Passes
from .linear import LowBitLinear
from .native_backend import VERSION, describe, library, unavailable
from .repeated import Repeated

logger = logging.get_logger("transformers.hf_lowbit")
OPS = ("linear", "linear_int8")
EAGER = "_lowbit_eager"  # attribute of a compiled forward: the one before
FUNCTIONS = (
    "get_data_ptr", "get_dim", "get_sizes", "get_strides", "get_dtype", "empty_strided", "copy_",
    "delete_tensor_object",
)  # fmt: skip
CHUNK = 4096  # elements of a loop for each thread, at least: a microsecond, which is what waking a thread takes
DTYPES = ("float32", "float16", "bfloat16")
# What the C++ wrapper sees. Its name for an op is torch's; the label says which function of the library that is.
DECLARATION = (
    "AOTITorchError aoti_torch_cpu_{op}(AtenTensorHandle x, AtenTensorHandle weight, "
    "const AtenTensorHandle* companions, int64_t count, AtenTensorHandle* bias, const char* format, "
    'int64_t in_features, const char* backend, AtenTensorHandle* out) __asm__("{prefix}lowbit_graph_{op}")'
)
JOINED = (
    "AOTITorchError aoti_torch_cpu_{op}(AtenTensorHandle x, const AtenTensorHandle* weights, int64_t count, "
    "const AtenTensorHandle* companions, int64_t companion_count, const char* format, int64_t in_features, "
    'const char* backend, AtenTensorHandle* out) __asm__("{prefix}lowbit_graph_{op}")'
)
DECLARATIONS = {**dict.fromkeys(OPS, DECLARATION), "linears": JOINED, "linears_int8": JOINED}
_layers: "weakref.WeakValueDictionary[int, LowBitLinear]" = weakref.WeakValueDictionary()  # those of compiled models
_kept: dict[int, object] = {}  # what the library's descriptions point to, by the address of the codes


class _Torch(ctypes.Structure):
    """``lowbit_torch`` of ``kernels/cpu/lowbit_cpu.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*FUNCTIONS, "get_num_threads", "describe")),
        ("device", ctypes.c_int32),
        ("dtypes", ctypes.c_int32 * len(DTYPES)),
    ]


@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)
def _describe(codes: int) -> int:
    """Tells the library how to read the weight whose codes lie at this address; 0, or 1 if there is none."""
    for layer in _layers.values():
        if layer.weight.data_ptr() == codes:
            try:
                _add(layer)
            except Exception:
                logger.exception("a packed layer of a compiled graph cannot be described")  # C has no exceptions
                return 1
            return 0
    logger.error("a compiled graph got packed codes of no layer that was given to compile_decoding: call it again")
    return 1


def _as_op(companions: list[torch.Tensor], format: str) -> tuple[list[torch.Tensor], str]:
    """The companions and the format that the op gets, which :mod:`.ops` takes out of those of a composed format."""
    if format.startswith(OUTLIERS):
        companions, format = companions[:-2], format.partition("+")[2]
    format = format.removeprefix(ROTATED)
    if format.startswith(PREFIX):
        companions, format = companions[:-1], "int:" + format.removeprefix(PREFIX)
    return companions, format


def _add(layer: LowBitLinear) -> None:
    """Tells the library how to read the weight of ``layer``."""
    codes = layer.weight.data_ptr()
    companions, format = _as_op(layer.companions(), layer.spec)
    found = describe(layer.weight, companions, format, layer.in_features)
    _, _, levels, steps = found.int8_table
    in_place = (found.record.scales, found.record.zeros, found.record.levels)
    lie = [tensor.data_ptr() for tensor in companions]
    copied = [0 if p in in_place else t.numel() * t.element_size() for p, t in zip(lie, companions, strict=True)]
    count = len(companions)
    result = library().lowbit_graph_add(
        found.pointer, levels, steps, format.encode(), (ctypes.c_void_p * count)(*lie),
        (ctypes.c_int64 * count)(*copied), count,
    )  # fmt: skip
    if result:
        raise RuntimeError(f"a CPU kernel refused to keep a packed weight (error {result})")
    if codes not in _kept:
        weakref.finalize(layer.weight, _forget, codes).atexit = False
    _kept[codes] = found


def _forget(codes: int) -> None:
    library().lowbit_graph_forget(codes)
    _kept.pop(codes, None)


@functools.cache
def _connect() -> str | None:
    """Gives the library torch's C interface, and graphs the library; or why that is impossible."""
    if reason := unavailable():
        return f"the CPU kernels {reason}"
    if sys.platform not in ("linux", "darwin"):
        return f"graphs of C++ are not tried on {sys.platform}"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lowbit = library()
    lowbit.lowbit_graph_add.argtypes = [pointer, pointer, pointer, ctypes.c_char_p, pointer, pointer, number]
    lowbit.lowbit_graph_forget.argtypes = [pointer]
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        for op in DECLARATIONS:
            getattr(lowbit, f"lowbit_graph_{op}")
        interface = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        functions = [getattr(interface, f"aoti_torch_{name}") for name in FUNCTIONS]
        functions.append(interface.torch_get_num_threads)
        numbers = [getattr(interface, f"aoti_torch_dtype_{name}")() for name in DTYPES]
        device = interface.aoti_torch_device_type_cpu()
        # Graphs find the library's functions among the symbols of the process.
        ctypes.CDLL(lowbit._name, mode=ctypes.RTLD_GLOBAL)
    except (OSError, AttributeError) as error:
        return f"torch {torch.__version__} has not the C interface that is needed: {error}"
    pointers = [ctypes.cast(function, pointer).value for function in (*functions, _describe)]
    lowbit.lowbit_use_torch(ctypes.byref(_Torch(*pointers, device, (ctypes.c_int32 * len(DTYPES))(*numbers))))
    return None


class _Functions(dict):
    """The library's functions by op, for Inductor; what its cache of graphs knows of them is their version."""

    def __init__(self, version: int):
        prefix = "_" if sys.platform == "darwin" else ""
        super().__init__({
            getattr(torch.ops.lowbit, op).default: [text.format(op=op, prefix=prefix)]
            for op, text in DECLARATIONS.items()
        })  # fmt: skip
        self.version = version

    def __reduce__(self):
        return _Functions, (self.version,)


def graph_options(model: nn.Module) -> dict:
    """``options`` of ``torch.compile`` for ``model``: those for graphs of C++, or none where they cannot be.

    A log message at level "info" says why not.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
    reason = "it has no packed layers" if not packed else _connect() or _unsuited(packed)
    if reason is not None:
        logger.info(f"compiled decoding of {type(model).__name__} is plain torch.compile: {reason}")
        return {}
    _layers.update({id(layer): layer for layer in packed.values()})
    return {
        "cpp_wrapper": True,
        "cpp_wrapper_build_separate": True,  # the wrapper, long and quick to run, with few optimisations
        "size_asserts": False,  # guards and the library look at sizes
        "aot_inductor.custom_ops_to_c_shims": _Functions(VERSION),
        "post_grad_custom_post_pass": Passes(),
        "cpp.min_chunk_size": CHUNK,
        "guard_filter_fn": _guard_filter(packed),
    }


def _unsuited(packed: dict[str, LowBitLinear]) -> str | None:
    """Why graphs cannot call the library for all of these layers, if they cannot."""
    for name, layer in packed.items():
        if layer.streamed is not None:
            return f"{name} is streamed"
        if layer.weight.device.type != "cpu":
            return f"{name} is on {layer.weight.device}"
        _, format = _as_op([], layer.spec)
        if select(OPS[layer.activations == "int8"], format, "cpu", torch.float32, layer.backend).backend != "native":
            return f"{name} runs in another backend"
    return None


def _guard_filter(packed: dict[str, LowBitLinear]):
    """A filter of guards: without those on the companions of codes, and on our modules being one under all names."""
    paths = {
        "".join(f"._modules['{part}']" for part in name.split(".")): set(m.packed_names[1:])
        for name, m in packed.items()
    }

    def wanted(guard) -> bool:
        if guard.guard_type == "DUPLICATE_INPUT":
            return "hf_lowbit" not in guard.name
        owner, _, name = guard.name.partition("._parameters['")
        owner = owner[max(0, owner.find("._modules")) :]
        return guard.guard_type != "TENSOR_MATCH" or name.removesuffix("']") not in paths.get(owner, ())

    return lambda guards: [wanted(guard) for guard in guards]


def _graph(model: nn.Module, eager: Callable, options: dict) -> Repeated:
    """``eager`` in a graph of C++, whose calls are repeated where nothing has changed."""
    guards = {"guard_filter_fn": options.pop("guard_filter_fn")}
    compile = functools.partial(torch.compile, eager, fullgraph=True, dynamic=False, options=guards)
    return Repeated(model, lambda b: compile(backend=b), functools.partial(compile_fx, config_patches=options))


def compile_decoding(model: nn.Module) -> None:
    """Makes ``model`` compute single tokens in a compiled graph; longer inputs run as before.

    The graph is compiled at the first token, which takes about a minute for a small model on a CPU, and is found in
    ``TORCHINDUCTOR_CACHE_DIR`` by later processes. ``generate`` wants a ``StaticCache`` of one length: another length
    is compiled again. ``del model.forward`` undoes it; do so before ``copy.deepcopy``, whose result would compute with
    this model. What the last call was given, its cache included, stays in memory until the next one.

    Args:
        model: A causal model of transformers, packed or not.
    """
    eager = getattr(model.forward, EAGER, model.forward)
    options = graph_options(model)
    graph = _graph(model, eager, options) if options else torch.compile(eager, fullgraph=True, dynamic=False)

    @functools.wraps(eager)
    def forward(input_ids=None, **kwargs):
        single = input_ids is not None and input_ids.shape[1] == 1
        return (graph if single else eager)(input_ids=input_ids, **kwargs)

    vars(forward).update({EAGER: eager, GRAPH: graph} if options else {EAGER: eager})
    model.forward = forward
