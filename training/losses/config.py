"""Settings of the loss of decoded pictures, checked when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tarflow.common.checks import AtLeastOne, Count, NotNegative, Positive, check, check_ranges, multiple_of

#: The package of Zhang et al., whose layers are weighted by what people found similar; it fetches its own weights.
LPIPS = "lpips"


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """A perceptual loss, see `PerceptualLoss`.

    Attributes:
        perceptual: weight of a perceptual loss; 0 leaves it out.
        perceptual_network: a classifier of Torchvision, or "lpips" where that package is installed.
        perceptual_weights: file of the classifier's state dict, ``.safetensors`` or ``.pth``; None for "lpips".
        perceptual_normalize: of pixels, as the classifier's weights want it: "imagenet", or "half" for [−1, 1].
        perceptual_layers: names of the classifier's modules that are compared; None takes one of each resolution.
        section: where the user sets them, "loss" for "loss.perceptual".
    """

    section: ClassVar[str] = ""
    perceptual: NotNegative = 0.0
    perceptual_network: str = "mobilenet_v2"
    perceptual_weights: str | None = None
    perceptual_normalize: Literal["imagenet", "half"] = "imagenet"
    perceptual_layers: list[str] | None = None

    def full_name(self, name: str) -> str:
        """What the user calls a setting."""
        return f"{self.section}.{name}" if self.section else name

    def check_perceptual(self) -> None:
        """Errors of settings that do not fit each other."""
        begin = self.full_name("")
        check(self.perceptual_layers != [], f"{begin}perceptual_layers is empty: name at least one, or null")
        if self.perceptual > 0 and self.perceptual_network == LPIPS:
            for name in ("perceptual_weights", "perceptual_layers"):
                check(getattr(self, name) is None, f"{begin}{name} is for classifiers of Torchvision, not for lpips")
        elif self.perceptual > 0:
            check(
                self.perceptual_weights is not None,
                f"{begin}perceptual needs weights of {self.perceptual_network}: set {begin}perceptual_weights to their "
                "file",
            )


@dataclass(frozen=True, kw_only=True)
class PictureLossConfig(PerceptualConfig):
    """Weights of a loss's parts; 0 leaves a part out.

    Attributes:
        l1: weight of the mean absolute difference of pixels in [−1, 1].
        l2: weight of the mean squared difference of pixels in [−1, 1].
        adversarial: weight of the discriminator's opinion.
        adversarial_start: the step from which it counts, and from which the discriminator learns.
        adaptive: multiply ``adversarial`` by `adaptive_weight`.
        discriminator_width: channels of the discriminator's first layer.
        discriminator_layers: how many of the discriminator's layers halve the resolution.
        discriminator_lr: the discriminator's learning rate.
    """

    section: ClassVar[str] = "loss"
    l1: NotNegative = 1.0
    l2: NotNegative = 1.0
    adversarial: NotNegative = 0.0
    adversarial_start: Count = 0
    adaptive: bool = True
    discriminator_width: Annotated[int, multiple_of(8)] = 64
    discriminator_layers: AtLeastOne = 3
    discriminator_lr: Positive = 1e-4

    def __post_init__(self) -> None:
        check_ranges(self, self.section)
        l1, l2, perceptual = (self.full_name(name) for name in ("l1", "l2", "perceptual"))
        check(
            self.l1 + self.l2 + self.perceptual > 0,
            f"{l1}, {l2} and {perceptual} are all 0: nothing makes pictures like their originals",
        )
        self.check_perceptual()

    @property
    def discriminator_shape(self) -> list[int] | None:
        """What its weights depend on; None without a discriminator."""
        return [self.discriminator_width, self.discriminator_layers] if self.adversarial > 0 else None


@dataclass(frozen=True, kw_only=True)
class JointLossConfig(PictureLossConfig):
    """The same of an autoencoder that is trained along with a flow."""

    section: ClassVar[str] = "joint.loss"
