"""Moves a Llama-shaped model off a quantization grid without changing its function.

A checkpoint that was stored in 4 bits lies exactly on that grid, so any quantizer with the same groups looks perfect
on it. The identities below change every weight and no output, up to rounding. With ``t`` and ``s`` drawn as
``2**U(-1/2, 1/2)``:

- one random permutation of the residual stream, and one of each MLP's inner channels;
- rows of ``up_proj`` times ``t``, columns of ``down_proj`` divided by ``t``;
- gains of each norm times ``s``, columns of the linears that read it divided by ``s``;
- a random rotation of each RoPE plane ``(i, i + d/2)`` of a key head, and of the query heads that share it (rotations
  of one plane commute, so RoPE does not notice);
- a random rotation of each such plane of a value head, undone in the columns of ``o_proj``.
"""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def move_off_grid(model: Any, seed: int = 0) -> Any:
    """Applies the identities to ``model`` in place.

    Args:
        model: A causal language model with Llama's modules (``model.layers[i].self_attn.q_proj`` ...), without biases
            in attention and MLP and without norms on queries and keys; best in float32, since every weight is
            recomputed.
        seed: Seed of the random choices.

    Returns:
        The same model.

    Raises:
        ValueError: for a model of another shape.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") and hasattr(layer.mlp, "up_proj") for layer in layers):
        raise ValueError(f"{type(model).__name__} does not have Llama's modules: only such models can be rescaled")
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    if any(m.bias is not None for m in linears) or any(hasattr(layer.self_attn, "q_norm") for layer in layers):
        raise ValueError(f"{type(model).__name__} has biases or query norms, which these identities do not cover")
    generator = torch.Generator().manual_seed(seed)

    def factors(count):
        return torch.exp2(torch.rand(count, generator=generator, dtype=torch.float64) - 0.5)

    def angles(count):
        return 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)

    def permutation(count):
        return torch.randperm(count, generator=generator)

    def update(parameter, function):
        parameter.copy_(function(parameter.double()).to(parameter.dtype))

    residual = permutation(model.config.hidden_size)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, followers in readers.items():
            s = factors(norm.weight.numel())
            update(norm.weight, lambda g, s=s: (g * s)[residual])
            for linear in followers:
                update(linear.weight, lambda w, s=s: (w / s)[:, residual])
        for linear in (attention.o_proj, mlp.down_proj):
            update(linear.weight, lambda w: w[residual])

        inner = permutation(mlp.up_proj.out_features)
        t = factors(mlp.up_proj.out_features)
        update(mlp.gate_proj.weight, lambda w, inner=inner: w[inner])
        update(mlp.up_proj.weight, lambda w, inner=inner, t=t: (w * t[:, None])[inner])
        update(mlp.down_proj.weight, lambda w, inner=inner, t=t: (w / t)[:, inner])

        width = attention.head_dim
        heads = attention.k_proj.out_features // width
        share = attention.q_proj.out_features // attention.k_proj.out_features
        for by, readers_of in ((attention.k_proj, attention.q_proj), (attention.v_proj, attention.o_proj)):
            theta = angles(heads * width // 2).view(heads, width // 2)
            wide = theta.repeat_interleave(share, dim=0)
            update(by.weight, lambda w, theta=theta: _rotate(w, theta))
            if readers_of is attention.q_proj:
                update(readers_of.weight, lambda w, wide=wide: _rotate(w, wide))
            else:
                update(readers_of.weight, lambda w, wide=wide: _rotate(w.T, wide).T)
    update(model.model.norm.weight, lambda g: g[residual])
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one, if tied
    for weight in embeddings:
        update(weight, lambda w: w[:, residual])
    return model


def _rotate(weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Rotates rows of ``weight`` (H*d, K) by ``theta`` (H, d/2) in the planes (i, i + d/2) of each head."""
    heads, half = theta.shape
    first, second = weight.view(heads, 2, half, -1).unbind(1)
    cos, sin = theta.cos().unsqueeze(-1), theta.sin().unsqueeze(-1)
    return torch.stack([cos * first - sin * second, sin * first + cos * second], dim=1).reshape(weight.shape)
