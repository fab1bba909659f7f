"""Sizes of tiles from files: the shipped ones are sound, the nearest shape is taken, and what is wrong is named."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import count_tiles
import lowbit_kernels
import pytest
import torch
from lowbit_kernels import forms, parse, tuning
from lowbit_kernels.fast import fast_tiles
from lowbit_kernels.tiles import fast_split, linear_tiles

INT4 = parse("int:bits=4,group_size=64")
ENTRY = {
    **{"form": "subnormal", "format": "int4_g64", "rows": 1, "N": 4096, "K": 4096, "split": 4},
    "tiles": {"rows": 1, "outputs": 64, "blocks": 8, "columns": 8, "window": 8, "warps": 2, "stages": 3},
}
FILE = {"family": "nvidia-sm90", "origin": "a test", "unpack_rows": 77, "multiprocessors": None, "entries": [ENTRY]}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Makes a dict the user's file."""

    def write(data, name="own.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))
        return path

    return write


def test_every_family_has_a_sound_file_that_says_where_it_comes_from():
    families = {*tuning.FAMILIES.values(), "default"}
    assert {path.stem for path in tuning.SHIPPED.iterdir()} == families
    for name in families:
        settings = tuning.shipped(name)
        assert settings.family == name and settings.origin.startswith("counted, not timed")
        keys = [(e.form, e.format, e.rows, e.N, e.K) for e in settings.entries]
        assert len(set(keys)) == len(keys)


def _used(device, form, layout, rows, N, K):
    """What :func:`lowbit_kernels.linear` takes there: its sizes as in a file, and the split."""
    if form == "portable":
        sizes = lowbit_kernels._tiles(device, layout, rows, N, K)
        return {k: v for k, v in dataclasses.asdict(sizes).items() if k != "split" and v}, sizes.split
    sizes, split = lowbit_kernels._fast_tiles(device, form, layout, rows, N, K)
    return {k: v for k, v in dataclasses.asdict(sizes).items() if v}, split


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_shipped_entries_are_what_the_kernels_use(architecture):
    settings = tuning.shipped(tuning.family(architecture))
    layouts = {tuning.format_class(parse(text)): parse(text) for text in (*count_tiles.FORMATS, "ternary:bits=1.58")}
    assert {e.format for e in settings.entries} == set(layouts) - (
        {"ternary_row"} if settings.multiprocessors else set()
    )
    device = forms.Device("amd" if "gfx" in architecture else "nvidia", architecture, settings.multiprocessors or 0)
    smaller = dataclasses.replace(device, multiprocessors=device.multiprocessors // 2)
    for e in settings.entries:
        layout = layouts[e.format]
        assert _used(device, e.form, layout, e.rows, e.N, e.K) == (e.tiles, e.split)
        # Shapes nearby take the same entry; the device with half the multiprocessors half the programs to a sum.
        assert _used(device, e.form, layout, max(1, e.rows - 1) if e.rows > 4 else e.rows, e.N + 64, e.K)[0] == e.tiles
        half = max(1, e.split // 2) if settings.multiprocessors else e.split
        assert _used(smaller, e.form, layout, e.rows, e.N, e.K) == (e.tiles, half)
    # What no entry covers, the rules decide; and no program is left without a step.
    (form,) = {e.form for e in settings.entries} - {"magic"}
    uncovered = parse("int:bits=5,group_size=256")
    ruled = (
        fast_tiles(1, uncovered, form) if form != "portable" else linear_tiles(1, 4096, 4096, uncovered, device.warp)
    )
    assert tuning.find(architecture, form, uncovered, 1, 4096, 4096) is None
    sizes = {k: v for k, v in dataclasses.asdict(ruled).items() if k != "split" and v}
    assert _used(device, form, uncovered, 1, 4096, 4096)[0] == sizes
    assert _used(device, form, layouts["int4_g32"], 16, 1024, 64)[1] == 1


def test_shipped_files_are_those_that_the_command_writes(tmp_path):
    """So they follow the rules: entries go before them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", tuning.ENVIRONMENT_VARIABLE)}
    command = [sys.executable, count_tiles.__file__, "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in tuning.SHIPPED.iterdir() if path.stem != "default"}


@pytest.mark.parametrize(
    "architecture, expected",
    [("sm_80", "nvidia-sm80"), ("sm_86", "nvidia-sm89"), ("sm_103", "nvidia-sm100"), ("gfx1101", "amd-gfx1100")],
)
def test_architectures_have_families(architecture, expected):
    assert tuning.family(architecture) == expected
    assert tuning.family("sm_75") == tuning.family("gfx906") == tuning.family("") == "default"


def test_formats_that_are_tuned_alike_have_one_name():
    names = {
        **{"int:bits=3": "int3_g64", "int:bits=3,symmetric=True": "int3_g64", "nf:bits=4": "table4_g64"},
        **{"codebook:bits=4": "table4_g64", "codebook:bits=4,group_size=-1,codebook=row": "table4_row"},
        **{
            "codebook:bits=4,scale_dtype=e4m3": "table4_g64_e4m3",
            "int:bits=4,zeros=float": "int4_g64_floats",
            "fp4:bits=4": "fp4_g32",
            "ternary:bits=1.58": "ternary_row",
        },
    }
    assert {text: tuning.format_class(parse(text)) for text in names} == names
    assert [tuning.bucket(m) for m in (1, 2, 3, 4, 5, 9, 17, 1000, 5000)] == [1, 2, 4, 4, 8, 16, 64, 1024, 1024]


def test_the_nearest_shape_is_taken_on_a_logarithmic_scale(own):
    shapes = [(1024, 4096), (4096, 4096), (16384, 4096)]
    own({**FILE, "entries": [{**ENTRY, "N": n, "K": k, "split": 2**i} for i, (n, k) in enumerate(shapes)]})

    def nearest(N, K):
        found = tuning.find("sm_90", "subnormal", INT4, 1, N, K)
        return found.N, found.K

    assert nearest(4096, 4096) == (4096, 4096)
    assert nearest(2000, 4096) == (1024, 4096) and nearest(2100, 4096) == (4096, 4096)  # sqrt(1024 * 4096) is 2048
    assert nearest(8000, 64) == (4096, 4096) and nearest(8300, 10**6) == (16384, 4096)
    assert nearest(2048, 4096) == (1024, 4096)  # the first of two that are equally near
    assert tuning.find("sm_90", "lop3", parse("int:bits=7,group_size=1024"), 1, 4096, 4096) is None


def test_a_users_file_goes_before_the_shipped_one(own, monkeypatch):
    path = own(FILE)
    assert dict(tuning.find("sm_90", "subnormal", INT4, 1, 9, 9).tiles) == ENTRY["tiles"]
    assert tuning.unpack_rows("sm_90") == 77
    device = forms.Device("nvidia", "sm_90", 132)
    assert forms.choose(device, INT4, torch.float16, 76).name == "subnormal"
    assert forms.choose(device, INT4, torch.float16, 77).name == "unpacked"
    with pytest.raises(ValueError, match=r"own\.json: the file is for nvidia-sm90, this device is of nvidia-sm80"):
        tuning.unpack_rows("sm_80")
    path.rename(path.with_name("nvidia-sm90.json"))
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path.parent))  # a folder: other families keep the shipped ones
    assert tuning.unpack_rows("sm_90") == 77 and tuning.unpack_rows("sm_80") == math.inf


@pytest.mark.parametrize(
    "data, message",
    [
        ("{", "not a readable JSON file"),
        ([], "expected an object with family, origin, unpack_rows, multiprocessors, entries, not list"),
        ({**FILE, "speed": 1}, "'speed' is unknown; there are family"),
        ({k: v for k, v in FILE.items() if k != "origin"}, "'origin' is missing"),
        ({**FILE, "unpack_rows": "77"}, "unpack_rows is '77', of a wrong type"),
        ({**FILE, "unpack_rows": 0}, "unpack_rows is 0; give 1 or more, or null"),
        ({**FILE, "multiprocessors": -1}, "multiprocessors is -1; give 1 or more, or null"),
        ({**FILE, "entries": [ENTRY, {**ENTRY, "form": "fastest"}]}, "entry 1: form 'fastest' has no tiles"),
        ({**FILE, "entries": [{**ENTRY, "rows": 3}]}, "entry 0: rows is 3; the buckets are 1, 2, 4"),
        ({**FILE, "entries": [{**ENTRY, "split": 3}]}, "entry 0: split is 3; it has to be a power of two"),
        ({**FILE, "entries": [{**ENTRY, "split": True}]}, "entry 0: split is True, of a wrong type"),
        ({**FILE, "entries": [{**ENTRY, "N": 0}]}, "entry 0: N and K have to be at least 1"),
        (
            {**FILE, "entries": [{**ENTRY, "tiles": {**ENTRY["tiles"], "outputs": 48}}]},
            "entry 0: outputs is 48; it has to be a power of two",
        ),
        (
            {**FILE, "entries": [{**ENTRY, "tiles": {**ENTRY["tiles"], "lanes": 64}}]},
            "entry 0, tiles: 'lanes' is unknown",
        ),
        (
            {**FILE, "entries": [{**ENTRY, "form": "portable", "tiles": {"rows": 1, "outputs": 16}}]},
            "entry 0, tiles: 'inputs' is missing",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(own, data, message):
    path = own(data)
    with pytest.raises(ValueError) as error:
        tuning.unpack_rows("sm_90")
    assert str(path) in str(error.value) and message in str(error.value)


def test_sums_are_shared_until_the_device_is_full_or_the_shares_cost_traffic():
    tiles = fast_tiles(1, INT4, "subnormal")
    splits = [fast_split(1, n, 4096, INT4, tiles, 100) for n in (64, 512, 4096, 65536)]
    assert splits == sorted(splits, reverse=True) and splits[-1] == 1
    assert -(-512 // tiles.outputs) * splits[1] <= 400
    many = fast_tiles(64, INT4, "subnormal")
    assert fast_split(64, 64, 4096, INT4, many, 10**6) * 64 * 256 <= 4096 * 4


def test_the_command_tunes_goes_on_and_writes_what_is_read(tmp_path, device):
    if device != "cpu":
        pytest.skip("there is a GPU")
    script, output = Path(__file__).parents[1] / "benchmarks" / "tune.py", tmp_path / "nvidia-sm90.json"

    def tune(*arguments):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, script, "--rounds", "1", "--output", output, *arguments]
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)

    first = tune("--interpret", "--format", "int:bits=4")
    assert first.returncode == 0, first.stderr
    assert f"export HF_LOWBIT_TUNING={output}" in first.stdout
    settings = tuning.read(output)
    assert {(e.form, e.format, e.rows, e.N, e.K) for e in settings.entries} == {
        (form, "int4_g64", 1, 32, 128) for form in ("magic", "subnormal")
    }
    assert settings.origin.startswith("timed on the interpreter")
    again = tune("--interpret", "--format", "int:bits=4", "--format", "int:bits=2", "--minutes", "0")
    assert again.returncode == 0 and "the time is over; 2 problems are left" in again.stdout
    more = tune("--interpret", "--format", "int:bits=4")
    assert more.returncode == 0 and "1/2" not in more.stdout and tuning.read(output).entries == settings.entries
    refused = tune()
    assert refused.returncode == 2 and "tune needs a GPU and a build of torch that supports it" in refused.stderr


@pytest.mark.parametrize("registers", [True, False], ids=["registers are faster", "pairs are faster"])
def test_a_table_of_pairs_is_tuned_away_or_kept_with_room_for_it(registers, device, tmp_path, monkeypatch):
    import tune
    from gpu_check import interpreted
    from lowbit_kernels import fast_pairs
    from support.inline_asm import emulate_inline_asm

    emulate_inline_asm()
    output, spec = tmp_path / "nvidia-sm90.json", "nf:bits=4,group_size=64"
    tuner, tried = tune.Tuner(device, interpreted(), output, 1), []

    def caller(form, layout, arguments):
        call = tune.Tuner.caller(tuner, form, layout, arguments)
        return lambda sizes: (tried.append(sizes), call(sizes))[1]

    def seconds(calls):
        for call in calls.values():
            call()
        faster = "new" in calls and registers and "pairs" not in tried[-1]
        return {"best": 2.0, "new": 1.0 if faster else 3.0}

    monkeypatch.setattr(tuner, "caller", caller)
    monkeypatch.setattr(tuner, "seconds", seconds)
    tuner.tune("subnormal", spec, 16, 128, 128)
    tuner.write("the interpreter")
    (entry,) = tuning.read(output).entries
    assert "pairs" in tried[0] and ("pairs" in entry.tiles) is not registers
    # Three steps in flight are tried where no table is beside them, and are too much beside one.
    assert any(sizes["stages"] == 3 for sizes in tried) is registers
    assert all(not tiles.pairs or fast_pairs.has_room(tiles, parse(spec)) for tiles in map(tune.tiles_of, tried))
