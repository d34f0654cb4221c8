"""Noise to data: the sequential inverse of a block, and of all blocks.

These functions know a block only by its methods, so that the network stays free of sampling state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.affine import affine_inverse, at_least_float32
from tarflow.flows.guidance import Guidance
from tarflow.flows.order import reorder


@torch.no_grad()
def decode_sequential(
    block: Any,
    z: Tensor,
    grid: tuple[int, int],
    cond: Tensor | None = None,
    null_cond: Tensor | None = None,
    guidance: Guidance | None = None,
) -> tuple[Tensor, Tensor]:
    """Invert one `FlowBlock` token after token with a key/value cache; exact up to rounding.

    Args:
        block: the block.
        z: row-major tokens (B, T, C); not changed.
        grid: rows and columns of tokens.
        cond, null_cond: what the block sees, and what its second pass sees under guidance.
        guidance: None or weight 0 for one pass only. It acts in blocks that see the condition, and with an attention
            temperature other than 1 in all of them.

    Returns:
        x (B, T, C), row-major, and the log|det dz/dx| (B,) of the (guided) map at x.
    """
    guided = guidance is not None and guidance.weight > 0
    guided = guided and (block.sees_condition or guidance.temperature != 1)
    order = block.config.order
    z = at_least_float32(reorder(z, order))
    batch, num_tokens, _ = z.shape
    temperature = None
    if guided:
        rows = 2 * batch
        if block.sees_condition and (cond is not None or null_cond is not None):
            cond = torch.cat([expand_rows(cond, block, batch), expand_rows(null_cond, block, batch)])
        if guidance.temperature != 1:
            temperature = z.new_ones(rows, 1, 1, 1)
            temperature[batch:] = guidance.temperature
    else:
        rows = batch
    context = block.context(cond, grid)
    dtype = block.layers[0].attention.qkv.weight.dtype
    if torch.is_autocast_enabled(z.device.type):
        dtype = torch.get_autocast_dtype(z.device.type)
    cache = block.new_cache(rows, context.prefix_length + num_tokens, dtype)

    x = torch.empty_like(z)
    log_det = z.new_zeros(batch)
    previous, first = block.start_token, 0
    if previous is None:  # token 0 passes unchanged
        x[:, 0] = z[:, 0]
        first = 1
    for token in range(first, num_tokens):
        inputs = x[:, token - 1 : token] if token else previous.to(x.dtype).expand(batch, 1, -1)
        if guided:
            inputs = torch.cat([inputs, inputs])
        shift, log_scale = block.affine_parameters(inputs, token - first, context, cache, temperature)
        if guided:
            (shift, shift_u), (log_scale, log_scale_u) = shift.chunk(2), log_scale.chunk(2)
            shift, log_scale = guidance((shift, log_scale), (shift_u, log_scale_u), token, num_tokens)
        x[:, token : token + 1] = affine_inverse(z[:, token : token + 1], shift, log_scale)
        log_det -= log_scale.flatten(1).sum(1)
    return reorder(x, order), log_det


def expand_rows(cond: Tensor | None, block: Any, batch: int) -> Tensor:
    """A block's condition with one row per sample; class vectors without a label take the "no class" row."""
    if cond is None:
        return torch.full((batch,), block.config.num_classes, device=block.proj_in.weight.device)
    return cond.expand(batch, *cond.shape[1:])


@torch.no_grad()
def generate(
    model: Any,
    z: Tensor,
    cond: Tensor | None = None,
    null_cond: Tensor | None = None,
    guidance: Guidance | None = None,
    callback: Callable[[int, Tensor], Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Invert all blocks of a `TARFlowModel`, the deep one first.

    Args:
        model: the model.
        z: noise in image layout (B, C, H, W).
        cond, null_cond: as the blocks take them (`TARFlowModel.condition`).
        guidance: see `decode_sequential`.
        callback: called after each block with its place (0 for the first one inverted) and the tokens in image
            layout; what it returns, if not None, goes on instead.

    Returns:
        x (B, C, H, W) and the sum of the blocks' log_det (B,).
    """
    tokens, grid = model.patchify(z)
    log_det = z.new_zeros(z.shape[0], dtype=torch.promote_types(z.dtype, torch.float32))
    for index, block in enumerate(reversed(model.blocks)):
        tokens, block_log_det = decode_sequential(block, tokens, grid, cond, null_cond, guidance)
        log_det = log_det + block_log_det
        if callback is not None:
            changed = callback(index, model.unpatchify(tokens, grid))
            if changed is not None:
                tokens, _ = model.patchify(changed)
    return model.unpatchify(tokens, grid), log_det
