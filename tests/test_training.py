"""Training adapters on a packed base with the unchanged Trainer, and what the backward pass keeps."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import load
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowbit import LowBitConfig, LowBitLinear
from hf_lowbit.adapters.branch import add_low_rank
from hf_lowbit.adapters.overflow import OverflowWatch

VOCABULARY = 160


def packed(tiny, bits=4, dtype=torch.float32, name="llama"):
    return load(name, tiny(name), dtype=dtype, quantization_config=LowBitConfig(bits=bits, embeddings="float"))


def adapted(model, **options):
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return get_peft_model(model, LoraConfig(**options))


def data(count, seed=0, length=16):
    """Sequences that can be learned: each token is the one before plus a step of its sequence."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, 40, (count, 1), generator=generator) for _ in range(2))
    ids = 4 + (start + step * torch.arange(length)) % (VOCABULARY - 4)
    return [{"input_ids": row, "labels": row} for row in ids]


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs["loss"]] if "loss" in logs else []


def run(model, folder, resume=None, evaluation=None, callbacks=(), **options):
    """Trains and returns (trainer, losses of all steps)."""
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
        "max_grad_norm": 0.0,
    }  # fmt: skip
    losses = Losses()
    trainer = Trainer(
        model=model, args=TrainingArguments(str(folder), **{**arguments, **options}), train_dataset=data(32),
        eval_dataset=evaluation, callbacks=[losses, *callbacks],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, losses.values


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("bits", [4, 2])
def test_the_trainer_trains_adapters_and_nothing_else(tiny, tmp_path, bits):
    model = adapted(packed(tiny, bits))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = trained(model)
    assert start and all("lora_" in n for n in start)
    _, losses = run(model, tmp_path, max_steps=12)
    assert losses[-1] < losses[0] - 0.2
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], value) for n, value in before.items())
    changed = [n for n, value in start.items() if not torch.equal(after[n], value)]
    assert len(changed) == len(start)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tiny, tmp_path, reentrant):
    plain, checkpointed = adapted(packed(tiny)), adapted(packed(tiny))
    run(plain, tmp_path)
    run(checkpointed, tmp_path, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # fmt: skip
    assert equal(trained(plain), trained(checkpointed))


def test_gradient_accumulation_is_a_larger_batch(tiny, tmp_path):
    """Sums in another order: gradients to float32's resolution, checked before an optimizer amplifies it."""
    gradients = []
    for size, accumulate in ((8, 1), (2, 4)):
        model = adapted(packed(tiny))
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(n)))
        start = trained(model)
        # Plain gradient descent with rate 1: the step is the gradient.
        run(model, tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            optim="sgd", learning_rate=1.0)  # fmt: skip
        gradients.append({n: value - start[n] for n, value in trained(model).items()})
        bounds = {n: 2**-24 * value.abs().max() for n, value in start.items()}  # of the subtraction above
    for n, gradient in gradients[0].items():
        # 128 tokens' shares, each after about 40 roundings of its own on the way back.
        bound = 2 * bounds[n] + 168 * 2**-24 * gradient.abs().max()
        assert gradient.abs().max() > 100 * bound
        assert (gradient - gradients[1][n]).abs().max() <= bound


def test_bfloat16_autocast(tiny, tmp_path):
    """A model in float32 under bfloat16: near what float32 gives, and learning."""
    exact, rounded = adapted(packed(tiny)), adapted(packed(tiny))
    _, reference = run(exact, tmp_path, max_steps=12)
    _, losses = run(rounded, tmp_path, max_steps=12, bf16=True)
    assert all(p.dtype == torch.float32 for p in trained(rounded).values())
    assert losses != reference and losses[-1] < losses[0] - 0.2
    # At the start nothing has diverged yet: the loss, about 5, moves by what bfloat16 rounds (2**-8 relative).
    assert abs(losses[0] - reference[0]) < 2**-8 * reference[0]


def test_a_bfloat16_model_trains_float32_adapters(tiny, tmp_path):
    model = adapted(packed(tiny, dtype=torch.bfloat16))
    _, losses = run(model, tmp_path, max_steps=12)
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_resuming_continues_bit_for_bit(tiny, tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 3, **options}
    dropout = {"lora_dropout": 0.1}  # so that the random state counts too
    whole, half, resumed = (adapted(packed(tiny), **dropout) for _ in range(3))
    _, expected = run(whole, tmp_path / "a", **options)
    run(half, tmp_path / "b", **{**options, "max_steps": 3})
    assert not equal(trained(half), trained(whole))
    _, losses = run(resumed, tmp_path / "b", resume=str(tmp_path / "b/checkpoint-3"), **options)
    assert losses[-3:] == expected[-3:] and equal(trained(resumed), trained(whole))


