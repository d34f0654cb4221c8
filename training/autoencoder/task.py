"""Training autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tarflow.data.images import Images, to_model
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.autoencoder.mixture import Mixture
from tarflow.training.autoencoder.model import (
    Reconstruction,
    copy_for_use,
    kl_divergence,
    make_autoencoder,
    plain,
    save_autoencoder,
)
from tarflow.training.autoencoder.report import HeldOutPictures
from tarflow.training.loop.draws import draw_noise
from tarflow.training.loop.network_trainer import NetworkTrainer, network_accelerator
from tarflow.training.losses.step import PictureStepper


class AutoencoderTask:
    """What is trained, see `tarflow.training.losses.step.PictureTask`: an autoencoder in its training form.

    Args:
        config: of the run.
        device: of its computations.
        output: folder of the autoencoder.
        folder: of the run.

    Raises:
        ValueError: if the settings do not fit the data or the weights to start from.
    """

    def __init__(self, config: TrainVaeConfig, device: torch.device, output: Path, folder: Path):
        self.config, self.device, self.output, self.folder = config, device, output, folder
        sources = [Images(source.data, "train") for source in config.sources.values()]
        self.train = Mixture(sources, [source.share for source in config.sources.values()], config.seed)
        self.held_out = HeldOutPictures(config)
        vae = make_autoencoder(config)
        self.network = Reconstruction(vae, config.constant_std)
        side = config.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (vae.config.latent_channels, side, side)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.network.last_layer

    def facts(self) -> dict[str, Any]:
        settings = self.network.vae.config
        return {f"model.{key}": plain(value) for key, value in settings.items() if not key.startswith("_")}

    def decode(
        self, model: nn.Module, batch: dict[str, Any], step: int, places: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
        """Draws of the posterior, decoded; the further loss is the KL divergence."""
        images = to_model(batch["image"].to(self.device))
        noise = draw_noise(self.config.seed, step, places, self.latent_shape, self.device, "posterior")
        mean, log_variance, decoded = model(images, noise)
        return decoded, images, {"kl": (self.config.kl_weight, kl_divergence(mean, log_variance))}

    def report(self, step: int, last: bool) -> dict[str, Any]:
        """Measure and save the autoencoder, each time; writes grids."""
        vae = copy_for_use(self.network.vae, self.config.constant_std)
        metrics = self.held_out.report(vae, self.folder / "grids", step)
        save_autoencoder(vae, self.output, self.config.dtype, self.config.card)
        return metrics


class AutoencoderTrainer(NetworkTrainer):
    """One run: `AutoencoderTrainer(config, resolved).run()`.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if the settings do not fit the data, the weights or the checkpoint to resume from.
    """

    def __init__(self, config: TrainVaeConfig, resolved: str):
        output = Path(config.output)
        folder = output.with_name(output.name + "_run")
        accelerator = network_accelerator(config, folder)
        task = AutoencoderTask(config, accelerator.device, output, folder)
        super().__init__(config, resolved, folder, accelerator, task, PictureStepper(config, accelerator, task))
