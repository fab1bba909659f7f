"""PEQA: training scales alone, and swapping them."""

import pytest
import torch
from conftest import load, logits
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from hf_lowbit import LowBitConfig, LowBitLinear
from hf_lowbit.adapters import scales as module
from hf_lowbit.adapters.scales import companion_gradients, load_scales, save_scales, train_scales
from hf_lowbit.formats import parse_format
from hf_lowbit.methods import make_method

SCALED = [
    "int:bits=4",
    "int:bits=2,group_size=32,scale_dtype=log8",
    "int:bits=3,zeros=float",
    "int:bits=1,symmetric=True",
    "nf:bits=4",
    "fp4:bits=4,group_size=16,scale_dtype=e4m3",
    "fp4:bits=4,group_size=32,scale_dtype=e8m0",
    "codebook:bits=3",
    "ternary:bits=1.58",
]


def packed_model(tiny, name="llama", **options):
    return load(
        name,
        tiny(name),
        dtype=torch.float32,
        quantization_config=LowBitConfig(**{"bits": 3, "embeddings": "float", **options}),
    )


def codes(model):
    return {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, LowBitLinear)}


def batch(seed=0, rows=4, length=16):
    ids = torch.randint(4, 160, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train(model, seed=0, steps=8, lr=1e-3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    losses = []
    for _ in range(steps):
        loss = model(**batch(seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("text", SCALED)
def test_gradients_are_those_of_the_dequantized_weight(monkeypatch, text):
    """Against float64 autograd through a weight that is written out again here, from codes, scales and zeros."""
    rows, columns, tokens = 13, 80, 7
    generator = torch.Generator().manual_seed(1)
    weight, x, gradient = (
        torch.randn(s, generator=generator) for s in ((rows, columns), (tokens, columns), (tokens, rows))
    )
    start = parse_format(text)
    method = make_method("lloyd" if start.name == "codebook" else "rtn", {})
    stored = start.pack(method.quantize(weight, start))
    format = module._trainable(start, zeros=True, scale_dtype="float32")
    stored = {**format.pack(start.unpack(stored, (rows, columns))), "": stored[""]}
    wanted = module._float_suffixes(format)
    monkeypatch.setattr(module, "BLOCK_WEIGHTS", 5 * columns)  # several blocks, the last one shorter
    got = companion_gradients(format, stored, x, gradient, wanted)

    q = format.unpack(stored, (rows, columns))
    group = torch.arange(columns) // (columns if format.group_size == -1 else format.group_size)
    scales = q.scales.double().requires_grad_()
    zeros = None if q.zeros is None else q.zeros.double().requires_grad_()
    if format.name == "int":
        zero = format.fixed_zero if zeros is None else zeros[:, group]
        unit = q.codes.double() - zero
    elif format.name == "ternary":
        unit = q.codes.double() - 1
    else:
        unit = format.table(q.levels, torch.device("cpu"))[0].double()[q.codes.long()]
    value = unit * scales[:, group]
    torch.testing.assert_close(value.detach(), format.decode(q).double(), rtol=2**-22, atol=0)
    (value * (gradient.double().T @ x.double())).sum().backward()
    # Float32 sums: of `tokens` products for every weight, then of a group's weights; each step rounds by 2**-24.
    largest = (gradient.abs().T.double() @ x.abs().double()) * unit.detach().abs().clamp_min(1)
    steps = tokens + columns + 4
    for suffix, leaf in (("_scales", scales), ("_zeros", zeros)):
        if suffix in wanted:
            size = largest * (1 if suffix == "_scales" else scales.detach()[:, group].abs())
            bound = torch.zeros_like(leaf).index_add_(1, group, size).detach() * steps * 2**-24
            assert ((got[suffix] - leaf.grad).abs() <= bound).all()
            assert leaf.grad.abs().max() > 100 * bound.max()  # the bound says something


@pytest.mark.parametrize("zeros", [False, True])
def test_output_is_unchanged_until_training_and_only_scales_learn(tiny, zeros):
    model = packed_model(tiny)
    before, start = logits(model, "llama"), codes(model)
    names = train_scales(model, zeros=zeros)
    assert set(names) == set(start) and torch.equal(logits(model, "llama"), before)  # 8-bit scales, now float32
    learning = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert learning == ({"weight_scales", "weight_zeros"} if zeros else {"weight_scales"})
    others = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    assert all(torch.equal(codes(model)[n], start[n]) for n in start)


def test_trained_models_are_saved_and_reloaded(tiny, tmp_path):
    for options in ({}, {"zeros": True}, {"scale_dtype": "float16"}, {"zeros": True, "scale_dtype": "bfloat16"}):
        model = packed_model(tiny)
        train_scales(model, **options)
        train(model, steps=2)
        after = logits(model, "llama")
        model.save_pretrained(tmp_path)
        again = load("llama", tmp_path, dtype=torch.float32)
        assert torch.equal(logits(again, "llama"), after)
        assert type(again.get_submodule("model.layers.0.mlp.up_proj")) is LowBitLinear
        assert not any(p.requires_grad for n, p in again.named_parameters() if "weight_scales" in n)
        train_scales(again)  # and trained further
        assert torch.equal(logits(again, "llama"), after)


@pytest.mark.parametrize("zeros", [False, True])
def test_swapping_scales_switches_tasks_exactly(tiny, tmp_path, zeros):
    model = packed_model(tiny)
    train_scales(model, zeros=zeros)
    tasks = []
    for task in range(2):
        train(model, seed=task, steps=3)
        save_scales(model, tmp_path / f"{task}.safetensors")
        tasks.append(logits(model, "llama"))
    assert not torch.equal(*tasks)
    other = packed_model(tiny)  # fresh: its scales are 8-bit
    for task in (0, 1, 0):
        for target in (model, other):
            load_scales(target, tmp_path / f"{task}.safetensors")
            assert torch.equal(logits(target, "llama"), tasks[task])
    assert not any(p.requires_grad for m in other.modules() if isinstance(m, LowBitLinear) for p in m.parameters())
    linears = [m for m in model.modules() if isinstance(m, LowBitLinear)]
    groups = sum(m.weight_scales.numel() for m in linears)
    size = (tmp_path / "0.safetensors").stat().st_size
    assert groups * (6 if zeros else 4) < size < groups * (6 if zeros else 4) + 8192
    other.save_pretrained(tmp_path / "repo")
    assert torch.equal(logits(load("llama", tmp_path / "repo", dtype=torch.float32), "llama"), tasks[0])


def test_the_unchanged_trainer_trains_scales_and_resumes(tiny, tmp_path):
    data = [{k: v[0] for k, v in batch(seed, rows=1).items()} for seed in range(8)]

    def run(folder, steps, resume=None, **options):
        model = packed_model(tiny)
        train_scales(model)
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-3,
            report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", seed=3, **options,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    whole = run("a", 4)
    run("b", 2)
    resumed = run("b", 4, resume=str(tmp_path / "b/checkpoint-2"))
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, trained[n]) for n, p in resumed.named_parameters() if n in trained)
    start = packed_model(tiny)
    train_scales(start)
    assert not any(torch.equal(p, trained[n]) for n, p in start.named_parameters() if n in trained)
    # Reentrant checkpointing runs each block again: the same arithmetic, the same result.
    again = run("c", 4, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert all(torch.equal(p, trained[n]) for n, p in again.named_parameters() if n in trained)


def test_backward_keeps_no_dequantized_weight(tiny):
    model = packed_model(tiny, bits=4)
    train_scales(model, zeros=True)
    shapes = {tuple(m.packed_shape) for m in model.modules() if isinstance(m, LowBitLinear)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(**batch(rows=3, length=11)).loss
    loss.backward()
    floats = [tuple(t.shape) for t in saved if t.is_floating_point()]
    assert floats and not [s for s in floats if s in shapes or s[::-1] in shapes]


def test_float16_storage_is_trained_in_float32(tiny):
    """Steps far below the resolution of float16 add up: 2000 of 1e-6 at 1, where float16 resolves 1e-3."""
    model = packed_model(tiny, method="hqq", group_size=64)
    train_scales(model)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.format.scale_dtype == "float16" and layer.weight_scales.dtype == torch.float32
    before = layer.dequantize()
    layer.weight_scales.data.mul_(1 + 1e-5)
    assert torch.equal(layer.dequantize(), before)
    layer.weight_scales.data.mul_(1 + 1e-3)
    assert not torch.equal(layer.dequantize(), before)
    assert layer.state_dict()["weight_scales"].dtype == torch.float16


def test_bad_input(tiny, tmp_path):
    float_model = load("llama", tiny("llama"))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no packed linear layer with scales"):
        train_scales(float_model)
    model = packed_model(tiny)
    with pytest.raises(ValueError, match="scale_dtype='log8' cannot be trained: use 'float32'"):
        train_scales(model, scale_dtype="log8")
    with pytest.raises(ValueError, match="no trained scales: call train_scales"):
        save_scales(model, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no layer has zero points: quantize with symmetric=False"):
        train_scales(packed_model(tiny, symmetric=True, group_size=32), zeros=True)
    train_scales(model)
    file = tmp_path / "scales.safetensors"
    save_scales(model, file)
    other = packed_model(tiny, method_options={"range": "minmax"})
    before = logits(other, "llama")
    with pytest.raises(ValueError, match=r"scales.safetensors was trained on other codes than this model has: load"):
        load_scales(other, file)
    with pytest.raises(ValueError, match=r"as int:bits=3.*the model has int:bits=4"):
        load_scales(packed_model(tiny, bits=4), file)
    with pytest.raises(ValueError, match=r"has scales of model.* which is not a packed linear layer of this model"):
        load_scales(float_model, file)
    tensors = load_file(file)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain.safetensors is not a file of scales: its kind is None"):
        load_scales(other, tmp_path / "plain.safetensors")
    whole = file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read"):
        load_scales(other, tmp_path / "cut.safetensors")
    name = next(iter(tensors))
    metadata = {
        "kind": module.KIND,
        "codes": "0" * 64,
        "layers": '{"%s": "int:bits=3,group_size=32,scale_dtype=float32"}',
    }
    metadata["layers"] %= name.removesuffix(".weight_scales")
    save_file({name: tensors[name][:1].clone()}, tmp_path / "short.safetensors", metadata=metadata)
    with pytest.raises(
        ValueError, match=r"short.safetensors has torch.float32 of shape \(1, .*not torch.float32 of shape"
    ):
        load_scales(other, tmp_path / "short.safetensors")
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"kind": module.KIND, "layers": "[]"})
    with pytest.raises(ValueError, match=r"odd.safetensors does not say the formats of its layers"):
        load_scales(other, tmp_path / "odd.safetensors")
    assert torch.equal(logits(other, "llama"), before)
