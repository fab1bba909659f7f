"""Compiled decoding: the functions for graphs of C++ beside the ops, and models that are compiled and changed.

The functions take handles of tensors, which torch gives out here as it does to its graphs, so that most is tested
without compiling. They run the same kernels as the ops: results are the same bit by bit.
"""

import copy
import ctypes
import gc
import weakref

import pytest
import torch
from conftest import inputs, load
from peft import LoraConfig, get_peft_model
from test_native import DTYPES, FORMATS, INT4, packed
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import StaticCache
from transformers.utils import logging

from hf_lowbit import LowBitConfig, compiled, ops, repeated
from hf_lowbit import native_backend as native
from hf_lowbit.formats import parse_format
from hf_lowbit.graph_passes import join_products
from hf_lowbit.linear import LowBitLinear

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")
COMPOSED = (
    "outliers=0.5+int:bits=3,group_size=32",
    "hadamard+int:bits=4,group_size=32,symmetric=False",
    "int_columns:bits=4,group_size=-1",
)


def layer_of(spec: str, N: int, K: int, bias: bool = True, activations: str = "float") -> LowBitLinear:
    """A layer of random codes."""
    weight, companions, text = packed(spec, N, K)
    layer = LowBitLinear(K, N, bias, parse_format(text), activations=activations)
    layer.set_packed(dict(zip(("", *layer.format.suffixes()), (weight, *companions), strict=True)))
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def known(*layers: LowBitLinear) -> None:
    """Makes the library able to ask for these layers."""
    assert compiled.graph_options(nn.ModuleList(layers))["cpp_wrapper"]


def call(layer: LowBitLinear, x: torch.Tensor, format: str | None = None) -> torch.Tensor:
    """What a graph gets from the library for ``layer``."""
    companions, spec = compiled._as_op(layer.companions(), layer.spec)
    op = compiled.OPS[layer.activations == "int8"]
    function = getattr(native.library(), f"lowbit_graph_{op}")
    tensors = [x, layer.weight.detach(), *(t.detach() for t in companions)]
    bias = None if layer.bias is None else layer.bias.detach()
    handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors if bias is None else [*tensors, bias])
    pointers = [pointer(handle) for handle in handles]
    out, count = ctypes.c_void_p(), len(companions)
    given = None if bias is None else ctypes.byref(pointers[-1])
    listed = (ctypes.c_void_p * count)(*(p.value for p in pointers[2 : 2 + count]))
    result = function(
        pointers[0], pointers[1], listed, ctypes.c_int64(count), given, (format or spec).encode(),
        ctypes.c_int64(layer.in_features), b"auto", ctypes.byref(out),
    )  # fmt: skip
    torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)  # which frees them
    if result:
        raise RuntimeError(f"error {result}")
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(out))


def pointer(handle) -> ctypes.c_void_p:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.c_void_p(get(handle, None))


def capsule(pointer: ctypes.c_void_p):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(pointer, None, None)


@needs_library
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("spec", FORMATS)
@torch.no_grad()
def test_functions_for_graphs_are_the_ops(spec, activations):
    layer = layer_of(spec, 65, 577, activations=activations)
    known(layer)
    for dtype, shape in zip(DTYPES, [(1, 1, 577), (3, 577), (577,)], strict=True):
        x = torch.randn(shape).to(dtype)
        got, expected = call(layer, x), layer(x)
        assert got.dtype == dtype and got.shape == expected.shape
        assert torch.equal(got, expected)


def call_joined(layers: list[LowBitLinear], x: torch.Tensor) -> torch.Tensor:
    """What a graph gets from the library for ``layers`` in one."""
    per_layer = [compiled._as_op(layer.companions(), layer.spec) for layer in layers]
    companions, spec = [c for own, _ in per_layer for c in own], per_layer[0][1]
    function = getattr(
        native.library(), f"lowbit_graph_{'linears_int8' if layers[0].activations == 'int8' else 'linears'}"
    )
    tensors = [x, *(layer.weight.detach() for layer in layers), *(t.detach() for t in companions)]
    handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
    pointers = [pointer(handle).value for handle in handles]
    many, out = len(layers), ctypes.c_void_p()
    result = function(
        ctypes.c_void_p(pointers[0]), (ctypes.c_void_p * many)(*pointers[1 : 1 + many]), ctypes.c_int64(many),
        (ctypes.c_void_p * len(companions))(*pointers[1 + many :]), ctypes.c_int64(len(companions)), spec.encode(),
        ctypes.c_int64(layers[0].in_features), b"auto", ctypes.byref(out),
    )  # fmt: skip
    torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)
    if result:
        raise RuntimeError(f"error {result}")
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(out))


