"""Budgets: the search is exact, the plan keeps its budget, is saved, replayed and resumed, and bad input is refused."""

import itertools
import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_lowbit import LowBitConfig, cli
from hf_lowbit.allocation import Allocation, allocate, budget, read_allocation, sensitivity
from hf_lowbit.allocation.groups import tie
from hf_lowbit.allocation.search import choose
from hf_lowbit.calibration import Calibration
from hf_lowbit.convert import open_source, quantize_folder
from hf_lowbit.packed import PackedMixin
from hf_lowbit.quantization import quantize

TOKENS = torch.randint(4, 160, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))


def calibration():
    return Calibration(TOKENS, windows=4, length=32)


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, **({"quantization_config": LowBitConfig(**options)} if options else {})
    )


@torch.no_grad()
def log_probabilities(model):
    return torch.log_softmax(model(TOKENS).logits, -1)


def widths(model):
    return {
        n: m.format.bits
        for n, m in model.named_modules()
        if isinstance(m, PackedMixin) and ("layers" in n or "h." in n)
    }


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed):
    rng = random.Random(seed)
    units, options = rng.randint(1, 6), rng.randint(1, 5)
    costs = [[rng.randint(1, 30) for _ in range(options)] for _ in range(units)]
    damages = [[rng.choice([rng.random(), rng.randint(0, 3)]) for _ in range(options)] for _ in range(units)]
    limit = sum(map(min, costs)) + rng.randint(0, 60)
    taken = choose(costs, damages, limit)
    assert sum(c[i] for c, i in zip(costs, taken, strict=True)) <= limit
    every = [
        sum(d[i] for d, i in zip(damages, picks, strict=True))
        for picks in itertools.product(range(options), repeat=units)
        if sum(c[i] for c, i in zip(costs, picks, strict=True)) <= limit
    ]
    # The bound is compared with a tolerance of 1e-9 of the whole damage.
    assert sum(d[i] for d, i in zip(damages, taken, strict=True)) <= min(every) * (1 + 1e-9)


def test_a_budget_below_the_cheapest_choice_is_refused():
    with pytest.raises(ValueError, match="the cheapest options need 5 bytes, the budget is 4"):
        choose([[2, 9], [3, 9]], [[1, 0], [1, 0]], 4)


def test_what_is_fused_is_one_unit():
    names = [
        "l.0.self_attn.q_proj", "l.0.self_attn.k_proj", "l.0.self_attn.v_proj", "l.0.self_attn.o_proj",
        "l.0.mlp.gate_proj", "l.0.mlp.up_proj", "l.0.mlp.down_proj", "l.1.self_attn.q_proj",
        "l.1.mlp.experts.0.up_proj", "l.1.mlp.experts.1.up_proj", "lm_head",
    ]  # fmt: skip
    assert tie(names) == [names[:3], [names[3]], names[4:6], [names[6]], [names[7]], names[8:10], [names[10]]]


# -- sensitivity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_divergences_are_those_of_the_model_with_one_unit_packed(name, tiny):
    """Against the whole model with that unit's weights replaced, computed the long way."""
    source = open_source(budget.fetch(tiny(name)), LowBitConfig(bits=4), None)
    candidates = budget._candidates(source, LowBitConfig(bits=4))
    units, known = tie(list(candidates)), {}
    sensitivity.Probes(source, TOKENS, candidates).divergences(units, known, lambda: None)
    assert list(known) == [unit[0] for unit in units]

    plain, packed = load(tiny(name)), load(tiny(name))
    positions = torch.arange(sensitivity.POSITIONS - 1, TOKENS.shape[1], sensitivity.POSITIONS)
    for unit in units[-3:]:
        saved = {n: packed.get_submodule(n).weight.data for n in unit}
        for n in unit:
            format, method = candidates[n][3]
            linear = isinstance(packed.get_submodule(n), torch.nn.Linear)
            value = format.decode(method.quantize(saved[n] if linear else saved[n].T, format))
            packed.get_submodule(n).weight.data = value if linear else value.T
        p, q = (log_probabilities(model)[:, positions] for model in (plain, packed))
        for n, weight in saved.items():
            packed.get_submodule(n).weight.data = weight
        # Sums of float32 in another order; a KL of 0.01 is a small difference of large terms.
        assert known[unit[0]] == pytest.approx(float(((p - q) * p.exp()).sum(-1).mean()), rel=1e-3, abs=1e-6)


