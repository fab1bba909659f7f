"""What the kernels are tested on: one frozen record a problem, one list, and the tensors of each.

Weights are made of random codes, not of quantized floats, so that every code occurs; what a reader has to ignore (codes
past the end of a row) is random too. Every tensor lies between canaries: NaN around floats and all bits set around
integers, so that a read past an end that is not masked away shows in the result, and a write shows in the canary.
"""

from dataclasses import dataclass

import torch

from hf_lowbit.formats import Format, Quantized, parse_format
from hf_lowbit.formats.planes import BLOCK
from hf_lowbit.formats.ternary import DIGITS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_DTYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
MARGIN = 64  # elements of canary on either side


@dataclass(frozen=True)
class Problem:
    """One call of one op: ``x`` (M, K) on a weight (N, K) packed as ``format``, or M rows of it."""

    op: str
    format: str
    M: int
    N: int
    K: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        format = parse_format(self.format)
        group = "row" if format.group_size == -1 else format.group_size
        options = self.format.partition(":")[2].split(",")
        rest = [o.partition("=")[2] for o in options if not o.startswith(("bits", "group_size"))]
        name = "_".join([f"{'w' if format.name == 'int' else format.name}{format.bits}", f"g{group}", *rest])
        return f"{self.op}_{name}_M{self.M}_N{self.N}_K{self.K}_{_DTYPES[self.dtype]}"


def _problems():
    def add(op, format, M, N, K, dtype):
        problems.append(Problem(op, format, M, N, K, dtype))

    problems: list[Problem] = []
    dtypes = (BF16, FP16, FP32)
    # Every width, asymmetric and symmetric, matrix-vector and tiles; the dtypes and row counts take turns. Inputs that
    # come in whole pairs of blocks have kernels of their own.
    for bits in range(1, 9):
        add("linear", f"int:bits={bits}", bits % 4 + 1, 66, 333, dtypes[bits % 3])
        add("linear", f"int:bits={bits},symmetric=True", 4 - bits % 4, 33, 256, dtypes[(bits + 1) % 3])
        add("linear", f"int:bits={bits}", 4 + bits, 66, 333, dtypes[(bits + 2) % 3])
        add("input_gradient", f"int:bits={bits}", 4 + bits, 66, 384 if bits % 2 else 333, dtypes[bits % 3])
        add("dequantize", f"int:bits={bits}", 0, 13, 333, FP32)
        add("embedding", f"int:bits={bits}", 5, 13, 256, dtypes[bits % 3])
    # A gradient that takes W in quarters of 128 rows, more than once and with an end within one.
    add("input_gradient", "int:bits=7", 5, 300, 192, FP16)
    # Every dtype on one width of one plane and one of three.
    for dtype in dtypes:
        for bits in (4, 7):
            for M in (1, 3, 17):
                add("linear", f"int:bits={bits},group_size=32", M, 66, 577, dtype)
            add("input_gradient", f"int:bits={bits},group_size=32", 3, 66, 577, dtype)
    # Every group size; the last group of a row is shorter. 3-bit zero points cross bytes.
    for group in (16, 32, 64, 128, 256, 512, 1024, -1):
        for M in (2, 6):
            add("linear", f"int:bits=3,group_size={group}", M, 34, 577, BF16)
        add("input_gradient", f"int:bits=3,group_size={group}", 2, 34, 577, FP16)
        add("dequantize", f"int:bits=5,group_size={group}", 0, 9, 577, FP32)
    # Every way to store scales and zero points.
    for scale in ("float16", "bfloat16", "float32", "log8", "e8m0", "e4m3"):
        add("dequantize", f"int:bits=4,scale_dtype={scale}", 0, 9, 193, FP32)
        add("linear", f"int:bits=4,scale_dtype={scale},symmetric=True", 1, 33, 193, FP16)
        add("linear", f"int:bits=2,scale_dtype={scale},zeros=float", 5, 33, 193, BF16)
    # Tables: constant, learned for the tensor, learned for every row.
    for format in (
        *("nf:bits=2", "nf:bits=3", "nf:bits=4", "nf:bits=4,group_size=16,scale_dtype=float16"),
        *("fp4:bits=4", "fp4:bits=4,group_size=16,scale_dtype=e4m3"),
        *(f"codebook:bits={bits}" for bits in range(1, 9)),
        *(f"codebook:bits={bits},group_size=-1,codebook=row" for bits in (1, 3, 4, 7, 8)),
        *("ternary:bits=1.58", "ternary:bits=1.58,group_size=32", "ternary:bits=1.58,scale_dtype=float32"),
    ):
        add("linear", format, 2, 33, 193, BF16)
        add("linear", format, 5, 33, 193, FP16)
        add("input_gradient", format, 3, 33, 193, BF16)
        add("dequantize", format, 0, 9, 193, FP32)
        add("embedding", format, 3, 9, 193, FP16)
    # Ternary rows of 32, 20, 22 and 13 lanes: all, each 2nd, 4th or 8th begin at 16 bytes, and so much is loaded at a
    # time. The last inputs of the last field are missing.
    for K in (315, 193, 213, 121):
        for format in ("ternary:bits=1.58", "ternary:bits=1.58,group_size=32"):
            add("linear", format, 3, 72, K, FP16)
            add("linear", format, 5, 40, K, BF16)
            add("input_gradient", format, 3, 40, K, BF16)
            add("input_gradient", format, 5, 296, K, FP32)
            add("dequantize", format, 0, 8, K, FP32)
            add("embedding", format, 3, 16, K, FP16)
    # The smallest, the edges of a block and of a tile, and enough lanes that programs share the inputs.
    for N, K in ((1, 1), (16, 64), (17, 65), (64, 63)):
        for M in (1, 4, 5, 16):
            add("linear", "int:bits=4", M, N, K, FP16)
            add("linear", "ternary:bits=1.58", M, N, K, FP16)
        add("input_gradient", "int:bits=4", 2, N, K, FP32)
        add("dequantize", "ternary:bits=1.58", 0, N, K, FP16)
    for bits in (3, 8):
        for M in (1, 20, 65):
            add("linear", f"int:bits={bits}", M, 18, 1152 if M == 20 else 1100, BF16)
        add("input_gradient", f"int:bits={bits}", 65, 130, 200, BF16)
    return problems


