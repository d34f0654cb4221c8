"""A loss that makes blocks converge in a few sweeps.

A sweep x ← z·σ(x) + μ(x) has one fixed point, the tokens that z belongs to. Of a training picture they are known, so how
far some sweeps still are from them is known without drawing anything. It depends on the block alone whether sweeps come
near in few steps: the less a token's μ and σ depend on the tokens just before it, the faster they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.layers.condition import Condition
from tarflow.flows.token_model import TokenModel
from tarflow.training.flow.sweep_config import SweepLossConfig
from tarflow.training.loop.draws import sample_seed

#: Squared distances below this are rounding, of which nothing is to be learned.
LEAST_DISTANCE = 1e-8


@dataclass(frozen=True)
class SweepTerm:
    """What a step's loss of sweeps is made of.

    Attributes:
        weight, blocks: as of `SweepLossConfig`.
        sweeps, gradient_sweeps: without gradients and then with them.
    """

    weight: float
    blocks: str
    sweeps: int
    gradient_sweeps: int


def sweep_term(config: SweepLossConfig, seed: int, step: int) -> SweepTerm | None:
    """A step's term, the same for all processes and passes; None if there is none."""
    if config.weight == 0:
        return None
    sweeps = 1 + sample_seed(seed, step, -1, "sweeps") % config.sweeps
    counted = min(config.gradient_sweeps, sweeps)
    return SweepTerm(config.weight, config.blocks, sweeps - counted, counted)


def sweep_loss(
    model: TokenModel, latents: Tensor, outputs: Sequence[Tensor], condition: Condition, term: SweepTerm
) -> Tensor:
    """The mean over the term's blocks of `error_left`, a scalar.

    Args:
        model: of autoregressive blocks.
        latents: noisy latents (B, C, H, W).
        outputs: what each block makes of them, (B, C, H, W).
        condition: as the blocks take it.
        term: which blocks, how many sweeps.
    """
    states = [model.patchify(state)[0] for state in (latents, *outputs)]
    grid = model.patchify(latents)[1]
    triples = list(zip(model.blocks, states[:-1], states[1:], strict=True))
    found = []
    for block, x, z in triples if term.blocks == "all" else triples[-1:]:
        assert isinstance(block, FlowBlock)  # settings of other blocks are refused
        found.append(error_left(block, x, z, grid, condition, term))
    return torch.stack(found).mean()


def error_left(
    block: FlowBlock, x: Tensor, z: Tensor, grid: tuple[int, int], condition: Condition, term: SweepTerm
) -> Tensor:
    """What the last sweeps leave of the squared distance to x, as a share, the mean over samples: a scalar.

    The sweeps begin with z, as drawing does. A share, because the distance itself is nearly all of the first sweeps': it
    would teach little about the last ones, which are most of them.

    Args:
        block: the block.
        x: row-major tokens (B, T, C); z: what the block makes of them.
        grid, condition: as of the block's ``forward``.
        term: how many sweeps.
    """
    current = z.detach()
    with torch.no_grad():
        for _ in range(term.sweeps):
            current = block.sweep(current, z, grid, condition)
        before = squared_distance(current, x)
    for _ in range(term.gradient_sweeps):
        current = block.sweep(current, z, grid, condition)
    return (squared_distance(current, x) / before.clamp(min=LEAST_DISTANCE)).mean()


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean square of a sample's differences, (B,)."""
    return (x - y).pow(2).flatten(1).mean(1)