def test_wave_by_wave_gives_the_same(tiny, monkeypatch):
    source = open_source(budget.fetch(tiny("llama")), LowBitConfig(bits=4), None)
    candidates = budget._candidates(source, LowBitConfig(bits=4))
    units, results = tie(list(candidates)), []
    for size in (1, 2**30):
        monkeypatch.setattr(sensitivity, "WAVE_BYTES", size)
        known: dict[str, float] = {}
        sensitivity.Probes(source, TOKENS, candidates).divergences(units, known, lambda: None)
        results.append(known)
    assert results[0] == results[1]


def test_a_search_that_was_stopped_goes_on(tiny, tmp_path, monkeypatch):
    whole = allocate(tiny("llama"), LowBitConfig(bits=3.7), calibration=calibration(), measured=tmp_path / "whole.json")
    path, runs = tmp_path / "measured.json", []
    write = budget.write_json

    def stop(file, content):
        write(file, content)
        if content["divergences"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(budget, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        allocate(tiny("llama"), LowBitConfig(bits=3.7), calibration=calibration(), measured=path)
    monkeypatch.setattr(budget, "write_json", write)
    before = json.loads(path.read_text())["divergences"]
    assert 0 < len(before) < 8
    packed = sensitivity.Probes._packed
    monkeypatch.setattr(sensitivity.Probes, "_packed", lambda *args: runs.append(args[-1][0]) or packed(*args))
    again = allocate(tiny("llama"), LowBitConfig(bits=3.7), calibration=calibration(), measured=path)
    assert again == whole
    assert len(runs) == 8 - len(before) and not set(runs) & set(before)


def test_another_budget_costs_no_measurement(tiny, monkeypatch):
    allocate(tiny("llama"), LowBitConfig(bits=3.7), calibration=calibration())
    monkeypatch.setattr(sensitivity.Probes, "_packed", None)
    monkeypatch.setattr(budget, "errors", None)
    found = allocate(tiny("llama"), LowBitConfig(bits=3.1), calibration=calibration())
    assert found.bits_per_weight <= 3.1


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_budget_is_kept_and_no_uniform_width_within_it_does_less_harm(tiny):
    harms = []
    for bits in (2.7, 3.3, 3.7, 4.8, 6.2):
        found = allocate(tiny("llama"), LowBitConfig(bits=bits), calibration=calibration())
        assert found.bits_per_weight <= bits
        assert all(found.damage <= harm for taken, harm in found.uniform.values() if taken <= bits)
        harms.append(found.damage)
        layers = found.layers
        for i in range(2):
            for kin in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
                assert len({layers[f"model.layers.{i}.{leaf}"] for leaf in kin}) == 1
    assert harms == sorted(harms, reverse=True)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_loading_and_packing_from_disk_agree_and_replay_gives_the_same(name, tiny, tmp_path):
    options = {"bits": 3.7, "calibration": calibration()}
    model = load(tiny(name), **options)
    model.save_pretrained(tmp_path / "loaded")
    quantize_folder(tiny(name), tmp_path / "packed", LowBitConfig(**options), progress=False)
    allocate(tiny(name), LowBitConfig(**options)).save(tmp_path / "plan.json")
    quantize_folder(tiny(name), tmp_path / "replayed", LowBitConfig(bits=str(tmp_path / "plan.json")), progress=False)
    first, *others = (load_file(tmp_path / f / "model.safetensors") for f in ("loaded", "packed", "replayed"))
    assert all(other.keys() == first.keys() for other in others)
    assert all(torch.equal(other[n], first[n]) for other in others for n in first)

    again = load(tmp_path / "packed")
    assert widths(again) == read_allocation(tmp_path / "plan.json").layers == widths(model)
    assert again.config.quantization_config.bits == 3.7
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    record = again.config.quantization_config.calibration
    assert record["windows"] == 4 and len(record["sha256"]) == 64


def test_a_calibrated_method_packs_by_a_plan(tiny, tmp_path):
    options = {"bits": 3.7, "method": "gptq", "calibration": calibration()}
    repo = quantize(tiny("llama"), LowBitConfig(**options), output=tmp_path / "gptq")
    found = allocate(tiny("llama"), LowBitConfig(**options))
    assert widths(repo.load()) == found.layers
    assert widths(load(tiny("llama"), **options)) == found.layers
    assert found.layers == allocate(tiny("llama"), LowBitConfig(bits=3.7, calibration=calibration())).layers


def test_rules_and_embeddings_are_outside_the_budget(tiny):
    options = {"rules": {".*o_proj": {"bits": 8}, ".*down_proj": None}, "calibration": calibration()}
    found = allocate(tiny("llama"), LowBitConfig(bits=3.7, **options))
    assert {name.rpartition(".")[2] for name in found.layers} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    model = load(tiny("llama"), bits=3.7, **options)
    assert model.model.layers[0].self_attn.o_proj.format.bits == 8
    assert {n: b for n, b in widths(model).items() if "o_proj" not in n} == found.layers


def test_the_command_shows_and_saves_a_plan_that_quantize_takes(tiny, tmp_path):
    run = CliRunner().invoke
    plan, text = tmp_path / "plan.json", tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in TOKENS.tolist()))
    options = ["--output", str(plan), "--calibration", str(text), "--length", "32"]
    shown = run(cli.app, ["plan", tiny("llama"), "--bits", "3.7", *options])
    assert shown.exit_code == 0, shown.output
    assert "model.layers.*.mlp.down_proj" in shown.output and "bits per weight of 3.7" in shown.output
    made = run(cli.app, ["quantize", tiny("llama"), str(tmp_path / "out"), "--bits", str(plan), "--json"])
    assert made.exit_code == 0, made.output
    assert widths(load(tmp_path / "out")) == read_allocation(plan).layers
    whole = run(cli.app, ["plan", tiny("llama"), "--budget", "4", *options, "--json"])
    assert json.loads(whole.stdout)["bits_per_weight"] <= 4


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_budgets_and_plans_are_refused(tiny, tmp_path):
    data = calibration()
    with pytest.raises(ValueError, match=r"bits=2.1 is below the least that this format takes, 2.5\d bits per weight"):
        allocate(tiny("llama"), LowBitConfig(bits=2.1), calibration=data)
    with pytest.raises(ValueError, match="every layer has a rule"):
        allocate(tiny("llama"), LowBitConfig(bits=3.7, rules={".*layers.*": {"bits": 3}}), calibration=data)
    with pytest.raises(ValueError, match=r"method 'gptq' .* needs calibration data"):
        LowBitConfig(bits=3.7, method="gptq").check_calibration()
    with pytest.raises(ValueError, match=r"bits=3.7 is a budget, for which a search measures .*: give calibration="):
        load(tiny("llama"), bits=3.7)
    with pytest.raises(ValueError, match=r"bits=3.7 is a budget, which is not searched here: make a plan"):
        open_source(budget.fetch(tiny("llama")), LowBitConfig(bits=3.7), None)
    plan, path = allocate(tiny("llama"), LowBitConfig(bits=3.7), calibration=data), tmp_path / "plan.json"
    with pytest.raises(ValueError, match=r"was measured on another model, format or text"):
        allocate(tiny("llama"), LowBitConfig(bits=3.7), calibration=data, measured=tmp_path / "m.json")
        allocate(tiny("llama"), LowBitConfig(bits=3.7, group_size=64), calibration=data, measured=tmp_path / "m.json")
    plan.save(path)
    assert read_allocation(path) == plan and isinstance(plan, Allocation)
    with pytest.raises(ValueError, match=r"there is no width for 'transformer\.h.0.attn.c_attn'"):
        load(tiny("gpt2"), bits=str(path))
    content = json.loads(path.read_text())
    for change, message in (
        ({"kind": "other"}, "is not a plan of bits per layer"),
        ({"layers": {}}, "names no layers"),
        ({"layers": {"x": 9}}, "gives 'x' 9 bits: use 1 to 8"),
        ({"budget": "3"}, "has budget='3', which is not a number"),
        ({"more": 1}, "has not the fields more right"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            LowBitConfig(bits=str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        LowBitConfig(bits=str(path))