@needs_library
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("spec", FORMATS)
@torch.no_grad()
def test_joined_products_are_the_single_ones(spec, activations):
    """Also where rows are left to other kernels, and with threads."""
    layers = [layer_of(spec, rows, 577, bias=False, activations=activations) for rows in (65, 8, 1)]
    known(*layers)
    for dtype, shape in zip(DTYPES, [(1, 1, 577), (1, 577), (577,)], strict=True):
        x = torch.randn(shape).to(dtype)
        weird = x.clone().fill_(float("nan"))
        for each in (x, weird):
            got, expected = call_joined(layers, each), torch.cat([layer(each) for layer in layers], -1)
            assert got.dtype == dtype and torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@needs_library
@torch.no_grad()
def test_joined_products_share_threads():
    layers = [layer_of(INT4, rows, 576, bias=False) for rows in (1536, 100, 1536)]
    known(*layers)
    x, before = torch.randn(1, 576), torch.get_num_threads()
    expected = torch.cat([layer(x) for layer in layers], -1)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(call_joined(layers, x), expected)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_what_cannot_be_joined():
    layers, other = [layer_of(INT4, 16, 64, bias=False) for _ in range(2)], layer_of(INT4, 16, 96, bias=False)
    known(*layers, other)
    for given, x in (
        (layers, torch.randn(2, 64)),  # rows
        ([layers[0], other], torch.randn(1, 64)),
        (layers * 9, torch.randn(1, 64)),  # more than 16
        ([layers[0], layer_of(INT4, 16, 64)], torch.randn(1, 64)),  # no layer of a compiled model
    ):
        with pytest.raises(RuntimeError, match="error 1"):
            call_joined(given, x)


@torch.no_grad()
def test_products_of_one_row_are_joined_in_a_graph():
    """Those without a bias, of one format, of weights that the graph is given; their values stay the same."""
    one, two, biased = (layer_of(INT4, rows, 64, bias=bias) for rows, bias in ((16, False), (8, False), (4, True)))
    other = layer_of("nf:bits=4,group_size=64", 8, 64, bias=False)
    layers = nn.ModuleList([one, biased, two, other, one])

    class All(nn.Module):
        def forward(self, x):
            return [layer(x) * 2 for layer in layers] + [two(x + 1)]

    model = All()
    model.layers = layers
    parameters = dict(model.named_parameters())
    for rows, gone in ((1, 2), (3, 0)):
        x = torch.randn(rows, 64)
        graph = make_fx(lambda x, p: torch.func.functional_call(model, p, x))(x, parameters)
        assert join_products(graph.graph) == gone
        graph.graph.lint()
        graph.recompile()
        for got, expected in zip(graph(x, parameters), model(x), strict=True):
            assert torch.equal(got, expected)
    assert join_products(make_fx(model)(torch.randn(1, 64)).graph) == 0  # weights are constants there


@needs_library
@torch.no_grad()
def test_inputs_of_any_strides_and_many_rows():
    layer = layer_of(INT4, 64, 96, bias=False)
    known(layer)
    for x in (torch.randn(96, 7).T, torch.randn(2, 300, 96), torch.randn(4, 5, 96)[:, ::2], torch.randn(0, 96)):
        got = call(layer, x)
        assert torch.equal(got, layer(x)) and got.is_contiguous()


@needs_library
@pytest.mark.parametrize("spec", COMPOSED)
@torch.no_grad()
def test_composed_formats_are_asked_for_as_their_op_is(spec):
    format = parse_format(spec)
    layer = LowBitLinear(64, 32, False, format)
    stored = {s: torch.randint(1, 30, t.shape).to(t.dtype) for s, t in format.empty((32, 64)).items()}
    layer.set_packed(stored)
    known(layer)
    companions, text = compiled._as_op(layer.companions(), layer.spec)
    x = torch.randn(2, 64)
    assert torch.equal(call(layer, x), ops.linear(x, layer.weight, companions, None, text, 64))


@needs_library
@pytest.mark.parametrize("spec", [INT4, "codebook:bits=4,group_size=64", "codebook:bits=2,group_size=-1,codebook=row"])
@torch.no_grad()
def test_changes_of_weights_are_seen(spec):
    """In place, and by other tensors at the same place or another one."""
    layer, x = layer_of(spec, 16, 64, bias=False), torch.randn(1, 64)
    known(layer)
    call(layer, x)
    for companion in layer.companions():
        before = call(layer, x)
        changed = companion ^ 85 if companion.dtype == torch.uint8 else companion * 1.5
        companion.copy_(changed)
        assert torch.equal(call(layer, x), layer(x))
        assert not torch.equal(call(layer, x), before)
    other = layer_of(spec, 16, 64, bias=False)
    layer.set_packed({s: t.clone() for s, t in other.stored().items()})
    assert torch.equal(call(layer, x), other(x))


