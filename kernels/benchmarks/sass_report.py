"""What a weight costs in instructions, counted in machine code that is compiled here, for real targets, without a GPU.

    python kernels/benchmarks/sass_report.py                    # NVIDIA and AMD targets, all widths: a table
    python kernels/benchmarks/sass_report.py --only sm_90 --only gemv --json report.json

How it counts. A kernel's main loop is the greatest set of pieces of its code that all reach each other; instructions
per weight are its instructions, predicated ones, address arithmetic, scales and synchronisation included, times the
threads of the program, divided by the weights that one turn takes. A loop in it (gradients of widths with a 1-bit
plane have one, and products in float32) counts as often as it turns. What is before and after the loop (pointers, the
last reduction, the store) is not in it: it does not grow with K. Shapes are whole multiples of a step. Kernels that
write weights out, and the Hadamard transform, have no loop: there every instruction counts, and a weight of the
transform is a value.

Registers, shared memory and spills (STL, LDL; on AMD scratch) come from the compiled file. ``load_bits`` is the width
of the narrowest load from global memory in the loop that line information traces to the source that loads packed
weights, 0 where the compiler lost the line. Occupancy is the share of warps that registers and shared memory leave
room for, on paper. The last column is a **model, not a measurement**: the share of memory bandwidth at which
instructions would be issued just fast enough, one a cycle on each of four schedulers of every multiprocessor, if
nothing else ever waited.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "torch-ext"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lowbit-kernels" / "sass"
KEYS = (
    *("target", "kernel", "format", "bits", "dtype", "form", "instructions_per_weight", "registers", "spills"),
    *("load_bits", "shared_bytes"),
)
NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = {"gfx942": 64, "gfx1100": 32}
ROWS = {"gemv": 1, "gemm16": 16}
# Kernels that have the portable form alone, with rows of x or of the result.
PORTABLE_ROWS = {"gemm64": 64, "input_gradient": 64, "dequantize": 4096, "embedding": 1}
PORTABLE_ROWS |= {"gemv4": 4, "grouped": 1, "grouped4": 4, "grouped16": 16, "grouped_gradient": 64}
DTYPES = ("fp16", "bf16", "fp32")
UNLOOPED = ("dequantize", "embedding", "hadamard")
HADAMARD = (64, 1024, 4096)  # lengths of a run
# Multiprocessors, clock in GHz, bandwidth in GB/s (data sheets), warps and KiB of shared memory of one.
DEVICES = {
    "sm_80": ("A100 40GB", 108, 1.41, 1555, 64, 164),
    "sm_89": ("RTX 4090", 128, 2.52, 1008, 48, 100),
    "sm_90": ("H100 SXM", 132, 1.83, 3350, 64, 228),
    "sm_100": ("B200", 148, 1.85, 8000, 64, 228),
    "sm_120": ("RTX 5090", 170, 2.41, 1792, 48, 100),
}


@dataclass(frozen=True)
class Case:
    """One kernel for one target."""

    target: str
    kernel: str
    format: str
    dtype: str
    form: str


@dataclass(frozen=True)
class Cost:
    """What was counted for a case; ``warps`` and ``tensor`` (tensor-core instructions a turn) are for the table."""

    bits: int
    instructions_per_weight: float
    registers: int
    spills: int
    load_bits: int
    shared_bytes: int
    warps: int
    tensor: int


def formats(group: int = 128) -> list[str]:
    """Texts of the formats of the matrix."""
    grids = [
        f"int:bits={bits},group_size={group},symmetric={symmetric}"
        for bits in range(1, 9)
        for symmetric in (True, False)
    ]
    tables = [f"nf:bits=4,group_size={group}", "fp4:bits=4", f"codebook:bits=4,group_size={group}"]
    return [*grids, *tables]


def cases() -> list[Case]:
    """The whole matrix."""
    found = []
    for target in (*NVIDIA, *AMD):
        for kernel in (*ROWS, *PORTABLE_ROWS):
            for format in formats():
                for dtype in DTYPES:
                    if kernel in PORTABLE_ROWS or dtype == "fp32":
                        found.append(Case(target, kernel, format, dtype, "portable"))
                        continue
                    fast = ("magic",) if dtype == "bf16" else ("subnormal", "lop3")
                    forms = ("portable", *fast) if target in NVIDIA else ("portable",)
                    if not format.startswith("int"):
                        forms = tuple(form for form in forms if form != "lop3")
                    found += [Case(target, kernel, format, dtype, form) for form in forms]
        found += [
            Case(target, "hadamard", f"block={n}", dtype, "portable") for n in HADAMARD for dtype in ("fp16", "bf16")
        ]
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
    """As :func:`_launch`, for the portable kernels."""
    import torch
    from lowbit_kernels import _tiles, fast, grouped, matmul, rows, tiles

    warp, own, full = AMD.get(case.target, 32), {}, case.dtype == "fp32"
    most, place = fast.REGISTERS if case.target in NVIDIA else None, (warp, case.target in NVIDIA, full)
    if case.kernel.startswith("grouped"):
        own = {"RANGE": 2 if layout.scale == "log8" else 0, "TABLE": 0, "BLOCK_E": 256}
    if case.kernel in UNLOOPED:
        size = tiles.row_tiles(M, 4096, layout, warp)
        own = {"BLOCK_R": size.rows, "BLOCK_K": size.inputs}
        return Launch(rows.rows_kernel, own, size.warps, size.rows * size.inputs)
    if "gradient" in case.kernel:
        rule = tiles.grouped_gradient_tiles if case.kernel.startswith("grouped") else tiles.gradient_tiles
        size = rule(M, 4096, 4096, layout, *(place if case.kernel.startswith("grouped") else (warp, full)))
        own |= {"BLOCK_M": size.rows, "BLOCK_N": size.outputs, "BLOCK_K": size.inputs}
        kernel = (
            grouped.grouped_input_gradient_kernel if case.kernel.startswith("grouped") else rows.input_gradient_kernel
        )
        turns = 4 if not layout.ternary and (full or layout.planes[-1] == 1) and size.outputs >= 64 else 1
        return Launch(kernel, own, size.warps, size.outputs * size.inputs, turns, most)
    grouping = case.kernel.startswith("grouped")
    if grouping:
        size = tiles.grouped_tiles(M, 4096, 4096, layout, *place)
    else:
        dtype = torch.float32 if full else torch.float16
        size = _tiles(_device(case.target), layout, M, 4096, 4096, dtype)
    gemv, most = size.rows <= tiles.GEMV_ROWS, most if tiles.wants_registers(size.rows, layout) else None
    own |= {"BLOCK_M": size.rows, "BLOCK_N": size.outputs, "BLOCK_L": size.inputs}
    if grouping:
        kernel, own["GEMV"] = grouped.grouped_linear_kernel, gemv
    else:
        kernel = matmul.gemv_kernel if gemv else matmul.gemm_kernel
        own["SPLIT"] = 4
    turns = layout.fields if (matmul._many_registers(size.rows, layout) if gemv else full) else 1
    if case.target == "gfx942" and layout.name == "nf" and not gemv:  # whose compiler writes the turns out
        turns = 1
    return Launch(kernel, own, size.warps, size.outputs * size.inputs * layout.fields, turns, most, size.stages)


def _launch(case: Case, layout) -> Launch:
    """What is compiled for a case: the sizes that the kernels take for a large shape that whole steps fill."""
    import lowbit_kernels
    from lowbit_kernels import fast, hadamard

    if case.kernel == "hadamard":
        block = int(case.format.removeprefix("block="))
        sizes = hadamard.sizes(block, AMD.get(case.target, 32))
        return Launch(hadamard.butterfly_kernel, sizes, hadamard.WARPS, block * sizes["BLOCK_R"])
    M = {**ROWS, **PORTABLE_ROWS}[case.kernel]
    if case.form == "portable":
        return _portable(case, layout, M)
    size, _ = lowbit_kernels._fast_tiles(_device(case.target), case.form, layout, M, 4096, 4096)
    constants = {"FORM": case.form, "SPLIT": 4, "BLOCK_M": size.rows, "BLOCK_N": size.outputs, "BLOCKS": size.blocks}
    constants |= {
        **{"STRIPS": size.strips, "SPANS": size.spans, "COLUMNS": size.columns, "WINDOW": size.window, "EVEN": True},
        **{"STAGES": size.stages, "ROWS_OF_ONES": min(16 * size.warps, size.outputs // size.strips)},
    }
    weights = size.outputs * size.blocks * size.spans * 64
    return Launch(fast.fast_kernel, constants, size.warps, weights, maxnreg=fast.REGISTERS)


def _layout(case: Case):
    from lowbit_kernels.layout import parse

    return None if case.kernel == "hadamard" else parse(case.format)


def _compile(case: Case, launch: Launch):
    """The compiled kernel, and how many threads a warp has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, layout = launch.kernel, _layout(case)
    types = {"x": f"*{case.dtype}", "gradient": f"*{case.dtype}", "weight": "*i16", "ends": "*i32", "bias": None}
    types |= {"out": "*fp32" if "SPLIT" in launch.constants else f"*{case.dtype}", **dict.fromkeys("MNKER", "i32")}
    types |= {"index": "*i64" if case.kernel == "embedding" else None, "rows": "i32", "scale": "fp32"}
    constants = dict(launch.constants)
    if layout is not None:
        constants |= {"LAYOUT": layout, **({"EVEN": True} if "EVEN" in kernel.arg_names else {})}
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


