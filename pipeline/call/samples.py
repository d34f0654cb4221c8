"""From a flow's samples to pictures: the training noise away, and decoding, in parts that bound the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.denoising import learned_denoise, score_denoise
from tarflow.flows.model import TARFlowModel
from tarflow.vae.codec import LatentCodec

#: So many tokens are denoised at once, and so many pixels decoded, whatever the batch: memory stays bounded.
DENOISED_TOKENS = 2**14
DECODED_PIXELS = 2**23


def without_noise(
    flow: TARFlowModel,
    latents: Tensor,
    step: str,
    noise_std: float,
    class_labels: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """Latents (B, C, h, w) without the training noise.

    Args:
        step: "score" or "learned".
        noise_std: σ of that noise.
        class_labels, cond: class indices (B,) or encoded captions (B, L, E) of a conditional model.
    """
    denoise = learned_denoise if step == "learned" else score_denoise
    with torch.autocast(latents.device.type, enabled=False):  # as the flow's inverse
        return in_parts(
            lambda part, labels, cond: denoise(flow, part, noise_std, class_labels=labels, cond=cond),
            max(1, DENOISED_TOKENS // (latents.shape[2] * latents.shape[3] // flow.config.patch_size**2)),
            (latents, class_labels, cond),
        )


def check_finite_latents(latents: Tensor, made_by: str) -> None:
    """Raise a FloatingPointError that says what made numbers that are not finite, which would be black pictures."""
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(
            f"the latents have numbers that are not finite, made by {made_by}: check the weights and the noise, or use a wider "
            "dtype"
        )


def decoded(codec: LatentCodec, latents: Tensor, decoder: Any) -> Tensor:
    """Latents (B, C, h, w) → images (B, 3, H, W) float32, about [−1, 1], by the autoencoder or another decoder.

    Raises:
        FloatingPointError: if an autoencoder in float16 makes numbers that are too large for it, which would be black pictures.
    """
    pixels = latents.shape[2] * latents.shape[3] * codec.factor**2
    size = max(1, DECODED_PIXELS // pixels)
    images = in_parts(lambda part: codec.decode(part, decoder).float(), size, (latents,))
    used = codec.vae if decoder is None else decoder
    if getattr(used, "dtype", None) == torch.float16 and not bool(images.isfinite().all()):
        raise FloatingPointError(
            f"the {type(used).__name__} makes numbers that float16 cannot hold: decode in float32, pipe.vae.float(), or take "
            "bfloat16"
        )
    return images


def in_parts(function: Callable[..., Tensor], size: int, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """Apply ``function`` to ``size`` rows of the tensors (B, …) at a time, and concatenate the results. Tensors may be
    None, but not the first."""
    first = tensors[0]
    batch = 0 if first is None else len(first)
    if batch <= size:
        return function(*tensors)
    parts = ((None if tensor is None else tensor[i : i + size] for tensor in tensors) for i in range(0, batch, size))
    return torch.cat([function(*part) for part in parts])
