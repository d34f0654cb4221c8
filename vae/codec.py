"""LatentCodec: images ↔ normalised latents.

Names of the three stages: *images* in [−1, 1] → *raw latents*, as the autoencoder gives them → *latents*, of about zero
mean and unit variance per channel, which the flow models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The autoencoder that ships with the project: trained on its drawings and on emoji, factor 8, 8 channels.
SHIPPED = {"drawings_emoji_f8c8": Path(__file__).parent / "drawings_emoji_f8c8"}


def load_autoencoder(name: str | None, subfolder: str | None = None) -> Any:
    """A frozen autoencoder by shipped name, folder or hub id; None for None or "none" (the flow works on pixels).

    Raises:
        ValueError: if there is no such autoencoder.
    """
    if name in (None, "none"):
        return None
    import diffusers  # imported here: only training and the shipped autoencoder need it

    path = str(SHIPPED.get(name, name))
    try:
        config = diffusers.AutoencoderKL.load_config(path, subfolder=subfolder)
        class_name = config["_class_name"]
        vae = getattr(diffusers, class_name).from_pretrained(path, subfolder=subfolder, torch_dtype=torch.float32)
    except (OSError, AttributeError, KeyError) as error:
        known = ", ".join(SHIPPED)
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot load the autoencoder {name!r} (shipped: {known}; else a folder or hub id): {reason}"
        ) from error
    return vae.eval().requires_grad_(False)


class LatentCodec:
    """Encodes and decodes with a frozen autoencoder.

    Args:
        vae: any object with Diffusers' ``encode`` and ``decode``, or None for pixels.
        latents_mean, latents_std: per channel of the scaled latents; None is 0 and 1. See `measure_latents`.
    """

    def __init__(self, vae: Any, latents_mean: list[float] | None = None, latents_std: list[float] | None = None):
        if latents_std is not None and min(latents_std) <= 0:
            raise ValueError(f"latents_std must be positive, got {latents_std}")
        self.vae, self.latents_mean, self.latents_std = vae, latents_mean, latents_std

    @property
    def factor(self) -> int:
        """Pixels per latent position along each side."""
        if self.vae is None:
            return 1
        config = getattr(self.vae, "config", {})
        for name in ("spatial_compression_ratio", "downsample"):
            if (value := getattr(self.vae, name, None)) is not None:
                return int(value)
        if "encoder_block_out_channels" in config:  # AutoencoderDC and AutoencoderTiny
            return 2 ** (len(config["encoder_block_out_channels"]) - 1)
        if "block_out_channels" in config:
            return 2 ** (len(config["block_out_channels"]) - 1)
        raise ValueError(f"cannot tell the factor of {type(self.vae).__name__}: it has no spatial_compression_ratio")

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] → latents (B, C, H/f, W/f).

        Args:
            sample: draw from the autoencoder's posterior; else take its mode.
            generator: for the draw.

        Raises:
            ValueError: if H or W is no multiple of the factor.
        """
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            size = f"{images.shape[-2]} × {images.shape[-1]}"
            raise ValueError(f"image height and width must be multiples of {self.factor}, got {size}")
        return self._normalise(self.scale_raw(self.encode_raw(images, sample, generator)))

    def encode_raw(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) → raw latents, as the autoencoder gives them."""
        if self.vae is None:
            return images
        output = self.vae.encode(images.to(getattr(self.vae, "dtype", images.dtype)))
        if (posterior := getattr(output, "latent_dist", None)) is not None:
            return posterior.sample(generator) if sample else posterior.mode()
        for name in ("latents", "latent"):
            if (raw := getattr(output, name, None)) is not None:
                return raw
        return output[0] if isinstance(output, tuple) else output

    def scale_raw(self, raw: Tensor) -> Tensor:
        """Raw latents with the autoencoder's own shift and scaling factors, in float32."""
        shift, scaling = self._factors()
        return (raw.float() - shift) * scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, h·f, w·f), about [−1, 1], not clipped."""
        scaled = latents
        if self.latents_std is not None:
            scaled = scaled * self._channels(self.latents_std, latents)
        if self.latents_mean is not None:
            scaled = scaled + self._channels(self.latents_mean, latents)
        if self.vae is None:
            return scaled
        shift, scaling = self._factors()
        output = self.vae.decode((scaled / scaling + shift).to(getattr(self.vae, "dtype", latents.dtype)))
        if (images := getattr(output, "sample", None)) is not None:
            return images
        return output[0] if isinstance(output, tuple) else output

    def _normalise(self, scaled: Tensor) -> Tensor:
        if self.latents_mean is not None:
            scaled = scaled - self._channels(self.latents_mean, scaled)
        if self.latents_std is not None:
            scaled = scaled / self._channels(self.latents_std, scaled)
        return scaled

    def _factors(self) -> tuple[float, float]:
        config = getattr(self.vae, "config", {})
        # AutoencoderTiny's shift factor belongs to its own 8-bit storage of latents, not to encode and decode.
        shift = 0.0 if type(self.vae).__name__ == "AutoencoderTiny" else config.get("shift_factor", None) or 0.0
        return shift, config.get("scaling_factor", None) or 1.0

    @staticmethod
    def _channels(values: list[float], like: Tensor) -> Tensor:
        if len(values) != like.shape[1]:
            raise ValueError(f"got latent statistics of {len(values)} channels for latents of {like.shape[1]}")
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


@torch.no_grad()
def measure_latents(vae: Any, batches: Any, prepare: Callable[[Any], Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the scaled latents (posterior modes), summed in float64.

    Args:
        vae: the autoencoder, or None.
        batches: any iterable; ``prepare`` makes images (B, 3, H, W) in [−1, 1] of each item.
    """
    codec, count, total, squares = LatentCodec(vae), 0, 0.0, 0.0
    for batch in batches:
        latents = codec.encode(prepare(batch)).cpu().double()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.pow(2).sum((0, 2, 3))
    if count == 0:
        raise ValueError("no images to measure the latents' mean and standard deviation on")
    mean = total / count
    return mean.tolist(), (squares / count - mean**2).clamp(min=1e-12).sqrt().tolist()