def _lines_of(*functions) -> set[tuple[str, int]]:
    """File name and number of every line of device functions; the compiler may give a load to a neighbouring line."""
    found = set()
    for function in functions:
        code = function.fn.__code__
        lines, first = inspect.getsourcelines(function.fn)
        found |= {(Path(code.co_filename).name, first + i) for i in range(len(lines))}
    return found


def _weight_lines() -> set[tuple[str, int]]:
    """The source lines of functions that load packed weights and nothing else; of butterflies, which load values."""
    from lowbit_kernels import decode, fast_fields, hadamard

    loading = (decode.load_lanes, decode.load_last, decode._plane, hadamard.butterfly_kernel)
    return _lines_of(fast_fields._words, *loading)


@dataclass(frozen=True)
class Instruction:
    """An instruction, and the source line that it came from."""

    text: str
    line: tuple[str, int]

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]


def _tool(tool: str, code: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Loops:
    """Instructions of a compiled kernel: all of them, those of its main loop, and those of the loops in that."""

    whole: list[Instruction]
    main: list[Instruction]
    inner: list[Instruction]


def find_loops(text: str, label: str, line: str, instruction: str, branch: str, ends: str) -> Loops:
    """The loops of an assembly text; the patterns say what its lines look like.

    ``branch`` finds the target of a branch, ``ends`` the instructions that never go on to the next one. A loop is a set
    of blocks that all reach each other, the main one that with most instructions; the one in it is what still does so
    without the block that the main one is entered by.
    """
    whole: list[Instruction] = []
    labels: dict[str, int] = {}
    here = ("", 0)
    for row in text.splitlines():
        if match := re.search(label, row):
            labels[match[1]] = len(whole)
        elif match := re.search(line, row):
            here = (match[1], int(match[2]))
        elif match := re.search(instruction, row):
            whole.append(Instruction(match[1].strip(), here))
    jumps = {i: to[1] for i, one in enumerate(whole) if (to := re.search(branch, one.text))}
    stops = {i for i, one in enumerate(whole) if re.search(ends, one.text)}
    starts = sorted({0, *labels.values(), *(i + 1 for i in (*jumps, *stops))} - {len(whole)})
    bounds = dict(zip(starts, [*starts[1:], len(whole)], strict=True))
    graph = {start: {end} - {i + 1 for i in stops} for start, end in bounds.items()}
    for start, end in bounds.items():
        graph[start] = (graph[start] | {labels.get(jumps.get(end - 1, ""), -1)}) & set(bounds)

    def longest(graph: dict[int, set[int]]) -> set[int]:
        return max(_cycles(graph), key=lambda loop: sum(bounds[start] - start for start in loop), default=set())

    def instructions(loop: set[int]) -> list[Instruction]:
        return [one for start in sorted(loop) for one in whole[start : bounds[start]]]

    main = longest(graph)
    inside = main - {to for start, after in graph.items() if start not in main for to in after}
    loops = _cycles({start: graph[start] & inside for start in inside})
    return Loops(whole, instructions(main), instructions(set().union(*loops)))


def _cycles(graph: dict[int, set[int]]) -> list[set[int]]:
    """Nodes that reach each other by one step at least, in sets."""
    reached: dict[int, set[int]] = {}
    for node in graph:
        seen, todo = set(), list(graph[node])
        while todo:
            if (after := todo.pop()) not in seen:
                seen.add(after)
                todo += graph[after]
        reached[node] = seen
    return [{other for other in reached[node] if node in reached[other]} for node in graph if node in reached[node]]


def _narrowest(loop: list[Instruction], lines: set[tuple[str, int]], pattern: str, widths: dict[str, int]) -> int:
    """Bits of the narrowest load from global memory that came from ``lines``; 0 if there is none."""
    bits = [widths[match[1] or ""] for i in loop if i.line in lines and (match := re.match(pattern, i.opcode))]
    return min(bits, default=0)


_NVIDIA_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8, "": 32}
_AMD_WIDTHS = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32}
_AMD_WIDTHS |= dict.fromkeys(
    ("ushort", "sshort", "u16", "i16", "d16_b16", "d16_hi_b16", "short_d16", "short_d16_hi"), 16
)
_AMD_WIDTHS |= dict.fromkeys(("ubyte", "sbyte", "u8", "i8"), 8)


