"""LowBitConfig: defaults, rules, and the way through JSON. What it refuses is in test_bad_input.py."""

import copy
import json
import pickle

import pytest

from hf_lowbit import LowBitConfig, __version__

CONFIGS = {
    "default": {},
    "falsy values": {"bits": 4, "symmetric": False, "modules_to_not_convert": []},
    "everything": {
        "bits": 3,
        "format": "int",
        "method": "rtn",
        "group_size": "row",
        "symmetric": False,
        "zeros": "int",
        "scale_dtype": "float32",
        "method_options": {"range": "minmax"},
        "modules_to_not_convert": ["lm_head"],
    },
    "rules": {"rules": {"z": None, "a": {"bits": 8}, "m": {"format": "nf", "bits": 3}}},
    "ternary": {"bits": 1.58},
    "codebook": {"format": "codebook", "codebook": "row", "bits": 2},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_json_round_trip(options):
    config = LowBitConfig(**options)
    saved = json.loads(config.to_json_string())  # sorts every dict
    again = LowBitConfig.from_dict(saved)
    assert again.to_dict() == config.to_dict()
    assert list(again.rules.items()) == list(config.rules.items())
    assert again.resolve()[0] == config.resolve()[0]
    for option, value in options.items():
        assert getattr(again, option) == value, option
    assert saved["quant_method"] == "lowbit" and saved["version"] == __version__


def test_loading_options_are_not_saved():
    saved = LowBitConfig(dequantize=True, backend="torch").to_dict()
    assert not {"dequantize", "backend", "requested", "given"} & set(saved)
    loading = LowBitConfig(bits=3, dequantize=True, backend="torch").get_loading_attributes()
    assert loading == {"dequantize": True, "backend": "torch", "requested": {"bits": 3}}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(duplicate):
    config = LowBitConfig(**CONFIGS["rules"])
    assert duplicate(config).to_dict() == config.to_dict()


def test_a_deepcopy_shares_nothing():
    config = LowBitConfig(**CONFIGS["rules"])
    copy.deepcopy(config).rules["a"]["bits"] = 2
    assert config.rules["a"]["bits"] == 8


def test_the_caller_may_change_what_it_passed():
    rules = {"a": {"bits": 8}}
    config = LowBitConfig(rules=rules)
    saved = config.to_dict()
    saved["rules"][0][1]["bits"] = 2
    assert config.rules["a"]["bits"] == 8


def test_rules_as_pairs():
    pairs = [("z", None), ["a", {"bits": 8}]]
    assert LowBitConfig(rules=pairs).to_dict() == LowBitConfig(rules=dict(pairs)).to_dict()


@pytest.mark.parametrize(
    ("options", "spec"),
    {
        "default": ({}, "int:bits=4,group_size=32,scale_dtype=log8,symmetric=False,zeros=int"),
        "one bit": ({"bits": 1}, "int:bits=1,group_size=64,scale_dtype=float16,symmetric=True,zeros=int"),
        "hqq": (
            {"bits": 2, "method": "hqq"},
            "int:bits=2,group_size=64,scale_dtype=float16,symmetric=False,zeros=float",
        ),
        "whole float": ({"bits": 4.0}, "int:bits=4,group_size=32,scale_dtype=log8,symmetric=False,zeros=int"),
    }.values(),
)
def test_what_options_stand_for(options, spec):
    assert LowBitConfig(**options).resolve()[0].spec == spec


def test_a_rule_of_another_format_leaves_the_options_of_the_first_behind():
    config = LowBitConfig(bits=2, method="hqq", group_size=128, zeros="float", rules={"a": {"format": "nf", "bits": 4}})
    format, method = config.resolve(config.rules["a"])
    assert (format.name, format.bits, method.name) == ("nf", 4, "rtn")
    assert format.group_size == LowBitConfig(format="nf").resolve()[0].group_size


def test_a_rule_may_ask_for_ternary_by_its_bits_and_back():
    assert LowBitConfig(rules={"a": {"bits": 1.58}}).resolve({"bits": 1.58})[0].name == "ternary"
    assert LowBitConfig(bits=1.58).resolve({"bits": 4})[0].name == "int"
