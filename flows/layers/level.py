"""The level of the training noise as an input of a network (iTARFlow, arXiv 2604.20041).

Shapes: B batch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: The slowest of the embedding's frequencies is nearly this many times as slow as the fastest.
SLOWEST = 10_000.0


def level_features(log_level: Tensor, width: int) -> Tensor:
    """[sin(ω_i·log t); cos(ω_i·log t)], ω_i = 10000^(−i/h), i = 0 … h − 1, h = D/2, of log t (B,): (B, D), all sines
    first, in the dtype of ``log_level``."""
    half = width // 2
    places = torch.arange(half, device=log_level.device, dtype=log_level.dtype)
    angles = log_level[:, None] * torch.pow(SLOWEST, -places / half)  # (B, h)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class LevelEmbedding(nn.Module):
    """The logarithm of each picture's noise level as a vector, which is added to every slot's embedding.

    Args:
        width: D, even.
    """

    def __init__(self, width: int):
        super().__init__()
        if width % 2:
            raise ValueError(f"noise_conditioning needs an even width, for pairs of sines and cosines; got {width}")
        self.width = width
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, log_level: Tensor, dtype: torch.dtype) -> Tensor:
        """log t (B,) → (B, D).

        Args:
            log_level: at least float32.
            dtype: that the layers compute in.
        """
        features = level_features(log_level, self.width).to(dtype)
        return self.down(nn.functional.gelu(self.up(features)))
