"""Densities in nats: of the prior, of the model per sample, per token, per dimension; and the training loss."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.decoding.method import InversionState
from tarflow.flows.layers.affine import affine_forward, at_least_float32
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.layers.prepared import at_hand
from tarflow.flows.model import TARFlowModel


def prior_log_prob(z: Tensor, variance: Tensor | None = None) -> Tensor:
    """log N(z; 0, variance) summed over all but the first axis, (B,); ``variance`` has z's shape without B, or is 1."""
    z = at_least_float32(z)
    if variance is None:
        return -0.5 * (z.pow(2) + math.log(2 * math.pi)).flatten(1).sum(1)
    variance = variance.to(z.dtype)
    return -0.5 * (z.pow(2) / variance + variance.log() + math.log(2 * math.pi)).flatten(1).sum(1)


def log_prob(
    model: TARFlowModel,
    x: Tensor,
    class_labels: Tensor | None = None,
    cond: Tensor | None = None,
    noise_level: Tensor | float | None = None,
) -> Tensor:
    """log p(x) of a `TARFlowModel` in nats, (B,); x in image layout (B, C, H, W). With noise_conditioning it is that of
    data with noise of the level, so always say which.

    Example:
        >>> import torch
        >>> from tarflow import TARFlowModel
        >>> from tarflow.flows.likelihood import log_prob, nats_per_dim
        >>> flow = TARFlowModel(in_channels=1, sample_size=4, layers_per_block=(1, 1), width=64)
        >>> nats = log_prob(flow, torch.zeros(3, 1, 4, 4))
        >>> nats.shape
        torch.Size([3])
        >>> round(nats_per_dim(nats, 4 * 4)[0].item(), 4)  # an untrained flow is the identity: ½·log 2π
        0.9189
    """
    model.check_prior_size(x)
    z, log_det = model(x, class_labels=class_labels, cond=cond, noise_level=noise_level)
    return prior_log_prob(z, model.prior_variance_image()) + log_det


def check_autoregressive(block: Block) -> None:
    """An error for a block that does not make token after token."""
    if block.one_pass:
        raise ValueError("shares of tokens and filling of holes are for autoregressive blocks; this model has others")


def block_affine(block: Block, x: Tensor, grid: tuple[int, int], condition: Condition = None) -> tuple[Tensor, Tensor]:
    """Shift and log-scale of a `FlowBlock` at row-major tokens x (B, T, C): (B, T, C) each, row-major too.

    Args:
        condition: as the blocks take it (`TARFlowModel.condition`).

    Raises:
        ValueError: if the block is not autoregressive from noise to data.
    """
    check_autoregressive(block)
    with at_hand(block):
        run = InversionState(block, len(x), grid, condition, None, None, cached=False)
        shift, log_scale = run.parameters(reorder(x, block.config.order, grid), run.first, run.num_tokens)
    parts = (F.pad(part, (0, 0, run.first, 0)) for part in (shift, log_scale))  # token 0 may pass unchanged
    shift, log_scale = (restore(part, block.config.order, grid) for part in parts)
    return shift, log_scale


def token_log_prob(
    model: TARFlowModel,
    x: Tensor,
    class_labels: Tensor | None = None,
    cond: Tensor | None = None,
    noise_level: Tensor | float | None = None,
) -> Tensor:
    """log p(x) in nats, shared out over the grid of tokens, (B, h, w); the sum over a picture is `log_prob`.

    A token's share is the prior's density of z at its place, and the −log-scales that the blocks applied at its place.
    With more than one block z there has seen other tokens too, so a share is no conditional probability of its token
    but says where the model finds the picture expensive.

    Args:
        model: a `TARFlowModel`.
        x: (B, C, H, W); class_labels, cond, noise_level: as of its ``forward``.
    """
    model.check_prior_size(x)
    condition = model.condition(class_labels, cond, len(x), noise_level)
    tokens, grid = model.patchify(x)
    log_scales: list[Tensor] = []  # (B, T) each
    for block in model.blocks:
        shift, log_scale = block_affine(block, tokens, grid, condition)
        tokens, _ = affine_forward(tokens, shift, log_scale)
        log_scales.append(log_scale.sum(2))
    share = -sum(log_scales[1:], log_scales[0])
    variance = model.held_prior_variance()
    if variance is not None:
        std = variance.sqrt().to(tokens.dtype)  # (T, C)
        tokens, share = tokens / std, share - std.log().sum(1)
    prior = prior_log_prob(tokens.flatten(0, 1)).unflatten(0, share.shape)
    return (share + prior).unflatten(1, grid)


def nats_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """−log p / dims, the same shape; ``dims`` is the number of numbers in one sample."""
    return -log_prob / dims


def flow_loss(z: Tensor, log_det: Tensor, weights: Tensor | None = None) -> Tensor:
    """Training loss: mean ½z² − mean log|det| per dimension, a scalar. It lacks the constant ½·log 2π and always has a
    unit prior, as the published models do.

    Args:
        z: (B, …); log_det: (B,).
        weights: of the pictures' own losses, (B,), as they are and not normalised; None is 1 for all.
    """
    if weights is not None:
        own = 0.5 * at_least_float32(z).pow(2).flatten(1).mean(1) - log_det / z[0].numel()  # (B,)
        return (weights * own).mean()
    return 0.5 * at_least_float32(z).pow(2).mean() - log_det.mean() / z[0].numel()


def dequantize(images: Tensor, noise: Tensor) -> Tensor:
    """8-bit numbers and uniform noise in [0, 1), of one shape, as real numbers: (u8 + noise)/256·2 − 1."""
    return (images.to(noise.dtype) + noise) / 256 * 2 - 1


def bits_per_dim(nats_per_dim: Any) -> Any:
    """Bits per dimension of 8-bit images from the nats per dimension (number or tensor) of `dequantize`d ones, where
    each of the 256 values is 2/256 wide."""
    return (nats_per_dim + math.log(128)) / math.log(2)