def _product():
    """Every width with every dtype and group size, and every other format with every dtype: for a slow run."""
    groups = (16, 32, 64, 128, 256, 512, 1024, -1)
    formats = [f"int:bits={bits},group_size={g},symmetric={g == 32}" for bits in range(1, 9) for g in groups]
    formats += [f"nf:bits={bits},group_size={g}" for bits in (2, 3, 4) for g in groups]
    formats += [f"codebook:bits={bits},group_size={g}" for bits in range(1, 9) for g in (16, 128, -1)]
    formats += [f"codebook:bits={bits},group_size=-1,codebook=row" for bits in range(1, 9)]
    formats += ["fp4:bits=4", "fp4:bits=4,group_size=16,scale_dtype=e4m3", "ternary:bits=1.58,group_size=-1"]
    for i, format in enumerate(formats):
        for dtype in (BF16, FP16, FP32):
            for op, M in (("linear", i % 4 + 1), ("linear", 17), ("input_gradient", 5), ("dequantize", 0)):
                yield Problem(op, format, M, 19, (130, 128, 191)[i % 3], dtype)


PROBLEMS = _problems()
PRODUCT = [problem for problem in _product() if problem not in PROBLEMS]


def guard(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` between canaries; :func:`intact` looks at them."""
    canary = float("nan") if tensor.is_floating_point() else -1 if tensor.dtype.is_signed else 255
    buffer = torch.full((tensor.numel() + 2 * MARGIN,), canary, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def intact(tensor: torch.Tensor) -> bool:
    """Whether the canaries around what :func:`guard` made are as they were."""
    buffer = tensor.new_empty(0).set_(tensor.untyped_storage())
    edges = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
    if tensor.is_floating_point():
        return bool(edges.isnan().all())
    return bool((edges == (-1 if tensor.dtype.is_signed else 255)).all())


def packed(format: Format, N: int, K: int, device: str, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``weight`` and companions of a random packed weight, each between canaries."""
    generator = torch.Generator().manual_seed(N * 10007 + K + seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    block = DIGITS if format.name == "ternary" else BLOCK
    levels = 3 if format.name == "ternary" else 2**format.bits
    codes = (uniform(N, -(-K // block) * block) * levels).to(torch.uint8)
    groups = format.groups(K)
    scales = 2 ** (4 * uniform(N, groups) - 6)
    scales *= torch.where((uniform(N, groups) < 0.3) & format.signed_scales, -1, 1)
    scales[:, -1:] = torch.where(uniform(N, 1) < 0.1, 0, scales[:, -1:])
    zeros = (uniform(N, groups) * levels).floor() + (0.37 if getattr(format, "zeros", "") == "float" else 0)
    tables = N if getattr(format, "codebook", "") == "row" else 1
    stored = format.pack(Quantized(codes, scales, zeros, torch.randn(tables, levels, generator=generator)))
    stored = {suffix: guard(tensor.to(device)) for suffix, tensor in stored.items()}
    return stored[""], [stored[suffix] for suffix in format.suffixes()]
