"""What a weight costs in instructions, registers and loads, counted in code compiled for real targets without a GPU.

The limits hold for the Triton that the project pins; another version's code is another's. Counting, and what it
means, are in ``benchmarks/sass_report.py``, the matrix in ``benchmarks/sass_cases.py``. It runs in a process of its
own, because this one may be under the interpreter. Instructions are limited where few of them decide, on sm_80 and
sm_90; spills, narrow loads and more shared memory than a program can have are refused on all targets.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import count_tiles
import pytest
import sass_report
import sass_tables
import triton
from sass_cases import AMD, DEFAULTS, FAST, NVIDIA, SMALL, Case, cases
from sass_code import find_loops, per_weight, products
from sass_report import KEYS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(triton.__version__ != "3.9.0", reason="counts are those of Triton 3.9.0")
_COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import sass_report as report
from sass_cases import Case
for line in sys.stdin:
    case = Case(*json.loads(line))
    ((_, cost),) = report.measure([case], processes=1)
    print("counted", json.dumps(cost if isinstance(cost, str) else report.record(case, cost)), flush=True)
"""
QUICK = (("gemv", "int:bits=4,group_size=128,symmetric=False"), ("gemm16", "int:bits=4,group_size=128,symmetric=False"))
LEAST_LOADS = {"entropy": 8}  # bits of a load, where not 128
LIMITED = ("sm_80", "sm_90")
# What one program can have: NVIDIA's programming guide (table of compute capabilities), and AMD's local data share.
_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
SHARED_BYTES = {target: 1024 * kib for target, kib in _KIB.items()}


def limit(kernel: str, format: str, dtype: str) -> float:
    """Instructions per weight allowed on sm_80 and sm_90."""
    bits = int(format.split("bits=")[1].split(",")[0])
    if not format.startswith("int"):
        allowed = 3.5
    elif kernel.startswith("gemv"):
        allowed = 2.0 if bits in (2, 4, 8) else 2.6
    else:
        allowed = {4: 2.0, 2: 2.5, 8: 2.5}.get(bits, 3.0)
    return allowed + (dtype == "bf16")


@functools.cache
def _counter() -> subprocess.Popen:
    """A process that counts a case a line for as long as the tests run: starting it takes longer than most counts."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", _COUNT, str(BENCHMARKS)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def count(case: Case) -> dict | str:
    """The record of ``case``, or the error as text."""
    process = _counter()
    print(json.dumps([case.target, case.kernel, case.format, case.dtype, case.form]), file=process.stdin, flush=True)
    for line in process.stdout:  # the compiler prints, too
        if line.startswith("counted "):
            return json.loads(line.removeprefix("counted "))
    _counter.cache_clear()
    pytest.fail(f"the process that counts ended with {process.wait()}; its message is above")


def _parameters():
    for case in cases():
        if case.form != "portable" and case.format not in (*SMALL, *DEFAULTS):
            quick = (case.kernel, case.format) in QUICK and (case.target, case.form) == ("sm_90", "subnormal")
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(case, marks=marks, id="-".join(vars(case).values()))


def sound(case: Case) -> dict:
    """The record of ``case``, which compiles, spills nothing, and loads weights 16 bytes at a time."""
    found = count(case)
    assert isinstance(found, dict), found
    assert set(found) == set(KEYS)
    assert found["spills"] == 0
    assert found["load_bits"] == LEAST_LOADS.get(case.kernel, 128)
    assert found["shared_bytes"] <= SHARED_BYTES[case.target]
    return found


@pytest.mark.parametrize("case", list(_parameters()))
def test_a_weight_costs_few_instructions_and_wide_loads(case):
    found = sound(case)
    if case.target in LIMITED and case.form in FAST.values():
        assert found["instructions_per_weight"] <= limit(case.kernel, case.format, case.dtype)


_SPECIALIZED = """
import sys
sys.path.insert(0, sys.argv[1])
from lowbit_kernels import fast, fast_scaled, grouped, hadamard, matmul, rows
modules = (fast, fast_scaled, grouped, hadamard, matmul, rows)
kernels = {k for m in modules for k in vars(m).values() if hasattr(k, "params")}
launched = [k for k in kernels if k.__name__.endswith("_kernel")]
rows = [p for k in launched for p in k.params if p.name in ("M", "R", "rows")]
print(len(launched), [p.name for p in rows if not p.do_not_specialize])
"""


def test_one_row_is_compiled_as_any_other_number_is():
    """Triton makes an argument of 1 a constant unless told otherwise: one more binary, of code that was not counted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _SPECIALIZED, str(BENCHMARKS.parent / "torch-ext")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, specialized = done.stdout.split(maxsplit=1)
    assert int(count) >= 10 and specialized.strip() == "[]"


