"""The learned denoiser: a network that predicts the score, so that no gradient is needed when drawing."""

from __future__ import annotations

from torch import Tensor

from tarflow.flows.layers.network import TokenNetwork


class Denoiser(TokenNetwork):
    """Transformer with full attention over the condition's prefix and all tokens (STARFlow-V).

    Trained to give σ·∇(−log p(y)) of noisy samples y, so that y − σ·net(y) is without the noise.
    """

    def forward(self, y: Tensor, grid: tuple[int, int], cond: Tensor | None = None) -> Tensor:
        """Row-major tokens of noisy samples (B, T, C) → the scaled score (B, T, C), at least float32.

        Args:
            y: the tokens.
            grid: rows and columns of tokens.
            cond: as a `FlowBlock` takes it; ignored by a denoiser that does not see the condition.
        """
        return self.run(y, 0, self.context(cond, grid))
