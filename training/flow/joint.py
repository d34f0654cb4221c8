"""An autoencoder and a flow as one model: pictures to noisy latents, their likelihood, and what they are decoded to.

The encoder gives means only, and the noise has one constant σ. So the evidence lower bound is, up to a constant, the loss
of decoded pictures plus the flow's negative log-likelihood of the same latents (SimFlow, arXiv 2512.04084). By itself the
likelihood would collapse the means: all alike, it is highest. Two things prevent that. No gradient reaches the means'
scale, as with batch normalisation (between autoencoder and generator in REPA-E, arXiv 2504.10483); here with running
statistics (batch renormalisation, arXiv 1702.03275), as single batches may be small. And the likelihood has a small weight
for the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tarflow.common.checks import check
from tarflow.flows.model import TARFlowModel
from tarflow.training.autoencoder.model import argument_defaults, with_weights
from tarflow.training.flow.config import RunConfig
from tarflow.training.flow.joint_config import JointConfig
from tarflow.training.flow.objective import FlowObjective
from tarflow.vae.codec import LatentCodec

#: Of the running moments of the means, for each optimizer step.
MOMENTS_DECAY = 0.95
#: A channel of smaller variance counts as constant.
SMALLEST_VARIANCE = 1e-10


class JointObjective(FlowObjective):
    """Flow, autoencoder and, if it is trained along, text encoder, as one module for the optimizer and Accelerate.

    Args:
        flow, text_encoder: as of `FlowObjective`.
        codec: of the autoencoder at the start, with its statistics.
        config: the settings.

    Attributes:
        moments: running mean and mean square per channel of the scaled means, (2, C).
    """

    moments: Tensor

    def __init__(self, flow: TARFlowModel, text_encoder: nn.Module | None, codec: LatentCodec, config: JointConfig):
        super().__init__(flow, text_encoder)
        check(
            codec.latents_mean is not None,
            "the pipeline of init_from has no latents_mean, which vae.train 'joint' needs",
        )
        self.config, self.vae = config, codec.vae.requires_grad_(True)
        self.scaled, self.factors = codec.scale_raw, codec.factors
        mean, std = torch.tensor(codec.latents_mean), torch.tensor(codec.latents_std)
        self.register_buffer("moments", torch.stack([mean, std.square() + mean.square()]))

    def forward(  # type: ignore[override]  # pictures in the place of latents
        self,
        latents: Tensor | None = None,
        images: Tensor | None = None,
        noise: Tensor | None = None,
        **conditions: Any,
    ) -> dict[str, Tensor]:
        """The flow's loss and what it is computed with; either of pictures or, as `FlowObjective`, of given latents.

        Args:
            latents: noisy latents (B, C, h, w), which nothing is decoded of.
            images: (B, 3, H, W) in [−1, 1].
            noise: normal numbers (B, C, h, w).
            conditions: as of `FlowObjective`.

        Returns:
            its ``loss``, ``nats_per_dim`` and ``z``; of pictures also ``decoded`` (B, 3, H, W), and ``moments``, those
            of this batch's means. Of the loss's gradient ``nll_weight`` times that reaches the encoder.
        """
        if latents is not None:
            return super().forward(latents, **conditions)
        if images is None or noise is None:
            raise ValueError("give latents, or images and noise")
        means = self.scaled(self.vae.encode(images).latent_dist.mean)
        latents = self.normalise(means) + self.config.posterior_std * noise
        output = super().forward(scale_gradient(latents, self.config.nll_weight), **conditions)
        decoded = self.vae.decode(self.raw(latents)).sample.float()
        found = means.detach()
        moments = torch.stack([found.mean((0, 2, 3)), found.square().mean((0, 2, 3))])
        return {**output, "decoded": decoded, "moments": moments}

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of the scaled means that latents are normalised with, (C, 1, 1)."""
        mean, square = self.moments[:, :, None, None]
        return mean, (square - mean.square()).clamp(min=SMALLEST_VARIANCE).sqrt()

    def normalise(self, means: Tensor) -> Tensor:
        """Scaled means (B, C, h, w) with mean 0 and deviation 1 per channel."""
        mean, std = self.statistics
        return renormalise(means, mean, std) if self.config.renormalise else (means - mean) / std

    def raw(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the autoencoder decodes them."""
        (mean, std), (shift, scaling) = self.statistics, self.factors
        return (latents * std + mean) / scaling + shift

    @torch.no_grad()
    def update_statistics(self, moments: Tensor) -> None:
        """Take in the moments (2, C) of an optimizer step's pictures."""
        if self.config.renormalise:
            self.moments.lerp_(moments, 1 - MOMENTS_DECAY)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer."""
        return self.vae.decoder.conv_out.weight


def renormalise(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(values − mean) / std with the gradient of a batch normalisation, which has no part along the values' mean and
    scale (batch renormalisation, arXiv 1702.03275, without its limits).

    Args:
        values: (B, C, h, w).
        mean, std: running ones, (C, 1, 1).
    """
    variance, center = torch.var_mean(values, (0, 2, 3), correction=0, keepdim=True)
    own = variance.clamp(min=SMALLEST_VARIANCE).sqrt()
    scale, shift = (own / std).detach(), ((center - mean) / std).detach()
    return (values - center) / own * scale + shift


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """The same values, whose gradient is multiplied by ``factor``."""
    return values.detach() + factor * (values - values.detach()) if factor else values.detach()


def trained_autoencoder(
    weights: dict[str, Tensor], vae: AutoencoderKL, latents_std: Sequence[float], std: float
) -> AutoencoderKL:
    """The autoencoder as a pipeline gets it, in the host's memory, with a posterior of constant σ.

    Args:
        weights: its own.
        vae: what they belong to, for its settings.
        latents_std: of the scaled means, by channel.
        std: σ in their units.
    """
    _, scaling = LatentCodec(vae).factors
    return with_weights(vae, weights, [std * value / scaling for value in latents_std])


def joint_invariants(config: RunConfig, vae: AutoencoderKL) -> dict[str, Any]:
    """What must be the same when training goes on, by readable names."""
    settings = {key: value for key, value in vae.config.items() if key in argument_defaults() and key != "sample_size"}
    return {
        "joint.posterior_std": config.joint.posterior_std,
        "joint.renormalise": config.joint.renormalise,
        "joint.loss.discriminator_width and layers": config.joint.loss.discriminator_shape,
        **{f"the autoencoder's {key}": value for key, value in settings.items()},
    }
