"""A learned invertible mixing of a token's channels: Glow's 1×1 convolution in its LU form (Kingma and Dhariwal, 2018).

Shapes: B batch, T tokens, C channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tarflow.flows.layers.affine import at_least_float32


class ChannelMixing(nn.Module):
    """z = W·x for each token, W = P·L·(U + diag(sign·exp log_diagonal)); it starts as a random rotation.

    P is a fixed permutation, L is lower triangular with ones on its diagonal, U strictly upper triangular; the signs are
    fixed. So W always has an inverse, and log|det W| = Σ log_diagonal, which counts once for each token.

    Args:
        channels: C.
    """

    sign: Tensor
    places: Tensor

    def __init__(self, channels: int):
        super().__init__()
        # The factorisations do not exist in 16 bits, which may be the default dtype while a model is loaded.
        dtype = torch.get_default_dtype()
        rotation, _ = torch.linalg.qr(at_least_float32(torch.randn(channels, channels)))
        permutation, *factors = torch.linalg.lu(rotation)
        lower, upper = (factor.to(dtype) for factor in factors)
        diagonal = upper.diagonal()
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("places", permutation.argmax(1))  # row i of P·A is row places[i] of A

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and the whole upper factor, (C, C) both, at least float32."""
        lower, upper, log_diagonal = (at_least_float32(part) for part in (self.lower, self.upper, self.log_diagonal))
        unit = torch.eye(len(log_diagonal), device=lower.device, dtype=lower.dtype)
        return lower.tril(-1) + unit, upper.triu(1) + torch.diag(self.sign.to(upper.dtype) * log_diagonal.exp())

    def log_det(self, x: Tensor) -> Tensor:
        """log|det| of the map of T tokens, (B,)."""
        return (x.shape[1] * at_least_float32(self.log_diagonal).sum()).expand(x.shape[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) to tokens, and log|det| (B,)."""
        with torch.autocast(x.device.type, enabled=False):
            lower, upper = self.factors()
            z = at_least_float32(x) @ (lower @ upper)[self.places].mT
        return z, self.log_det(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`, by two triangular systems, with the same log|det|."""
        with torch.autocast(z.device.type, enabled=False):
            lower, upper = self.factors()
            columns = at_least_float32(z)[..., self.places.argsort()].flatten(0, 1).mT  # (C, B·T)
            columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
            x = torch.linalg.solve_triangular(upper, columns, upper=True).mT.reshape(z.shape)
        return x, self.log_det(z)
