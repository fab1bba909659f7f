"""How the group scales of a packed weight are stored.

Six codecs behind two functions, because a scale of 16 bits costs a quarter of a bit per weight at groups of 64:

- ``float32``, ``float16``, ``bfloat16``: as they are.
- ``log8``: 8 bits on a logarithmic grid with one range per tensor, ``scale = 2**(low + step*(code - 1))``, and code 0
  for a scale of exactly 0. It plays the part of QLoRA's double quantization (Dettmers et al., 2023, section 3) at
  8/group bits per weight.
- ``e8m0``: a power of two, 8 bits (OCP Microscaling formats, v1.0).
- ``e4m3``: an 8-bit float times one float32 per tensor (the block scale of NVFP4).

``log8`` and ``e8m0`` round *up*, so that the largest weight of a group is never clipped; the others to nearest. A
method must
choose its codes with the scales that :func:`storable` returns, which are the ones a reader will see.
"""

import torch

SCALE_DTYPES = ("float16", "bfloat16", "float32", "log8", "e8m0", "e4m3")
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_E4M3_MAX = 448.0
_FLOAT16_MIN = 2.0**-22  # four times the smallest float16: below, rounding changes a scale by more than an eighth
_LOG8_OCTAVES = 24.0  # smaller positive scales are stored as 2**-24 of the largest one


def signed(scale_dtype: str) -> bool:
    """Whether scales are stored as ordinary floats, which may be negative, and which an optimizer may train."""
    return scale_dtype in _FLOATS


def takes_negative(scale_dtype: str) -> bool:
    """Whether a negative scale can be stored."""
    return scale_dtype in _FLOATS or scale_dtype == "e4m3"


def scale_tensors(scale_dtype: str, rows: int, groups: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the stored tensors, by the suffix they add to the parameter's name."""
    if scale_dtype in _FLOATS:
        return {"_scales": ((rows, groups), _FLOATS[scale_dtype])}
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"_scales": ((rows, groups), torch.uint8)}
    if scale_dtype == "log8":
        stored["_scales_range"] = ((2,), torch.float32)
    elif scale_dtype == "e4m3":
        stored["_scales_range"] = ((1,), torch.float32)
    return stored


def encode_scales(scales: torch.Tensor, scale_dtype: str) -> dict[str, torch.Tensor]:
    """Stores ``scales`` (N, G), float32; raises ``ValueError`` when they do not fit."""
    if scale_dtype in _FLOATS:
        stored = scales.to(_FLOATS[scale_dtype])
        if not scales.is_meta and not torch.isfinite(stored).all():
            raise ValueError(
                f"a scale of {scales.abs().max():.3g} does not fit {scale_dtype}; use scale_dtype='float32'"
            )
        if scale_dtype == "float16" and not scales.is_meta and 0 < (largest := scales.abs().max()) < _FLOAT16_MIN:
            raise ValueError(f"scales of at most {largest:.3g} vanish in float16; use scale_dtype='log8' or 'float32'")
        return {"_scales": stored}
    if scale_dtype == "log8":
        high = torch.log2(scales.amax().clamp_min(2.0**-100))
        low = torch.maximum(
            torch.log2(torch.where(scales > 0, scales, scales.amax()).amin().clamp_min(2.0**-126)), high - _LOG8_OCTAVES
        )
        step = (high - low).clamp_min(1e-6) / 254
        code = torch.ceil((torch.log2(scales.clamp_min(2.0**-126)) - low) / step - 1e-3).clamp(0, 254) + 1
        code = torch.where(scales > 0, code, 0)
        return {"_scales": code.to(torch.uint8), "_scales_range": torch.stack([low, step]).to(torch.float32)}
    if scale_dtype == "e8m0":
        mantissa, exponent = torch.frexp(scales.clamp_min(2.0**-126))  # mantissa in [0.5, 1); 0.5 is an exact power
        code = exponent - (mantissa == 0.5).to(exponent.dtype) + 127
        return {"_scales": code.clamp(0, 254).to(torch.uint8)}
    base = (scales.abs().amax() / _E4M3_MAX).clamp_min(2.0**-126).reshape(1)
    stored = (scales / base).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return {"_scales": stored.view(torch.uint8), "_scales_range": base.to(torch.float32)}


def decode_scales(stored: dict[str, torch.Tensor], scale_dtype: str) -> torch.Tensor:
    """Inverse of :func:`encode_scales`: the stored scales as float32 (N, G)."""
    scales = stored["_scales"]
    if scale_dtype in _FLOATS:
        return scales.to(torch.float32)
    if scale_dtype == "log8":
        # Through a table, because exp2 of an element may depend, by a bit, on its place in a vector register.
        low, step = stored["_scales_range"].to(torch.float32).unbind()
        exponents = torch.arange(-1, 255, dtype=torch.float32, device=scales.device)
        table = torch.where(exponents < 0, 0, torch.exp2(low + step * exponents))
        return table[scales.int()]
    if scale_dtype == "e8m0":
        return torch.exp2(scales.to(torch.float32) - 127)
    return scales.view(torch.float8_e4m3fn).to(torch.float32) * stored["_scales_range"].to(torch.float32)


def storable(scales: torch.Tensor, scale_dtype: str) -> torch.Tensor:
    """``scales`` as a reader will see them: encoded and decoded again, float32 (N, G)."""
    return decode_scales(encode_scales(scales, scale_dtype), scale_dtype)
