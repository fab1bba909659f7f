"""One trained LoRA adapter at every rank up to its own (QDyLoRA, Rajabzadeh et al., 2024, arXiv 2402.10462).

:func:`truncate_ranks` keeps the leading ranks of a trained adapter; :func:`load_truncated` does so while loading. An
adapter trained by :class:`NestedRanks` has its ranks in order of importance: in each step all ranks above a random one
are left out, so that the first ones learn to do without the others (as in DyLoRA, Valipour et al., 2022). Any other
adapter is put in order first: the singular value decomposition of its product gives the factors whose leading ranks
are the best approximation of it that there is (Eckart and Young, 1936).

Unlike in these papers the factor of the adapter does not depend on the rank that is left: a truncated adapter is a part
of the whole one, and its config says the ``lora_alpha`` that keeps it so.
"""

import math
import os
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback


def load_truncated(
    model: Any, adapter: str | os.PathLike, rank: int, *, ordered: bool = False, adapter_name: str = "default", **kwargs
) -> PeftModel:
    """``PeftModel.from_pretrained(model, adapter)``, then :func:`truncate_ranks`; ``kwargs`` go to the former."""
    loaded = PeftModel.from_pretrained(model, adapter, adapter_name=adapter_name, **kwargs)
    truncate_ranks(loaded, rank, ordered=ordered, adapter_name=adapter_name)
    return loaded


@torch.no_grad()
def truncate_ranks(model: Any, rank: int, *, ordered: bool = False, adapter_name: str = "default") -> None:
    """Keeps ``rank`` ranks of every layer of a LoRA adapter, in place; layers that have fewer stay as they are.

    Args:
        model: A ``PeftModel``, or a transformers model with an adapter.
        rank: How many to keep.
        ordered: Whether the ranks are in order already, as :class:`NestedRanks` trains them.
        adapter_name: Which adapter.

    Raises:
        ValueError: for an adapter that there is not, that is not LoRA or is merged, and for a rank below 1 or above the
            adapter's.
    """
    layers = lora_layers(model, adapter_name)
    largest = max(layer.r[adapter_name] for layer in layers.values())
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank={rank} is not possible: adapter {adapter_name!r} has ranks of up to {largest}, use 1 to it"
        )
    config, kept = model.peft_config[adapter_name], {}
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before its ranks are truncated")
        own, scaling = min(rank, layer.r[adapter_name]), layer.scaling[adapter_name]
        if own < layer.r[adapter_name]:
            a, b = _factors(layer, adapter_name)
            if not ordered:
                a.data, b.data = order_ranks(a.data, b.data)
            a.data, b.data = a.data[:own].contiguous(), b.data[:, :own].contiguous()
            if adapter_name in layer.lora_A:
                layer.lora_A[adapter_name].out_features = layer.lora_B[adapter_name].in_features = own
        layer.r[adapter_name] = own
        layer.lora_alpha[adapter_name] = scaling * (math.sqrt(own) if config.use_rslora else own)
        kept[name] = (own, layer.lora_alpha[adapter_name])
    # What the config says must give the same ranks and factors to whoever loads the adapter.
    config.r, config.lora_alpha = max(set(kept.values()), key=list(kept.values()).count)
    config.rank_pattern = {name: own for name, (own, _) in kept.items() if own != config.r}
    config.alpha_pattern = {name: alpha for name, (_, alpha) in kept.items() if alpha != config.lora_alpha}


def order_ranks(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with the product of ``b`` (N, r) and ``a`` (r, K) whose ranks are its singular ones, largest first."""
    left, outer = torch.linalg.qr(b.float())
    right, inner = torch.linalg.qr(a.float().T)
    u, s, vh = torch.linalg.svd(outer @ inner.T)
    root = s.sqrt()
    return ((root[:, None] * vh) @ right.T).to(a.dtype), ((left @ u) * root).to(b.dtype)


def lora_layers(model: Any, adapter_name: str) -> dict[str, Any]:
    """The LoRA layers of an adapter, by the name that they have in the base model.

    Raises:
        ValueError: if there is no such adapter, or it is not LoRA.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"there is no adapter {adapter_name!r}, there is {', '.join(map(repr, configs)) or 'none'}")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} is not LoRA, but {type(configs[adapter_name]).__name__}")
    return layers


def _factors(layer: Any, adapter_name: str) -> tuple[Any, Any]:
    """The parameters A (r, K) and B (N, r)."""
    if adapter_name in layer.lora_A:
        return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]


class NestedRanks(TrainerCallback):
    """Trains a LoRA adapter so that its first ranks work without the others: ``Trainer(callbacks=[NestedRanks()])``.

    For each optimizer step a rank is drawn; above it, B is zero in the forward pass and nothing learns.

    Args:
        smallest: The smallest rank that is drawn.
        adapter_name: Which adapter.
        seed: Of the draws, which depend on it and on the number of the step only.
    """

    def __init__(self, smallest: int = 1, adapter_name: str = "default", seed: int = 0):
        self.smallest, self.adapter_name, self.seed = smallest, adapter_name, seed
        self.hidden: list[tuple[Any, Any, torch.Tensor]] = []

    @torch.no_grad()
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.global_step)
        draw = float(torch.rand((), generator=generator))
        for layer in lora_layers(model, self.adapter_name).values():
            a, b = _factors(layer, self.adapter_name)
            rank = self.smallest + int(draw * (layer.r[self.adapter_name] - self.smallest + 1))
            self.hidden.append((a, b, b.data[:, rank:].clone()))
            b.data[:, rank:] = 0

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for a, b, columns in self.hidden:
            rank = b.shape[1] - columns.shape[1]
            b.data[:, rank:] = columns
            if b.grad is not None:
                b.grad[:, rank:] = 0
                a.grad[rank:] = 0
        self.hidden = []
