"""Settings of a student's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tarflow.common.checks import AtLeastOne, Fraction, Interval, NotNegative, at_least
from tarflow.training.loop.component_config import ComponentConfig
from tarflow.training.losses.config import PerceptualConfig


@dataclass(frozen=True, kw_only=True)
class StudentConfig(ComponentConfig, PerceptualConfig):
    """Everything about training a student of a pipeline's flow.

    Attributes:
        num_layers: Transformer layers of the student.
        width: numbers of a token in the student.
        head_dim: numbers of one of its attention heads, which must divide ``width``.
        patch_size: of the student's tokens; None is the flow's. A student is not bound to it: larger patches are fewer
            tokens.
        target: what it makes, "clean" latents, or "noisy" ones as the flow's inverse does, which want a score step.
        alignment: what leads its layers along the flow's way back: "projected", its layers before the last are read by
            learned projections, which are to give the flow's states; "states", those readings are all that the next
            layer gets; "none".
        alignment_weight: of their mean squared error, beside the one of the latents.
        guidance_scale: the largest that the student is to know; None is the pipeline's own, 1 is none.
        guidance: how the student learns it: "flow", from pairs that the guided flow maps to each other; "extrapolated",
            from latents moved away from what the student makes of the same noise without a condition.
        unguided_share: share of pictures with scale 1; the others' scales are uniform from 1 to the largest.
        own_share: share of pictures that are the student's own samples, with new noise, instead of the data's: the flow
            maps them to noise as it does any picture, so that the student learns where it will be used.
        own_after: share of the steps after which ``own_share`` counts.
        reuse: how many passes each pair of the flow is part of on average. A pass has ``batch_size`` new pairs and
            (``reuse`` − 1) · ``batch_size`` of earlier passes, which cost the student's own computation alone; 1 is new
            ones only.
        reuse_from: the number of last pairs that are kept for it, in the device's memory and in checkpoints: 4,096 are 63 MB
            of the shipped `drawings_text`, 252 MB of `emoji`.
        perceptual_pictures: so many decoded pictures of each pass count for the perceptual loss.
    """

    kind: ClassVar[str] = "student"

    num_layers: AtLeastOne = 8
    width: AtLeastOne = 256
    head_dim: AtLeastOne = 64
    patch_size: AtLeastOne | None = None
    target: Literal["clean", "noisy"] = "clean"
    alignment: Literal["projected", "states", "none"] = "projected"
    alignment_weight: NotNegative = 1.0
    guidance_scale: Annotated[float, at_least(1, "(off)")] | None = None
    guidance: Literal["flow", "extrapolated"] = "flow"
    unguided_share: Fraction = 0.25
    own_share: Fraction = 0.0
    own_after: Fraction = 0.5
    reuse: AtLeastOne = 1
    reuse_from: AtLeastOne = 4096
    perceptual_pictures: AtLeastOne = 8
    steps: AtLeastOne = 10000
    batch_size: AtLeastOne = 64
    eval_every: Interval = 1000
    eval_images: AtLeastOne = 128
    grid_images: AtLeastOne = 12
    checkpoint_every: Interval = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_perceptual()
