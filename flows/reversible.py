"""Reversible training: blocks whose inputs are rebuilt from their outputs in the backward pass (Gomez et al., The
Reversible Residual Network, 2017), so that memory does not grow with their number.

Shapes: B batch, T tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
                with torch.no_grad():
                    x, _ = block.inverse(z, ctx.grid, cond)
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    seen = cond.detach().requires_grad_() if ctx.needs_input_grad[3] else cond
                    outputs = block(x, ctx.grid, seen)
                parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
                inputs = [x, *parameters, *([seen] if ctx.needs_input_grad[3] else [])]
                pairs = zip(outputs, (grad_tokens, grad_log_det), strict=True)
                outputs, given = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
                grads = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
                found |= {id(parameter): grad for parameter, grad in zip(parameters, grads[1:], strict=False)}
                if ctx.needs_input_grad[3] and grads[-1] is not None:
                    grad_cond = grads[-1] if grad_cond is None else grad_cond + grads[-1]
                z, grad_tokens = x.detach(), grads[0]
        of_parameters = [found.get(id(parameter)) for parameter in parameters_of(ctx.blocks)]
        return None, None, grad_tokens.to(ctx.dtype), grad_cond, *of_parameters


def parameters_of(blocks: Sequence[Any]) -> list[Tensor]:
    return [parameter for block in blocks for parameter in block.parameters()]


def through_blocks(
    blocks: Sequence[Any], tokens: Tensor, grid: tuple[int, int], cond: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Data to noise through all blocks, with ordinary gradients and the activations of one block at a time.

    The backward pass inverts a block and runs it again, so a step takes two more passes of the network than usual.

    Args:
        blocks: of which `inverse` is one pass and gives back the input.
        tokens: (B, T, C); grid, cond: as the blocks take them.

    Returns:
        z (B, T, C) and the sum of the log|det| (B,).
    """
    return ReversibleBlocks.apply(tuple(blocks), grid, tokens, cond, *parameters_of(blocks))
