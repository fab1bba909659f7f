"""Which kernels are compiled for which targets, with what constants: the matrix that :mod:`sass_report` counts.

For every kernel, target and dtype, with the sizes that are taken by default for a weight of 4096 x 4096:

- the form that a device takes by default, of all widths with zero points and all tables, in groups of 128 (FP4: 32) and
  of 32, fast forms of integers in groups of 64, too, and of ternary rows: those of 4096 inputs have 410 lanes, each 4th
  begins at 16 bytes; those of 5120 all do;
- the portable form in float16 also where a fast form goes before it, but for 2 to 4 rows; ``lop3``, which no device
  takes by default, in 4 and 7 bits.

Some kernels stand for others, which are the same or need less:

- Symmetric grids are compiled in all fast forms, and of the portable form in 7 bits and float16: they are the others
  without the loads and the arithmetic of zero points.
- 64 rows of x are cut into tiles of 16 in fast forms and in float32.
- In float32 with groups of 128, and in bfloat16 on AMD's targets, formats are those of :data:`FULLEST`. Where all are
  compiled (float16, and float32 in groups of 32), one of these has the most registers of a kernel for a target in 197
  of 214 cases; in the 17 others a format has up to 40 more, 250 at most, and does not spill.
- In bfloat16 on NVIDIA's targets, what has the portable form alone is compiled in 7 bits and ternary: there rounding to
  bfloat16 takes one instruction, as to float16.

The Hadamard transform and the decoder of coded weights do not depend on a format.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))
NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = {"gfx942": 64, "gfx1100": 32}
PRODUCTS = {"gemv": 1, "gemv4": 4, "gemm16": 16, "gemm64": 64}  # kernels with several forms, and rows of x
# Kernels that have the portable form alone, with rows of x or of the result.
OTHERS = {"input_gradient": 64, "dequantize": 4096, "embedding": 1}
OTHERS |= {"grouped": 1, "grouped4": 4, "grouped16": 16, "grouped_gradient": 64}
DTYPES = ("fp16", "bf16", "fp32")
FAST = {"fp16": "subnormal", "bf16": "magic"}
UNLOOPED = ("dequantize", "embedding", "hadamard")
HADAMARD = (64, 1024, 4096)  # lengths of a run
TERNARY = "ternary:bits=1.58"
TERNARY_EVEN = f"{TERNARY},group_size=-1"  # the same, for rows of 5120 inputs


@dataclass(frozen=True)
class Case:
    """One kernel for one target."""

    target: str
    kernel: str
    format: str
    dtype: str
    form: str


def formats(group: int = 128) -> list[str]:
    """Texts of the formats that fast forms read, in groups of 128 (FP4: 32)."""
    grids = [
        f"int:bits={bits},group_size={group},symmetric={symmetric}"
        for bits in range(1, 9)
        for symmetric in (True, False)
    ]
    tables = [f"nf:bits=4,group_size={group}", "fp4:bits=4", f"codebook:bits=4,group_size={group}"]
    return [*grids, *tables]


FULLEST = ("int:bits=1,", "int:bits=3,", "int:bits=5,", "int:bits=7,", "nf:")  # how they begin
SMALL = (*(f"int:bits={bits},group_size=32" for bits in range(1, 9)), "nf:bits=4,group_size=32")
# Groups of 16, and of 64, in fast forms alone; FP4 is NVFP4's.
SMALLEST = (
    *(f"int:bits={bits},group_size=16" for bits in range(1, 9)),
    *("nf:bits=4,group_size=16", "codebook:bits=3,group_size=16", "fp4:bits=4,group_size=16,scale_dtype=e4m3"),
)
MIDDLE = tuple(f"int:bits={bits},group_size=64" for bits in range(1, 9))
# What the package packs integers as unless told otherwise; in fast forms alone.
DEFAULTS = tuple(f"int:bits={bits},group_size=32,scale_dtype=log8" for bits in range(1, 9))
# Tables as they are packed unless told otherwise, and those of each row; in fast forms alone, too.
TABLES = (
    *("nf:bits=4,group_size=64", "codebook:bits=3,group_size=64"),
    *(f"codebook:bits={bits},group_size=-1,codebook=row" for bits in (3, 4)),
)


def fast_cases(target: str, formats: list[str]) -> list[Case]:
    """The fast forms that a device takes by default, of every product."""
    kernels = [kernel for kernel in PRODUCTS if kernel != "gemm64"]
    return [Case(target, k, f, dtype, form) for dtype, form in FAST.items() for k in kernels for f in formats]


def cases() -> list[Case]:
    """The whole matrix."""
    read = [*formats(), *SMALL]
    ternary = [TERNARY, TERNARY_EVEN]
    portable = [f for f in read if "symmetric=True" not in f] + ternary
    fullest = [f for f in portable if f.startswith((*FULLEST, TERNARY))]
    few = [f for f in portable if f.startswith(("int:bits=7,", TERNARY))]
    symmetric = [f for f in read if f.startswith("int:bits=7,") and "symmetric=True" in f]
    full = [f for f in portable if f in (*SMALL, *fullest)]
    found = []
    for target in (*NVIDIA, *AMD):
        if target in NVIDIA:
            found += fast_cases(target, [*read, *SMALLEST, *MIDDLE, *DEFAULTS, *TABLES])
            asked = [f for f in portable if f.startswith(("int:bits=4,", "int:bits=7,"))]
            found += [Case(target, k, f, "fp16", "lop3") for k in ("gemv", "gemm16") for f in asked]
        for kernel in (*PRODUCTS, *OTHERS):
            half, brain = [*portable, *symmetric], fullest if target in AMD else few
            if target in NVIDIA and kernel in PRODUCTS:
                half, brain = ternary if kernel == "gemv4" else half, ternary
            lists = {"fp16": half, "bf16": brain, "fp32": full if kernel != "gemm64" else []}
            found += [Case(target, kernel, f, dtype, "portable") for dtype, texts in lists.items() for f in texts]
        found += [Case(target, "hadamard", f"block={n}", d, "portable") for n in HADAMARD for d in FAST]
        found.append(Case(target, "entropy", "rans", "u8", "portable"))
    return found


@dataclass(frozen=True)
class Launch:
    """A kernel with its compile-time constants; ``weights`` are those of a turn of the main loop, in which another loop
    turns ``turns`` times."""

    kernel: object
    constants: dict
    warps: int
    weights: int
    turns: int = 1
    maxnreg: int | None = None
    stages: int | None = None


def _device(target: str):
    from lowbit_kernels import Device

    return Device("amd" if target in AMD else "nvidia", target)


def _portable(case: Case, layout, M: int) -> Launch:
    """As :func:`launch_of`, for the portable kernels."""
    import torch
    from lowbit_kernels import _tiles, fast, grouped, matmul, rows, tiles
    from lowbit_kernels import layout as layouts

    warp, full = AMD.get(case.target, 32), case.dtype == "fp32"
    in_lane = layout.fields if layout.ternary else 1
    most, place = fast.REGISTERS if case.target in NVIDIA else None, (warp, case.target in NVIDIA, full)
    K = 5120 if case.format == TERNARY_EVEN else 4096
    own = {"EVEN": layouts.even(K, layout)}
    if case.kernel.startswith("grouped"):
        own |= {"RANGE": 2 if layout.scale == "log8" else 0, "TABLE": 0, "BLOCK_E": 256}
    if case.kernel in UNLOOPED:
        size = tiles.row_tiles(M, K, layout, *place)
        own |= {"BLOCK_R": size.rows, "BLOCK_K": size.inputs}
        return Launch(rows.rows_kernel, own, size.warps, size.rows * size.inputs * in_lane)
    if "gradient" in case.kernel:
        rule = tiles.grouped_gradient_tiles if case.kernel.startswith("grouped") else tiles.gradient_tiles
        size = rule(M, 4096, K, layout, *(place if case.kernel.startswith("grouped") else (warp, full)))
        own |= {"BLOCK_M": size.rows, "BLOCK_N": size.outputs, "BLOCK_K": size.inputs}
        kernel = (
            grouped.grouped_input_gradient_kernel if case.kernel.startswith("grouped") else rows.input_gradient_kernel
        )
        turns = 4 if not layout.ternary and (full or layout.planes[-1] == 1) and size.outputs >= 64 else 1
        return Launch(kernel, own, size.warps, size.outputs * size.inputs * in_lane, turns, most)
    grouping = case.kernel.startswith("grouped")
    if grouping:
        size = tiles.grouped_tiles(M, 4096, K, layout, *place)
    else:
        dtype = torch.float32 if full else torch.float16
        size = _tiles(_device(case.target), layout, M, 4096, K, dtype)
    gemv, most = size.rows <= tiles.GEMV_ROWS, most if tiles.wants_registers(size.rows, layout, full) else None
    own |= {"BLOCK_M": size.rows, "BLOCK_N": size.outputs, "BLOCK_L": size.inputs}
    if grouping:
        kernel, own["GEMV"] = grouped.grouped_linear_kernel, gemv
    else:
        kernel = matmul.gemv_kernel if gemv else matmul.gemm_kernel
        own["SPLIT"] = 4
    turns = layout.fields if (matmul._many_registers(size.rows, layout) if gemv else full) else 1
    return Launch(kernel, own, size.warps, size.outputs * size.inputs * layout.fields, turns, most, size.stages)


def launch_of(case: Case, layout) -> Launch:
    """What is compiled for a case: the sizes that the kernels take for a large shape that whole steps fill."""
    import lowbit_kernels
    from lowbit_kernels import entropy, fast, fast_scaled, hadamard

    if case.kernel == "hadamard":
        block = int(case.format.removeprefix("block="))
        sizes = hadamard.sizes(block, AMD.get(case.target, 32))
        return Launch(hadamard.butterfly_kernel, sizes, hadamard.WARPS, block * sizes["BLOCK_R"])
    if case.kernel == "entropy":
        return Launch(entropy.entropy_kernel, {"LANES": entropy.LANES}, 1, entropy.LANES)
    M = {**PRODUCTS, **OTHERS}[case.kernel]
    if case.form == "portable":
        return _portable(case, layout, M)
    size, _ = lowbit_kernels._fast_tiles(_device(case.target), case.form, layout, M, 4096, 4096)
    weights = size.outputs * size.blocks * size.spans * 64
    constants = {"SPLIT": 4, "BLOCK_M": size.rows, "BLOCK_N": size.outputs, "EVEN": True, "STAGES": size.stages}
    if size.scaled:
        constants |= {"FORM": case.form, "WARPS": size.warps, "PAIRS": size.pairs}
        return Launch(fast_scaled.scaled_kernel, constants, size.warps, weights, maxnreg=fast.REGISTERS)
    constants |= {"FORM": case.form, "BLOCKS": size.blocks, "STRIPS": size.strips, "SPANS": size.spans}
    constants |= {"COLUMNS": size.columns, "WINDOW": size.window}
    constants |= {"ROWS_OF_ONES": min(16 * size.warps, size.outputs // size.strips), "PAIRS": size.pairs}
    return Launch(fast.fast_kernel, constants, size.warps, weights, maxnreg=fast.REGISTERS)


def layout_of(case: Case):
    """The layout of a case's weights; None for kernels that have none."""
    from lowbit_kernels.layout import parse

    return None if case.kernel in ("hadamard", "entropy") else parse(case.format)


