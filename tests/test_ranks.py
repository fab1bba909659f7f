"""Adapters at every rank up to their own."""

import pytest
import torch
from conftest import load
from peft import LoraConfig, PeftModel, get_peft_model
from test_training import adapted, data, packed, run

from hf_lowbit.adapters.ranks import NestedRanks, load_truncated, lora_layers, order_ranks, truncate_ranks

IDS = torch.stack([row["input_ids"] for row in data(4, seed=9)])


def random_adapter(model, **options):
    """With B as large as A: a fresh B is zero."""
    generator = torch.Generator().manual_seed(2)
    model = adapted(model, r=6, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.05, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def products(model):
    """The product of every layer's factors, with its scaling, in float64."""
    return {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.double()
        @ layer.lora_A["default"].weight.double()
        for name, layer in lora_layers(model, "default").items()
    }


def test_ordered_factors_have_the_same_product_and_the_best_leading_part():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 50, generator=generator), torch.randn(30, 6, generator=generator)
    a2, b2 = order_ranks(a, b)
    size = torch.linalg.matrix_norm(b.double() @ a.double())
    # Two QRs and an SVD are stable: relative errors of a modest multiple of the dimension times 2**-24.
    assert torch.linalg.matrix_norm(b2.double() @ a2.double() - b.double() @ a.double()) < 50 * 2**-24 * size
    values = torch.linalg.svdvals(b.double() @ a.double())
    for rank in (1, 3, 5):
        left = torch.linalg.matrix_norm(b.double() @ a.double() - b2[:, :rank].double() @ a2[:rank].double())
        assert abs(left - values[rank:].square().sum().sqrt()) < 50 * 2**-24 * size
        plain = torch.linalg.matrix_norm(b[:, rank:].double() @ a[rank:].double())
        assert left < 0.99 * plain


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
@pytest.mark.parametrize("ordered", [False, True])
def test_truncated_adapters_are_a_part_of_the_whole_and_are_saved_as_such(tiny, tmp_path, options, ordered):
    model = random_adapter(packed(tiny), **options)
    whole = products(model)
    a, scaling = {}, {}
    for name, layer in lora_layers(model, "default").items():
        a[name], scaling[name] = layer.lora_A["default"].weight.clone(), layer.scaling["default"]
    model.save_pretrained(tmp_path / "whole")
    truncate_ranks(model, 4, ordered=ordered)
    for name, product in products(model).items():
        layer, before = lora_layers(model, "default")[name], whole[name]
        own = 2 if options.get("rank_pattern") and name.endswith("up_proj") else 4
        assert layer.r["default"] == own == torch.linalg.matrix_rank(product)
        if ordered:
            assert torch.equal(layer.lora_A["default"].weight, a[name][:own])
        else:
            values = torch.linalg.svdvals(before)
            error = torch.linalg.matrix_norm(product - before)
            assert abs(error - values[own:].square().sum().sqrt()) < 64 * 2**-24 * values.square().sum().sqrt()
        assert layer.scaling["default"] == scaling[name]
    model.save_pretrained(tmp_path / "part")
    again = PeftModel.from_pretrained(packed(tiny), tmp_path / "part").eval()
    assert torch.equal(logits(again), logits(model))
    direct = load_truncated(packed(tiny), tmp_path / "whole", 4, ordered=ordered).eval()
    assert torch.equal(logits(direct), logits(model))


def test_all_ranks_change_nothing_and_embeddings_are_truncated_too(tiny):
    model = random_adapter(packed(tiny), target_modules=["embed_tokens", "q_proj"])
    before = logits(model)
    truncate_ranks(model, 6)
    assert torch.equal(logits(model), before)
    truncate_ranks(model, 1)
    layer = next(m for n, m in lora_layers(model, "default").items() if n.endswith("embed_tokens"))
    assert layer.lora_embedding_A["default"].shape[0] == layer.lora_embedding_B["default"].shape[1] == 1
    assert logits(model).isfinite().all() and not torch.equal(logits(model), before)


def test_nested_ranks_work_without_the_others(tiny, tmp_path):
    """At 1 and 2 of 4 ranks an adapter trained for that fits its data better than one that was not."""
    ids = torch.stack([row["input_ids"] for row in data(32)])
    losses = {}
    for name, callbacks in (("plain", []), ("nested", [NestedRanks()])):
        model = adapted(packed(tiny))
        run(model, tmp_path, max_steps=30, callbacks=callbacks)
        model.eval()
        for rank in (4, 2, 1):
            truncate_ranks(model, rank, ordered=True)
            with torch.no_grad():
                losses[name, rank] = model(ids, labels=ids).loss.item()
    assert losses["plain", 4] < losses["nested", 4]  # which is what it costs
    assert all(losses["nested", rank] < losses["plain", rank] - 0.05 for rank in (1, 2))
    assert losses["nested", 4] < losses["nested", 2] < losses["nested", 1]


def test_ranks_above_the_drawn_one_do_not_learn(tiny, tmp_path):
    model = random_adapter(packed(tiny))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    callback = NestedRanks(smallest=3, seed=1)
    seen = []
    original = callback.on_pre_optimizer_step

    def on_pre_optimizer_step(*args, **kwargs):
        seen.append({b.shape[1] - columns.shape[1] for _, b, columns in callback.hidden})
        original(*args, **kwargs)

    callback.on_pre_optimizer_step = on_pre_optimizer_step
    run(model, tmp_path, max_steps=1, callbacks=[callback])
    ((rank,),) = seen
    assert 3 <= rank < 6
    for name, old in before.items():
        new = dict(model.named_parameters())[name]
        if "lora_A" in name:
            assert torch.equal(new[rank:], old[rank:]) and not torch.equal(new[:rank], old[:rank])
        else:
            assert torch.equal(new[:, rank:], old[:, rank:]) and not torch.equal(new[:, :rank], old[:, :rank])


def test_bad_input(tiny):
    model = random_adapter(packed(tiny))
    for rank in (0, 7):
        with pytest.raises(ValueError, match=f"rank={rank} is not possible: adapter 'default' has ranks of up to 6"):
            truncate_ranks(model, rank)
    with pytest.raises(ValueError, match="there is no adapter 'other', there is 'default'"):
        truncate_ranks(model, 1, adapter_name="other")
    with pytest.raises(ValueError, match="there is no adapter 'default', there is none"):
        truncate_ranks(packed(tiny), 1)
    merged = random_adapter(load("llama", tiny("llama")))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="adapter 'default' is merged: unmerge it"):
        truncate_ranks(merged, 1)
    from peft import IA3Config

    other = get_peft_model(load("llama", tiny("llama")), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapter 'default' is not LoRA, but IA3Config"):
        truncate_ranks(other, 1)
    assert isinstance(model.peft_config["default"], LoraConfig)
