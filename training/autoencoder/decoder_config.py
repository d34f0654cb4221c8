"""Settings of a decoder's finetuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tarflow.common.checks import NotNegative, Positive
from tarflow.training.loop.component_config import ComponentConfig
from tarflow.training.losses.config import PictureLossConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ComponentConfig):
    """Everything about finetuning a decoder.

    Attributes:
        set_default: the pipeline's calls take the new decoder unless they say otherwise; False leaves their default.
        noise_std: σ of the noise on the latents; None is the pipeline's training noise, which its samples have.
        start: decoder of the pipeline whose weights training begins from, in the words of its call: "vae", the
            autoencoder's own, or "finetuned", which goes on from an earlier finetuning with other settings.
        loss: what makes decoded pictures like their originals.
    """

    kind: ClassVar[str] = "decoder"

    set_default: bool = True
    noise_std: NotNegative | None = None
    start: Literal["vae", "finetuned"] = "vae"
    loss: PictureLossConfig = field(default_factory=PictureLossConfig)
    lr: Positive = 3e-4

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.data.image_size
