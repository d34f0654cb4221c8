"""Settings of a student's training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tarflow.data.config import DataConfig
from tarflow.evaluation.backbones import Normalize
from tarflow.training.config import check
from tarflow.training.network_config import NetworkConfig


@dataclass(frozen=True, kw_only=True)
class StudentConfig(NetworkConfig):
    """Everything about training a student of a pipeline's flow.

    Attributes, besides those of `NetworkConfig`:
        pipeline: folder, shipped name or hub id.
        data: the pictures, of the model's size.
        output: folder of the run: resolved settings, logs, grids, checkpoints. None is ``runs/NAME_student``, with the
            name of the pipeline's folder, or of the folder above if it is called "pipeline".
        save_to: folder of the pipeline with its student. None puts the student into the pipeline's own folder.
        num_layers, width, head_dim: of the student, see `StudentModel`.
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
        own_share: share of pictures that are the student's own samples, with new noise, instead of the data's, after
            ``own_after`` of the steps (a fraction): the flow maps them to noise as it does any picture, so that the
            student learns where it will be used.
        own_after: see there.
        sample_posterior: noise on draws from the autoencoder's posterior, or else on its means: as the flow was trained
            (``vae.sample_posterior`` there).
        perceptual: weight of a perceptual loss of ``perceptual_pictures`` decoded pictures of each pass; 0 is off.
            ``perceptual_network``, ``perceptual_weights``, ``perceptual_normalize``, ``perceptual_layers``: see
            `PerceptualLoss`.
        grid_images: in the grid of each evaluation, the flow's samples above the student's.
    """

    pipeline: str
    data: DataConfig
    output: str | None = None
    save_to: str | None = None
    num_layers: int = 8
    width: int = 256
    head_dim: int = 64
    patch_size: int | None = None
    target: Literal["clean", "noisy"] = "clean"
    alignment: Literal["projected", "states", "none"] = "projected"
    alignment_weight: float = 1.0
    guidance_scale: float | None = None
    guidance: Literal["flow", "extrapolated"] = "flow"
    unguided_share: float = 0.25
    own_share: float = 0.0
    own_after: float = 0.5
    sample_posterior: bool = True
    perceptual: float = 0.0
    perceptual_network: str = "mobilenet_v2"
    perceptual_weights: str | None = None
    perceptual_normalize: Normalize = "imagenet"
    perceptual_layers: list[str] | None = None
    perceptual_pictures: int = 8
    steps: int = 10000
    batch_size: int = 64
    mixed_precision: Literal["no", "bf16"] = "bf16"
    eval_every: int = 1000
    eval_images: int = 128
    grid_images: int = 12
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "width", "head_dim", "grid_images", "perceptual_pictures"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        check(self.patch_size is None or self.patch_size >= 1, f"patch_size must be at least 1, got {self.patch_size}")
        for name in ("alignment_weight", "perceptual"):
            check(getattr(self, name) >= 0, f"{name} must be 0 or positive, got {getattr(self, name)}")
        for name in ("unguided_share", "own_share", "own_after"):
            check(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)}")
        check(
            self.guidance_scale is None or self.guidance_scale >= 1,
            f"guidance_scale must be at least 1 (off), got {self.guidance_scale}",
        )
        check(
            self.perceptual == 0 or self.perceptual_network == "lpips" or self.perceptual_weights is not None,
            "perceptual is on, so perceptual_weights must name the weights' file of its network",
        )
        check(self.data.source != "latents", "a student learns from pictures: data.source cannot be 'latents'")

    @property
    def folder(self) -> Path:
        """Of the run."""
        if self.output is not None:
            return Path(self.output).expanduser()
        path = Path(self.pipeline).expanduser()
        name = path.parent.name if path.name == "pipeline" and path.parent.name else path.name
        return Path("runs") / f"{name}_student"
