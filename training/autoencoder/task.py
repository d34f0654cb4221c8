"""Training autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from tarflow.data.drawings import ENDLESS
from tarflow.data.images import to_model
from tarflow.data.stream.stream import Stream
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.autoencoder.mixture import Mixture, open_sources
from tarflow.training.autoencoder.model import (
    Reconstruction,
    check_unused,
    copy_for_use,
    kl_divergence,
    make_autoencoder,
    plain,
    save_autoencoder,
)
from tarflow.training.autoencoder.report import HeldOutPictures
from tarflow.training.loop.draws import draw_noise
from tarflow.training.loop.network_trainer import network_trainer
from tarflow.training.loop.summary import number_of_pictures
from tarflow.training.loop.task import Batch, State
from tarflow.training.loop.trainer import Trainer
from tarflow.training.losses.task import PictureTask


class AutoencoderTask(PictureTask):
    """What is trained: an autoencoder in its training form.

    Args:
        config: of the run.
        accelerator: of the run.
    """

    config: TrainVaeConfig
    train: Mixture | Stream
    network: Reconstruction

    def __init__(self, config: TrainVaeConfig, accelerator: Accelerator):
        super().__init__(config, accelerator, config.folder, config.loss, config.image_size)

    def make_parts(self, state: State | None) -> None:
        config = self.config
        if state is None:
            check_unused(config.autoencoder_folder)
        self.train = open_sources(config)
        self.held_out = HeldOutPictures(config)
        vae = make_autoencoder(config)
        self.network = Reconstruction(vae, config.constant_std)
        side = config.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (vae.config.latent_channels, side, side)

    def about(self) -> str:
        if isinstance(self.train, Stream):
            return " and ".join(
                f"{name} (a stream)" if data.data.is_stream else name for name, data in self.config.sources.items()
            )
        named = zip(self.config.sources, self.train.sources, strict=True)
        counts = {name: number_of_pictures(images) for name, images in named}
        return " and ".join(
            f"{name} ({count:,} pictures)" if count < ENDLESS else name for name, count in counts.items()
        )

    def ending(self) -> str:
        return (
            f"the autoencoder is {self.config.output}; to train a flow on its latents: --vae.name {self.config.output}"
        )

    @property
    def last_layer(self) -> nn.Parameter:
        return self.network.last_layer

    def network_invariants(self) -> dict[str, Any]:
        settings = self.network.vae.config
        model = {f"model.{key}": plain(value) for key, value in settings.items() if not key.startswith("_")}
        return {**model, **self.posterior_invariants()}

    def posterior_invariants(self) -> dict[str, Any]:
        return {"posterior": self.config.posterior, "posterior_std": self.config.constant_std}

    def check_resume(self, checkpoint: Path, state: State) -> None:
        # Checkpoints from before the posterior was kept pass.
        facts = {**self.posterior_invariants(), **state.get("facts", {})}
        super().check_resume(checkpoint, {**state, "facts": facts})

    def decode(
        self, model: nn.Module, batch: Batch, step: int, sample_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
        """Draws of the posterior, decoded; the further loss is the KL divergence."""
        images = to_model(batch["image"].to(self.accelerator.device))
        noise = draw_noise(self.config.seed, step, sample_ids, self.latent_shape, self.accelerator.device, "posterior")
        mean, log_variance, decoded = model(images, noise)
        return decoded, images, {"kl": (self.config.kl_weight, kl_divergence(mean, log_variance))}

    def measure(self, step: int, last: bool) -> dict[str, Any]:
        """Measure and save the autoencoder, each time; writes grids."""
        vae = copy_for_use(self.network.vae, self.config.constant_std)
        metrics = self.held_out.report(vae, self.folder / "grids", step)
        save_autoencoder(vae, self.config.autoencoder_folder, self.config.dtype, self.config.card)
        return metrics


def autoencoder_trainer(config: TrainVaeConfig, resolved: str) -> Trainer:
    """One run: `autoencoder_trainer(config, resolved).run()`.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if the settings do not fit the data, the weights or the checkpoint to resume from.
    """
    return network_trainer(AutoencoderTask, config, resolved)
