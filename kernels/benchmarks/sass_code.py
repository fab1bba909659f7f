"""Reads what a compiled kernel says: loops of machine code, registers, spills, and widths of loads.

A main loop is the greatest set of pieces of code that all reach each other; the loop in it is what still does so
without the piece that it is entered by. NVIDIA's code is read from a disassembly, AMD's from the assembler text that
the compiler leaves.
"""

import bisect
import inspect
import io
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


def _lines_of(*functions) -> set[tuple[str, int]]:
    """File name and number of every line of device functions; the compiler may give a load to a neighbouring line."""
    found = set()
    for function in functions:
        code = function.fn.__code__
        lines, first = inspect.getsourcelines(function.fn)
        found |= {(Path(code.co_filename).name, first + i) for i in range(len(lines))}
    return found


def _weight_lines() -> set[tuple[str, int]]:
    """Source lines of functions that load packed weights and nothing else; of kernels that load values or bytes."""
    from lowbit_kernels import decode, entropy, fast_fields, hadamard

    planes = (decode.load_lanes, decode.load_last, decode._plane)
    return _lines_of(fast_fields._words, *planes, hadamard.butterfly_kernel, entropy.entropy_kernel)


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


_LINE = r"\.loc\s+(\S+)\s+(\d+)"


def find_loops(text: str, label: str, instruction: str, branch: str, ends: str) -> Loops:
    """The loops of an assembly text; the patterns say what its rows look like. ``.loc file line`` is a source line.

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
        elif match := re.search(_LINE, row):
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
_AMD_WIDTHS |= dict.fromkeys(("ubyte", "sbyte", "u8", "i8", "d16_u8", "d16_hi_u8", "ubyte_d16", "ubyte_d16_hi"), 8)


def _lines_by_address(code: bytes, ptx: str) -> tuple[list[int], list[tuple[str, int]]]:
    """Where pieces of a cubin's code begin, and from which source line each is, by the line of PTX that it is from.

    The assembler's table of source lines, which the disassembler prints, leaves out some changes of the file where the
    number of the line stays: loads of weights seemed to be from another file there.
    """
    from elftools.common.utils import struct_parse
    from elftools.dwarf.lineprogram import LineProgram
    from elftools.dwarf.structs import DWARFStructs
    from elftools.elf.elffile import ELFFile

    sections = {section.name: section for section in ELFFile(io.BytesIO(code)).iter_sections()}
    if sum(name.startswith(".text.") for name in sections) != 1:
        raise ValueError("addresses are unique in cubins of one function alone")
    stream = io.BytesIO(sections[".nv_debug_line_sass"].data())
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
    header = struct_parse(structs.Dwarf_lineprog_header, stream, 0)
    end = header["unit_length"] + structs.initial_length_field_size()
    states = [entry.state for entry in LineProgram(header, stream, structs, stream.tell(), end).get_entries()]
    files, origins, here = _files(ptx), [], ("", 0)
    for row in ptx.splitlines():
        if match := re.search(_LINE, row):
            here = (files[match[1]], int(match[2]))
        origins.append(here)
    found = {state.address: origins[state.line - 1] for state in states if state is not None}
    return sorted(found), [found[address] for address in sorted(found)]


def _files(text: str) -> dict[str, str]:
    """Names of source files by their number in PTX or AMD's assembly."""
    return {number: Path(name).name for number, name in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', text)}


def read_nvidia(code: bytes, ptx: str, looped: bool) -> tuple[Loops, int, int, int, int]:
    import triton

    usage = _tool(triton.knobs.nvidia.cuobjdump.path, code, "-res-usage")
    addresses, lines = _lines_by_address(code, ptx)

    def with_line(row: re.Match) -> str:
        place = bisect.bisect_right(addresses, int(row[1], 16)) - 1
        return f".loc {lines[place][0]} {lines[place][1]}\n{row[0]}" if place >= 0 else row[0]

    text = _tool(triton.knobs.nvidia.nvdisasm.path, code, "-c")
    loops = find_loops(
        re.sub(r"^\s+/\*([0-9a-f]{4,})\*/", with_line, text, flags=re.MULTILINE),
        label=r"^\s*(\.L_x_\d+):",
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


def read_amd(text: str, looped: bool) -> tuple[Loops, int, int, int, int]:
    files = _files(text)
    loops = find_loops(
        re.sub(r"\.loc\s+(\d+)", lambda m: f".loc {files.get(m[1], m[1])}", text),
        label=r"^(\.LBB\w+):",
        instruction=r"^\s+([a-z]+_\w+(?:\s.*)?)$",
        branch=r"^s_c?branch\w*\s+(\.LBB\w+)",
        ends=r"^s_(?:branch|endpgm|setpc)",
    )
    counted = loops.main if looped else loops.whole
    tensor = sum("mfma" in i.opcode or "wmma" in i.opcode for i in counted)
    load = _narrowest(counted, _weight_lines(), r"(?:global|buffer)_load_(\w+)", _AMD_WIDTHS)
    registers, spills = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    return loops, registers, spills, load, tensor


def products(loop: list[Instruction]) -> int:
    """Products that a warp's tensor-core instructions make in a loop, where their names say so, as AMD's do."""
    shapes = (re.match(r"v_w?mf?ma_\w+?_(\d+)x(\d+)x(\d+)", one.opcode) for one in loop)
    return sum(math.prod(map(int, shape.groups())) for shape in shapes if shape)


def per_weight(loops: Loops, looped: bool, threads: int, weights: int, turns: int, work: int = 0) -> float:
    """Instructions for each of ``weights``, which one turn of the main loop and ``turns`` of the one in it take.

    A compiler may write the loop in it out. Whether it did is known where tensor-core instructions say how much they
    multiply: all of them together have to make ``work`` products for a warp.

    Raises:
        ValueError: if they do not; if there should be a loop, or one in it of more turns than a compiler writes out
            unseen, and is none.
    """
    made, again = products(loops.main), products(loops.inner)
    if looped and made:
        turns = turns if loops.inner else 1
        if made + (turns - 1) * again != work:
            raise ValueError(f"loops of {turns} turns multiply {made + (turns - 1) * again} times, not {work}")
    elif looped and not (loops.main and (turns <= 2 or loops.inner)):
        raise ValueError("the kernel has no loop, or none in it, that should have: nothing to count")
    counted = len(loops.main) + (turns - 1) * len(loops.inner) if looped else len(loops.whole)
    return counted * threads / weights
