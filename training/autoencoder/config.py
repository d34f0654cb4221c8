"""Settings of an autoencoder's training, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tarflow.common.checks import AtLeastOne, Interval, NotNegative, Positive, check, check_ranges
from tarflow.data.config import DataConfig
from tarflow.training.loop.network_config import NetworkConfig
from tarflow.training.losses.config import PictureLossConfig


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of pictures.

    Attributes:
        data: the pictures, which may be a stream.
        share: how often it is drawn from, relative to the other sources.
    """

    data: DataConfig
    share: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainVaeConfig(NetworkConfig):
    """Settings of a training run. Each evaluation saves the autoencoder too.

    Attributes:
        eval_images: held-out pictures of each source in an evaluation.
        output: folder for the autoencoder; grids, metrics, logs and checkpoints go to ``output`` + "_run".
        sources: where pictures come from, by name; all of one size.
        model: arguments of Diffusers' ``AutoencoderKL``. With ``init_from`` they may be left out, and must be that
            autoencoder's if given, ``sample_size`` apart.
        init_from: a shipped autoencoder, folder or hub id whose weights training starts from.
        posterior: "gaussian", whose σ the encoder learns, or "constant".
        posterior_std: σ of the posterior "constant", in raw latents' units.
        loss: what makes reconstructions like their originals.
        kl_weight: weight of the KL divergence (nats per latent number, mean).
        eval_noise_std: of the noise on the latents in which reconstructions are measured once more, over the latents'
            standard deviation per channel: the flow's training noise.
        card: text of the saved folder's README.md.
    """

    output: str
    sources: dict[str, SourceConfig]
    model: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    posterior: Literal["gaussian", "constant"] = "gaussian"
    posterior_std: Positive = 0.5
    loss: PictureLossConfig = field(default_factory=PictureLossConfig)
    kl_weight: NotNegative = 1e-3
    steps: AtLeastOne = 2400
    eval_every: Interval = 400
    eval_noise_std: NotNegative = 0.3
    checkpoint_every: Interval = 1000
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    card: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
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
            check_ranges(source, f"sources.{name}")
            check("/" not in name, f"names of sources become names of files: {name!r} has a slash")
        sizes = {name: source.data.image_size for name, source in self.sources.items()}
        check(len(set(sizes.values())) == 1, f"all sources must have one data.image_size, got {sizes}")

    @property
    def autoencoder_folder(self) -> Path:
        """``output``."""
        return Path(self.output).expanduser()

    @property
    def folder(self) -> Path:
        """Of the run, beside the autoencoder's."""
        return self.autoencoder_folder.with_name(self.autoencoder_folder.name + "_run")

    @property
    def constant_std(self) -> float | None:
        """σ of a constant posterior, None if the encoder learns it."""
        return self.posterior_std if self.posterior == "constant" else None

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return next(iter(self.sources.values())).data.image_size