def compiled(case: Case, launch: Launch):
    """The compiled kernel, and how many threads a warp has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, layout = launch.kernel, layout_of(case)
    types = {"x": f"*{case.dtype}", "gradient": f"*{case.dtype}", "weight": "*i16", "ends": "*i32", "bias": None}
    shares = "SPLIT" in launch.constants or ("gradient" in case.kernel and launch.constants["EVEN"] > 1)
    types |= {"out": "*fp32" if shares else f"*{case.dtype}", **dict.fromkeys("MNKER", "i32")}
    types |= {"index": "*i64" if case.kernel == "embedding" else None, "rows": "i32", "scale": "fp32"}
    types |= {"stream": "*u8", **dict.fromkeys(("starts", "sizes", "counts", "places"), "*i64")}
    types |= dict.fromkeys(("table", "sound"), "*i32")
    constants = dict(launch.constants)
    if layout is not None:
        constants |= {"LAYOUT": layout}
        stored = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "none": None}
        types["scales"] = stored.get(layout.scale, "*u8")
        types["scale_range"] = "*fp32" if layout.scale in ("log8", "e4m3") else None
        types["zeros"] = {"fixed": None, "float": "*fp16"}.get(layout.zeros, "*u8")
        types["levels"] = None if layout.table == "none" else "*fp16" if layout.name == "codebook" else "*fp32"
    constants |= {name: None for name, type in types.items() if type is None and name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ("N", "K")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[kernel.arg_names[i]] != "constexpr"}
    source = ASTSource(kernel, signature, constants, attributes)
    if case.target in AMD:
        target = GPUTarget("hip", case.target, AMD[case.target])
    else:
        target = GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    options = {"num_warps": launch.warps, "maxnreg": launch.maxnreg, "num_stages": launch.stages}
    options = {name: value for name, value in options.items() if value is not None}
    return triton.compile(source, target=target, options=options), target.warp_size
