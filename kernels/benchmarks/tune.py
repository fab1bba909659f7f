"""Times sizes of tiles on this machine's GPU and writes a file that the kernels read: see ``lowbit_kernels.tuning``.

    python kernels/benchmarks/tune.py                          # half an hour; the same command again goes on
    export HF_LOWBIT_TUNING=~/.cache/lowbit-kernels/tuning     # what it wrote is used from now on

For every problem (a form, a format, a number of rows, a shape) it starts from the sizes that the rules choose and tries
each size halved and doubled, one after another, keeping what is fastest: about a dozen compilations. A candidate that
the device has no room for is passed over; one that computes something else ends the command. The file is written after
each problem, beside and renamed, and problems that are in it are not timed again, so that it can be stopped and started
at will. At the end it looks from how many rows on writing W out and multiplying by torch is faster.

Without a GPU it ends with code 2. ``--interpret`` tries it out, tiny, in Triton's interpreter.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "torch-ext"), str(HERE)]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lowbit-kernels" / "tuning"
# The most used first: the time may not suffice for all.
FORMATS = (
    *(f"int:bits={bits},group_size=64" for bits in (4, 3, 2, 8)),
    *("nf:bits=4,group_size=64", "int:bits=4,group_size=128", "fp4:bits=4", "ternary:bits=1.58"),
)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
BUCKETS = (1, 16, 64, 256, 4, 8)
VARIED = ("pairs", "split", "outputs", "blocks", "inputs", "warps", "stages", "rows")
LEAST = {"outputs": 16, "inputs": 16, "rows": 16, "pairs": 0}
MOST = {"warps": 8, "stages": 5, "outputs": 256, "rows": 64, "pairs": 1}
GEMV_ROWS = 4


def neighbours(sizes: dict[str, int], name: str, layout) -> list[dict[str, int]]:
    """``sizes`` with the size called ``name`` halved and doubled (stages: one less and more), where there is room.

    ``pairs`` is 1 where it is there, and is left out.
    """
    from lowbit_kernels import fast

    if name == "blocks" and "scaled" in sizes:
        return []  # its steps have 4
    value = sizes[name]
    steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
    found = []
    for new in steps:
        if not LEAST.get(name, 1) <= new <= MOST.get(name, 2**20):
            continue
        changed = {**sizes, name: new}
        if new == 0:  # as it is written: sizes of 0 are not
            del changed[name]
        if name == "blocks":  # columns are groups in a step: they go with it
            changed["columns"] = fast.columns_of(new, layout)
            changed["rows"] = max(sizes["rows"], 8 // changed["columns"])  # a tensor core takes 8 at least
        # Each warp of a fast form multiplies 16 rows of W at a time, of each strip.
        if "strips" not in changed or changed["outputs"] >= 16 * changed["warps"] * changed["strips"]:
            found.append(changed)
    return found


def tiles_of(sizes: dict[str, int]):
    """The record of a fast form's sizes, without the split."""
    from lowbit_kernels import fast

    return fast.FastTiles(**{name: size for name, size in sizes.items() if name != "split"})