def test_evaluation_and_the_best_model_at_the_end(tiny, tmp_path):
    model = adapted(packed(tiny))
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # The highest loss counts as the best here: that of the first evaluation, since training lowers it.
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    trainer, _ = run(model, tmp_path, evaluation=data(8), learning_rate=0.01, **best, **steps)
    history = [(entry["eval_loss"], entry["step"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    best = max(history)
    assert len(history) == 3 and trainer.state.best_metric == best[0] and best[1] < 6
    assert trainer.evaluate()["eval_loss"] == best[0]
    saved = Path(trainer.state.best_model_checkpoint)
    assert saved.name == f"checkpoint-{best[1]}" and json.loads((saved / "adapter_config.json").read_text())["r"] == 4
    fresh = PeftModel.from_pretrained(packed(tiny), saved)
    trainer.model = fresh.eval()
    assert trainer.evaluate()["eval_loss"] == best[0]


def test_the_model_alone_is_refused_by_the_trainer(tiny, tmp_path):
    with pytest.raises(ValueError, match="attach trainable adapters"):
        run(packed(tiny), tmp_path)


# -- what the backward pass keeps --------------------------------------------------------------------------------------


def kept(model, batch, **autocast):
    """What autograd keeps of one step besides parameters: one tensor for every piece of memory."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            loss = model(**batch).loss
        loss.backward()  # inside: what checkpointing computes again counts too
    return list(tensors.values())


def is_a_weight(tensor, model):
    """Whether it has the size of a layer's float weight, in any layout."""
    counts = {m.in_features * m.out_features for m in model.modules() if isinstance(m, LowBitLinear)}
    return tensor.is_floating_point() and tensor.untyped_storage().nbytes() // tensor.itemsize in counts


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dequantized_weight_is_kept(tiny, checkpointing, autocast, dtype):
    model = adapted(packed(tiny, dtype=dtype)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    batch = {k: torch.stack([row[k] for row in data(3, length=11)]) for k in ("input_ids", "labels")}
    tensors = kept(model, batch, enabled=autocast)
    assert tensors and not [tuple(t.shape) for t in tensors if is_a_weight(t, model)]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_that_a_float_base_keeps_its_weights_is_seen(tiny):
    """The measure of the test above finds what a layer that dequantizes in the graph would keep."""
    model = adapted(packed(tiny)).train()
    layer = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.dequantize())
    batch = {k: torch.stack([row[k] for row in data(3, length=11)]) for k in ("input_ids", "labels")}
    assert [t.shape for t in kept(model, batch, enabled=False) if is_a_weight(t, model)]


def test_bfloat16_layers_share_their_input(tiny):
    """Of the seven inputs in a block, four are one tensor's: none is kept again as float32."""
    model = adapted(packed(tiny, dtype=torch.bfloat16)).train()
    batch = {k: torch.stack([row[k] for row in data(3, length=11)]) for k in ("input_ids", "labels")}
    tokens, mine, peft = 33, kept(model, batch, enabled=False), None
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            module.forward = super(type(module), module).forward  # PEFT's
    peft = kept(model, batch, enabled=False)
    copies = 2 * tokens * 4 * (6 * 64 + 144)  # float32 inputs of seven layers in each of two blocks
    saved = sum(t.untyped_storage().nbytes() for t in peft) - sum(t.untyped_storage().nbytes() for t in mine)
    inputs = 2 * tokens * 2 * (3 * 64 + 144)  # kept here: what the norms, attention and the activation gave
    assert saved >= copies - inputs > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_branch_is_pefts(dtype, monkeypatch):
    """Values bit for bit in plain PyTorch; gradients against float64, within the roundings of each product.

    The same of the kernels: ``test_native_low_rank.py``.
    """
    monkeypatch.setenv("HF_LOWBIT_BACKEND", "torch")
    generator = torch.Generator().manual_seed(0)
    x, result, a, b, gradient = (
        torch.randn(s, generator=generator) for s in ((2, 9, 40), (2, 9, 24), (4, 40), (24, 4), (2, 9, 24))
    )
    x, result, gradient = (t.to(dtype) for t in (x, result, gradient))
    leaves = [t.clone().requires_grad_() for t in (result, x, a, b)]
    out = add_low_rank(*leaves, 0.5)
    expected = (result + torch.nn.functional.linear(torch.nn.functional.linear(x.float(), a), b) * 0.5).to(dtype)
    assert out.dtype == dtype and torch.equal(out, expected)
    out.backward(gradient)
    exact = [t.double().requires_grad_() for t in (result, x, a, b)]
    r, xd, ad, bd = exact
    (r + 0.5 * xd @ ad.T @ bd.T).backward(gradient.double())
    sizes = [t.detach().abs().requires_grad_() for t in exact]
    r, xd, ad, bd = sizes
    (r + 0.5 * xd @ ad.T @ bd.T).backward(gradient.double().abs())
    for leaf, truth, size in zip(leaves, exact, sizes, strict=True):
        # Two products of at most 40 and 24 terms, or 18 rows; then, for x of bfloat16, one rounding to it.
        bound = (40 + 24 + 18) * 2**-24 * size.grad + (2**-8 if leaf.dtype == torch.bfloat16 else 0) * truth.grad.abs()
        assert leaf.grad.dtype == leaf.dtype and ((leaf.grad.double() - truth.grad).abs() <= bound).all()


def test_norms_and_biases_are_trained_and_saved_on_request(tiny, tmp_path):
    model = adapted(packed(tiny, name="gpt2"), bias="all", modules_to_save=["ln_1", "ln_2", "ln_f"])
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    norms = [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert names == {"weight", "bias"} and len(norms) == 10  # of five norms
    assert not any("base_layer.weight" in n for n in trained(model))
    run(model, tmp_path)
    model.eval().save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(packed(tiny, name="gpt2"), tmp_path / "adapter").eval()
    ids = data(2)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)
        with model.disable_adapter():
            assert not torch.equal(fresh(ids).logits, model(ids).logits)


def test_a_target_that_does_not_exist_is_named(tiny):
    with pytest.raises(ValueError, match=r"Target modules .*nope.* not found in the base model"):
        adapted(packed(tiny), target_modules=["nope"])


# -- float16 -----------------------------------------------------------------------------------------------------------

CURE = r"Train in bfloat16 \(bf16=True, or dtype=torch.bfloat16\) or in float32"
# What is damaged, with what, and what is said of it.
OVERFLOWS = {
    "lora_B": (3e4, r"its output is past 65504, for inputs of at most \d"),
    "lora_A": (float("nan"), "its adapter is no longer finite"),
}


@pytest.mark.parametrize("factor", OVERFLOWS)
@pytest.mark.parametrize("autocast", [False, True])
def test_float16_overflow_names_the_layer_and_the_cure(tiny, factor, autocast):
    model = adapted(packed(tiny, dtype=torch.float32 if autocast else torch.float16)).train()
    batch = torch.stack([row["input_ids"] for row in data(2)])

    def loss():
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return model(input_ids=batch, labels=batch).loss

    assert torch.isfinite(loss())
    value, message = OVERFLOWS[factor]
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        getattr(model.get_base_model().get_submodule(name), factor)["default"].weight.fill_(value)
    with pytest.raises(ValueError, match=f"float16 overflow in training at {name}: {message}.*{CURE}"):
        loss()
    model.eval()
    loss()  # is not watched


def test_float16_overflow_before_a_packed_layer_is_not_laid_at_its_door(tiny):
    model = adapted(packed(tiny, dtype=torch.float16)).train()
    with torch.no_grad():
        model.get_base_model().model.layers[1].input_layernorm.weight.fill_(float("inf"))
    batch = torch.stack([row["input_ids"] for row in data(2)])
    message = r"model.layers.1.self_attn.q_proj: its input is not finite: something before it overflowed"
    with pytest.raises(ValueError, match=message):
        model(input_ids=batch)


def test_the_answer_of_another_device_is_read_once_it_is_there():
    class Event:
        ready = False

        def query(self):
            return self.ready

    watch, event, finite = OverflowWatch(), Event(), torch.ones(2, 2, dtype=torch.float16)
    watch.pending = torch.tensor([1.0, 1.0, 1.0, float("inf")]), event
    watch("layer", finite, finite, finite, finite)  # not there yet: nothing is waited for
    event.ready = True
    with pytest.raises(ValueError, match="at layer: its output is past 65504, for inputs of at most 1"):
        watch("layer", finite, finite, finite, finite)
    assert copy.deepcopy(watch).pending is None
