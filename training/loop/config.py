"""Settings of the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tarflow.common.checks import check


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and then a schedule; gradients clipped by their norm.

    Attributes:
        lr: the peak; ``denoiser_lr`` is that of a learned denoiser, an optimizer group of its own, clipped by itself.
        lr_scaling: what both are multiplied by: "none", 1; "linear", the pictures of one step over
            ``reference_batch``; "sqrt", its square root.
        schedule: after the warm-up "cosine", down to ``min_lr_ratio`` of the peak at the last step, or "constant".
        warmup_steps: of the warm-up; ``warmup_images`` gives it in pictures instead.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        skip_grad_norm: steps with a larger norm are left out, counted and logged; None leaves none out.
    """

    lr: float = 1e-3
    denoiser_lr: float = 1e-4
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: int = 256
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    warmup_images: int | None = None
    min_lr_ratio: float = 0.01
    max_grad_norm: float = 1.0
    skip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "denoiser_lr", "max_grad_norm"):
            check(getattr(self, name) > 0, f"optim.{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            check(getattr(self, name) >= 0, f"optim.{name} must be 0 or positive, got {getattr(self, name)}")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1), got {self.betas}")
        check(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        check(self.reference_batch >= 1, f"optim.reference_batch must be at least 1, got {self.reference_batch}")
        if self.warmup_images is not None:
            check(self.warmup_images >= 0, f"optim.warmup_images must be 0 or positive, got {self.warmup_images}")
        if self.skip_grad_norm is not None:
            check(self.skip_grad_norm > 0, f"optim.skip_grad_norm must be positive, got {self.skip_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: optimizer steps; ``images`` gives them in pictures instead. ``max_minutes`` lowers them, from the
            measured speed, so that the training takes about as long (the schedule then ends there; resuming keeps the
            checkpoint's number).
        batch_size: pictures of one process in one forward pass; gradients of ``accumulation`` passes are added.
        noise: "gaussian", added with standard deviation ``noise_std`` (σ), or "uniform", which makes real numbers of
            8-bit pixels for likelihoods in bits per dimension, and leaves σ unused.
        drop_rate: share of conditions replaced by "none", which guidance needs.
        latent_norm_weight: weight of a penalty, the sum of the mean squares of all blocks' outputs but the last's;
            0 is off.
        mixed_precision: "no", "bf16" or "fp16".
        compile: compile the Transformer layers (`torch.compile`); the first steps take minutes, the others less time.
        checkpointing: activations that are computed again in the backward pass to save memory: "none", of each
            "block", of each "layer" (with ``checkpointing_every`` only of every so many layers), or "both"; or
            "reversible", for coupling blocks, all of them, from the last output.
        ema_decay: of the averaged weights that are evaluated and saved; averages with ``more_ema_decays`` are kept,
            evaluated at the end and saved beside them.
        max_bad_steps: so many losses in a row that are not finite are skipped before training stops.
        seed: of weights, noise and drops.
    """

    steps: int = 10000
    images: int | None = None
    max_minutes: float | None = None
    batch_size: int = 64
    accumulation: int = 1
    noise: Literal["gaussian", "uniform"] = "gaussian"
    noise_std: float = 0.3
    drop_rate: float = 0.1
    latent_norm_weight: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    checkpointing: Literal["none", "block", "layer", "both", "reversible"] = "none"
    checkpointing_every: int = 1
    ema_decay: float = 0.9999
    more_ema_decays: list[float] = field(default_factory=list)
    max_bad_steps: int = 5
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpointing_every", "max_bad_steps"):
            check(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        check(self.images is None or self.images >= 1, f"train.images must be at least 1, got {self.images}")
        if self.max_minutes is not None:
            check(self.max_minutes > 0, f"train.max_minutes must be positive, got {self.max_minutes}")
        for name in ("noise_std", "latent_norm_weight", "num_workers"):
            check(getattr(self, name) >= 0, f"train.{name} must be 0 or positive, got {getattr(self, name)}")
        check(0 <= self.drop_rate <= 1, f"train.drop_rate must be in [0, 1], got {self.drop_rate}")
        check(
            self.checkpointing_every == 1 or self.checkpointing in ("layer", "both"),
            f"train.checkpointing_every is for checkpointing 'layer' and 'both', not {self.checkpointing!r}",
        )
        for decay in self.ema_decays:
            check(0 <= decay < 1, f"train.ema_decay and more_ema_decays must be in [0, 1), got {decay}")
        check(len(set(self.ema_decays)) == len(self.ema_decays), f"EMA decays must differ, got {self.ema_decays}")

    @property
    def ema_decays(self) -> list[float]:
        return [self.ema_decay, *self.more_ema_decays]


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training; 0 turns an interval off.

    Attributes:
        trackers: names of Accelerate trackers.
        log_every: steps between logged losses.
        eval_every: steps between evaluations of held-out nats per dimension, on ``eval_images`` pictures.
        sample_every: steps between grids of ``sample_images`` pictures from fixed noise, raw and denoised.
        checkpoint_every: steps between checkpoints, of which the last ``keep_checkpoints`` stay.
        save_pipeline_every: steps between pipeline folders; the last step always saves one.
        prompts: captions of the grid; None takes held-out ones.
        guidance_scale, guidance_method: of the grid, and the saved pipeline's defaults; a scale of 1 is off.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 10
    eval_every: int = 1000
    eval_images: int = 512
    sample_every: int = 1000
    sample_images: int = 36
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    save_pipeline_every: int = 0
    prompts: list[str] | None = None
    guidance_scale: float = 1.0
    guidance_method: Literal["gaussian", "linear"] = "gaussian"

    def __post_init__(self) -> None:
        for name in ("log_every", "eval_images", "sample_images", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"log.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "sample_every", "checkpoint_every", "save_pipeline_every"):
            check(getattr(self, name) >= 0, f"log.{name} must be 0 (off) or positive, got {getattr(self, name)}")
        check(self.guidance_scale >= 1, f"log.guidance_scale must be at least 1, got {self.guidance_scale}")
