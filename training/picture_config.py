"""Sections of the settings of runs that train decoders of pictures: optimizer, loop, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tarflow.training.config import check


@dataclass(frozen=True, kw_only=True)
class PictureOptimConfig:
    """AdamW with linear warm-up and then a schedule; gradients clipped by their norm.

    Attributes:
        lr: the peak.
        schedule: after the warm-up "cosine", down to ``min_lr_ratio`` of the peak at the last step, or "constant".
        warmup_steps: of the warm-up.
        max_grad_norm: gradients of a larger norm are scaled down to it.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "max_grad_norm"):
            check(getattr(self, name) > 0, f"optim.{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            check(getattr(self, name) >= 0, f"optim.{name} must be 0 or positive, got {getattr(self, name)}")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1), got {self.betas}")
        check(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")


@dataclass(frozen=True, kw_only=True)
class PictureTrainConfig:
    """The loop.

    Attributes:
        steps: optimizer steps; ``max_minutes`` lowers them, from the measured speed, so that the training takes about as
            long (the schedule then ends there; resuming keeps the checkpoint's number).
        batch_size: pictures of one process in one step.
        mixed_precision: "no" or "bf16".
        ema_decay: of the averaged weights that are evaluated and saved.
        max_bad_steps: so many losses in a row that are not finite are skipped before training stops.
        seed: of weights, noise and the pictures' order.
    """

    steps: int = 5000
    max_minutes: float | None = None
    batch_size: int = 32
    mixed_precision: Literal["no", "bf16"] = "bf16"
    ema_decay: float = 0.999
    max_bad_steps: int = 5
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_bad_steps"):
            check(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.max_minutes is not None:
            check(self.max_minutes > 0, f"train.max_minutes must be positive, got {self.max_minutes}")
        check(self.num_workers >= 0, f"train.num_workers must be 0 or positive, got {self.num_workers}")
        check(0 <= self.ema_decay < 1, f"train.ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class PictureLogConfig:
    """What is written while training; 0 turns an interval off.

    Attributes:
        trackers: names of Accelerate trackers.
        log_every: steps between logged losses.
        eval_every: steps between evaluations on ``eval_images`` held-out pictures, with a grid of ``grid_images``.
        checkpoint_every: steps between checkpoints, of which the last ``keep_checkpoints`` stay.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 10
    eval_every: int = 500
    eval_images: int = 256
    grid_images: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        for name in ("log_every", "eval_images", "grid_images", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"log.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every"):
            check(getattr(self, name) >= 0, f"log.{name} must be 0 (off) or positive, got {getattr(self, name)}")
