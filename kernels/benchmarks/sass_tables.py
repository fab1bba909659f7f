"""Writes ``benchmarks/results/sass_report.md``: what :mod:`sass_report` counts, as tables.

python kernels/benchmarks/sass_tables.py             # an hour or two of compiling the first time
python kernels/benchmarks/sass_tables.py --counted   # only what was counted before; the file says how much that is
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "torch-ext")]
RESULT = HERE.parents[1] / "benchmarks" / "results" / "sass_report.md"
FORM = {"fp16": "subnormal", "bf16": "magic"}
HEAD = """`python kernels/benchmarks/sass_tables.py`

Instructions for a weight in the main loop, counted in machine code compiled for each target, with registers of a
thread in brackets. Counted, not timed: no GPU took part. The sizes that the kernels take by default for a weight of
4096 x 4096. Triton {version}, its own assembler.
"""
GROUPS = """
## Fast forms, small groups

Group 32, zero points; `subnormal` for fp16, `magic` for bf16. Held to the limits above: integers by vector, except
7 bits in fp16. Not held: 7 bits (2.6) and NF4 (3.5) by vector in fp16, and 16 rows.

16 rows cannot reach the limits of groups of 128. A sum takes one multiplication by its scale and one by its zero point
for every group: 16 rows x 2 / 32 weights = 1.0 instruction a weight, where groups of 128 take 0.25. At 4 bits on sm_80,
of 3.47: 1.00 that, 0.91 unpacking, 0.31 tensor cores, about 0.5 loading scales and zero points and bringing them to
where the sums are, the rest loads, addresses and the loop. Scaling weights in pairs of halves instead of sums costs a
subtraction and a multiplication for two weights, 1.0 again, rounds the weights, and needs the same scales.
"""
PORTABLE = """
## Portable form

