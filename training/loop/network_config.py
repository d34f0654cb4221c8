"""Settings that all networks other than the flow are trained with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tarflow.common.checks import check


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """How `NetworkTrainer` trains; what is trained, and on what, subclasses say.

    Attributes:
        steps: optimizer steps; ``max_minutes`` lowers them, from the measured speed, so that the training takes about
            as long.
        batch_size: pictures of one process in one forward pass; gradients of ``accumulation`` passes are added.
        lr: the peak, after ``warmup_steps``; a cosine takes it down to 0.
        max_grad_norm: gradients of a larger norm, a discriminator's too, are scaled down to it.
        ema_decay: of the averaged weights, which are evaluated and saved.
        eval_every: steps between evaluations on ``eval_images`` held-out pictures (of each source); 0 leaves the one at
            the end.
        checkpoint_every: steps between checkpoints, of which the last ``keep_checkpoints`` stay; 0 is off.
        log_every: steps between logged losses, by ``trackers`` of Accelerate.
        dtype: of the saved weights.
        seed: of weights, noise and the pictures' order.
        resume: "latest", a checkpoint folder, "auto" (the latest if there is one), or None to start anew.
    """

    steps: int = 5000
    max_minutes: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    num_workers: int = 0
    eval_every: int = 500
    eval_images: int = 256
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: int = 0
    resume: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_images", "keep_checkpoints", "log_every"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm"):
            check(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "num_workers", "eval_every", "checkpoint_every"):
            check(getattr(self, name) >= 0, f"{name} must be 0 or positive, got {getattr(self, name)}")
        check(self.max_minutes is None or self.max_minutes > 0, f"max_minutes must be positive, got {self.max_minutes}")
        check(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")
