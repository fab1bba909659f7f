"""Size against quality over settings, on a tiny model, and what is said of wrong input."""

import json

import pytest
from rich.console import Console
from tiny_chat import save_tiny_chat
from typer.testing import CliRunner

from hf_lowbit import LowBitConfig, cli, tables
from hf_lowbit import tradeoff as module
from hf_lowbit.convert import quantize_folder

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it. " * 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("source") / "tiny")


def test_sizes_and_quality_of_settings(source, tmp_path, capsys, monkeypatch):
    settings = [{"bits": 6}, {"bits": 3}, {"bits": 3, "group_size": "row"}, {"bits_stored": 4.0}]
    options = {"text": TEXT, "windows": 3, "length": 64}
    result = module.measure_tradeoff(source, tmp_path / "out", settings, **options)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["bits=6", "bits=3", "bits=3, group_size=row", "bits_stored=4.0"]
    assert rows["bits=6"]["kl"] < rows["bits=3"]["kl"] < rows["bits=3, group_size=row"]["kl"]
    assert rows["bits=3, group_size=row"]["bits_in_memory"] < rows["bits=3"]["bits_in_memory"]
    step = rows["bits_stored=4.0"]
    assert step["bits_stored"] < step["bits_in_memory"] and step["method"] == "ecsq"
    for row in rows.values():
        beaten = [r for r in rows.values() if r["file_bytes"] < row["file_bytes"] and r["kl"] < row["kl"]]
        assert row["on_frontier"] == (not beaten)
    assert result["float"]["perplexity"] > 1
    assert (tmp_path / "out" / "tradeoff.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert written["rows"] == result["rows"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tradeoff.json", "tradeoff.png"]
    tables.tradeoff(Console(width=160), result, {})
    assert "bits=3, group_size=row" in capsys.readouterr().out

    # Again, with a setting more: what is there is not measured again.
    measured, measure = [], module._measure
    monkeypatch.setattr(module, "_measure", lambda *a: measured.append(a[1]) or measure(*a))
    again = module.measure_tradeoff(source, tmp_path / "out", [*settings, {"bits": 4}], **options)
    assert measured == [{"bits": 4}] and [row["name"] for row in again["rows"]] == [*rows, "bits=4"]
    with pytest.raises(ValueError, match="has results of another model, text or number of windows: choose another"):
        module.measure_tradeoff(source, tmp_path / "out", settings, **{**options, "windows": 2})


def test_wrong_input(source, tmp_path):
    with pytest.raises(ValueError, match=r"bits=4, method=gptq needs calibration: give calibration= \(--calibration"):
        module.measure_tradeoff(source, tmp_path / "a", [{"bits": 4, "method": "gptq"}], text=TEXT)
    with pytest.raises(ValueError, match="bits"):
        module.measure_tradeoff(source, tmp_path / "b", [{"bits": 9}], text=TEXT)
    quantize_folder(source, tmp_path / "packed", LowBitConfig(bits=4))
    with pytest.raises(ValueError, match="packed is quantized already: this needs the float model"):
        module.measure_tradeoff(tmp_path / "packed", tmp_path / "c", [{"bits": 4}], text=TEXT)
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["tradeoff", str(source), str(tmp_path / "d"), "--text", str(tmp_path / "text.txt")]
    refused = CliRunner().invoke(cli.app, [*arguments, "--setting", "bits:4"])
    assert refused.exit_code == 2 and "'bits:4' is not KEY=VALUE,..." in " ".join(refused.output.split())


def test_every_default_setting_is_possible():
    for setting in (*module.SETTINGS, *module.CALIBRATED):
        config = LowBitConfig(**setting, storage="entropy")
        assert (setting in module.CALIBRATED) == config.needs_calibration
    names = [module.series({"method": "m", "setting": s}) for s in ({"bits": 3, "group_size": "row"}, {"bits": 4})]
    assert names == ["m, group_size=row", "m"]
