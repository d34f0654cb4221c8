"""LatentCodec: images ↔ normalised latents.

Names of the three stages: *images* in [−1, 1] → *raw latents*, as the autoencoder gives them → *latents*, of about zero
mean and unit variance per channel, which the flow models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.common.tensors import dequantized
from tarflow.models import AUTOENCODERS, SHARED, followed, locate_autoencoder


def load_autoencoder(name: str | None, subfolder: str | None = None) -> Any:
    """A frozen autoencoder by shipped name, folder or hub id; None for None or "none" (the flow works on pixels). A folder
    has Diffusers' format, or TAEF2's own two files.

    Raises:
        ValueError: if there is no such autoencoder.
    """
    if name in (None, "none"):
        return None
    path = locate_autoencoder(name)
    import diffusers  # imported here: only training and the shipped autoencoder need it

    from tarflow.vae.taef2 import AutoencoderTAEF2, is_original

    if (own := Path(path, subfolder or "")).joinpath(SHARED).is_file():
        path, subfolder = str(followed(own)), None
    try:
        if is_original(Path(path, subfolder or "")):
            vae: Any = AutoencoderTAEF2.from_original(Path(path, subfolder or ""))
        else:
            class_name = diffusers.AutoencoderKL.load_config(path, subfolder=subfolder)["_class_name"]
            own = class_name == AutoencoderTAEF2.__name__
            kind = AutoencoderTAEF2 if own else getattr(diffusers, class_name)
            vae = kind.from_pretrained(path, subfolder=subfolder, torch_dtype=torch.float32)
    except (OSError, AttributeError, KeyError) as error:
        known = ", ".join(AUTOENCODERS)
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

    Example:
        >>> import torch
        >>> from tarflow import LatentCodec
        >>> from tarflow.vae.codec import load_autoencoder
        >>> codec = LatentCodec(load_autoencoder("drawings_emoji_f8c8"))  # or a folder, or a hub id
        >>> latents = codec.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
        >>> latents.shape, codec.factor
        (torch.Size([2, 8, 8, 8]), 8)
        >>> codec.decode(latents).shape
        torch.Size([2, 3, 64, 64])
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
        self.check_size(images)
        return self.normalise(self.scale_raw(self.encode_raw(images, sample, generator)))

    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) in [−1, 1] → mean and standard deviation of the *scaled* latents, (B, C, H/f, W/f) each.

        ``normalise(mean + std · ε)`` with normal ε is what `encode` draws. The second is None if the autoencoder has
        no posterior.

        Raises:
            ValueError: if H or W is no multiple of the factor.
        """
        self.check_size(images)
        output = self._encoded(images)
        posterior = getattr(output, "latent_dist", None)
        std = getattr(posterior, "std", None)
        return self.scale_raw(raw_of(output)), None if std is None else std.float() * self.factors[1]

    def check_size(self, images: Tensor) -> None:
        """An error if the pictures' height or width is no multiple of the factor."""
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            size = f"{images.shape[-2]} × {images.shape[-1]}"
            raise ValueError(f"image height and width must be multiples of {self.factor}, got {size}")

    def encode_raw(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) → raw latents, as the autoencoder gives them."""
        output = self._encoded(images)
        posterior = getattr(output, "latent_dist", None)
        return posterior.sample(generator) if sample and posterior is not None else raw_of(output)

    def scale_raw(self, raw: Tensor) -> Tensor:
        """Raw latents with the autoencoder's own shift and scaling factors, in float32."""
        shift, scaling = self.factors
        return (raw.float() - shift) * scaling

    def decode(self, latents: Tensor, decoder: Any = None) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, h·f, w·f), about [−1, 1], not clipped.

        Args:
            decoder: decodes raw latents instead of the autoencoder; see `tarflow.vae.decoder.DecoderHalf`.
        """
        raw = self.raw(latents)
        decoder = self.vae if decoder is None else decoder
        if decoder is None:
            return raw
        output = decoder.decode(raw.to(getattr(decoder, "dtype", latents.dtype)))
        if (images := getattr(output, "sample", None)) is not None:
            return images
        return output[0] if isinstance(output, tuple) else output

    def raw(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → raw latents: the inverse of `scale_raw` and `normalise`."""
        scaled = latents
        if self.latents_std is not None:
            scaled = scaled * self._channels(self.latents_std, latents)
        if self.latents_mean is not None:
            scaled = scaled + self._channels(self.latents_mean, latents)
        if self.vae is None:
            return scaled
        shift, scaling = self.factors
        return scaled / scaling + shift

    def normalise(self, scaled: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) → latents of about zero mean and unit variance per channel."""
        if self.latents_mean is not None:
            scaled = scaled - self._channels(self.latents_mean, scaled)
        if self.latents_std is not None:
            scaled = scaled / self._channels(self.latents_std, scaled)
        return scaled

    def _encoded(self, images: Tensor) -> Any:
        if self.vae is None:
            return images
        return self.vae.encode(images.to(getattr(self.vae, "dtype", images.dtype)))

    @property
    def factors(self) -> tuple[float, float]:
        """The autoencoder's own shift and scaling factors of raw latents."""
        config = getattr(self.vae, "config", {})
        # AutoencoderTiny's shift factor belongs to its own 8-bit storage of latents, not to encode and decode.
        shift = 0.0 if type(self.vae).__name__ == "AutoencoderTiny" else config.get("shift_factor", None) or 0.0
        return float(shift), float(config.get("scaling_factor", None) or 1.0)

    @staticmethod
    def _channels(values: list[float], like: Tensor) -> Tensor:
        if len(values) != like.shape[1]:
            raise ValueError(f"got latent statistics of {len(values)} channels for latents of {like.shape[1]}")
        # The host need not wait for the device.
        return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True).view(1, -1, 1, 1)