class Tuner:
    """One device and the file that is being made for it."""

    def __init__(self, device, record, output: Path, rounds: int):
        from lowbit_kernels import tuning

        self.device, self.record, self.output, self.rounds = device, record, output, rounds
        self.family = tuning.family(record.architecture)
        self.data = {"family": self.family, "origin": "", "unpack_rows": None}
        self.data |= {"multiprocessors": record.multiprocessors or None, "entries": []}
        if output.exists():
            settings = tuning.read(output)
            if settings.family != self.family:
                raise ValueError(
                    f"{output} is for {settings.family}, this device of {self.family}: give another --output"
                )
            self.data = json.loads(output.read_text(encoding="utf-8"))
        self.done = {(e["form"], e["format"], e["rows"], e["N"], e["K"]) for e in self.data["entries"]}

    def write(self, origin: str) -> None:
        self.data["origin"] = origin
        self.output.parent.mkdir(parents=True, exist_ok=True)
        part = self.output.with_name(self.output.name + ".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        part.replace(self.output)

    def key(self, form: str, spec: str, rows: int, N: int, K: int) -> tuple:
        """What the entry of a problem is found by."""
        from lowbit_kernels import parse, tuning

        return (form, tuning.format_class(parse(spec)), rows, N, K)

    def tune(self, form: str, spec: str, rows: int, N: int, K: int) -> dict[str, float]:
        """Finds the entry of one problem; seconds ``before`` and ``after``, and how many ``tried``.

        Raises:
            RuntimeError: if a candidate computes something else.
        """
        import torch
        from lowbit_kernels import fast_pairs, parse, plain
        from problems import packed
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        from hf_lowbit.formats import parse_format

        layout, dtype = parse(spec), torch.bfloat16 if form == "magic" else torch.float16
        key = self.key(form, spec, rows, N, K)
        weight, companions = packed(parse_format(spec), N, K, self.device)
        x = torch.randn(rows, K, device=self.device, dtype=dtype)
        best = self.start(form, layout, rows, N, K)
        call = self.caller(form, layout, (x, weight, companions, None, spec, K))
        wanted = call(best)
        # Twice the rounding of the result, and of the levels of a table, which sizes do not change.
        values = plain.dequantize(weight, companions, spec, K, torch.float32)
        allowed = 2 * torch.finfo(dtype).eps * (x.float().abs() @ values.abs().T)
        before = after = self.seconds({"best": lambda: call(best)})["best"]
        tried = 1
        for name in (n for n in VARIED if n in best and (rows > GEMV_ROWS or n != "rows")):
            for sizes in neighbours(best, name, layout):
                if sizes.get("inputs", layout.step) < layout.step:
                    continue
                if sizes.get("pairs") and not fast_pairs.has_room(tiles_of(sizes), layout):
                    continue
                tried += 1
                try:
                    result = call(sizes)
                except (CompilationError, OutOfResources, PTXASError):
                    continue  # more shared memory or registers than there are, or too small for a tensor core
                if not ((result.float() - wanted.float()).abs() <= allowed).all():
                    raise RuntimeError(f"{key}: {sizes} computes something else: do not use what was tuned here")
                taken = self.seconds({"best": lambda b=best: call(b), "new": lambda s=sizes: call(s)})
                if taken["new"] < taken["best"]:
                    best, after = sizes, taken["new"]
        tiles = {k: v for k, v in best.items() if k != "split"}
        names = ("form", "format", "rows", "N", "K")
        self.data["entries"].append({**dict(zip(names, key, strict=True)), "tiles": tiles, "split": best["split"]})
        self.done.add(key)
        return {"before": before, "after": after, "tried": tried}

    def seconds(self, calls) -> dict[str, float]:
        from timing import medians

        return medians(calls, self.device, self.rounds)

    def start(self, form: str, layout, rows: int, N: int, K: int) -> dict[str, int]:
        """The sizes of the rules, with the split among them."""
        from lowbit_kernels import fast, tiles

        if form == "portable":
            return dataclasses.asdict(tiles.linear_tiles(rows, N, K, layout))
        sizes = fast.fast_tiles(rows, layout, form)
        split = tiles.fast_split(rows, N, K, layout, sizes, self.record.multiprocessors)
        return {**{name: size for name, size in dataclasses.asdict(sizes).items() if size}, "split": split}

    def caller(self, form: str, layout, arguments):
        """A function of sizes that runs the problem with them."""
        from lowbit_kernels import fast, linear
        from lowbit_kernels.tiles import Tiles

        def call(sizes):
            if form == "portable":
                return linear(*arguments, tiles=Tiles(**sizes))
            return fast.fast_linear(*arguments, form=form, tiles=tiles_of(sizes), split=sizes["split"])

        return call

    def unpack_rows(self, counts: tuple[int, ...], N: int, K: int) -> int | None:
        """The least of ``counts`` from which on, in 4 bits, the form "unpacked" is faster than the one chosen."""
        import torch
        from lowbit_kernels import forms, linear, parse
        from problems import packed

        from hf_lowbit.formats import parse_format

        spec = parse_format("int:bits=4,group_size=64").spec
        weight, companions = packed(parse_format(spec), N, K, self.device)
        chosen = forms.choose(self.record, parse(spec), torch.bfloat16, 1).name
        least = None
        for rows in counts:
            x = torch.randn(rows, K, device=self.device, dtype=torch.bfloat16)
            arguments = (x, weight, companions, None, spec, K)
            names = ("unpacked", chosen)
            taken = self.seconds({n: lambda a=arguments, n=n: linear(*a, form=n) for n in names})
            faster = taken["unpacked"] < taken[chosen]
            least = (least or rows) if faster else None
        return least


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="when to stop; the same command again goes on")
    parser.add_argument("--format", action="append", help="text of a format, int:bits=4,group_size=64; repeatable")
    parser.add_argument("--rounds", type=int, default=15, help="runs in a median")
    parser.add_argument("--output", type=Path, help="the file to write [default: ~/.cache/lowbit-kernels/tuning/...]")
    parser.add_argument("--interpret", action="store_true", help="try it out in the interpreter, tiny; needs --output")
    given = parser.parse_args(arguments)
    if given.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        if given.output is None:
            parser.error("--interpret needs --output: its times mean nothing")
    import torch
    from timing import find_device

    device = torch.device("cpu") if given.interpret else find_device()
    if device is None:
        print("tune needs a GPU and a build of torch that supports it; torch finds none", file=sys.stderr)
        return 2
    from lowbit_kernels import forms, parse, tuning

    from hf_lowbit.formats import parse_format

    record = forms.describe(device)
    if given.interpret:
        from gpu_check import interpreted

        record = interpreted()
    output = given.output or CACHE / f"{tuning.family(record.architecture)}.json"
    tuner = Tuner(device, record, output, given.rounds)
    name = "the interpreter" if given.interpret else torch.get_device_module(device).get_device_name(device)
    origin = f"timed on {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    shapes, buckets = (((32, 128),), (1,)) if given.interpret else (SHAPES, BUCKETS)
    problems = [
        (form, parse_format(text).spec, rows, N, K)
        for text in given.format or FORMATS
        for rows in buckets
        for N, K in shapes
        for dtype in (torch.bfloat16, torch.float16)
        for form in [forms.choose(record, parse(text), dtype, 1).name]
    ]
    problems = list(dict.fromkeys(problems))  # the portable form is the same for both dtypes
    problems = [problem for problem in problems if tuner.key(*problem) not in tuner.done]
    end = time.monotonic() + 60 * given.minutes
    for i, problem in enumerate(problems):
        if time.monotonic() > end:
            print(f"the time is over; {len(problems) - i} problems are left: the same command again goes on")
            return 0
        found = tuner.tune(*problem)
        tuner.write(origin)
        taken = f"{found['before'] * 1e6:.1f} -> {found['after'] * 1e6:.1f} us, {found['tried']} tried"
        print(f"{i + 1}/{len(problems)} {problem}: {taken}", flush=True)
    counts = (2, 4) if given.interpret else (256, 512, 1024, 2048, 4096)
    tuner.data["unpack_rows"] = tuner.unpack_rows(counts, *shapes[0])
    tuner.write(origin)
    print(f"written: {output}\nto use it: export {tuning.ENVIRONMENT_VARIABLE}={output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