def _nvidia(code: bytes, looped: bool) -> tuple[Loops, int, int, int, int]:
    import triton

    usage = _tool(triton.knobs.nvidia.cuobjdump.path, code, "-res-usage")
    text = _tool(triton.knobs.nvidia.nvdisasm.path, code, "-g", "-c")
    loops = find_loops(
        text,
        label=r"^\s*(\.L_x_\d+):",
        line=r'//## File ".*?([^/"]+)", line (\d+)(?! inlined)',
        instruction=r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;",
        branch=r"\b(?:BRA|CALL\.REL\.NOINC)\b.*?`\((\.L_x_\d+)\)",  # such calls leave loops
        ends=r"^(?:EXIT|RET|BRA )",
    )
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", i.text)) for i in loops.whole)
    counted = loops.main if looped else loops.whole
    tensor = sum("MMA." in i.opcode for i in counted)
    load = _narrowest(
        counted,
        _weight_lines(),
        r"(?:LDG|LDGSTS)\.E(?:\.[A-Z_]+)*?(?:\.(128|64|U16|S16|U8|S8))?(?:\.[A-Z]+)*$",
        _NVIDIA_WIDTHS,
    )
    return loops, int(re.search(r"REG:(\d+)", usage)[1]), spills, load, tensor


def _amd(text: str, looped: bool) -> tuple[Loops, int, int, int, int]:
    files = {number: Path(name).name for number, name in re.findall(r'\.file\s+(\d+)\s+"[^"]*"\s+"([^"]+)"', text)}
    text = re.sub(r"\.loc\s+(\d+)", lambda m: f".loc {files.get(m[1], m[1])}", text)
    loops = find_loops(
        text,
        label=r"^(\.LBB\w+):",
        line=r"\.loc (\S+)\s+(\d+)",
        instruction=r"^\s+([a-z]+_\w+(?:\s.*)?)$",
        branch=r"^s_c?branch\w*\s+(\.LBB\w+)",
        ends=r"^s_(?:branch|endpgm|setpc)",
    )
    counted = loops.main if looped else loops.whole
    tensor = sum("mfma" in i.opcode or "wmma" in i.opcode for i in counted)
    load = _narrowest(counted, _weight_lines(), r"(?:global|buffer)_load_(\w+)", _AMD_WIDTHS)
    registers, spills = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    return loops, registers, spills, load, tensor


