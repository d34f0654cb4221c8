"""Settings that every training has, and what the loop takes of them."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tarflow.common.checks import (
    AtLeastOne,
    BelowOne,
    Count,
    Interval,
    NotNegative,
    Positive,
    below_one,
    check_ranges,
    fraction,
)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How long a training is, and what its steps are made of.

    Attributes:
        steps: optimizer steps.
        max_minutes: about how long training may take: there are fewer steps then, by the measured speed, and the
            schedule ends there; resuming keeps the checkpoint's number. None sets no limit.
        batch_size: pictures of one process in one forward pass.
        accumulation: passes whose gradients are added for one step.
        mixed_precision: "no", "bf16" or "fp16".
        ema_decay: of the averaged weights, which are evaluated and saved.
        num_workers: processes that read pictures, for each process that trains.
        seed: of weights, noise and the pictures' order.
    """

    steps: AtLeastOne = 10000
    max_minutes: Positive | None = None
    batch_size: AtLeastOne = 64
    accumulation: AtLeastOne = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    ema_decay: BelowOne = 0.9999
    num_workers: Count = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RateSettings:
    """How far a step goes.

    Attributes:
        lr: the peak of the learning rate.
        warmup_steps: steps in which it rises to the peak.
        weight_decay: of AdamW.
        max_grad_norm: gradients of a larger norm, a discriminator's too, are scaled down to it.
        muon_lr: learning rate of Muon's matrices; None takes ``lr``. Parts with a rate of their own, a learned denoiser
            or an autoencoder that is trained along, have it times ``muon_lr / lr`` there.
        muon_weight_decay: of Muon's matrices; None takes ``weight_decay``.
        muon_momentum: of Muon.
    """

    lr: Positive = 1e-3
    warmup_steps: Count = 100
    weight_decay: NotNegative = 1e-4
    max_grad_norm: Positive = 1.0
    muon_lr: Positive | None = None
    muon_weight_decay: NotNegative | None = None
    muon_momentum: BelowOne = 0.95


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is written while training; 0 turns an interval off.

    Attributes:
        trackers: names of Accelerate trackers.
        log_every: steps between logged losses.
        eval_every: steps between evaluations on held-out pictures; 0 leaves the one at the end.
        eval_images: held-out pictures of an evaluation.
        checkpoint_every: steps between checkpoints; 0 is off.
        keep_checkpoints: so many of the last checkpoints stay.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: AtLeastOne = 10
    eval_every: Interval = 1000
    eval_images: AtLeastOne = 512
    checkpoint_every: Interval = 1000
    keep_checkpoints: AtLeastOne = 3


@dataclass(frozen=True, kw_only=True)
class OptimConfig(RateSettings):
    """AdamW or Muon, with linear warm-up and then a schedule; gradients clipped by their norm.

    Attributes:
        name: "adamw", or "muon" for the matrices of hidden layers with AdamW for all else, see `make_optimizer`.
        denoiser_lr: the peak for a learned denoiser, an optimizer group of its own, clipped by itself.
        lr_scaling: what ``lr`` and ``denoiser_lr`` are multiplied by: "none", 1; "linear", the pictures of one step
            over ``reference_batch``; "sqrt", its square root.
        reference_batch: pictures of one step for which the rates are meant, see ``lr_scaling``.
        betas: of AdamW.
        schedule: after the warm-up "cosine", down to ``min_lr_ratio`` of the peak at the last step, or "constant".
        warmup_images: the warm-up in pictures, instead of ``warmup_steps``; None takes those.
        min_lr_ratio: share of the peak that is left at the end of the schedule "cosine".
        skip_grad_norm: steps with a larger norm are left out, counted and logged; None leaves none out.
    """

    name: Literal["adamw", "muon"] = "adamw"
    denoiser_lr: Positive = 1e-4
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: AtLeastOne = 256
    betas: Annotated[tuple[float, float], below_one] = (0.9, 0.95)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_images: Count | None = None
    min_lr_ratio: Annotated[float, fraction] = 0.01
    skip_grad_norm: Positive | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "optim")
        check_muon(self, self.name, "optim.")


def check_muon(settings: RateSettings, name: str, begin: str = "") -> None:
    """An error of settings of Muon that are given without it.

    Args:
        settings: of a step.
        name: of the optimizer.
        begin: what the settings' names begin with.
    """
    if name != "muon" and (given := muon_settings(settings)):
        first = f"{begin}{given[0].name} is {getattr(settings, given[0].name)}"
        remedy = ", ".join(without_muon(settings, begin))
        raise ValueError(f"{first}, but the optimizer is {name!r}, which has no such setting: set {remedy}")


def muon_settings(settings: RateSettings) -> list[Field[Any]]:
    """Those of Muon that are not left as they are by default."""
    own = [field for field in fields(RateSettings) if field.name.startswith("muon_")]
    return [field for field in own if getattr(settings, field.name) != field.default]


def without_muon(settings: RateSettings, begin: str = "") -> list[str]:
    """What to set so that settings of Muon are as if it had not been named."""
    return [
        f"{begin}{field.name} {'null' if field.default is None else field.default}" for field in muon_settings(settings)
    ]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop goes by, whatever the user's settings are called.

    Attributes:
        folder: of the run: settings, logs, checkpoints.
        resume: "latest", a checkpoint folder, "auto" (the latest if there is one), or None to start anew.
        train, optim, log: the settings.
        images: the length in pictures, instead of ``train.steps``.
        ema_decays: of all averages; the first is evaluated while training.
        max_bad_steps: so many losses or gradients in a row that are not finite are skipped before training stops.
        sections: whether the user's settings stand in sections, "train.steps", or not, "steps".
    """

    folder: Path
    resume: str | None
    train: StepSettings
    optim: OptimConfig
    log: LogSettings
    images: int | None = None
    ema_decays: tuple[float, ...]
    max_bad_steps: int = 5
    sections: bool = True

    def name(self, section: str, key: str) -> str:
        """A setting as the user calls it."""
        return f"{section}.{key}" if self.sections else key

    def images_per_step(self, processes: int) -> int:
        """Pictures of all processes and passes in one optimizer step."""
        return self.train.batch_size * self.train.accumulation * processes

    def total_steps(self, processes: int) -> int:
        """Optimizer steps of a run, from ``images`` if it is given, else ``train.steps``."""
        if self.images is None:
            return self.train.steps
        return -(-self.images // self.images_per_step(processes))
