"""Densities in nats: of the prior, of the model per sample, per dimension; and the training loss."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tarflow.flows.affine import at_least_float32


def prior_log_prob(z: Tensor, variance: Tensor | None = None) -> Tensor:
    """log N(z; 0, variance) summed over all but the first axis, (B,); ``variance`` has z's shape without B, or is 1."""
    z = at_least_float32(z)
    if variance is None:
        return -0.5 * (z.pow(2) + math.log(2 * math.pi)).flatten(1).sum(1)
    variance = variance.to(z.dtype)
    return -0.5 * (z.pow(2) / variance + variance.log() + math.log(2 * math.pi)).flatten(1).sum(1)


def log_prob(model: Any, x: Tensor, class_labels: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
    """log p(x) of a `TARFlowModel` in nats, (B,); x in image layout (B, C, H, W)."""
    z, log_det = model(x, class_labels=class_labels, cond=cond)
    return prior_log_prob(z, model.prior_variance_image()) + log_det


def nats_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """−log p / dims, the same shape; ``dims`` is the number of numbers in one sample."""
    return -log_prob / dims


def flow_loss(z: Tensor, log_det: Tensor) -> Tensor:
    """Training loss: mean ½z² − mean log|det| per dimension, a scalar. It lacks the constant ½·log 2π and always has a
    unit prior, as the published models do."""
    return 0.5 * at_least_float32(z).pow(2).mean() - log_det.mean() / z[0].numel()


def dequantize(images: Tensor, noise: Tensor) -> Tensor:
    """8-bit numbers and uniform noise in [0, 1), of one shape, as real numbers: (u8 + noise)/256·2 − 1."""
    return (images.to(noise.dtype) + noise) / 256 * 2 - 1


def bits_per_dim(nats_per_dim: Any) -> Any:
    """Bits per dimension of 8-bit images from the nats per dimension (number or tensor) of `dequantize`d ones, where
    each of the 256 values is 2/256 wide."""
    return (nats_per_dim + math.log(128)) / math.log(2)