def per_weight(loops: Loops, looped: bool, threads: int, weights: int, turns: int) -> float:
    """Instructions for each of ``weights``, which one turn of the main loop and ``turns`` of those in it take.

    Raises:
        ValueError: if there should be a loop, or one in it of more turns than a compiler writes out, and is none.
    """
    if looped and not (loops.main and (turns <= 2 or loops.inner)):
        raise ValueError("the kernel has no loop, or none in it, that should have: nothing to count")
    counted = len(loops.main) + (turns - 1) * len(loops.inner) if looped else len(loops.whole)
    return counted * threads / weights


def count(case: Case) -> Cost:
    """Compiles a case and counts."""
    launch, layout = _launch(case, _layout(case)), _layout(case)
    compiled, warp = _compile(case, launch)
    looped = case.kernel not in UNLOOPED
    if case.target in AMD:
        loops, *numbers = _amd(compiled.asm["amdgcn"], looped)
    else:
        loops, *numbers = _nvidia(compiled.asm["cubin"], looped)
    registers, spills, load_bits, tensor = numbers
    ratio = per_weight(loops, looped, launch.warps * warp, launch.weights, launch.turns)
    bits = 16 if layout is None else layout.bits
    shared = compiled.metadata.shared
    return Cost(bits, round(ratio, 3), registers, spills, load_bits, shared, launch.warps, tensor)