def _small_groups():
    found = [case for case in cases() if case.form != "portable" and case.format in (*SMALL, *DEFAULTS)]
    scales = ("log8", "e4m3", "e8m0")
    others = [f"codebook:bits={bits},group_size=32,scale_dtype={s}" for bits in (1, 3, 4) for s in scales]
    others += [f"int:bits={bits},group_size={g},zeros=float" for bits in range(1, 9) for g in (16, 32, 64)]
    others += [f"int:bits={bits},group_size=16,scale_dtype={s}" for bits in (2, 4, 7) for s in (*scales, "bfloat16")]
    others += [f"int:bits={bits},group_size=32,scale_dtype={s},zeros=float" for bits in (6, 8) for s in scales]
    found += [
        Case(t, k, f, d, form)
        for f in others
        for t in LIMITED
        for k in ("gemv", "gemv4", "gemm16")
        for d, form in FAST.items()
    ]
    for case in found:
        quick = case in (
            Case("sm_80", "gemv", "int:bits=4,group_size=32", "fp16", "subnormal"),
            Case("sm_90", "gemm16", "int:bits=4,group_size=32,scale_dtype=log8", "fp16", "subnormal"),
            Case("sm_80", "gemm16", "nf:bits=4,group_size=32", "fp16", "subnormal"),
            Case("sm_90", "gemv4", "int:bits=7,group_size=32,scale_dtype=log8", "fp16", "subnormal"),
            Case("sm_80", "gemv", "int:bits=7,group_size=16,scale_dtype=log8", "fp16", "subnormal"),
            Case("sm_80", "gemm16", "int:bits=4,group_size=16,zeros=float", "bf16", "magic"),
        )
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(case, marks=marks, id="-".join(vars(case).values()))


@pytest.mark.parametrize("case", list(_small_groups()))
def test_groups_smaller_than_a_block_compile_and_do_not_spill(case):
    """The limits of instructions hold there, too."""
    found = sound(case)
    if case.form in FAST.values() and case.target in LIMITED:
        assert found["instructions_per_weight"] <= limit(case.kernel, case.format, case.dtype)


