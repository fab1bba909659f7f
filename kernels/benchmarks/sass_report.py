"""What a weight costs in instructions, counted in machine code that is compiled here, for real targets, without a GPU.

    python kernels/benchmarks/sass_report.py                    # NVIDIA and AMD targets, all widths: a table
    python kernels/benchmarks/sass_report.py --only sm_90 --only gemv --json report.json
    python kernels/benchmarks/sass_report.py --format int:bits=4,group_size=256 --only sm_80     # not in the matrix

What is compiled says :mod:`sass_cases`, how code is read :mod:`sass_code`. Instructions per weight are those of a
kernel's main loop, predicated ones, address arithmetic, scales and synchronisation included, times the threads of the
program, divided by the weights that one turn takes. A loop in it (gradients of widths with a 1-bit plane have one, and
products in float32) counts as often as it turns. What is before and after the loop (pointers, the last reduction, the
store) is not in it: it does not grow with K. Shapes are whole multiples of a step. Kernels that write weights out, and
the Hadamard transform, have no loop: there every instruction counts, and a weight of the transform is a value, one of
the decoder of coded weights a symbol.

Registers, shared memory and spills (STL, LDL; on AMD scratch) come from the compiled file. ``load_bits`` is the width
of the narrowest load from global memory in the loop that line information traces to the source that loads packed
weights, 0 where the compiler lost the line. Occupancy is the share of warps that registers and shared memory leave
room for, on paper. The last column is a **model, not a measurement**: the share of memory bandwidth at which
instructions would be issued just fast enough, if nothing else ever waited. It lets a multiprocessor begin instructions
for 128 threads a cycle on NVIDIA (four schedulers of a warp), for 64 on AMD.

A result is kept in a cache under a key that changes with all that it depends on, so a second run compiles nothing.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import sass_cases
import sass_code
from sass_cases import AMD, NVIDIA, UNLOOPED, Case, cases, fast_cases, launch_of, layout_of
from sass_code import per_weight, read_amd, read_nvidia

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lowbit-kernels" / "sass"
KEYS = (
    *("target", "kernel", "format", "bits", "dtype", "form", "instructions_per_weight", "registers", "spills"),
    *("load_bits", "shared_bytes"),
)


@dataclass(frozen=True)
class Device:
    """A device of a target, by data sheets; all but the first four of one multiprocessor.

    Args:
        name: What it is sold as.
        multiprocessors: How many; compute units on AMD.
        clock: In GHz.
        bandwidth: In GB/s.
        kib: KiB of shared memory.
        warps: Warps that a scheduler holds at most.
        registers: For each thread of one warp after another, of a scheduler.
        granule: Registers that a warp takes at least, and in multiples of.
        schedulers: How many.
        issued: Threads that an instruction begins for in a cycle, by all of them.
        reserved: Bytes of shared memory that a program takes besides its own.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: int
    kib: int
    warps: int = 16
    registers: int = 512
    granule: int = 8
    schedulers: int = 4
    issued: int = 128
    reserved: int = 1024


DEVICES = {
    "sm_80": Device("A100 40GB", 108, 1.41, 1555, 164),
    "sm_89": Device("RTX 4090", 128, 2.52, 1008, 100, warps=12),
    "sm_90": Device("H100 SXM", 132, 1.83, 3350, 228),
    "sm_100": Device("B200", 148, 1.85, 8000, 228),
    "sm_120": Device("RTX 5090", 170, 2.41, 1792, 100, warps=12),
    "gfx942": Device("MI300X", 304, 2.1, 5300, 64, warps=8, issued=64, reserved=0),
    "gfx1100": Device("RX 7900 XTX", 96, 2.5, 960, 64, 16, 1536, 24, schedulers=2, issued=64, reserved=0),
}


@dataclass(frozen=True)
class Cost:
    """What was counted for a case; ``warps`` and ``tensor`` (tensor-core instructions a turn) are for the table."""

    bits: float
    instructions_per_weight: float
    registers: int
    spills: int
    load_bits: int
    shared_bytes: int
    warps: int
    tensor: int


