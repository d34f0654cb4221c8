"""One autoregressive flow block.

Shapes: B batch, T tokens, C channels of a token, S slots of a sequence, L prefix tokens.
With a start token, slot t holds token t − 1 (the start token in slot 0) and its output belongs to token t; without
one, slot t holds token t and its output belongs to token t + 1, so token 0 passes unchanged and the last slot is not
needed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.decoding import sampling
from tarflow.flows.layers.affine import affine_forward
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
        if self.start_token is None:
            inputs = self.slot_inputs(x, grid, 1, x.shape[1])
            shift, log_scale = self.affine_parameters(inputs, 0, self.context(cond, grid))
            shift, log_scale = F.pad(shift, (0, 0, 1, 0)), F.pad(log_scale, (0, 0, 1, 0))  # token 0 is unchanged
        else:
            inputs = self.slot_inputs(x, grid, 0, x.shape[1])
            shift, log_scale = self.affine_parameters(inputs, 0, self.context(cond, grid))
        z, log_det = affine_forward(x, shift, log_scale)
        return restore(z, self.config.order, grid), log_det

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