def test_the_command_counts_formats_outside_the_matrix(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(*arguments):
        command = [sys.executable, str(BENCHMARKS / "sass_report.py"), "--processes=1", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    asked = [f"--format=int:bits=4,group_size=256{symmetric}" for symmetric in ("", ",symmetric=True")]
    done = run(*asked, "--only=sm_90 gemv ", "--only=fp16", f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr[-2000:]
    with_zeros, symmetric = json.loads((tmp_path / "found.json").read_text())
    assert 0 < symmetric["instructions_per_weight"] < with_zeros["instructions_per_weight"]
    done = run("--format=codebook:bits=5")
    assert done.returncode == 2 and "no fast form reads codebook:bits=5" in done.stderr


@pytest.mark.parametrize("group", [32, -1])
def test_a_table_of_pairs_and_what_triton_asks_for_are_what_any_program_may_have(group):
    """Triton asks the driver for more than 48 KiB only by its own part."""
    from lowbit_kernels import fast_pairs

    found = sound(Case("sm_90", "gemm16", f"nf:bits=4,group_size={group}", "fp16", "subnormal"))
    assert fast_pairs.BYTES < found["shared_bytes"] <= 48 * 1024


def _shipped():
    for target in (*NVIDIA, *AMD):
        forms = ("portable",) if target in AMD else tuple(count_tiles.FORMS)
        for text in count_tiles.FORMATS:
            for form in forms:
                for kernel in ("gemv", "gemm16", "gemm64") if target in AMD else ("gemv", "gemm16"):
                    case = Case(target, kernel, text, count_tiles.FORMS.get(form, "fp16"), form)
                    quick = ("int:bits=4,group_size=32", "subnormal", "gemm16")
                    marks = [] if (text, form, kernel) == quick and target == "sm_90" else [pytest.mark.slow]
                    yield pytest.param(case, marks=marks, id=f"{target}-{kernel}-{text}-{form}")


@pytest.mark.parametrize("case", list(_shipped()))
def test_shipped_sizes_do_not_spill(case):
    """The entries of the files in ``tuning``, which :mod:`sass_report` takes as the kernels do."""
    sound(case)


def test_tables_show_what_was_counted_and_leave_the_rest_empty():
    cost = sass_report.Cost(4, 1.494, 153, 2, 64, 0, 2, 0)
    coded = Case("gfx942", "entropy", "rans", "u8", "portable")
    dearer = sass_report.Cost(7, 20.26, 90, 1, 128, 0, 2, 0)
    text, seven = (f"int:bits={bits},group_size=128,symmetric=False" for bits in (4, 7))
    counts = {
        Case("sm_90", "gemv", text, "fp16", "subnormal"): cost,
        Case("gfx942", "gemv", text, "fp16", "portable"): cost,
        Case("gfx942", "gemv", seven, "fp16", "portable"): dearer,
        Case("sm_80", "hadamard", "block=64", "bf16", "portable"): cost,
        coded: sass_report.Cost(8, 174.0, 22, 0, 8, 0, 1, 0),
    }
    table = sass_tables.fast(counts, "gemv", [text], True)
    assert table[2:] == [
        "| 4 bits, zero points | fp16 | 2.0 |  |  | 1.49 (153) |  |  |",
        "| 4 bits, zero points | bf16 | 3.0 |  |  |  |  |  |",
    ]
    expected = ["| gemv |  |  |  |  |  | 1.5 to 20.3; 153; 3; 64; 2 |  |"]
    assert sass_tables.portable(counts, 128, "fp16")[2:] == expected
    assert sass_tables.portable(counts, 32, "fp16")[2:] == sass_tables.portable(counts, 128, "bf16")[2:] == []
    blocks = sass_tables.alone(counts, ["hadamard"], ["block=64", "block=1024"], FAST)
    assert blocks[2:] == ["| hadamard, block=64 | bf16 | 1.5 (153), 2, 64 |  |  |  |  |  |  |"]
    rans = sass_tables.alone(counts, ["entropy"], ["rans"], ["u8"], loads=False)
    assert rans[2:] == ["| entropy | u8 |  |  |  |  |  | 174.0 (22), 0 |  |"]
    head, above, spilled, narrow = sass_tables.summary(counts, 7)
    assert head == "Counted: 5 of the 7 kernels of the matrix." and above.endswith("limit: none.")
    assert spilled.count(";") == 3 and "entropy" not in narrow and narrow.count(";") == 2


def test_the_committed_report_says_what_its_script_writes():
    report = sass_tables.RESULT.read_text()
    texts = (sass_tables.GROUPS, sass_tables.TABLES_TEXT, sass_tables.PORTABLE, sass_tables.TERNARY_ROWS)
    for text in (sass_tables.HEAD.format(version=triton.__version__), *texts, sass_tables.ENTROPY):
        assert text in report


def test_occupancy_and_the_model_of_bandwidth():
    """Two warps of 153 registers and 24.5 KiB, by hand; a program takes 1 KiB more on NVIDIA."""
    text = "int:bits=4,group_size=128,symmetric=False"
    cost = sass_report.Cost(4, 1.5, 153, 0, 128, 25088, 2, 0)
    shares = {t: sass_report.occupancy(Case(t, "gemv", text, "fp16", "portable"), cost) for t in (*NVIDIA, *AMD)}
    # sm_80: 160 of 512 registers, 3 warps x 4 schedulers = 6 programs; shared memory has room for as many.
    assert shares["sm_80"] == 12 / 64
    # sm_89: room for 3 programs in 100 KiB. gfx942: 2 in 64 KiB; gfx1100: the same.
    assert shares["sm_89"] == 6 / 48 and shares["gfx942"] == 4 / 32 and shares["gfx1100"] == 4 / 32
    # 108 x 1.41e9 x 128 / 1.5 weights a second, 4 bits each, are 6.5 TB/s, more than there is; at 15 a tenth.
    slow = sass_report.Cost(4, 15.0, 153, 0, 128, 25088, 2, 0)
    case = Case("sm_80", "gemv", text, "fp16", "portable")
    assert sass_report.roofline(case, cost) == 1.0
    assert sass_report.roofline(case, slow) == pytest.approx(108 * 1.41e9 * 128 / 15 / 2 / 1555e9)


def _instructions(*lines: str) -> str:
    return "\n".join(line if line.startswith(".") else f"\t/*0000*/ {line} ;" for line in lines)


_PATTERNS = {
    **{"label": r"^(\.L_x_\d+):", "instruction": r"/\*\d+\*/\s+(.*?)\s*;"},
    **{"branch": r"BRA.*?`\((\.L_x_\d+)\)", "ends": r"^(?:EXIT|BRA )"},
}


def test_the_main_loop_is_found_and_lines_are_kept():
    text = _instructions(
        *(".L_x_0:", "MOV R1, R2", ".L_x_1:", ".loc b.py 7", "LDG.E.128 R4, [R2]", "IADD3 R1, R1, 1"),
        *("@P0 BRA `(.L_x_1)", "@P1 BRA.DIV UR5, `(.L_x_3)", ".L_x_2:", "EXIT"),
        *(".L_x_3:", *["SHFL R1, R2"] * 9, "BRA `(.L_x_2)"),  # goes back, but not in a circle
    )
    loops = find_loops(text, **_PATTERNS)
    assert [i.opcode for i in loops.main] == ["LDG.E.128", "IADD3", "BRA"] and len(loops.whole) == 16
    assert loops.main[0].line == ("b.py", 7) and loops.inner == []
    assert per_weight(loops, True, 32, 96, 1) == 1 and per_weight(loops, False, 32, 512, 1) == 1
    for found, turns in ((find_loops(_instructions("EXIT"), **_PATTERNS), 1), (loops, 4)):
        with pytest.raises(ValueError, match="has no loop, or none in it"):
            per_weight(found, True, 32, 96, turns)


_KERNEL = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path[:0] = sys.argv[1:]
import first, second
from sass_code import read_nvidia

@triton.jit
def kernel(x, out):
    tl.store(out, first.load(x) + second.load(x + 1))

compiled = triton.compile(ASTSource(kernel, {"x": "*fp32", "out": "*fp32"}), target=GPUTarget("cuda", 80, 32))
loops, *_ = read_nvidia(compiled.asm["cubin"], compiled.asm["ptx"], False)
print(*(f"{i.opcode[:3]} {i.line[0]} {i.line[1]}" for i in loops.whole if i.opcode[:3] == "LDG"), sep="\\n")
"""


def test_loads_on_lines_of_the_same_number_are_told_apart_by_file(tmp_path):
    load = "import triton\nimport triton.language as tl\n\n@triton.jit\ndef load(x):\n    return tl.load(x)\n"
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(load)
    (tmp_path / "kernel.py").write_text(_KERNEL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (tmp_path, BENCHMARKS, BENCHMARKS.parent / "torch-ext")
    command = [sys.executable, str(tmp_path / "kernel.py"), *map(str, paths)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()
    assert found[::3] == ["LDG", "LDG"] and found[1::3] == ["first.py", "second.py"] and found[2] == found[5] != "0"


def test_a_loop_that_the_compiler_wrote_out_is_known_by_what_it_multiplies():
    multiply = "v_mfma_f32_16x16x4_f32 a[0:3], v1, v2, a[0:3]"
    loops = find_loops(_instructions("NOP", ".L_x_0:", *[multiply] * 4, "@P0 BRA `(.L_x_0)", "EXIT"), **_PATTERNS)
    assert products(loops.main) == 4 * 16 * 16 * 4 and loops.inner == []
    assert per_weight(loops, True, 64, 5, 4, work=4096) == 64
    with pytest.raises(ValueError, match="loops of 1 turns multiply 4096 times, not 16384"):
        per_weight(loops, True, 64, 5, 4, work=16384)
    inner = ("NOP", ".L_x_0:", multiply, ".L_x_1:", multiply, "@P1 BRA `(.L_x_1)", "@P0 BRA `(.L_x_0)", "EXIT")
    loops = find_loops(_instructions(*inner), **_PATTERNS)
    assert per_weight(loops, True, 1, 1, 4, work=5 * 1024) == 4 + 3 * 2
    with pytest.raises(ValueError, match="loops of 3 turns multiply 4096 times, not 5120"):
        per_weight(loops, True, 1, 1, 3, work=5 * 1024)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_loop_in_a_loop_counts_as_often_as_it_turns(rotated):
    if rotated:  # the inner loop goes back to the end of the outer one, which lies before its beginning
        lines = (
            *("BRA `(.L_x_2)", ".L_x_1:", "A R1", "@P0 BRA `(.L_x_5)", ".L_x_2:", "B R1", "BRA `(.L_x_4)"),
            *(".L_x_3:", "C R1", "@P1 BRA `(.L_x_1)", ".L_x_4:", "D R1", "BRA `(.L_x_3)", ".L_x_5:", "EXIT"),
        )
    else:
        lines = (
            *("NOP", ".L_x_2:", "B R1", ".L_x_4:", "C R1", "D R1", "@P1 BRA `(.L_x_4)", "A R1", "@P0 BRA `(.L_x_2)"),
            *("NOP", "EXIT"),
        )
    loops = find_loops(_instructions(*lines), **_PATTERNS)
    opcodes = sorted(i.opcode for i in loops.main)
    assert [o for o in opcodes if o != "BRA"] == ["A", "B", "C", "D"]
    assert sorted(i.opcode for i in loops.inner if i.opcode != "BRA") == ["C", "D"]
    counted = len(loops.main) + 3 * len(loops.inner)
    assert per_weight(loops, True, 1, counted, 4) == 1
