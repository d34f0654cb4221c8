"""Settings of an autoencoder's training, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tarflow.data.config import DataConfig
from tarflow.training.config import check
from tarflow.training.picture_loss import PictureLossConfig


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of pictures. ``share``: how often it is drawn from, relative to the other sources."""

    data: DataConfig
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainVaeConfig:
    """Settings of a training run.

    Attributes:
        output: folder for the autoencoder; grids, metrics, logs and checkpoints go to ``output`` + "_run".
        sources: where pictures come from, by name; all of one size.
        model: arguments of Diffusers' ``AutoencoderKL``. With ``init_from`` they may be left out, and must be that
            autoencoder's if given, ``sample_size`` apart.
        init_from: a shipped autoencoder, folder or hub id whose weights training starts from.
        resume: "latest", a checkpoint folder, "auto" (the latest if there is one), or None to start anew.
        posterior: "gaussian", whose σ the encoder learns, or "constant", with ``posterior_std`` as its σ, in raw
            latents' units.
        loss: what makes reconstructions like their originals.
        kl_weight: weight of the KL divergence (nats per latent number, mean).
        steps: optimizer steps; ``max_minutes`` lowers them, from the measured speed, so that the training takes about
            as long.
        batch_size: pictures of one process in one forward pass; gradients of ``accumulation`` passes are added.
        lr: the peak, after ``warmup_steps``; a cosine takes it down to 0.
        max_grad_norm: gradients of a larger norm, the discriminator's too, are scaled down to it.
        ema_decay: of the averaged weights, which are evaluated and saved.
        eval_every: steps between evaluations, each of which saves the autoencoder too; 0 leaves the one at the end.
        eval_images: held-out pictures of each source.
        eval_noise_std: of the noise on the latents in which reconstructions are measured once more, over the latents'
            standard deviation per channel: the flow's training noise.
        checkpoint_every: steps between checkpoints, of which the last ``keep_checkpoints`` stay; 0 is off.
        log_every: steps between logged losses, by ``trackers`` of Accelerate.
        dtype: of the saved weights.
        card: text of the saved folder's README.md.
        seed: of weights, pictures and noise.
    """

    output: str
    sources: dict[str, SourceConfig]
    model: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    resume: str | None = None
    posterior: Literal["gaussian", "constant"] = "gaussian"
    posterior_std: float = 0.5
    loss: PictureLossConfig = field(default_factory=PictureLossConfig)
    kl_weight: float = 1e-3
    steps: int = 2400
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
    eval_every: int = 400
    eval_images: int = 256
    eval_noise_std: float = 0.3
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 20
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    card: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_images", "keep_checkpoints", "log_every"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm", "posterior_std"):
            check(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        names = "kl_weight warmup_steps weight_decay num_workers eval_every eval_noise_std checkpoint_every"
        for name in names.split():
            check(getattr(self, name) >= 0, f"{name} must be 0 or positive, got {getattr(self, name)}")
        check(self.max_minutes is None or self.max_minutes > 0, f"max_minutes must be positive, got {self.max_minutes}")
        check(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")
        check(bool(self.model) or self.init_from is not None, "model is empty: give its arguments, or init_from")
        check(
            self.mixed_precision != "fp16" or self.loss.adversarial == 0,
            "loss.adversarial cannot be trained with mixed_precision fp16, whose gradients of single layers vanish: "
            "take bf16 or no",
        )
        self._check_sources()

    def _check_sources(self) -> None:
        check(bool(self.sources), "sources is empty; name at least one")
        for name, source in self.sources.items():
            check(source.share > 0, f"sources.{name}.share must be positive, got {source.share}")
            check("/" not in name, f"names of sources become names of files: {name!r} has a slash")
        sizes = {name: source.data.image_size for name, source in self.sources.items()}
        check(len(set(sizes.values())) == 1, f"all sources must have one data.image_size, got {sizes}")

    @property
    def constant_std(self) -> float | None:
        """σ of a constant posterior, None if the encoder learns it."""
        return self.posterior_std if self.posterior == "constant" else None

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return next(iter(self.sources.values())).data.image_size
