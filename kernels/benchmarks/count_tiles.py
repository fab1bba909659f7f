"""Writes the shipped files of sizes of tiles: from the rules, and from counting in compiled code. Nothing is timed.

    python kernels/benchmarks/count_tiles.py                # seconds: the sizes of the rules, for every family
    python kernels/benchmarks/count_tiles.py --search       # an hour or so: better ones, where counting finds them

Without ``--search`` an entry has the sizes of the rules (:mod:`lowbit_kernels.fast`, :mod:`lowbit_kernels.tiles`), or
those that an earlier search left in the file, as long as ``--forget`` does not drop them; the split is that for the
device that stands for the family in ``sass_report.DEVICES``.

The model of a search is the time to issue a weight's instructions or to read its bits, whichever is longer. Where
reading takes longer with the sizes of the rule, no sizes can be better, and they stay. Elsewhere the sizes with more or
fewer rows of W and inputs to a step are compiled (:mod:`sass_report`), those that spill or load weights in pieces
smaller than 16 bytes dropped, and the fastest are written if the model has them faster than the rule by a hundredth. It
is a model; :mod:`tune` measures. 64 rows of x are cut in tiles of 16: what holds for 16 holds for them.

Run it again when a rule changes: entries go before the rules, and a test compares them.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "torch-ext"), str(HERE)]
FAMILIES = {target: f"nvidia-{target.replace('_', '')}" for target in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")}
FAMILIES |= {target: f"amd-{target}" for target in ("gfx942", "gfx1100")}
FORMATS = (
    *(f"int:bits={bits},group_size=32" for bits in range(1, 9)),
    *(f"int:bits={bits},group_size={group}" for bits in (2, 3, 4, 8) for group in (64, 128)),
    *("nf:bits=4,group_size=32", "nf:bits=4,group_size=64", "fp4:bits=4"),
)
SHAPES = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 4, 16, 64)
KERNELS = {1: "gemv", 16: "gemm16", 64: "gemm16"}  # what counts for so many rows
FORMS = {"subnormal": "fp16", "magic": "bf16"}
ORIGIN = (
    "counted, not timed: sizes by the rules of fast.py and tiles.py, which were chosen by counting in compiled code,"
    " and what count_tiles.py --search found for {}"
)


def candidates(rows: int, layout) -> list[dict[str, int]]:
    """The rule's sizes and their neighbours in outputs and blocks."""
    from lowbit_kernels import fast
    from tune import neighbours

    rule = dataclasses.asdict(fast.fast_tiles(rows, layout))
    return [rule, *(n for name in ("outputs", "blocks") for n in neighbours(rule, name))]


def counted(case, sizes: dict[str, int]):
    """The cost of a case with these sizes, or None where it does not compile."""
    import lowbit_kernels
    import sass_report
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    chosen = lowbit_kernels._fast_tiles
    lowbit_kernels._fast_tiles = lambda *_: (lowbit_kernels.FastTiles(**sizes), 1)
    try:
        return sass_report.count(case)
    except (CompilationError, OutOfResources, PTXASError):
        return None
    finally:
        lowbit_kernels._fast_tiles = chosen


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


def searched(case, layout, rows: int) -> dict[str, int]:
    """The sizes of the rule, or those of its neighbours that the model has faster."""
    rule, *others = candidates(rows, layout)
    ruled = counted(case, rule)
    issued, read = seconds(case, ruled)
    if issued <= read and not ruled.spills:
        return rule
    costs = [(sizes, counted(case, sizes)) for sizes in others]
    good = [(s, c) for s, c in costs if c is not None and not c.spills and c.load_bits == 128]
    sizes, cost = min(good, key=lambda pair: rank(case, pair[1]), default=(rule, ruled))
    better = ruled.spills or rank(case, cost)[0] <= 0.99 * rank(case, ruled)[0]
    return sizes if better else rule


def entries(target: str, text: str, form: str, search: bool, found: dict[tuple, dict[str, int]]) -> list[dict]:
    """Entries of a form and format for every number of rows and shape; ``found`` are sizes of earlier searches."""
    import sass_report
    from lowbit_kernels import fast, parse, tiles, tuning

    layout, made = parse(text), []
    for rows in ROWS:
        key = {"form": form, "format": tuning.format_class(layout), "rows": rows}
        sizes = found.get((form, key["format"], rows))
        if form != "portable":
            if search and rows in KERNELS:
                sizes = searched(sass_report.Case(target, KERNELS[rows], text, FORMS[form], form), layout, rows)
            record = fast.FastTiles(**sizes) if sizes else fast.fast_tiles(rows, layout)
        for N, K in SHAPES:
            if form == "portable":
                record = tiles.linear_tiles(rows, N, K, layout, sass_report.AMD[target])
                split = record.split
            else:
                split = tiles.fast_split(rows, N, K, layout, record, sass_report.DEVICES[target][1])
            taken = {
                name: size for name, size in dataclasses.asdict(record).items() if name != "split" and size is not None
            }
            made.append({**key, "N": N, "K": K, "tiles": taken, "split": split})
    return made


def earlier(settings) -> dict[tuple, dict[str, int]]:
    """Sizes in a file that are not those of the rules, by form, format and rows."""
    from lowbit_kernels import fast, parse, tuning

    layouts = {tuning.format_class(parse(text)): parse(text) for text in FORMATS}
    return {
        (e.form, e.format, e.rows): dict(e.tiles)
        for e in settings.entries
        if e.form in FORMS and fast.FastTiles(**e.tiles) != fast.fast_tiles(e.rows, layouts[e.format])
    }


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=tuple(FAMILIES), help="only this one; repeatable")
    parser.add_argument("--search", action="store_true", help="compile other sizes, on NVIDIA's targets")
    parser.add_argument("--format", action="append", help="text of a format to search for; repeatable")
    parser.add_argument("--forget", action="store_true", help="drop what earlier searches left in the files")
    parser.add_argument("--output", type=Path, help="folder of the files [default: that of the package]")
    given = parser.parse_args(arguments)
    if given.search and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing can be compiled under the interpreter")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import sass_report
    from lowbit_kernels import tuning

    output = given.output or tuning.SHIPPED
    for target in given.target or FAMILIES:
        name = FAMILIES[target]
        shipped = tuning.shipped(name)
        found = {} if given.forget else earlier(shipped)
        fast = target in sass_report.NVIDIA
        formats = FORMATS if fast else (*FORMATS, "ternary:bits=1.58")
        made = [
            entry
            for text in formats
            for form in (FORMS if fast else ("portable",))
            for entry in entries(target, text, form, given.search and text in (given.format or FORMATS), found)
        ]
        head = {"family": name, "origin": ORIGIN.format(target), "unpack_rows": shipped.unpack_rows}
        head["multiprocessors"] = sass_report.DEVICES[target][1] if fast else None
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in made)
        part = output / f"{name}.json.part"
        part.write_text(json.dumps({**head, "entries": []}, indent=1).replace("[]", f"[\n{lines}\n ]") + "\n")
        others = len(earlier(tuning.read(part)))
        part.replace(output / f"{name}.json")
        print(f"{name}: {len(made)} entries, {others} sizes from searches", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
