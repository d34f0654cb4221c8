"""One autoregressive flow block.

Shapes: B batch, T tokens, C channels of a token, S slots of a sequence, L prefix tokens.
With a start token, slot t holds token t − 1 (the start token in slot 0) and its output belongs to token t; without
one, slot t holds token t and its output belongs to token t + 1, so token 0 passes unchanged and the last slot is not
needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.decoding import sampling
from tarflow.flows.layers.affine import affine_forward, affine_inverse
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.order import reorder, restore


class FlowBlock(Block):
    """Invertible map of T tokens: each is shifted and scaled by numbers that depend on the tokens before it.

    Args:
        config: what the block is made of.
    """

    def forward(self, x: Tensor, grid: tuple[int, int], cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Data to noise, in one parallel pass.

        Args:
            x: row-major tokens (B, T, C).
            grid: rows and columns of tokens.
            cond: class labels (B,) for class vectors, prefix tokens (B, L, E) for a prefix; ignored by a block that
                does not see the condition.

        Returns:
            z (B, T, C), row-major, and log|det dz/dx| (B,).
        """
        x = reorder(x, self.config.order, grid)
        shift, log_scale = self.parameters_of(x, grid, cond)
        z, log_det = affine_forward(x, shift, log_scale)
        return restore(z, self.config.order, grid), log_det

    def parameters_of(self, x: Tensor, grid: tuple[int, int], cond: Condition) -> tuple[Tensor, Tensor]:
        """Shift and log-scale (B, T, C) of all tokens, each from those before it, in the block's order as x is."""
        if self.start_token is None:
            shift, log_scale = self.affine_parameters(x[:, :-1], 0, self.context(cond, grid))
            return F.pad(shift, (0, 0, 1, 0)), F.pad(log_scale, (0, 0, 1, 0))  # token 0 is unchanged
        start = self.start_token.to(x.dtype).expand(x.shape[0], 1, -1)
        return self.affine_parameters(torch.cat([start, x[:, :-1]], 1), 0, self.context(cond, grid))

    def sweep(self, x: Tensor, z: Tensor, grid: tuple[int, int], cond: Condition = None) -> Tensor:
        """One Jacobi sweep towards the inverse of z, with gradients: z·σ(x) + μ(x), row-major (B, T, C).

        The inverse is the only x that a sweep leaves as it is, and T sweeps find it from anywhere.

        Args:
            x: where the sweep begins, z: the noise, row-major tokens (B, T, C) both.
            grid, cond: as in `forward`.
        """
        order = self.config.order
        shift, log_scale = self.parameters_of(reorder(x, order, grid), grid, cond)
        return affine_inverse(z, restore(shift, order, grid), restore(log_scale, order, grid))

    def inverse(
        self,
        z: Tensor,
        grid: tuple[int, int],
        cond: Condition = None,
        null_cond: Condition = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noise to data, token after token; the inverse of `forward`, with the same log_det, if guidance is off.

        Args:
            z: row-major tokens (B, T, C).
            grid, cond: as in `forward`.
            null_cond: the condition of the second, unconditional pass that guidance compares with.
            guidance: how strongly and by which formula.
        """
        return sampling.decode(self, z, grid, cond, null_cond, guidance)
