"""Coupling blocks: the tokens of one group are shifted and scaled by numbers that depend on the other group.

NICE (Dinh et al., 2014) with the scale "additive", RealNVP (Dinh et al., 2016) with another, Glow (Kingma and Dhariwal,
2018) with actnorm and channel mixing before. Shapes: B batch, T tokens, C channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.decoding.method import InversionState
from tarflow.flows.layers.actnorm import ActNorm
from tarflow.flows.layers.affine import affine_forward, affine_inverse, at_least_float32
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.config import BlockConfig
from tarflow.flows.layers.groups import seen_group
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.mixing import ChannelMixing
from tarflow.flows.layers.prepared import at_hand


class CouplingBlock(FlowBlock):
    """Invertible map of T tokens in one parallel pass in both directions.

    The network reads the tokens of the seen group, which pass unchanged; in the places of the others it reads a learned
    token, or zeros without ``start_token``, and gives their shift and scale. As nothing hidden is read, attention needs
    no mask: each slot attends to all.

    Args:
        config: what the block is made of.
    """

    one_pass = True

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        self.actnorm = ActNorm(config.token_dim) if config.actnorm else None
        self.mixing = ChannelMixing(config.token_dim) if config.mixing == "lu" else None

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        cond: Condition = None,
        null_cond: Condition = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: row-major tokens (B, T, C).
            grid, cond, null_cond, guidance: as in `inverse`.

        Returns:
            z (B, T, C) and log|det dz/dx| (B,).
        """
        x, log_det = self.mixed(x)
        z, coupling_log_det = affine_forward(x, *self.group_parameters(x, grid, cond, null_cond, guidance))
        return z, log_det + coupling_log_det

    def inverse(
        self,
        z: Tensor,
        grid: tuple[int, int],
        cond: Condition = None,
        null_cond: Condition = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noise to data; the inverse of `forward`, with the same log_det. Gradients pass through it.

        Args:
            z: row-major tokens (B, T, C).
            grid: rows and columns of tokens.
            cond: as a `FlowBlock` takes it.
            null_cond, guidance: see `InversionState`. The changed group given the seen one is Gaussian, so guidance is what
                it is in an autoregressive block; annealed it has its full weight, as for the token that is made last.
        """
        shift, log_scale = self.group_parameters(z, grid, cond, null_cond, guidance)
        x, log_det = self.unmixed(affine_inverse(z, shift, log_scale))
        return x, log_det - log_scale.flatten(1).sum(1)

    def mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What comes before the coupling, actnorm and mixing: tokens (B, T, C) and log|det| (B,)."""
        x = at_least_float32(x)
        log_det = x.new_zeros(len(x))
        for part in (self.actnorm, self.mixing):
            if part is not None:
                x, part_log_det = part(x)
                log_det = log_det + part_log_det
        return x, log_det

    def unmixed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `mixed`, with the same log|det|."""
        log_det = z.new_zeros(len(z))
        for part in (self.mixing, self.actnorm):
            if part is not None:
                with at_hand(part):
                    z, part_log_det = part.inverse(z)
                log_det = log_det + part_log_det
        return z, log_det

    def group_parameters(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        cond: Condition,
        null_cond: Condition,
        guidance: Guidance | None,
    ) -> tuple[Tensor, Tensor]:
        """Shift and log-scale of all tokens, (B, T, C) both; zeros for the seen group, on which they depend."""
        tokens, config = at_least_float32(tokens), self.config
        seen = seen_group(grid, config.groups, config.swapped, tokens.device)[:, None]  # (T, 1)
        hidden = tokens.new_zeros(1) if self.start_token is None else self.start_token.to(tokens)
        inputs = torch.where(seen, tokens, hidden)
        run = InversionState(self, len(tokens), grid, cond, null_cond, guidance, cached=False)
        raw = self.affine_parameters(run.doubled(inputs), 0, run.context, None, run.temperature)
        shift, log_scale = run.combined(raw, token=len(seen) - 1)
        return shift.masked_fill(seen, 0), log_scale.masked_fill(seen, 0)
