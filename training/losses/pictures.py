"""What makes a decoded picture like its original: pixels, a network's features, and a discriminator of patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from tarflow.common.checks import check
from tarflow.training.loop.task import Learner
from tarflow.training.losses.config import PictureLossConfig
from tarflow.training.losses.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_decoder_loss,
    hinge_discriminator_loss,
)
from tarflow.training.losses.perceptual import make_perceptual


@dataclass
class Decoded:
    """What a decoder made of pictures.

    Attributes:
        decoded, images: it and the originals, (B, 3, H, W) in [−1, 1].
        last_layer: weight of the decoder's last layer, which ``decoded`` depends on, for the adaptive weight.
    """

    decoded: Tensor
    images: Tensor
    last_layer: nn.Parameter


class PictureLoss(nn.Module):
    """The loss of a decoder, and of its discriminator.

    Weights of the discriminator, the only ones that learn, are those of ``discriminator``, which Accelerate may have
    wrapped, see `prepare`.

    Args:
        config: the weights.

    Attributes:
        discriminator: a `PatchDiscriminator`, or None if ``adversarial`` is 0.

    Raises:
        ValueError: if the perceptual network cannot be loaded.
    """

    def __init__(self, config: PictureLossConfig):
        super().__init__()
        self.config = config
        self.perceptual = make_perceptual(config)
        self.discriminator: nn.Module | None = None
        if config.adversarial > 0:
            self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)

    def check_size(self, size: int) -> None:
        """An error if pictures of ``size`` × ``size`` pixels are too small, or do not suit the perceptual network."""
        if self.perceptual is not None:
            self.perceptual.check_size(size)
        if self.discriminator is not None:
            least = self.plain_discriminator.least_size
            check(
                size >= least,
                f"pictures of {size} pixels are too small for {self.config.full_name('discriminator_layers')} "
                f"{self.config.discriminator_layers}, which need {least}",
            )

    def prepare(self, accelerator: Accelerator) -> Learner | None:
        """Go to the accelerator's device; returns the discriminator, prepared with it, or None."""
        self.to(accelerator.device)
        if self.discriminator is None:
            return None
        rate = self.config.discriminator_lr
        optimizer = torch.optim.Adam(self.discriminator.parameters(), rate, betas=(0.5, 0.9))
        self.discriminator, optimizer = accelerator.prepare(self.discriminator, optimizer)
        return Learner(self.discriminator, optimizer, lr=rate)

    def backward(
        self, accelerator: Accelerator, pictures: Decoded, step: int, further: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Gradients of one pass: of the decoder's loss, and then of the discriminator's.

        Args:
            accelerator: of the run.
            pictures: what was decoded.
            step: counted from 0.
            further: another loss, weighted, to be added to the decoder's.

        Returns:
            "loss", their sum, its parts, and where it takes part "discriminator".
        """
        decoded, images = pictures.decoded, pictures.images
        with accelerator.autocast():
            loss, parts = self(decoded, images, pictures.last_layer, step)
        if further is not None:
            loss = loss + further
        accelerator.backward(loss)
        with accelerator.autocast():
            discriminator_loss = self.discriminator_loss(decoded, images, step)
        if discriminator_loss is not None:
            accelerator.backward(discriminator_loss)
            parts["discriminator"] = discriminator_loss.detach()
        return {"loss": loss.detach(), **parts}

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in step ``step``."""
        return self.discriminator is not None and step >= self.config.adversarial_start

    def forward(
        self, decoded: Tensor, images: Tensor, last_layer: nn.Parameter, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The decoder's loss.

        Args:
            decoded, images: (B, 3, H, W) in [−1, 1].
            last_layer: weight of the decoder's last layer, which ``decoded`` depends on, for the adaptive weight.
            step: counted from 0.

        Returns:
            the weighted sum, and its parts without weights and gradients: "l1", "l2", where they take part also
            "perceptual", "adversarial" and "adaptive_weight".
        """
        config, error = self.config, decoded.float() - images
        parts = {"l1": error.abs().mean(), "l2": error.square().mean()}
        loss = config.l1 * parts["l1"] + config.l2 * parts["l2"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(decoded, images)
            loss = loss + config.perceptual * parts["perceptual"]
        if self.is_adversarial(step):
            network = self.plain_discriminator
            # Its weights are constants here: they learn from their own loss only.
            constants = {name: parameter.detach() for name, parameter in network.named_parameters()}
            parts["adversarial"] = hinge_decoder_loss(torch.func.functional_call(network, constants, (decoded,)))
            weight = torch.ones((), device=decoded.device)
            if config.adaptive:
                weight = parts["adaptive_weight"] = adaptive_weight(loss, parts["adversarial"], last_layer)
            loss = loss + config.adversarial * weight * parts["adversarial"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def discriminator_loss(self, decoded: Tensor, images: Tensor, step: int) -> Tensor | None:
        """The discriminator's loss on pictures (B, 3, H, W), None if it takes no part in this step. No gradient reaches
        ``decoded``."""
        if self.discriminator is None or not self.is_adversarial(step):
            return None
        # One pass for both: distributed training wants one for each backward pass.
        logits = self.discriminator(torch.cat([images, decoded.detach().to(images.dtype)]))
        real, fake = logits.chunk(2)
        return hinge_discriminator_loss(real, fake)

    @property
    def plain_discriminator(self) -> PatchDiscriminator:
        """The discriminator as it is without what distributed training wraps around it."""
        plain: PatchDiscriminator = extract_model_from_parallel(self.discriminator)
        return plain
