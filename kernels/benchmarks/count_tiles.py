"""Writes the shipped files of sizes of tiles by counting in compiled code, where there is no device to time them on.

    python kernels/benchmarks/count_tiles.py            # NVIDIA's families, the usual formats: an hour or so

The model is the time to issue a weight's instructions or to read its bits, whichever is longer, for the device that
stands for the family in ``sass_report.DEVICES``. Where reading takes longer with the sizes of the rule, no sizes can be
better, and nothing is written. Elsewhere the sizes with more or fewer rows of W and inputs to a step are compiled
(:mod:`sass_report`), those that spill or load weights in pieces smaller than 16 bytes dropped, and the fastest are
written if the model has them faster than the rule by a hundredth. Programs share a sum until the device is full by the
registers and shared memory that were counted. It is a model; :mod:`tune` measures.

More than 4 rows of x are cut in tiles of 16: what holds for 16 holds for them. Run it again when ``fast.py`` changes:
entries go before the rule.
"""

import argparse
import dataclasses
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "torch-ext"), str(HERE)]
FAMILIES = {target: f"nvidia-{target.replace('_', '')}" for target in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")}
FORMATS = (
    *(f"int:bits={bits},group_size={group}" for bits in (4, 3, 2, 8) for group in (32, 64, 128)),
    "nf:bits=4,group_size=64",
)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
KERNELS = {"gemv": 1, "gemm16": 16}
FORMS = {"subnormal": "fp16", "magic": "bf16"}
ORIGIN = "counted, not timed: entries where kernels/benchmarks/count_tiles.py finds sizes that beat the rule"


def candidates(rows: int, layout) -> list[dict[str, int]]:
    """The rule's sizes and their neighbours in outputs and blocks."""
    from lowbit_kernels import fast
    from tune import neighbours

    rule = dataclasses.asdict(fast.fast_tiles(rows, layout))
    return [rule, *(n for name in ("outputs", "blocks") for n in neighbours(rule, name))]


def counted(case, sizes: dict[str, int]):
    """The cost of a case with these sizes, or None where it does not compile."""
    import sass_report
    from lowbit_kernels import fast
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    rule = fast.fast_tiles
    fast.fast_tiles = lambda rows, layout: fast.FastTiles(**sizes)
    try:
        return sass_report.count(case)
    except (CompilationError, OutOfResources, PTXASError):
        return None
    finally:
        fast.fast_tiles = rule


def seconds(case, cost) -> tuple[float, float]:
    """The model: seconds to issue the instructions of a weight, and to read its bits."""
    import sass_report

    _, processors, clock, bandwidth, *_ = sass_report.DEVICES[case.target]
    return cost.instructions_per_weight / (processors * clock * 1e9 * 4 * 32), cost.bits / 8 / (bandwidth * 1e9)


def rank(case, cost) -> tuple:
    """What the best has least: seconds a weight in the model; of equals, the one with room for most warps."""
    import sass_report

    issued, read = seconds(case, cost)
    return max(issued, read), -sass_report.occupancy(case, cost)


def entries(target: str, text: str, kernel: str, form: str) -> list[dict]:
    """The entries of a form, format and number of rows for every shape; none if the rule's sizes are as good."""
    import sass_report
    from lowbit_kernels import fast, parse, tiles, tuning

    case, layout, rows = sass_report.Case(target, kernel, text, FORMS[form], form), parse(text), KERNELS[kernel]
    rule, *others = candidates(rows, layout)
    ruled = counted(case, rule)
    issued, read = seconds(case, ruled)
    if issued <= read and not ruled.spills:
        return []
    costs = [(sizes, counted(case, sizes)) for sizes in others]
    good = [(s, c) for s, c in costs if c is not None and not c.spills and c.load_bits == 128]
    sizes, cost = min(good, key=lambda pair: rank(case, pair[1]), default=(rule, ruled))
    if not ruled.spills and rank(case, cost)[0] > 0.99 * rank(case, ruled)[0]:
        return []
    _, processors, *_, most, _ = sass_report.DEVICES[target]
    resident = max(1, round(sass_report.occupancy(case, cost) * most / cost.warps))
    key = {"form": form, "format": tuning.format_class(layout), "rows": rows}
    record = fast.FastTiles(**sizes)
    return [
        {
            **{**key, "N": N, "K": K, "tiles": sizes},
            "split": tiles.fast_split(rows, N, K, layout, record, processors, resident),
        }
        for N, K in SHAPES
    ]


def _entries(arguments: tuple) -> list[dict]:
    return entries(*arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=tuple(FAMILIES), help="only this one; repeatable")
    parser.add_argument("--format", action="append", help="text of a format, int:bits=4,group_size=64; repeatable")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of the files [default: that of the package]")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing can be compiled under the interpreter")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from lowbit_kernels import tuning

    output = given.output or tuning.SHIPPED
    for target in given.target or FAMILIES:
        work = [(target, text, k, form) for text in given.format or FORMATS for k in KERNELS for form in FORMS]
        with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
            found = [entry for part in pool.map(_entries, work) for entry in part]
        shipped = json.loads((tuning.SHIPPED / f"{FAMILIES[target]}.json").read_text(encoding="utf-8"))
        text = json.dumps({**shipped, "origin": ORIGIN, "entries": []}, indent=1)
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in found)
        part = output / f"{FAMILIES[target]}.json.part"
        part.write_text(text.replace("[]", f"[\n{lines}\n ]" if found else "[]") + "\n", encoding="utf-8")
        tuning.read(part)
        part.replace(output / f"{FAMILIES[target]}.json")
        print(f"{FAMILIES[target]}: {len(found)} entries", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
