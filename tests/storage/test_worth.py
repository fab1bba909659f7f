"""What is coded by measured speeds: never more than the processors can decode while the rest is read."""

import json
import logging

import pytest
import torch
import transformers
from conftest import _TEXT
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from hf_lowbit import LowBitConfig, compress
from hf_lowbit.cli import app
from hf_lowbit.compress import CHOICE, compress_folder, token_seconds
from hf_lowbit.convert import quantize_folder
from hf_lowbit.storage import worth
from hf_lowbit.storage.entropy import is_coded
from hf_lowbit.storage.layers import layer_of
from hf_lowbit.storage.reading import PIECE_BYTES
from hf_lowbit.storage.worth import SHARE, Kind, choose, disk_speed

KINDS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1000, 10**7), st.floats(0.1, 0.97), st.floats(1e-6, 1.0)), max_size=6
)


def made(drawn) -> list[Kind]:
    return [
        Kind(tuple(f"model.layers.{i}.k{number}.weight" for i in range(count)), nbytes, int(part * nbytes), seconds)
        for number, (count, nbytes, part, seconds) in enumerate(drawn)
    ]


@given(KINDS, st.floats(1e6, 1e10), st.floats(0, 1))
def test_what_is_chosen_fits_and_no_other_would(drawn, disk, computing):
    kinds = made(drawn)
    total = sum(kind.nbytes * len(kind.names) for kind in kinds) + 10**6
    choice = choose(kinds, total, disk, computing)
    by_name = {name: kind for kind in kinds for name in kind.names}
    assert len(set(choice.names)) == len(choice.names)

    def times(names):
        saved = sum(by_name[name].nbytes - by_name[name].coded_bytes for name in names)
        return (total - saved) / disk, computing + sum(by_name[name].decoding_s for name in names)

    read, busy = times(choice.names)
    if choice.names:
        assert busy <= SHARE * read * (1 + 1e-9)
    # The tensor that saves most for its decoding, among those left, does not fit any more.
    left = [name for name in by_name if name not in choice.names]
    if left:
        best = max(left, key=lambda name: by_name[name].gain)
        read, busy = times([*choice.names, best])
        assert busy >= SHARE * read * (1 - 1e-9)
    assert 0 <= choice.fraction <= 1 and (choice.fraction == 1) == (not left and bool(kinds))


def test_kinds_that_save_most_come_first_and_are_spread_over_the_layers():
    names = [tuple(f"model.layers.{i}.{k}.weight" for i in range(8)) for k in "ab"]
    slow, quick = Kind(names[0], 1000, 900, 0.1), Kind(names[1], 1000, 500, 0.1)
    choice = choose([slow, quick], 16000, 16000 / 1.5, 0.0)  # 1.2 s less 0.04 s for each, 0.1 s for each: 8
    assert choice.names == [*names[1]]
    half = choose([slow, quick], 16000, 16000 / 0.7, 0.0)
    assert half.names == [names[1][i] for i in (1, 3, 5, 7)]


# -- a repo ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worth")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**_TEXT, "hidden_size": 128, "num_hidden_layers": 4})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "float")
    quantize_folder(folder / "float", folder / "raw", LowBitConfig(bits_stored=3.0), progress=False)
    return folder


def coded_names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name for name in file.keys() if is_coded(file.get_tensor(name))}  # noqa: SIM118


def test_a_slow_disk_codes_everything_and_a_fast_one_nothing_in_layers(packed, tmp_path, monkeypatch, capfd):
    transformers.utils.logging.enable_progress_bar()
    found = {}
    for name, speed in (("slow", 1e3), ("fast", 1e15)):
        monkeypatch.setattr(compress, "disk_speed", lambda folder, sample, speed=speed: speed)
        found[name] = compress_folder(packed / "raw", tmp_path / name, fraction="auto", progress=False)
        assert found[name]["disk"] == speed and not list(tmp_path.glob("**/hf_lowbit_choice.json"))
    compress_folder(packed / "raw", tmp_path / "all", progress=False)
    assert "Loading weights" not in capfd.readouterr().err and transformers.utils.logging.is_progress_bar_enabled()
    assert coded_names(tmp_path / "slow") == coded_names(tmp_path / "all")
    inside = {name for name in coded_names(tmp_path / "all") if layer_of(name) and name.endswith("proj.weight")}
    assert inside and coded_names(tmp_path / "fast") == coded_names(tmp_path / "all") - inside
    assert (found["slow"]["fraction"], found["fast"]["fraction"]) == (1.0, 0.0)
    assert found["slow"]["computing_s"] > 0 and found["slow"]["decoding"] > 0
    assert found["fast"]["computing_s"] == 0  # nothing would fit, so the model was not run


def test_a_choice_is_made_once(packed, tmp_path, monkeypatch):
    """Stopped after its choice, the run goes on with it though the disk has another speed by then."""

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "disk_speed", lambda folder, sample: 1e3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compress, "store_file", stop)
        compress_folder(packed / "raw", tmp_path / "coded", fraction="auto", progress=False)
    choice = json.loads((tmp_path / "coded.partial" / CHOICE).read_text())
    monkeypatch.setattr(compress, "disk_speed", stop)
    found = compress_folder(packed / "raw", tmp_path / "coded", fraction="auto", progress=False)
    assert found["fraction"] == choice["fraction"] == 1 and set(choice["names"]) <= coded_names(tmp_path / "coded")


def test_the_disk_is_measured_where_the_output_will_lie(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(worth, "TRIAL_BYTES", 2 * PIECE_BYTES + 999)
    sample = tmp_path / "sample"
    sample.write_bytes(bytes(3 * PIECE_BYTES))
    seen, read = [], worth.Files.read

    def noted(self, name, into, begin):
        seen.append((name, begin))
        return read(self, name, into, begin)

    monkeypatch.setattr(worth.Files, "read", noted)
    assert disk_speed(tmp_path, sample) > 0
    assert {name.rpartition("/")[0] for name, _ in seen} == {str(tmp_path)}
    assert [begin for _, begin in seen] == [0, PIECE_BYTES, 2 * PIECE_BYTES] * worth.ROUNDS
    assert [file.name for file in tmp_path.iterdir()] == ["sample"]


def test_computing_is_what_remains_without_waiting(packed, monkeypatch, caplog):
    assert 0 < token_seconds(packed / "raw") < 10
    monkeypatch.setattr(transformers.LlamaForCausalLM, "main_input_name", "pixel_values")
    with caplog.at_level(logging.WARNING):
        transformers.utils.logging.enable_propagation()
        assert token_seconds(packed / "raw") == 0
        transformers.utils.logging.disable_propagation()
    assert "computing is left out, since this model cannot be run on tokens here" in caplog.text


def test_the_command_says_what_it_measured_and_chose(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "disk_speed", lambda folder, sample: 2e8)
    arguments = ["compress", str(packed / "raw"), str(tmp_path / "coded"), "--fraction"]
    said = " ".join(CliRunner().invoke(app, [*arguments, "auto"]).output.split())
    assert "of what coding makes smaller in layers is coded: the disk was read at 0.20 GB/s" in said
    assert "GB/s were decoded, and computing a token took" in said
    refused = " ".join(CliRunner().invoke(app, [*arguments, "most"]).output.split())
    assert "--fraction most is neither a number above 0, up to 1, nor auto" in refused


def test_impossible_fractions_are_refused(packed, tmp_path):
    for fraction in ("most", 0, 1.5):
        with pytest.raises(ValueError, match=f"fraction={fraction} is not possible: use a number above 0, up to 1, or"):
            compress_folder(packed / "raw", tmp_path / "none", fraction=fraction)
