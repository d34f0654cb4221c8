"""Blocks of an inverse autoregressive flow (Kingma et al., IAF, 2016): the sampling equation is the encoder.

Shapes: B batch, T tokens, C channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.decoding.jacobi import decode_jacobi
from tarflow.flows.decoding.method import Decoding, InversionState
from tarflow.flows.decoding.sequential import decode_sequential
from tarflow.flows.layers.affine import affine_inverse, at_least_float32
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.kv_cache import GrowingCache
from tarflow.flows.layers.order import reorder, restore


class InverseAutoregressiveBlock(FlowBlock):
    """A `FlowBlock` run backwards: z_t = x_t·σ(z_<t) + μ(z_<t), so drawing is one parallel pass, likelihood is not.

    Args:
        config: what the block is made of.
    """

    one_pass = True
    caches_with_gradients = True

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        cond: Condition = None,
        null_cond: Condition = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Data to noise, token after token.

        With gradients the keys and values of all T passes are kept for the backward pass, T² slots: for small grids.

        Args:
            x: row-major tokens (B, T, C).
            grid, cond: as a `FlowBlock` takes them.
            null_cond, guidance: as of `inverse`.

        Returns:
            z (B, T, C), row-major, and log|det dz/dx| (B,).
        """
        if not torch.is_grad_enabled():
            return self.encode(x, grid, cond, null_cond, guidance)
        self.refuse_guidance(guidance)
        ordered = at_least_float32(reorder(x, self.config.order, grid))
        context, cache = self.context(cond, grid), GrowingCache(self.config.transformer.layers)
        made: list[Tensor] = []
        log_scales: list[Tensor] = []
        if self.start_token is None:  # token 0 is unchanged
            first = ordered[:, :1]
            made, log_scales = [first], [torch.zeros_like(first)]
        else:
            first = self.start_token.to(ordered.dtype).expand(len(ordered), 1, -1)
        for token in range(len(made), ordered.shape[1]):
            last = made[-1] if made else first
            slot = max(cache.length - context.prefix_length, 0)
            shift, log_scale = self.affine_parameters(last, slot, context, cache)
            log_scales.append(log_scale)
            made.append(affine_inverse(ordered[:, token : token + 1], shift, log_scale))
        z = restore(torch.cat(made, dim=1), self.config.order, grid)
        return z, torch.cat(log_scales, dim=1).flatten(1).sum(1)

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        grid: tuple[int, int],
        cond: Condition = None,
        null_cond: Condition = None,
        guidance: Guidance | None = None,
        decoding: Decoding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` without gradients, by one of the methods that invert autoregressive blocks; see `Decoding`."""
        self.refuse_guidance(guidance)
        decoding = decoding or Decoding()
        with torch.autocast(x.device.type, enabled=False):
            run = InversionState(self, len(x), grid, cond, null_cond, None)
            ordered = at_least_float32(reorder(x, self.config.order, grid))
            if decoding.method == "sequential":
                z, log_scales = decode_sequential(run, ordered)
            else:
                z, log_scales, _ = decode_jacobi(run, ordered, decoding)
        return restore(z, self.config.order, grid), log_scales.flatten(1).sum(1)

    def inverse(
        self,
        z: Tensor,
        grid: tuple[int, int],
        cond: Condition = None,
        null_cond: Condition = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noise to data in one parallel pass, x_t = (z_t − μ(z_<t))/σ(z_<t); with the log_det of `forward`. Gradients
        pass through it.

        Args:
            z: row-major tokens (B, T, C).
            grid, cond: as a `FlowBlock` takes them.
            null_cond: is not used, as there is no guidance.
            guidance: None or of weight 0.

        Raises:
            ValueError: with guidance.
        """
        self.refuse_guidance(guidance)
        x, log_det = super().forward(z, grid, cond)
        return x, -log_det

    def refuse_guidance(self, guidance: Guidance | None) -> None:
        """Guidance compares what a token may be given the tokens before it, which these blocks never know."""
        if guidance is not None and guidance.active and (self.sees_condition or guidance.temperature != 1):
            raise ValueError(
                "inverse autoregressive blocks have no guidance: they know the noise before a token, not the tokens; "
                "set guidance_scale to 1"
            )
