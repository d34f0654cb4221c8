"""Noise to data: the inverse of a block by a chosen method, and of all blocks.

These functions know a block only by its methods, so that the network stays free of sampling state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow.common.clock import clock
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.jacobi import decode_jacobi
from tarflow.flows.decoding.method import Decoding, InversionState, check_finite, check_method
from tarflow.flows.decoding.sequential import decode_sequential
from tarflow.flows.layers.affine import at_least_float32
from tarflow.flows.layers.block import Block, Flow
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.layers.prepared import at_hand


@dataclass(frozen=True)
class Change:
    """What a callback of `generate` wants for the blocks to come; None leaves a thing as it is.

    Attributes:
        latents: instead of what the block made, in image layout.
        guidance, null_cond: see `decode`.
        stop: invert no further block.
    """

    latents: Tensor | None = None
    guidance: Guidance | None = None
    null_cond: Condition = None
    stop: bool = False


@torch.no_grad()
def decode(
    block: Block,
    z: Tensor,
    grid: tuple[int, int],
    cond: Condition = None,
    null_cond: Condition = None,
    guidance: Guidance | None = None,
    decoding: Decoding | None = None,
    name: str = "the block",
    fast: FastSteps | None = None,
) -> tuple[Tensor, Tensor]:
    """Invert one `FlowBlock`; the network runs in its weights' dtype, also under autocast.

    Args:
        block: the block.
        z: row-major tokens (B, T, C); not changed.
        grid: rows and columns of tokens.
        cond, null_cond, guidance: see `InversionState`.
        decoding: how; exactly (sequentially or in one pass) if not given. "auto" must have been resolved.
        name: of the block, for errors.
        fast: compiled steps for sequential decoding, if any.

    Returns:
        x (B, T, C), row-major, and the log|det dz/dx| (B,) of the (guided) map at x.

    Raises:
        ValueError: for a segment longer than the sequence, or a method that is not for this kind of block.
        FloatingPointError: for numbers that are not finite; names the block and the token.
    """
    decoding = decoding or Decoding()
    if decoding.method == "auto":
        raise ValueError("the method 'auto' is resolved by `calibrate`, not here")
    if decoding.segment is not None and decoding.segment > z.shape[1]:
        raise ValueError(f"the decoding segment has {decoding.segment} tokens, but the sequence only {z.shape[1]}")
    check_method(decoding, block.one_pass)
    if not len(z):
        x = at_least_float32(z)
        return x, x.sum((1, 2))
    with torch.autocast(z.device.type, enabled=False), at_hand(block):
        if block.one_pass:
            x, log_det = block.inverse(at_least_float32(z), grid, cond, null_cond, guidance)
            check_finite(reorder(x, block.config.order, grid), name)
            return x, log_det
        run = InversionState(block, z.shape[0], grid, cond, null_cond, guidance)
        z = at_least_float32(reorder(z, block.config.order, grid))
        if decoding.method == "sequential":
            x, log_scales = decode_sequential(run, z, fast)
        else:
            x, log_scales, _ = decode_jacobi(run, z, decoding)
    check_finite(x, name)
    return restore(x, block.config.order, grid), -log_scales.flatten(1).sum(1)


@torch.no_grad()
def generate(
    model: Flow,
    z: Tensor,
    cond: Condition = None,
    null_cond: Condition = None,
    guidance: Guidance | None = None,
    callback: Callable[[int, Tensor], Change | Tensor | None] | None = None,
    decoding: Decoding | Sequence[Decoding] | None = None,
    fast: FastSteps | None = None,
    timed: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Invert all blocks of a `TARFlowModel`, the deep one first.

    Args:
        model: the model.
        z: noise in image layout (B, C, H, W).
        cond, null_cond: as the blocks take them (`TARFlowModel.condition`).
        guidance: see `InversionState`.
        callback: called after each block with its place (0 for the first one inverted) and the tokens in image
            layout; returns what to change, or other tokens in image layout, or None.
        decoding: how, for all blocks or one for each in the order of ``model.blocks``; sequentially if not given.
        fast: see `decode`.
        timed: called with each block's place in ``model.blocks`` and the milliseconds that its inversion took, as long
            as the callback leaves the guidance as it is.

    Returns:
        x (B, C, H, W) and the sum of the blocks' log_det (B,).

    Example:
        >>> import torch
        >>> from tarflow import TARFlowModel
        >>> from tarflow.flows.decoding.method import Decoding
        >>> from tarflow.flows.decoding.sampling import generate
        >>> flow = TARFlowModel(in_channels=1, sample_size=4, layers_per_block=(1, 1), width=64)
        >>> z = torch.randn(2, 1, 4, 4)
        >>> x, log_det = generate(flow, z)  # token after token
        >>> swept, _ = generate(flow, z, decoding=Decoding("jacobi", tolerance=1e-6))  # all tokens at once, until they stay
        >>> torch.allclose(swept, x, atol=1e-4)
        True
    """
    tokens, grid = model.patchify(z)
    methods = decoding if isinstance(decoding, Sequence) else [decoding] * len(model.blocks)
    if len(methods) != len(model.blocks):
        raise ValueError(f"got {len(methods)} decodings for {len(model.blocks)} blocks")
    log_det = z.new_zeros(z.shape[0], dtype=torch.promote_types(z.dtype, torch.float32))
    for place, block, method in zip(range(len(methods)), reversed(model.blocks), reversed(methods), strict=True):
        index = len(methods) - 1 - place
        name = f"block {index} (0 is next to the data)"
        start = clock(z.device) if timed is not None else 0.0
        own = None if guidance is None else guidance.of_block(place == 0)
        tokens, block_log_det = decode(block, tokens, grid, cond, null_cond, own, method, name, fast)
        if timed is not None:  # `decode` has waited for the device, so this makes it no slower
            timed(index, 1e3 * (clock(z.device) - start))
        log_det = log_det + block_log_det
        if callback is not None:
            change = callback(place, model.unpatchify(tokens, grid))
            change = change if isinstance(change, Change) else Change(change)
            if change.latents is not None:
                tokens, _ = model.patchify(change.latents)
            if change.guidance is not None and change.guidance != guidance:
                guidance, timed = change.guidance, None  # times of another kind of call
            null_cond = null_cond if change.null_cond is None else change.null_cond
            if change.stop:
                break
    return model.unpatchify(tokens, grid), log_det
