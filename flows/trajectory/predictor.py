"""The predictor: what the next state of a trajectory is, as a Gaussian of each number.

Shapes: B batch, T tokens, C channels of a token, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor

from tarflow.flows.layers.affine import log_scale_of, soft_clip
from tarflow.flows.layers.config import BlockConfig
from tarflow.flows.layers.network import TokenNetwork
from tarflow.flows.layers.prepared import compute_dtype
from tarflow.flows.trajectory.chain import white_step_down

#: Numbers that a level is embedded by, and how many "time steps" the highest level stands for.
LEVEL_FEATURES, LEVEL_STEPS = 64, 1000.0


class Predictor(TokenNetwork):
    """A Transformer with full attention over all tokens of the present state: u_s given u_t is a Gaussian.

    Its outputs tell in which way that Gaussian differs from what it were for standard normal data and no transporter,
    so that an untrained predictor is right for such data, at all levels.

    Args:
        config: what the network is made of.
    """

    def __init__(self, config: BlockConfig):
        super().__init__(config, outputs=2 * config.token_dim)  # [raw scale; shift]
        width = config.transformer.width
        self.level_features = Timesteps(LEVEL_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embed_levels = TimestepEmbedding(2 * LEVEL_FEATURES, width)

    def forward(
        self, u: Tensor, grid: tuple[int, int], level: Tensor, lower: Tensor, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of u_s, (B, T, C) each, at least float32.

        Args:
            u: row-major tokens of u_t (B, T, C).
            grid: rows and columns of tokens.
            level, lower: t and s (B,).
            cond: as a `FlowBlock` takes it.
        """
        dtype = compute_dtype(self.proj_in)
        features = [self.level_features(at * LEVEL_STEPS) for at in (level, lower)]
        vector = self.embed_levels(torch.cat(features, dim=1).to(dtype))[:, None]  # (B, 1, D)
        context = self.context(cond, grid)
        added = vector if context.added is None else context.added + vector
        context = replace(context, added=added.expand(-1, u.shape[1], -1))
        out = soft_clip(self.run(u, 0, context), self.config.soft_clip)
        raw, shift = out.chunk(2, dim=-1)
        share, std = (part[:, None, None].to(out.dtype) for part in white_step_down(level, lower))
        return share * u + std * shift, std.log() + log_scale_of(raw, self.config.scale)
