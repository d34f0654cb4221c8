"""Noise levels of training pictures (iTARFlow, arXiv 2604.20041): which each gets, and how much its loss counts."""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow.training.flow.levels_config import NoiseLevels

#: log t of log-normal levels has this mean and deviation 1.
LOG_MEAN = -1.2


def levels_from(chances: Tensor, levels: NoiseLevels) -> Tensor:
    """Levels t of pictures from numbers in [0, 1), (B,) both: the inverse of their distribution function."""
    low, high = levels.low, levels.high
    if levels.distribution == "uniform":
        return low + (high - low) * chances
    ends = torch.tensor([low, high], dtype=torch.float64).log() - LOG_MEAN
    first, last = torch.special.ndtr(ends).tolist()
    # In float64, as log-normal levels far from the mean have probabilities near 0 or 1.
    normal = torch.special.ndtri((first + (last - first) * chances.cpu().double()).clamp(1e-15, 1 - 1e-15))
    return (normal + LOG_MEAN).exp().clamp(low, high).to(chances.device, chances.dtype)


def loss_weights(levels: Tensor, weight: str) -> Tensor:
    """How much each picture's loss counts, (B,), by its level (B,)."""
    return {"level": levels, "square": levels.square(), "one": torch.ones_like(levels)}[weight]
