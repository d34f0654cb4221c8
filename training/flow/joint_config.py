"""Settings of training the autoencoder along with the flow, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tarflow.common.checks import NotNegative, Positive, check, check_ranges
from tarflow.training.losses.config import JointLossConfig

if TYPE_CHECKING:
    from tarflow.training.flow.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """What the autoencoder learns from when ``vae.train`` is "joint" (SimFlow, arXiv 2512.04084).

    Latents are mean + σ · noise with one constant σ, of which the decoder makes pictures and the flow the likelihood.

    Attributes:
        posterior_std: σ, in units of the means' standard deviation per channel as measured (at the start, or all along
            with ``renormalise``).
        lr: the autoencoder's peak learning rate, an optimizer group of its own, clipped by itself.
        nll_weight: what the flow's negative log-likelihood (nats per latent dimension) weighs for the encoder, beside
            the loss of pictures; 0 keeps it from the encoder. The flow itself learns from it with weight 1.
        renormalise: the means are divided by their standard deviation of now, and no gradient reaches their scale. If
            false, they are divided by what was measured at the start, and the likelihood makes them shrink.
        model: arguments of Diffusers' ``AutoencoderKL`` for a new autoencoder; for ``vae.name`` "new".
        loss: what makes decoded pictures like their originals.
    """

    posterior_std: Positive = 0.5
    lr: Positive = 1e-4
    nll_weight: NotNegative = 1e-3
    renormalise: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    loss: JointLossConfig = field(default_factory=JointLossConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "joint")


def check_joint(config: RunConfig) -> None:
    """Errors of a `RunConfig` whose other settings do not fit ``vae.train`` and the section ``joint``."""
    vae, train, joint = config.vae, config.train, config.joint
    new = vae.name == "new"
    if vae.train == "frozen":
        check(joint == JointConfig(), "settings of joint are given, which are for vae.train 'joint', not 'frozen'")
        check(not new, "vae.name is 'new', an autoencoder that must be trained: set vae.train to joint")
        return
    check(not vae.pixels, "vae.train is 'joint', but vae.name is none, which models pixels: there is no autoencoder")
    check(
        config.data.source != "latents",
        "vae.train is 'joint', but data.source is 'latents': latents of a cache do not change, give the pictures",
    )
    check(
        train.noise_std == 0,
        f"with vae.train 'joint' the latents' noise is joint.posterior_std ({joint.posterior_std}): set train.noise_std "
        f"to 0, got {train.noise_std}",
    )
    check(vae.measure_images > 0, "vae.train 'joint' measures the latents: set vae.measure_images above 0")
    check(
        config.flow.get("learned_denoiser", "none") == "none",
        "flow.learned_denoiser has nothing to do with vae.train 'joint', whose decoder takes noisy latents: leave it out",
    )
    check(new == bool(joint.model), "joint.model is for vae.name 'new', and both must be given")
    check(
        not new or config.init_from is None,
        "init_from is for the autoencoder of a pipeline: name that by vae.name instead of 'new'",
    )
    check(
        train.mixed_precision != "fp16" or joint.loss.adversarial == 0,
        "joint.loss.adversarial cannot be trained with train.mixed_precision fp16, whose gradients of single layers "
        "vanish: take bf16 or no",
    )
