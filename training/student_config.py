"""Settings of a student's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tarflow.data.config import DataConfig
from tarflow.evaluation.backbones import Normalize
from tarflow.training.config import check


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Everything about training a student of a pipeline's flow.

    Attributes:
        pipeline: folder, shipped name or hub id.
        data: the pictures, of the model's size.
        output: folder of the run: resolved settings, logs, grids, checkpoints. None is ``runs/NAME_student``, with the
            name of the pipeline's folder, or of the folder above if it is called "pipeline".
        save_to: folder of the pipeline with its student. None puts the student into the pipeline's own folder.
        dtype: of the saved student.
        num_layers, width, head_dim: of the student, see `StudentModel`.
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
        steps: optimizer steps; ``max_minutes`` lowers them, from the measured speed, so that the training takes about
            as long.
        batch_size: pictures of one process in one forward pass; gradients of ``accumulation`` passes are added.
        lr: the peak, after ``warmup_steps``; a cosine takes it down to 0.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        ema_decay: of the averaged weights, which are evaluated and saved.
        eval_every: steps between evaluations on ``eval_images`` held-out pictures, with a grid of ``grid_images``; 0
            leaves the one at the end.
        checkpoint_every: steps between checkpoints, of which the last ``keep_checkpoints`` stay; 0 is off.
        log_every: steps between logged losses, by ``trackers`` of Accelerate.
        seed: of weights, noise, guidance scales and the pictures' order.
        resume: "latest", a checkpoint folder, "auto" (the latest if there is one), or None to start anew.
    """

    pipeline: str
    data: DataConfig
    output: str | None = None
    save_to: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    num_layers: int = 8
    width: int = 256
    head_dim: int = 64
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
    max_minutes: float | None = None
    batch_size: int = 64
    accumulation: int = 1
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16"] = "bf16"
    num_workers: int = 0
    eval_every: int = 1000
    eval_images: int = 128
    grid_images: int = 12
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 20
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    seed: int = 0
    resume: str | None = None

    def __post_init__(self) -> None:
        names = "num_layers width head_dim steps batch_size accumulation eval_images grid_images keep_checkpoints"
        for name in [*names.split(), "log_every", "perceptual_pictures"]:
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm"):
            check(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        names = "alignment_weight perceptual warmup_steps weight_decay num_workers eval_every checkpoint_every"
        for name in names.split():
            check(getattr(self, name) >= 0, f"{name} must be 0 or positive, got {getattr(self, name)}")
        for name in ("unguided_share", "own_share", "own_after"):
            check(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)}")
        check(self.max_minutes is None or self.max_minutes > 0, f"max_minutes must be positive, got {self.max_minutes}")
        check(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")
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
