"""What the exact-flow tools give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class EncodingOutput(BaseOutput):
    """A picture as noise.

    Attributes:
        z: standard normal noise (B, C, h, w) if the picture is one that the flow would draw; ``pipe(…, latents=z,
            guidance_scale=1)`` with the same condition draws it again.
        latents: what the flow encoded, the autoencoder's latents with the training noise, (B, C, h, w).
        error: largest |x − x'| of latents → z → latents, (B,).
    """

    z: Tensor
    latents: Tensor
    error: Tensor


@dataclass
class LikelihoodOutput(BaseOutput):
    """How likely a picture is.

    Attributes:
        log_prob: in nats, (B,).
        nats_per_dim: −log p over the number of latent numbers, (B,): the quantity that training minimises.
        map: each token's share of ``log_prob``, which is their sum, (B, h, w); None if blocks are not autoregressive.
    """

    log_prob: Tensor
    nats_per_dim: Tensor
    map: Tensor | None


@dataclass
class EditingOutput(BaseOutput):
    """Changed pictures.

    Attributes:
        images: as ``output_type`` says.
        latents: of the pictures, (B, C, h, w); without the training noise, unless the pipeline's decoder removes it.
        log_prob: of them with the training noise, in nats: (B,), or along a Metropolis–Hastings chain (steps + 1, B).
        acceptance: share of accepted proposals of such a chain, (B,).
    """

    images: Any
    latents: Tensor
    log_prob: Tensor
    acceptance: Tensor | None = None
