"""Settings that all networks other than the flow are trained with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tarflow.common.checks import AtLeastOne, BelowOne, Interval, check_ranges
from tarflow.training.loop.config import LogSettings, LoopSettings, OptimConfig, RateSettings, StepSettings, check_muon


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(StepSettings, RateSettings, LogSettings):
    """How a network is trained; what is trained, and on what, subclasses say.

    Attributes:
        lr: the peak of the learning rate, from which a cosine takes it down to 0.
        optimizer: "adamw", or "muon" for the matrices of hidden layers with AdamW for all else.
        dtype: of the saved weights.
        resume: "latest", a checkpoint folder, "auto" (the latest if there is one), or None to start anew.
    """

    steps: AtLeastOne = 5000
    batch_size: AtLeastOne = 32
    ema_decay: BelowOne = 0.999
    log_every: AtLeastOne = 20
    eval_every: Interval = 500
    eval_images: AtLeastOne = 256
    checkpoint_every: Interval = 500
    keep_checkpoints: AtLeastOne = 2
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    resume: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        check_muon(self, self.optimizer)

    @property
    def folder(self) -> Path:
        """Of the run; subclasses say which."""
        raise NotImplementedError(f"{type(self).__name__} lacks `folder`")

    @property
    def optim(self) -> OptimConfig:
        """The optimizer's settings: the rates, and a cosine down to 0."""
        rates = {field.name: getattr(self, field.name) for field in fields(RateSettings)}
        return OptimConfig(name=self.optimizer, **rates, min_lr_ratio=0.0)

    def loop(self, folder: Path) -> LoopSettings:
        """What the loop goes by, of a run in ``folder``."""
        return LoopSettings(
            folder=folder,
            resume=self.resume,
            train=self,
            optim=self.optim,
            log=self,
            ema_decays=(self.ema_decay,),
            sections=False,
        )