def _key(case: Case) -> str:
    """Changes with whatever a count depends on: a kernel's code, what it is compiled with, Triton, and the counting."""
    import triton
    from lowbit_kernels import fast_asm
    from lowbit_kernels import layout as layouts

    launch = _launch(case, _layout(case))
    counting = (_compile, _nvidia, _amd, find_loops, _cycles, _narrowest, _lines_of, _weight_lines, per_weight, count)
    parts = [triton.__version__, repr(case), launch.kernel.cache_key, repr(dataclasses.replace(launch, kernel=None))]
    parts += [inspect.getsource(source) for source in (layouts, fast_asm, *counting)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def is_counted(case: Case) -> bool:
    """Whether :func:`cached_count` would compile nothing."""
    sys.path.insert(0, str(KERNELS))
    return (CACHE / f"{_key(case)}.json").exists()


def cached_count(case: Case) -> Cost | str:
    """:func:`count`, remembered while its :func:`_key` stays; the error as text where it does not compile."""
    sys.path.insert(0, str(KERNELS))
    path = CACHE / f"{_key(case)}.json"
    if path.exists():
        return Cost(**json.loads(path.read_text()))
    try:
        cost = count(case)
    except Exception as error:  # a compiler's refusal is a result: it is shown in the table
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:100] if str(error).strip() else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(dataclasses.asdict(cost)))
    part.replace(path)
    return cost


def record(case: Case, cost: Cost) -> dict:
    """What ``--json`` writes for a case; the keys are :data:`KEYS`."""
    both = {**dataclasses.asdict(case), **dataclasses.asdict(cost)}
    return {key: both[key] for key in KEYS}


def occupancy(case: Case, cost: Cost) -> float | None:
    """Share of a multiprocessor's warps that registers and shared memory leave room for, on paper."""
    if case.target not in DEVICES:
        return None
    *_, most, kib = DEVICES[case.target]
    by_registers = 65536 // (-(-max(cost.registers, 1) // 8) * 8 * 32 * cost.warps)
    programs = min(by_registers, kib * 1024 // (cost.shared_bytes + 1024), 32, most // cost.warps)
    return programs * cost.warps / most


def roofline(case: Case, cost: Cost) -> float | None:
    """A model: share of memory bandwidth that instruction issue alone would allow, at most 1."""
    if case.target not in DEVICES:
        return None
    _, processors, clock, bandwidth, *_ = DEVICES[case.target]
    issued = processors * clock * 1e9 * 4 * 32 / cost.instructions_per_weight
    return min(1.0, issued * cost.bits / 8 / (bandwidth * 1e9))


def _table(results: list[tuple[Case, Cost | str]]):
    from rich.table import Table

    table = Table(caption="instr/w: instructions per weight in the main loop. model: bandwidth that issue alone allows")
    heads = ("target", "kernel", "format", "dtype", "form", "instr/w", "regs", "spills", "load bits", "shared", "mma")
    for head in (*heads, "occupancy", "model"):
        table.add_column(head, justify="left" if head in heads[:5] else "right", no_wrap=True)
    for case, cost in results:
        named = (case.target, case.kernel, case.format.replace("group_size", "g"), case.dtype, case.form)
        if isinstance(cost, str):
            table.add_row(*named, cost)
            continue
        shares = [f"{s:.0%}" if s is not None else "" for s in (occupancy(case, cost), roofline(case, cost))]
        numbers = (cost.registers, cost.spills, cost.load_bits, cost.shared_bytes, cost.tensor)
        table.add_row(*named, f"{cost.instructions_per_weight:.2f}", *map(str, numbers), *shares)
    return table


def measure(selected: list[Case], processes: int = 2) -> list[tuple[Case, Cost | str]]:
    """Counts every case, in so many processes; in this one if that is 1."""
    if processes == 1:
        return [(case, cached_count(case)) for case in selected]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(zip(selected, pool.map(cached_count, selected), strict=True))


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a case did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", default=[], help="part of a case's name; give several to narrow down"
    )
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing can be compiled under the interpreter")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    named = {case: " ".join(dataclasses.astuple(case)) for case in cases()}
    results = measure([c for c, name in named.items() if all(part in name for part in given.only)], given.processes)
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 180).print(_table(results))
    if given.json:
        part = given.json.with_name(given.json.name + ".part")
        part.write_text(json.dumps([record(c, r) for c, r in results if isinstance(r, Cost)], indent=1) + "\n")
        part.replace(given.json)
    return int(any(isinstance(cost, str) for _, cost in results))


if __name__ == "__main__":
    sys.exit(main())
