"""The affine map of a flow block and its log-determinant, as pure functions.

Shapes: B batch, T tokens, C channels of a token. Everything is computed in at least float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = ("exp", "softplus", "additive")

#: softplus(0 + SOFTPLUS_OFFSET) = 1, so a network that gives 0 leaves its input unchanged.
SOFTPLUS_OFFSET = 0.541324854612918


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in its own dtype if that is float32 or float64, else in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def soft_clip(x: Tensor, limit: float) -> Tensor:
    """limit·tanh(x / limit), which stays within ±limit; a limit of 0 returns x unchanged."""
    return limit * torch.tanh(x / limit) if limit > 0 else x


def log_scale_of(raw: Tensor, scale: str) -> Tensor:
    """The log-scale log σ from the network's raw output, of the same shape.

    Args:
        raw: (..., C), any values.
        scale: "exp" (σ = exp raw), "softplus" (σ = softplus(raw + SOFTPLUS_OFFSET)) or "additive" (σ = 1).
    """
    raw = at_least_float32(raw)
    if scale == "exp":
        return raw
    if scale == "softplus":
        return F.softplus(raw + SOFTPLUS_OFFSET).log()
    if scale == "additive":
        return torch.zeros_like(raw)
    raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")


def affine_forward(x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Density direction: z = (x − shift)·exp(−log_scale), all (B, T, C), and log|det| summed over T and C: (B,)."""
    z = (at_least_float32(x) - shift) * torch.exp(-log_scale)
    return z, -log_scale.flatten(1).sum(1)


def affine_inverse(z: Tensor, shift: Tensor, log_scale: Tensor) -> Tensor:
    """Sampling direction: x = z·exp(log_scale) + shift, all (B, T, C)."""
    return torch.addcmul(shift, at_least_float32(z), torch.exp(log_scale))
