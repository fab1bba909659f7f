"""Writes ``benchmarks/results/sass_report.md``: what :mod:`sass_report` counts, as tables.

python kernels/benchmarks/sass_tables.py             # two hours or so of compiling the first time
python kernels/benchmarks/sass_tables.py --counted   # only what was counted before; the file says how much that is
"""

import argparse
import os
import sys
from pathlib import Path

import sass_cases
from sass_cases import (
    AMD,
    DEFAULTS,
    FAST,
    HADAMARD,
    MIDDLE,
    NVIDIA,
    OTHERS,
    PRODUCTS,
    SMALL,
    SMALLEST,
    TERNARY,
    TERNARY_EVEN,
    Case,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
RESULT = HERE.parents[1] / "benchmarks" / "results" / "sass_report.md"
TARGETS = (*NVIDIA, *AMD)
HEAD = """`python kernels/benchmarks/sass_tables.py`

Instructions for a weight in the main loop, counted in machine code compiled for each target, with registers of a
thread in brackets. Counted, not timed: no GPU took part. The sizes that the kernels take by default for a weight of
4096 x 4096. Triton {version}, its own assembler. Which kernels are compiled, and which are not because others stand for
them, says `kernels/benchmarks/sass_cases.py`. `python kernels/benchmarks/sass_report.py` prints the same one by one,
with shared memory, tensor-core instructions, occupancy, and the share of bandwidth that a model predicts.
"""
GROUPS = """
## Fast forms, small groups

Group 32, zero points; `subnormal` for fp16, `magic` for bf16. First with scales of 16 bits, then with those of 8 bits
(`log8`) that the package packs by default, then in groups of 64 and 16.

From 3 rows on integers have their scales and zero points in the weights (`fast_scaled.py`): `q s - z s` by one
multiply-add for two weights in fp16, `(q - z) s` by two in bf16. Where they are in the sums, as with fewer rows, a
group takes one multiplication of each sum by its scale and one by its zero point: 16 rows x 2 / 32 weights = 1.0
instruction a weight, where groups of 128 take 0.25. What was compiled and counted on the way, on sm_80 and sm_90, with
scales of 16 bits, before the next table's changes:

| 16 rows, 4 bits, fp16 | sm_80 | sm_90 |
|---|---|---|
| **scales in the weights, each thread with two groups of its own, two steps in flight** | 1.84 | 1.81 |
| the same, three steps in flight | 1.88 | |
| the same with scales of 8 bits, two steps in flight | 1.99 | 2.00 |
| the same in bf16, two steps in flight | 2.32 | 2.32 |
| scales in the sums, as before | 3.47 | 3.38 |
| the same, 256 rows of W a program, 4 warps | 3.42 | 3.70 |
| the same, two steps in a turn of the loop, up to 255 registers | 3.29 | 3.18 |
| the same, W in two strips | 3.65 | 3.52 |
| the same, all fields read after one shift, with two sums | 3.72 | 3.63 |
| each thread with all groups: weights (q - z) s in pairs, two instructions a pair, one sum for all | 3.43 | 3.47 |
| the same by one multiply-add, s (1024 + q) - (1024 + z) s, which rounds by half a step of the grid | 3.15 | 3.18 |
| weights q s by one multiply-add of 1024 + q, s and -1024 s, which is exact, without zero points | 2.02 | 2.02 |
| sums of x times z s for these, as a product of K / 32, with sums of x from another kernel | 0.20 | 0.19 |
| that with sums of x made by each program | 0.58 | 0.54 |

What made all of them cheaper, on sm_80, one after the other, counted as each was made:

| 7 bits, fp16 | vector | vector, 8-bit scales | 16 rows | 16 rows, 8-bit scales |
|---|---|---|---|---|
| before | 2.95 | 3.21 | 3.43 | 3.50 |
| nibbles of a lane are joined with the bits of small planes where they are, then turned | 2.82 | | 3.30 | 3.38 |
| addresses of W are made by one instruction each, not carried by two to four | 2.66 | | 3.15 | |
| those of x, scales and zero points, too | 2.65 | | 3.09 | |
| zero points are made of their bytes, one shift for two groups | 2.52 | 2.78 | 3.08 | 3.16 |
| a scale of 8 bits takes 5 instructions, not 9 | | 2.68 | | |
| scales and zero points as halves of a register, which a multiply-add repeats by itself | | | 2.99 | 3.09 |
| bytes are joined by permutes, four zero points to a register; fewer addresses | 2.42 | 2.58 | 2.84 | 2.97 |
| a block's 16 lanes are two sides, whose texts know their bits of the plane of two | 2.29 | 2.45 | 2.72 | 2.82 |
| zero points of 3, 5 and 7 bits are made once, not by each thread that wants them | | | 2.65 | 2.75 |

With 4 rows, 7 bits go by the last two from 2.66 to 2.54 and 2.47, with 8-bit scales from 2.79 to 2.65 and 2.57 (sm_90:
2.82, 2.68, 2.62). Then scales of 8 bits are read by pairs, with one comparison for those that are code 0: 2.58 on sm_90
and 2.59 on sm_80.

In groups of 64 and 16 each thread has one or four groups of its own. With scales in sums, 16 rows of 4 bits took 2.38
in groups of 64, of 7 bits 3.52.

What made the compiler move weights, for 0.5 to 1.5 instructions each, was how scales and zero points come to their
threads (`fast_blocks.py`). It looks for what an operand of a product is made of, back to loads and to conversions
between layouts; where it meets the two halves of a split tile before one of these, it gives up and converts the
operand. So every tile of pairs ends in a move that it takes for more than a move. A tile of as many columns as a plane
of one bit has lanes was shared out to threads as that plane is, so scales have one dimension more. And rows are asked
for in the order in which threads multiply them: then nothing is left to convert, and no thread wants what another has
loaded. That is why groups of 16 are possible for all widths, and why scales of all types go into weights, and zero
points as floats (`zeros="float"`). On sm_80, in groups of 16, before and now:

| fp16 | vector | now | 16 rows | now |
|---|---|---|---|---|
| 1 bit | 2.35 | 1.75 | 3.74 | 1.95 |
| 2 bits | 2.10 | 1.75 | 2.28 | 1.95 |
| 3 bits | 2.80 | 2.11 | 4.25 | 2.29 |
| 4 bits | 1.93 | 1.65 | 2.08 | 1.88 |
| 5 bits | 3.58 | 2.36 | 4.28 | 2.53 |
| 6 bits | 2.63 | 2.36 | 2.85 | 2.50 |
| 7 bits | 3.75 | 2.52 | 4.47 | 2.70 |
| 8 bits | 12.75 | 1.65 | 13.28 | 1.82 |
| NF4 | 10.66 | 2.66 | 12.56 | 3.01 |
| FP4 with scales of e4m3, bf16 | 10.53 | 2.66 | 12.44 | 3.01 |

Before, 8 bits, NF4, and FP4 in bf16 took the portable form there.

A scale of a group of 16 has only 16 weights, so those of other types than float16 took some of these kernels above the
limits. What brought them below, for scales of `log8`, counted as each was made:

| groups of 16, scales of `log8`, fp16 | 4 bits, 16 rows | 7 bits, vector | the same two on sm_90 | |
|---|---|---|---|---|
| before | 2.11 | 2.80 | | |
| a table of all 255 in shared memory, made once by each program: 2.5 instructions, not 5 | 1.95 | 2.65 | | |
| zero points in pairs of the first and third group, nearly as far apart as halves | | 2.60 | | 2.66 |
| second codes of a pair stay four bits higher, with scales as much smaller | 1.92 | | | |
| 64 rows of W a program, with registers to spare | 1.98 | | 2.04 | |
| the table's addresses by a sum of products of bytes | 1.98 | 2.60 | 2.00 | 2.63 |
| x of a step by one load; its number in registers of each thread, as not known to be one | | 2.59 | | 2.61 |
| the factors of these products kept in registers, too | 1.97 | 2.59 | 1.97 | 2.59 |

Of the other types, in groups of 16, on sm_80, fp16, before and now:

| | limit | `log8` | now | `e4m3` | now | `e8m0` | now | `bfloat16` | now |
|---|---|---|---|---|---|---|---|---|---|
| 2 bits, vector and 4 rows | 2.0 | 2.04 | 1.84 | | 1.84 | 2.004 | 1.80 | | 1.81 |
| 4 bits, 16 rows | 2.0 | 2.11 | 1.97 | 2.05 | 1.97 | 2.07 | 1.93 | | 1.94 |
| 7 bits, vector and 4 rows | 2.6 | 2.80 | 2.59 | 2.68 | 2.59 | 2.77 | 2.54 | 2.65 | 2.55 |
| 7 bits, 16 rows | 3.0 | 3.01 | 2.76 | | 2.76 | | 2.71 | | 2.73 |

Zero points as floats stayed in sums in bf16, because one bfloat16 has too few bits for a zero point times its scale;
now two of them are added to each code times its scale. Of 16 rows, bf16, on sm_80, before and now:

| zero points as floats, 16 rows, bf16 | limit | groups of 16 | now | 32 | now | 64 | now |
|---|---|---|---|---|---|---|---|
| 1 bit | 4.0 | 3.98 | 2.88 | 3.89 | 2.60 | 3.14 | 2.56 |
| 2 bits | 3.5 | 3.69 | 2.90 | 3.24 | 2.61 | 2.44 | 2.57 |
| 3 bits | 4.0 | 4.20 | 3.18 | 4.05 | 2.90 | 3.36 | 2.87 |
| 4 bits | 3.0 | 3.61 | 2.82 | 3.15 | 2.54 | 2.36 | 2.50 |
| 5 bits | 4.0 | 4.76 | 3.36 | 4.61 | 3.07 | 3.87 | 3.04 |
| 6 bits | 4.0 | 4.48 | 3.38 | 3.94 | 3.08 | 3.19 | 3.06 |
| 7 bits | 4.0 | 4.90 | 3.53 | 3.77 | 3.23 | 4.03 | 3.21 |
| 8 bits | 3.5 | portable | 2.79 | 3.88 | 2.50 | 3.06 | 2.46 |

With 1 and 2 rows sums take less; not so with 8 bits, nor with 6 bits in groups of 32. Of 8 bits in groups of 32, those
with scales of `log8` on sm_80 and of `e4m3` on sm_80 and sm_90 were above the limit. By vector, bf16, on sm_80, in
sums and now in weights:

| zero points as floats, vector, bf16 | limit | `float16` | now | `log8` | now | `e4m3` | now |
|---|---|---|---|---|---|---|---|
| 6 bits, groups of 32 | 3.6 | 3.15 | 2.90 | 3.19 | 2.89 | 3.23 | 2.89 |
| 8 bits, groups of 32 | 3.0 | 2.88 | 2.32 | 3.04 | 2.30 | 3.02 | 2.30 |
| 8 bits, groups of 64 | 3.0 | 2.52 | 2.28 | 2.59 | 2.28 | 2.57 | 2.28 |

Outside the matrix (`sass_report.py --format`), on sm_80 and sm_90, fp16 and bf16, by vector and with 4 and 16 rows,
these hold the limits, with all loads of weights of 128 bits and no spills: integers in groups of 16, 32 and 64 with
zero points stored as codes and as floats and scales of all six types; the same in groups of 128 and 256 and a row,
with scales of float16 and `log8`; symmetric integers with 4 and 16 rows in groups of 16, 32 and 64; NF of 2 to 4 bits,
learned tables of 1 to 4 bits and FP4 in groups of 16 and 32 with scales of all six types, and in groups of 64 and 256
and a row with those of float16 and `log8`.

Other versions of Triton were looked at on sm_80. In 3.7.1 and 3.8.0 what was tried is within 0.15 of 3.9.0: 16 rows
of 4 bits and a vector of 7 bits in groups of 16 with scales of `log8`, a vector of 4 bits with those of `e8m0`, 16
rows of 4 bits there with zero points as floats in bf16, of 7 bits in groups of 32 and of 4 bits there with `log8`. In
3.5.1 and 3.6.0 4 bits with stored zero points take 2.7 to 3.0 of these, because operands go through shared memory
once more, and the vector spills. The others are within 0.15 there.
"""
TABLES_TEXT = """
## Fast forms, tables

NF4 in groups of 64, as the package packs it by default, learned tables of 3 bits, and tables of each row of W.

Looked up in registers a level of 4 bits takes 2.6 instructions: for four codes four permutes of bytes, two that choose,
two that pair, and what these permute by. With more than 4 rows two levels are looked up at once in a table of all
pairs in shared memory (`fast_pairs.py`): two instructions for an address and one that loads, 1.5 a weight. The table
has 32 KiB, a column for each lane of a warp, so that no two lanes meet in a bank. For NF4 in groups of 32 on sm_80 the
code outside the loop is 104 instructions longer than with registers, a turn of the loop 296 shorter. What is made
before the loop begins nothing hides, so with up to 4 rows registers stay. With more, `tune.py` tries both on a GPU.

A table of each row was brought to its threads by way of looked up levels in shared memory, 0.3 to 1.3 a weight: the
compiler gives a load of as many rows as there are threads a layout that it keeps. A strip of fewer rows it loads anew
in the layout of the product.

| sm_80, fp16 | before | now |
|---|---|---|
| NF4, groups of 32, 16 rows | 4.14 | 2.93 |
| the same in groups of 64 | 3.73 | 2.54 |
| NF4, groups of 64, 4 rows: two blocks a step, in two strips | 4.61 | 3.29 |
| table of 3 bits, groups of 64, 16 rows: one block a step, not two with empty columns | 3.62 | 2.71 |
| the same in groups of 32 | 3.97 | 3.45 |
| table of 4 bits a row, vector | 4.84 | 3.09 |
| the same, 16 rows: in four strips | 5.02 | 3.32 |
| table of 3 bits a row, vector | 3.75 | 2.13 |

With 16 rows in groups of 32 and 64 a step takes one block, of whose plane of one bit a row has 8 bytes. So two steps
are a turn of the loop, and that plane is loaded for both at once. In groups of 32 that takes strips of 64 rows, or
registers are spilled: 3 bits, 16 rows 3.45 (with 64 bits a load 3.11).

Scales of one byte (FP4, or a learned table with `scale_dtype="e8m0"` or `"e4m3"`) are decoded once, not by each thread
that multiplies by them, and what all scales of a tensor share is multiplied into the last sums:

| sm_80, fp16, groups of 32 | vector | 4 rows | 16 rows |
|---|---|---|---|
| FP4, before | 2.22 | 2.61 | 3.07 |
| now | 2.06 | 2.27 | 2.73 |
"""
PORTABLE = """
## Portable form

Of all formats with zero points and all tables: the range of instructions, the most registers, spills (registers moved
to memory, in all), the narrowest load of weights in bits, and how many formats were counted. Groups of 128 (FP4: 32)
and of 32. In bfloat16 the products on NVIDIA's targets are left out: their fast forms go before this one. In float16
and 7 bits a symmetric grid is among them, for all of that kind: it is the same kernel without zero points.
"""
TERNARY_ROWS = """
## Ternary

Ten to a lane, a scale for each row: instructions a weight (registers), spills, bits of a load. Rows of 4096 inputs have
410 lanes, so that only each 4th begins at 16 bytes. What lies in the 16 bytes that a row begins or ends in is loaded
too and left out; a program takes rows that lie alike, and a gradient is the sum of four shares, of float32 and together
no more than 64 MiB at a time (for experts as many as there are rows). Rows of 5120 inputs all begin at 16 bytes.
Weights that end within 16 bytes are read to their end; only those that begin elsewhere than at 16 bytes are loaded
16 bits at a time, which no tensor of its own does.
"""
ENTROPY = """
## Decoder of coded weights

Instructions for a symbol (registers), spills. A lane takes the bytes that it needs one at a time, so loads are of 8
bits: which lanes need any is known only then.
"""


def name(format: str) -> str:
    """What a format is called in a table."""
    from lowbit_kernels import parse

    layout = parse(format)
    if not format.startswith("int"):
        return format.partition(",")[0] + (", a table a row" if layout.table == "row" else "")
    plural = "bit" if layout.bits == 1 else "bits"
    return f"{layout.bits} {plural}, {'symmetric' if layout.zeros == 'fixed' else 'zero points'}"


def header(*heads: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]


def fast(counts, kernel: str, formats: list[str], limits: bool, forms: dict[str, str] = FAST) -> list[str]:
    """A table of fast forms: a row for a format and dtype, a column for a target."""
    from test_cost import limit

    rows = header("format", "dtype", *(["limit"] if limits else []), *NVIDIA)
    for format in formats:
        for dtype, form in forms.items():
            cells = [name(format), dtype, *([str(limit(kernel, format, dtype))] if limits else [])]
            for target in NVIDIA:
                cost = counts.get(Case(target, kernel, format, dtype, form))
                cells.append(f"{cost.instructions_per_weight:.2f} ({cost.registers})" if cost else "")
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def portable(counts, group: int, dtype: str) -> list[str]:
    """A table of the portable kernels: a row for a kernel, a column for a target."""
    rows = header("kernel", *TARGETS)
    for kernel in (*PRODUCTS, *OTHERS):
        cells = []
        for target in TARGETS:
            found = [
                cost
                for case, cost in counts.items()
                if (case.target, case.kernel, case.form, case.dtype) == (target, kernel, "portable", dtype)
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


def alone(counts, kernels, formats, dtypes, loads: bool = True) -> list[str]:
    """A table of the portable form without ranges: a row for a kernel, format and dtype, a column for a target."""
    rows = header("kernel", "dtype", *TARGETS)
    for kernel in kernels:
        for format in formats:
            for dtype in dtypes:
                found = [counts.get(Case(target, kernel, format, dtype, "portable")) for target in TARGETS]
                cells = [
                    f"{c.instructions_per_weight:.1f} ({c.registers}), {c.spills}" + f", {c.load_bits}" * loads
                    if c
                    else ""
                    for c in found
                ]
                title = f"{kernel}, {format}" if len(formats) > 1 else kernel
                if any(cells):
                    rows.append(f"| {title} | {dtype} | {' | '.join(cells)} |")
    return rows


def summary(counts, listed: int) -> list[str]:
    """What was counted, and what of it breaks a limit."""
    from test_cost import LEAST_LOADS, LIMITED, limit

    above = [
        case
        for case, cost in counts.items()
        if case.target in LIMITED and case.form in FAST.values()
        if cost.instructions_per_weight > limit(case.kernel, case.format, case.dtype)
    ]
    bad = {
        "Above a limit": above,
        "With spills": [case for case, cost in counts.items() if cost.spills],
        "Loads of weights below 128 bits": [
            case for case, cost in counts.items() if cost.load_bits < LEAST_LOADS.get(case.kernel, 128)
        ],
    }
    lines = [f"Counted: {len(counts)} of the {listed} kernels of the matrix."]
    return lines + [
        f"\n{what}: {'; '.join(' '.join(vars(c).values()) for c in found) or 'none'}." for what, found in bad.items()
    ]


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

    listed = sass_cases.cases()
    chosen = [c for c in listed if not given.counted or sass_report.is_counted(c)]
    results = sass_report.measure(chosen, given.processes)
    counts = {case: cost for case, cost in results if isinstance(cost, sass_report.Cost)}
    large = sass_cases.formats()
    lines = [HEAD.format(version=triton.__version__), *summary(counts, len(listed)), ""]
    titles = {"gemv": "matrix by vector", "gemv4": "2 to 4 rows of x", "gemm16": "16 rows of x"}
    for kernel, title in titles.items():
        lines += [f"## Fast forms, {title}\n", "Group 128 (FP4: 32).", "The limit is for sm_80 and sm_90.\n"]
        lines += [*fast(counts, kernel, large, True), ""]
    lines.append(GROUPS)
    for formats, which in (
        (SMALL, "scales of 16 bits"),
        (DEFAULTS, "scales of 8 bits"),
        (MIDDLE, "groups of 64"),
        (SMALLEST, "groups of 16"),
    ):
        for kernel in titles:
            lines += [f"{kernel}, {which}:\n", *fast(counts, kernel, formats, True), ""]
    lines.append(TABLES_TEXT)
    for kernel in titles:
        lines += [f"{kernel}:\n", *fast(counts, kernel, sass_cases.TABLES, True), ""]
    lines += ["## `lop3`\n", "float16; for who asks for it. Groups of 128 and of 32.\n"]
    for kernel in ("gemv", "gemm16"):
        for formats in (large, SMALL):
            grids = [f for f in formats if f.startswith("int")]
            lines += [f"{kernel}:\n", *fast(counts, kernel, grids, False, {"fp16": "lop3"}), ""]
    lines.append(PORTABLE)
    for dtype in sass_cases.DTYPES:
        for group in (128, 32):
            lines += [f"{dtype}, groups of {group}:\n", *portable(counts, group, dtype), ""]
    lines.append(TERNARY_ROWS)
    for inputs, format in ((4096, TERNARY), (5120, TERNARY_EVEN)):
        lines += [f"{inputs} inputs:\n", *alone(counts, (*PRODUCTS, *OTHERS), [format], sass_cases.DTYPES), ""]
    lines += ["## Hadamard transform\n", "Instructions a value (registers), spills, bits of a load.\n"]
    lines += [*alone(counts, ["hadamard"], [f"block={n}" for n in HADAMARD], FAST), ""]
    lines += [ENTROPY, *alone(counts, ["entropy"], ["rans"], ["u8"], loads=False)]
    part = given.output.with_name(given.output.name + ".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(given.output)
    print("\n".join(summary(counts, len(listed))))
    return int(len(counts) < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
