"""Reversible training: coupling blocks whose inputs are rebuilt from their outputs in the backward pass (Gomez et al., The
Reversible Residual Network, 2017), so that memory does not grow with their number.

Shapes: B batch, T tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tarflow.flows.affine import affine_forward, affine_inverse


class ReversibleBlocks(torch.autograd.Function):
    """All blocks as one function, which keeps its last output alone; see `through_blocks`."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Sequence[Any], grid: tuple[int, int], tokens: Tensor, cond: Tensor | None, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        device = tokens.device.type
        ctx.blocks, ctx.grid, ctx.dtype = blocks, grid, tokens.dtype
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        log_det: Tensor | float = 0.0
        for block in blocks:
            tokens, block_log_det = block(tokens, grid, cond)
            log_det = log_det + block_log_det
        ctx.save_for_backward(tokens, cond)
        return tokens, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tokens: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        z, cond = ctx.saved_tensors
        grad_cond: Tensor | None = None
        found: dict[int, Tensor | None] = {}  # by the parameter's id
        with torch.autocast(*ctx.autocast):
            for block in reversed(ctx.blocks):
                seen = cond.detach().requires_grad_() if ctx.needs_input_grad[3] else cond
                z, grad_tokens, grads = backward_of_block(block, z, ctx.grid, seen, grad_tokens, grad_log_det)
                of_cond = grads.pop(id(seen), None)
                if of_cond is not None:
                    grad_cond = of_cond if grad_cond is None else grad_cond + of_cond
                found |= grads
        of_parameters = [found.get(id(parameter)) for parameter in parameters_of(ctx.blocks)]
        return None, None, grad_tokens.to(ctx.dtype), grad_cond, *of_parameters


@torch.enable_grad()
def backward_of_block(
    block: Any, z: Tensor, grid: tuple[int, int], cond: Tensor | None, grad_z: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, Tensor, dict[int, Tensor | None]]:
    """A coupling block's input, rebuilt from its output, the gradient there, and those of parameters and condition.

    One pass of the network serves both: it reads the seen group, which is the same in z as before the coupling.

    Args:
        block: a `CouplingBlock`.
        z: its output (B, T, C); grad_z, grad_log_det: gradients of what it gave.
        cond: the condition; it gets a gradient if it asks for one.

    Returns:
        x (B, T, C), its gradient, and gradients by the parameter's id.
    """
    seen = z.detach().requires_grad_()
    shift, log_scale = block.group_parameters(seen, grid, cond, None, None)
    with torch.no_grad():
        before = affine_inverse(z, shift, log_scale)
        x, _ = block.unmixed(before)
    before.requires_grad_()
    parts = [part for part in (block.actnorm, block.mixing) if part is not None]
    mixers = [parameter for part in parts for parameter in part.parameters()]
    others = [parameter for parameter in block.parameters() if all(parameter is not mixer for mixer in mixers)]
    others += [cond] if cond is not None and cond.requires_grad else []
    outputs = affine_forward(before, shift, log_scale)
    of_before, of_seen, *grads = gradients_of(outputs, [before, seen, *others], (grad_z, grad_log_det))
    grad_before = of_before if of_seen is None else of_before + of_seen
    found = {id(tensor): grad for tensor, grad in zip(others, grads, strict=True)}
    if not parts:
        return x.detach(), grad_before, found
    x.requires_grad_()
    grad_x, *grads = gradients_of(block.mixed(x), [x, *mixers], (grad_before, grad_log_det))
    return x.detach(), grad_x, found | {id(mixer): grad for mixer, grad in zip(mixers, grads, strict=True)}


def gradients_of(outputs: Sequence[Tensor], inputs: list[Tensor], given: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of inputs from those of outputs; None for inputs that are frozen or have no part in them."""
    outputs, given = zip(*(pair for pair in zip(outputs, given, strict=True) if pair[0].requires_grad), strict=True)
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    grads = iter(torch.autograd.grad(outputs, needed, given, allow_unused=True))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]


def parameters_of(blocks: Sequence[Any]) -> list[Tensor]:
    return [parameter for block in blocks for parameter in block.parameters()]


def through_blocks(
    blocks: Sequence[Any], tokens: Tensor, grid: tuple[int, int], cond: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Data to noise through all blocks, with ordinary gradients and the activations of one block at a time.

    The backward pass runs each block's network once more, as it does when a block's activations are computed again.

    Args:
        blocks: `CouplingBlock`s.
        tokens: (B, T, C); grid, cond: as the blocks take them.

    Returns:
        z (B, T, C) and the sum of the log|det| (B,).
    """
    return ReversibleBlocks.apply(tuple(blocks), grid, tokens, cond, *parameters_of(blocks))
