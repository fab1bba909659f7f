"""Writes the shipped files of sizes of tiles, in seconds, from the rules. Nothing is timed.

    python kernels/benchmarks/count_tiles.py

The sizes are those of the rules (:mod:`lowbit_kernels.fast`, :mod:`lowbit_kernels.tiles`), which were chosen by
counting in compiled code; the split is that for the device that stands for the family in ``sass_report.DEVICES``.
:mod:`tune` measures, and finds others.

Run it again when a rule changes: entries go before the rules, and a test compares them.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from sass_cases import AMD, FAST, TERNARY
from sass_report import DEVICES

FAMILIES = {target: f"{'amd-' if target in AMD else 'nvidia-'}{target.replace('_', '')}" for target in DEVICES}
FORMATS = (
    *(f"int:bits={bits},group_size=32" for bits in range(1, 9)),
    *(f"int:bits={bits},group_size={group}" for bits in (2, 3, 4, 8) for group in (64, 128)),
    *("nf:bits=4,group_size=32", "nf:bits=4,group_size=64", "fp4:bits=4"),
)
SHAPES = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 4, 16, 64)
FORMS = {form: dtype for dtype, form in FAST.items()}
ORIGIN = (
    "counted, not timed: sizes by the rules of fast.py and tiles.py, which were chosen by counting in compiled code,"
    " for {}"
)


def entries(target: str, text: str, form: str) -> list[dict]:
    """Entries of a form and format for every number of rows and shape."""
    from lowbit_kernels import fast, parse, tiles, tuning

    layout, made = parse(text), []
    for rows in ROWS:
        key = {"form": form, "format": tuning.format_class(layout), "rows": rows}
        for N, K in SHAPES:
            if form == "portable":
                record = tiles.linear_tiles(rows, N, K, layout, AMD[target])
                split = record.split
            else:
                record = fast.fast_tiles(rows, layout, form)
                split = tiles.fast_split(rows, N, K, layout, record, DEVICES[target].multiprocessors)
            taken = dataclasses.asdict(record)
            taken = {name: size for name, size in taken.items() if name != "split" and size}
            made.append({**key, "N": N, "K": K, "tiles": taken, "split": split})
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    from lowbit_kernels import tuning

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the files [default: that of the package]")
    output = parser.parse_args(arguments).output or tuning.SHIPPED
    for target, name in FAMILIES.items():
        fast = target not in AMD
        formats, forms = (FORMATS, FORMS) if fast else ((*FORMATS, TERNARY), ("portable",))
        made = [entry for text in formats for form in forms for entry in entries(target, text, form)]
        unpack = tuning.shipped(name).unpack_rows
        head = {"family": name, "origin": ORIGIN.format(target), "unpack_rows": unpack}
        head["multiprocessors"] = DEVICES[target].multiprocessors if fast else None
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in made)
        part = output / f"{name}.json.part"
        part.write_text(json.dumps({**head, "entries": []}, indent=1).replace("[]", f"[\n{lines}\n ]") + "\n")
        part.replace(output / f"{name}.json")
        print(f"{name}: {len(made)} entries", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