def raw_of(output: Any) -> Tensor:
    """Raw latents of what an autoencoder's ``encode`` returned; of a posterior, its mode."""
    if (posterior := getattr(output, "latent_dist", None)) is not None:
        return posterior.mode()
    for name in ("latents", "latent"):
        if (raw := getattr(output, name, None)) is not None:
            return raw
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def measure_latents(vae: Any, batches: Any, prepare: Callable[[Any], Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the scaled latents (posterior modes), summed in float64.

    Args:
        vae: the autoencoder, or None.
        batches: any iterable; ``prepare`` makes images (B, 3, H, W) in [−1, 1] of each item.
    """
    codec, sums = LatentCodec(vae), torch.zeros(3, 1, dtype=torch.float64)
    for batch in batches:
        sums = sums + channel_sums(codec.encode(prepare(batch)))
    return channel_statistics(sums)


def channel_sums(latents: Tensor) -> Tensor:
    """Count, sum and sum of squares per channel of latents (B, C, h, w), as (3, C) float64; sums of batches add up."""
    latents = latents.cpu().double()
    total = latents.sum((0, 2, 3))
    return torch.stack([torch.full_like(total, latents[:, 0].numel()), total, latents.pow(2).sum((0, 2, 3))])


def channel_statistics(sums: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, from added `channel_sums`.

    Raises:
        ValueError: if nothing was added.
    """
    count, total, squares = sums
    if not count.all():
        raise ValueError("no images to measure the latents' mean and standard deviation on")
    mean = total / count
    return mean.tolist(), (squares / count - mean**2).clamp(min=1e-12).sqrt().tolist()


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, sorted by name, as float32: the same for any lossless storage."""
    return tensors_hash(module.state_dict().items())


def tensors_hash(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> str:
    """SHA-256 of named tensors, sorted by name, as float32 after they were rounded to ``dtype``."""
    digest = hashlib.sha256()
    for name, value in sorted(named, key=lambda pair: pair[0]):
        values = dequantized(value).detach().cpu().to(dtype).float().contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().numpy().data)
    return digest.hexdigest()


def autoencoder_hash(vae: Any) -> str:
    """SHA-256 of what makes an autoencoder's latents: its class, its factors and its weights."""
    essentials = [type(vae).__name__, *LatentCodec(vae).factors, weights_hash(vae)]
    return hashlib.sha256(repr(essentials).encode()).hexdigest()
