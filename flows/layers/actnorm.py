"""Activation normalisation: a learned shift and scale of each channel (Kingma and Dhariwal, Glow, 2018).

Shapes: B batch, T tokens, C channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tarflow.flows.layers.affine import affine_forward, affine_inverse, at_least_float32

#: Smallest deviation that a channel is divided by: one that never changes is left at its size.
SMALLEST_STD = 1e-6


class ActNorm(nn.Module):
    """z = (x − shift)·exp(−log_scale) with parameters (C,) for all tokens; the identity until `initialize`."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return at_least_float32(self.shift).expand(x.shape), at_least_float32(self.log_scale).expand(x.shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) to tokens, and log|det| (B,)."""
        return affine_forward(x, *self.parameters_for(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`, with the same log|det|."""
        shift, log_scale = self.parameters_for(z)
        return affine_inverse(z, shift, log_scale), -log_scale.flatten(1).sum(1)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the parameters so that the channels of ``x`` (B, T, C) come out with mean 0 and deviation 1."""
        numbers = at_least_float32(x).flatten(0, 1)
        std = numbers.std(0, correction=0)
        self.shift.copy_(numbers.mean(0))
        self.log_scale.copy_(torch.where(std > SMALLEST_STD, std, torch.ones_like(std)).log())