@needs_library
def test_what_a_graph_must_not_ask_for():
    layer, stranger = layer_of(INT4, 16, 64), layer_of(INT4, 16, 64)
    known(layer)
    with pytest.raises(RuntimeError, match="error 1"):  # no layer of a compiled model
        call(stranger, torch.randn(1, 64))
    with pytest.raises(RuntimeError, match="error 1"):  # compiled for another format
        call(layer, torch.randn(1, 64), format=INT4.replace("log8", "float16"))
    with pytest.raises(RuntimeError, match="error 1"):  # other inputs
        call(layer, torch.randn(1, 96))
    with pytest.raises(RuntimeError, match="error 1"):
        call(layer, torch.randn(1, 64, dtype=torch.float64))


@needs_library
def test_weights_that_are_gone_are_forgotten():
    layer = layer_of(INT4, 16, 64)
    known(layer)
    call(layer, torch.randn(1, 64))
    codes = layer.weight.data_ptr()
    assert codes in compiled._kept
    del layer
    assert codes not in compiled._kept


def test_compiling_again_replaces_and_keeps_no_model_alive(tiny):
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4))
    eager = model.forward
    for _ in range(2):
        compiled.compile_decoding(model)
        assert getattr(model.forward, compiled.EAGER) == eager
    alive = weakref.ref(model)
    del model, eager
    gc.collect()
    assert alive() is None


def test_where_graphs_of_cpp_cannot_be(tiny, monkeypatch, caplog):
    """Plain torch.compile, and a message that says why."""
    logging.set_verbosity_info()
    logging.enable_propagation()
    try:
        assert compiled.graph_options(nn.Linear(4, 4)) == {}
        model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, backend="torch"))
        assert compiled.graph_options(model) == {}
        monkeypatch.setattr(compiled, "_connect", lambda: "the CPU kernels were not built")
        assert compiled.graph_options(model) == {}
    finally:
        logging.disable_propagation()
        logging.set_verbosity_warning()
    assert "has no packed layers" in caplog.text
    assert "another backend" in caplog.text
    assert "were not built" in caplog.text


def test_guards_that_are_left_out(tiny):
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4))
    packed_layers = {n: m for n, m in model.named_modules() if isinstance(m, LowBitLinear)}
    layer = "self._modules['model']._modules['layers']._modules['0']._modules['mlp']._modules['up_proj']"

    class Guard:
        def __init__(self, guard_type, name):
            self.guard_type, self.name = guard_type, name

    guards = {
        Guard("TENSOR_MATCH", f"{layer}._parameters['weight_scales']"): False,
        Guard("TENSOR_MATCH", f"{layer}._parameters['weight']"): True,
        Guard("TENSOR_MATCH", layer.replace("up_proj", "norm") + "._parameters['weight_scales']"): True,
        Guard("TYPE_MATCH", layer): True,
        Guard("CONSTANT_MATCH", f"{layer}.spec"): True,
        Guard("DUPLICATE_INPUT", "G['__import_hf_lowbit_dot_ops']"): False,
        Guard("DUPLICATE_INPUT", "self._modules['lm_head']._parameters['weight']"): True,
    }
    assert compiled._guard_filter(packed_layers)(list(guards)) == list(guards.values())


def tokens(model) -> torch.Tensor:
    cache = StaticCache(config=model.config, max_cache_len=16)
    prompt = inputs("llama", batch=1, length=5)
    return model.generate(**prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)


def eager(model) -> torch.Tensor:
    """The tokens of a copy that is not compiled."""
    plain = copy.deepcopy(model)
    (plain.get_base_model() if hasattr(plain, "get_base_model") else plain).__dict__.pop("forward")
    return tokens(plain)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_library
@torch.no_grad()
def test_a_compiled_model_gives_the_same_tokens(tiny, monkeypatch):
    """Also after its weights have changed, for which no other graph is needed; and most calls are repeated ones."""
    repeats, repeat = [], repeated._Call.repeat
    monkeypatch.setattr(repeated._Call, "repeat", lambda *args: repeats.append(1) or repeat(*args))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4))
    compiled.compile_decoding(model)
    before = tokens(model)
    assert torch.equal(before, eager(model))
    model.model.layers[0].mlp.down_proj.weight_scales.fill_(250)
    assert torch.equal(tokens(model), eager(model))
    assert not torch.equal(tokens(model), before)
    assert graphs() == 1
    assert len(repeats) == 12  # of 3 times 5 single tokens: one to begin with for every cache


@needs_library
@pytest.mark.slow  # two graphs a model
@pytest.mark.parametrize(
    "config",
    [
        LowBitConfig(bits=3, transform="hadamard", outliers=1.0),
        LowBitConfig(bits=4, format="nf", activations="int8"),
        LowBitConfig(bits=2, embeddings="float"),
    ],
    ids=["int3, rotated, outliers", "nf4, int8", "int2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_changed_model_is_compiled_again(tiny, config, dtype):
    """With an adapter, which the first graph does not have."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = load("llama", tiny("llama"), quantization_config=config, dtype=dtype)
    compiled.compile_decoding(model)
    before = tokens(model)
    assert torch.equal(before, eager(model))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert torch.equal(tokens(adapted), eager(adapted))
    assert not torch.equal(tokens(adapted), before)
    assert graphs() == 2