float16. Of all formats: the range of instructions, the most registers, spills (registers moved to memory, in all), the
narrowest load of weights in bits, and how many formats were counted. Groups of 128 (FP4: 32) and, for the same kernels,
of 32.
"""


def name(format: str) -> str:
    """What a format is called in a table."""
    from lowbit_kernels import parse

    if not format.startswith("int"):
        return format.partition(",")[0]
    layout = parse(format)
    plural = "bit" if layout.bits == 1 else "bits"
    return f"{layout.bits} {plural}, {'symmetric' if layout.zeros == 'fixed' else 'zero points'}"


def fast(counts, kernel: str, formats: list[str], limits: bool) -> list[str]:
    """Rows of a table of the fast forms."""
    from sass_report import NVIDIA, Case
    from test_cost import limit

    head = ["format", "dtype", *(["limit"] if limits else []), *NVIDIA]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for format in formats:
        for dtype, form in FORM.items():
            cells = [name(format), dtype, *([str(limit(kernel, format, dtype))] if limits else [])]
            for target in NVIDIA:
                cost = counts.get(Case(target, kernel, format, dtype, form))
                cells.append(f"{cost.instructions_per_weight:.2f} ({cost.registers})" if cost else "")
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def portable(counts, group: int) -> list[str]:
    """Rows of a table of the portable kernels: one for a kernel, a column for a target."""
    from sass_report import AMD, NVIDIA, PORTABLE_ROWS, ROWS

    targets = (*NVIDIA, *AMD)
    rows = ["| kernel | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for kernel in (*ROWS, *PORTABLE_ROWS):
        cells = []
        for target in targets:
            found = [
                cost
                for case, cost in counts.items()
                if (case.target, case.kernel, case.form, case.dtype) == (target, kernel, "portable", "fp16")
                and (f"group_size={group}" in case.format or (group == 128 and case.format == "fp4:bits=4"))
            ]
            ratios = [cost.instructions_per_weight for cost in found]
            cells.append(
                f"{min(ratios):.1f} to {max(ratios):.1f}; {max(c.registers for c in found)}; "
                f"{sum(c.spills for c in found)}; {min(c.load_bits for c in found)}; {len(found)}"
                if found
                else ""
            )
        if any(cells):
            rows.append(f"| {kernel} | {' | '.join(cells)} |")
    return rows


def hadamard(counts) -> list[str]:
    """Rows of the table of the Hadamard transform: one for a length, a column for a target."""
    from sass_report import AMD, HADAMARD, NVIDIA, Case

    targets = (*NVIDIA, *AMD)
    rows = ["| values | dtype | " + " | ".join(targets) + " |", "|---" * (len(targets) + 2) + "|"]
    for n in HADAMARD:
        for dtype in FORM:
            found = [counts.get(Case(target, "hadamard", f"block={n}", dtype, "portable")) for target in targets]
            cells = [
                f"{c.instructions_per_weight:.1f} ({c.registers}), {c.spills}, {c.load_bits}" if c else ""
                for c in found
            ]
            rows.append(f"| {n} | {dtype} | {' | '.join(cells)} |")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a case did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counted", action="store_true", help="compile nothing: what was counted before")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing can be compiled under the interpreter")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import sass_report
    import triton
    from sass_report import Case, Cost
    from test_cost import limit

    small = [f"int:bits={bits},group_size=32" for bits in range(1, 9)] + ["nf:bits=4,group_size=32"]
    listed = [c for c in sass_report.cases() if "symmetric=True" not in c.format or c.form in FORM.values()]
    listed = [c for c in listed if c.form in FORM.values() or c.dtype == "fp16" or c.kernel == "hadamard"]
    listed = [c for c in listed if c.form != "lop3"]
    for target in (*sass_report.NVIDIA, *sass_report.AMD):
        for format in small:
            for kernel in sass_report.ROWS:
                if target in sass_report.NVIDIA:
                    listed += [Case(target, kernel, format, *kind) for kind in FORM.items()]
            portable_kernels = (*sass_report.ROWS, *sass_report.PORTABLE_ROWS)
            listed += [Case(target, kernel, format, "fp16", "portable") for kernel in portable_kernels]
    chosen = [c for c in listed if not given.counted or sass_report.is_counted(c)]
    results = sass_report.measure(chosen, given.processes)
    counts = {case: cost for case, cost in results if isinstance(cost, Cost)}
    fast_formats = sass_report.formats()
    lines = [HEAD.format(version=triton.__version__)]
    for title, kernel in (("Fast forms, matrix by vector", "gemv"), ("Fast forms, 16 rows of x", "gemm16")):
        lines += [f"## {title}\n", "Group 128 (FP4: 32). The limit holds on sm_80 and sm_90.\n"]
        lines += [*fast(counts, kernel, fast_formats, True), ""]
    lines.append(GROUPS)
    for kernel in sass_report.ROWS:
        lines += [f"{kernel}:\n", *fast(counts, kernel, small, False), ""]
    lines += [PORTABLE, "Groups of 128:\n", *portable(counts, 128), "", "Groups of 32:\n", *portable(counts, 32), ""]
    lines += [
        "## Hadamard transform\n",
        "Instructions a value (registers), spills, bits of a load.\n",
        *hadamard(counts),
        "",
    ]
    above = [
        case
        for case, cost in counts.items()
        if case.target in ("sm_80", "sm_90") and case.form in FORM.values() and "group_size=32" not in case.format
        if cost.instructions_per_weight > limit(case.kernel, case.format, case.dtype)
    ]
    bad = {
        "Above a limit": above,
        "With spills": [case for case, cost in counts.items() if cost.spills],
        "Loads of weights below 128 bits": [case for case, cost in counts.items() if cost.load_bits < 128],
    }
    lines.append(f"Counted: {len(counts)} of the {len(listed)} kernels that these tables have.")
    lines += [
        f"\n{what}: {'; '.join(' '.join(vars(c).values()) for c in found) or 'none'}." for what, found in bad.items()
    ]
    part = given.output.with_name(given.output.name + ".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(given.output)
    print("\n".join(lines[-4:]))
    return int(len(counts) < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