def count(case: Case) -> Cost:
    """Compiles a case and counts."""
    layout = layout_of(case)
    launch = launch_of(case, layout)
    compiled, warp = sass_cases.compiled(case, launch)
    looped = case.kernel not in UNLOOPED
    if case.target in AMD:
        loops, *numbers = read_amd(compiled.asm["amdgcn"], looped)
    else:
        loops, *numbers = read_nvidia(compiled.asm["cubin"], compiled.asm["ptx"], looped)
    registers, spills, load_bits, tensor = numbers
    work = launch.weights * launch.constants.get("BLOCK_M", 0) // launch.warps
    ratio = per_weight(loops, looped, launch.warps * warp, launch.weights, launch.turns, work)
    bits = {"hadamard": 16, "entropy": 8}[case.kernel] if layout is None else 1.6 if layout.ternary else layout.bits
    shared = compiled.metadata.shared
    if launch.constants.get("PAIRS"):
        from lowbit_kernels import fast_pairs

        shared += fast_pairs.BYTES  # declared in the code itself
    return Cost(bits, round(ratio, 3), registers, spills, load_bits, shared, launch.warps, tensor)


def key(case: Case) -> str:
    """Changes with whatever a count depends on: a kernel's code, what it is compiled with, Triton, and the counting.

    Cases that compile to the same kernel have the same.
    """
    import triton
    from lowbit_kernels import fast_asm
    from lowbit_kernels import layout as layouts

    layout, code = layout_of(case), sass_code
    launch, indexed = launch_of(case, layout), case.kernel == "embedding"
    counting = (code.find_loops, code._cycles, code._narrowest, code._lines_of, code._weight_lines, code.products)
    counting += (code._lines_by_address, code._files)
    counting += (read_nvidia, read_amd, per_weight, sass_cases.compiled, count)
    parts = [triton.__version__, repr((case.target, case.dtype, layout, indexed))]
    parts += [launch.kernel.cache_key, repr(dataclasses.replace(launch, kernel=None))]
    parts += [inspect.getsource(source) for source in (layouts, fast_asm, *counting)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def is_counted(case: Case) -> bool:
    """Whether :func:`cached_count` would compile nothing."""
    return (CACHE / f"{key(case)}.json").exists()


def cached_count(case: Case) -> Cost | str:
    """:func:`count`, remembered while its :func:`key` stays; the error as text where it does not compile."""
    path = CACHE / f"{key(case)}.json"
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


def occupancy(case: Case, cost: Cost) -> float:
    """Share of a multiprocessor's warps that registers and shared memory leave room for, on paper."""
    device = DEVICES[case.target]
    rounded = -(-max(cost.registers, 1) // device.granule) * device.granule
    held = min(device.warps, device.registers // rounded) * device.schedulers
    programs = min(held // cost.warps, device.kib * 1024 // max(1, cost.shared_bytes + device.reserved), 32)
    return programs * cost.warps / (device.warps * device.schedulers)


def roofline(case: Case, cost: Cost) -> float:
    """A model: share of memory bandwidth that instruction issue alone would allow, at most 1."""
    device = DEVICES[case.target]
    issued = device.multiprocessors * device.clock * 1e9 * device.issued / cost.instructions_per_weight
    return min(1.0, issued * cost.bits / 8 / (device.bandwidth * 1e9))


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
        shares = [f"{share:.0%}" for share in (occupancy(case, cost), roofline(case, cost))]
        numbers = (cost.registers, cost.spills, cost.load_bits, cost.shared_bytes, cost.tensor)
        table.add_row(*named, f"{cost.instructions_per_weight:.2f}", *map(str, numbers), *shares)
    return table


def measure(selected: list[Case], processes: int = 2) -> list[tuple[Case, Cost | str]]:
    """Counts every case, in so many processes; in this one if that is 1."""
    if processes == 1:
        return [(case, cached_count(case)) for case in selected]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(zip(selected, pool.map(cached_count, selected), strict=True))


def _reads(case: Case) -> bool:
    from lowbit_kernels.fast import reads

    return reads(layout_of(case), case.form)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a case did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", default=[], help="part of a case's name; give several to narrow down"
    )
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        help="count its fast forms instead of the matrix; give several for more",
    )
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing can be compiled under the interpreter")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        listed = [c for t in NVIDIA for c in fast_cases(t, given.format) if _reads(c)] if given.format else cases()
    except ValueError as error:
        parser.error(str(error))
    if unread := set(given.format) - {case.format for case in listed}:
        parser.error(f"no fast form reads {', '.join(sorted(unread))}")
    named = {case: " ".join(dataclasses.astuple(case)) for case in listed}
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
