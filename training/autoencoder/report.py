"""What an autoencoder's run shows of itself: reconstructions in numbers and pictures, statistics of the latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchvision.utils import make_grid, save_image

from tarflow.data.images import to_model, to_uint8
from tarflow.data.stream.first import open_pictures, without_conditions
from tarflow.data.subset import spread
from tarflow.evaluation.reconstruction.quality import psnr, ssim
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.loop.draws import draw_noise
from tarflow.vae.codec import channel_statistics, channel_sums

#: Columns of a grid, and how many times its rows are repeated.
COLUMNS, BANDS = 8, 2
#: A channel whose means vary by less than this share of the posterior's σ says nothing about pictures.
DEAD = 0.1


class HeldOutPictures:
    """Held-out pictures of each source, uint8 (N, 3, S, S) by name, which lie evenly in their split.

    Raises:
        ValueError: if a source holds none out.
    """

    def __init__(self, config: TrainVaeConfig):
        self.config, self.sources = config, {}
        for name, source in config.sources.items():
            found = open_pictures(
                without_conditions(source.data), "validation", config.eval_images, "eval_images", config.seed
            )
            pictures = spread(found, config.eval_images)
            if len(pictures) == 0:
                raise ValueError(f"the source {name!r} holds no pictures out: raise its data.validation_fraction")
            self.sources[name] = torch.stack([pictures[i]["image"] for i in range(len(pictures))])

    def report(self, vae: AutoencoderKL, folder: Path, step: int) -> dict[str, Any]:
        """Measures of `evaluate` by name and source; writes a grid ``NAME_STEP.png`` of each."""
        folder.mkdir(parents=True, exist_ok=True)
        metrics: dict[str, Any] = {}
        for name, images in self.sources.items():
            measured, rows = evaluate(vae, images, self.config.batch_size, self.config.eval_noise_std, self.config.seed)
            metrics |= {f"{key}_{name}": value for key, value in measured.items()}
            save_image(banded_grid(rows), folder / f"{name}_{step:08d}.png")
        return metrics


@torch.no_grad()
def evaluate(
    vae: AutoencoderKL, images: Tensor, batch_size: int, noise_std: float, seed: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """Measure reconstructions of uint8 pictures (N, 3, S, S), decoded from the posterior's means.

    Args:
        noise_std: of the noise on the latents, over their standard deviation per channel.
        seed: of that noise.

    Returns:
        "psnr", "ssim", and "noisy_psnr", "noisy_ssim" with the noise, means over pictures; "latents_mean" and
        "latents_std" of the raw latents by channel; "posterior_std", the mean σ; "kl" in nats per latent number;
        "dead_channels", the share of channels whose means' standard deviation is less than a tenth of their mean σ.
        And the first pictures: originals, reconstructions, and reconstructions with noise.
    """
    posteriors = [vae.encode(to_model(batch.to(vae.device))).latent_dist for batch in images.split(batch_size)]
    mean = torch.cat([posterior.mean for posterior in posteriors])  # (N, C, h, w)
    sigma = torch.cat([posterior.std for posterior in posteriors])
    kl = torch.cat([posterior.kl() for posterior in posteriors]).mean() / mean[0].numel()
    center, spread_of = channel_statistics(channel_sums(mean))
    noise = draw_noise(seed, -1, range(len(images)), mean.shape[1:], mean.device, "held out")
    noise *= noise_std * torch.tensor(spread_of, device=mean.device).view(1, -1, 1, 1)
    clean, noisy = (decode(vae, latents, batch_size) for latents in (mean, mean + noise))
    sigmas = sigma.mean((0, 2, 3)).tolist()
    dead = [std < DEAD * own for std, own in zip(spread_of, sigmas, strict=True)]
    metrics = {
        "psnr": float(psnr(clean, images).mean()),
        "ssim": float(ssim(clean, images).mean()),
        "noisy_psnr": float(psnr(noisy, images).mean()),
        "noisy_ssim": float(ssim(noisy, images).mean()),
        "kl": float(kl),
        "posterior_std": sum(sigmas) / len(sigmas),
        "dead_channels": sum(dead) / len(dead),
        "latents_mean": center,
        "latents_std": spread_of,
    }
    return metrics, [pictures[: COLUMNS * BANDS] for pictures in (images, clean, noisy)]


def decode(vae: AutoencoderKL, latents: Tensor, batch_size: int) -> Tensor:
    """Raw latents (N, C, h, w) as 8-bit pictures (N, 3, S, S), on the CPU."""
    return torch.cat([to_uint8(vae.decode(batch).sample).cpu() for batch in latents.split(batch_size)])


def banded_grid(rows: Sequence[Tensor]) -> Tensor:
    """Pictures in [0, 1] side by side: a row of the first of each kind below another, then of the next."""
    bands = [part[first : first + COLUMNS] for first in range(0, len(rows[0]), COLUMNS) for part in rows]
    full = [torch.cat([band, band.new_full((COLUMNS - len(band), *band.shape[1:]), 255)]) for band in bands]
    return make_grid(torch.cat(full).float() / 255, nrow=COLUMNS)
