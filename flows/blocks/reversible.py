"""Reversible training: coupling blocks whose inputs are rebuilt from their outputs in the backward pass (Gomez et al., The
Reversible Residual Network, 2017), so that memory does not grow with their number.

Shapes: B batch, T tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tarflow.flows.blocks.coupling import CouplingBlock
from tarflow.flows.layers.affine import affine_forward, affine_inverse, at_least_float32
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.condition import Condition, parts_of, with_level


@dataclass
class Carrier:
    """The tokens that the backward pass has come to.

    Attributes:
        tokens: the output (B, T, C) of block ``place``, without a graph.
    """

    tokens: Tensor
    place: int


class ReversibleBlock(torch.autograd.Function):
    """One block that stores no activations. Its backward pass reads the block's output from the `Carrier`, and leaves the
    rebuilt input there for the block before."""

    @staticmethod
    def forward(
        ctx: Any,
        block: CouplingBlock,
        place: int,
        carrier: Carrier,
        grid: tuple[int, int],
        tokens: Tensor,
        log_det: Tensor,
        cond: Tensor | None,
        log_level: Tensor | None,
        *_: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = tokens.device.type
        ctx.block, ctx.place, ctx.carrier, ctx.grid, ctx.dtype = block, place, carrier, grid, tokens.dtype
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(cond, log_level)
        z, block_log_det = block(tokens, grid, with_level(cond, log_level))
        carrier.tokens, carrier.place = z.detach(), place
        return z, log_det + block_log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        (cond, log_level), carrier = ctx.saved_tensors, ctx.carrier
        if carrier.place != ctx.place:
            raise RuntimeError("reversible training has one backward pass: inputs that it rebuilt are gone after it")
        wants_cond = ctx.needs_input_grad[6]
        seen = cond.detach().requires_grad_() if wants_cond else cond
        with torch.autocast(*ctx.autocast):
            x, grad_x, grads = backward_of_block(
                ctx.block, carrier.tokens, ctx.grid, with_level(seen, log_level), grad_z, grad_log_det
            )
        carrier.tokens, carrier.place = x, ctx.place - 1
        of_parameters = [grads.get(id(parameter)) for parameter in ctx.block.parameters()]
        return None, None, None, None, grad_x.to(ctx.dtype), grad_log_det, grads.get(id(seen)), None, *of_parameters


@torch.enable_grad()
def backward_of_block(
    block: CouplingBlock, z: Tensor, grid: tuple[int, int], condition: Condition, grad_z: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, Tensor, dict[int, Tensor | None]]:
    """A coupling block's input, rebuilt from its output, the gradient there, and those of parameters and condition.

    One pass of the network serves both: it reads the seen group, which is the same in z as before the coupling.

    Args:
        block: a `CouplingBlock`.
        z: its output (B, T, C); grad_z, grad_log_det: gradients of what it gave.
        condition: as the block takes it; labels or prefix get a gradient if they ask for one.

    Returns:
        x (B, T, C), its gradient, and gradients by the parameter's id.
    """
    seen = z.detach().requires_grad_()
    cond, _ = parts_of(condition)
    shift, log_scale = block.group_parameters(seen, grid, condition, None, None)
    with torch.no_grad():
        before = affine_inverse(z, shift, log_scale)
        x, _ = block.unmixed(before)
    before.requires_grad_()
    parts = [part for part in (block.actnorm, block.mixing) if part is not None]
    mixers = [parameter for part in parts for parameter in part.parameters()]
    others: list[Tensor] = [
        parameter for parameter in block.parameters() if all(parameter is not mixer for mixer in mixers)
    ]
    others += [cond] if cond is not None and cond.requires_grad else []
    outputs = affine_forward(before, shift, log_scale)
    of_before, of_seen, *grads = gradients_of(outputs, [before, seen, *others], (grad_z, grad_log_det))
    assert of_before is not None  # all that comes out depends on it
    grad_before = of_before if of_seen is None else of_before + of_seen
    found = {id(tensor): grad for tensor, grad in zip(others, grads, strict=True)}
    if not parts:
        return x.detach(), grad_before, found
    x.requires_grad_()
    grad_x, *grads = gradients_of(block.mixed(x), [x, *mixers], (grad_before, grad_log_det))
    assert grad_x is not None
    return x.detach(), grad_x, found | {id(mixer): grad for mixer, grad in zip(mixers, grads, strict=True)}


def gradients_of(outputs: Sequence[Tensor], inputs: list[Tensor], given: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of inputs from those of outputs; None for inputs that are frozen or have no part in them."""
    outputs, given = zip(*(pair for pair in zip(outputs, given, strict=True) if pair[0].requires_grad), strict=True)
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    grads = iter(torch.autograd.grad(outputs, needed, given, allow_unused=True))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]


def through_blocks(
    blocks: Iterable[Block], tokens: Tensor, grid: tuple[int, int], condition: Condition
) -> tuple[Tensor, Tensor]:
    """Data to noise through all blocks, with ordinary gradients and the activations of one block at a time.

    The backward pass, of which there can be one, runs each block's network once more, as it does when a block's
    activations are computed again.

    Args:
        blocks: `CouplingBlock`s.
        tokens: (B, T, C); grid, condition: as the blocks take them.

    Returns:
        z (B, T, C) and the sum of the log|det| (B,).
    """
    carrier, log_det = Carrier(tokens.detach(), -1), at_least_float32(tokens).new_zeros(len(tokens))
    for place, block in enumerate(blocks):
        shared = carrier, grid, tokens, log_det, *parts_of(condition)
        tokens, log_det = ReversibleBlock.apply(block, place, *shared, *block.parameters())
    return tokens, log_det
