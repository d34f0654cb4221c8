"""Pictures as latents with the training noise, and the ways back to pictures: what removing the noise is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.common.progress import progress_bar
from tarflow.data.images import Pictures, collate, to_uint8
from tarflow.data.latents import CachedLatents
from tarflow.data.subset import evenly, spread
from tarflow.evaluation.likelihood.held_out import check_arguments, held_out_noise, noisy
from tarflow.evaluation.reconstruction.quality import psnr, ssim
from tarflow.pipeline.call.choices import NOISE_REMOVALS
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.conditions import check_class_names, condition_of


def available_methods(pipe: FlowPipeline) -> list[str]:
    """Those of `NOISE_REMOVALS` that a pipeline has the parts for."""
    missing = set()
    if pipe.flow.config.get("learned_denoiser", "none") == "none":
        missing.add("learned")
    if pipe.finetuned_decoder is None:
        missing.add("finetuned")
    return [name for name in NOISE_REMOVALS if name not in missing]


def decode_by(pipe: FlowPipeline, method: str, latents: Tensor, condition: dict[str, Any]) -> Tensor:
    """Noisy latents (B, C, h, w) → images (B, 3, H, W) in about [−1, 1]; ``condition`` as the flow takes it."""
    denoise, decoder = NOISE_REMOVALS[method]
    return pipe.decode_latents(pipe.remove_noise(latents, denoise, **condition), decoder)


@dataclass
class NoisyPictures:
    """Pictures and their noisy latents, in batches.

    Attributes:
        originals: uint8 (B, 3, H, W) each.
        latents: posterior modes + σ·ε, (B, C, h, w) each; ε of a picture depends on its place alone.
        conditions: keyword arguments of the flow for each batch.
    """

    originals: list[Tensor]
    latents: list[Tensor]
    conditions: list[dict[str, Any]]

    @torch.no_grad()
    def decoded(self, pipe: FlowPipeline, method: str) -> list[Tensor]:
        """uint8 pictures (B, 3, H, W) of all batches by one of `NOISE_REMOVALS`."""
        parts = zip(self.latents, self.conditions, strict=True)
        return [to_uint8(decode_by(pipe, method, latents, condition)).cpu() for latents, condition in parts]

    def quality(self, pictures: list[Tensor]) -> dict[str, float]:
        """Mean "psnr" in dB and "ssim" of what `decoded` gave."""
        pairs = list(zip(pictures, self.originals, strict=True))
        measures = {"psnr": psnr, "ssim": ssim}
        return {
            name: float(torch.cat([measure(*pair).cpu() for pair in pairs]).mean())
            for name, measure in measures.items()
        }


@torch.no_grad()
def noisy_pictures(pipe: FlowPipeline, images: Pictures, count: int, batch_size: int, seed: int = 0) -> NoisyPictures:
    """Encode some pictures of a split, which lie evenly in it, and add the pipeline's training noise.

    Raises:
        ValueError: if data and model do not fit, or the pipeline has no autoencoder.
    """
    if pipe.vae is None:
        raise ValueError("this model draws pixels: it has no decoder that could remove the noise")
    count = check_arguments(pipe, images, count, 1, 0)
    check_class_names(pipe, images.class_names)
    some, found = spread(images, count), NoisyPictures([], [], [])
    for first in progress_bar(range(0, count, batch_size), desc="encoding", unit="batch", leave=False):
        indices = list(range(first, min(first + batch_size, count)))
        batch = collate([some[i] for i in indices])
        found.originals.append(batch["image"])
        found.latents.append(noisy(pipe, batch["image"].to(pipe.flow.device), seed, indices, 0))
        # Pictures without captions or labels are denoised without a condition.
        given = "caption" in batch if pipe.flow.config.conditioning == "prefix" else "label" in batch
        found.conditions.append(condition_of(pipe, batch, len(indices), with_condition=given))
    return found


@torch.no_grad()
def noisy_cached(pipe: FlowPipeline, cache: CachedLatents, count: int, batch_size: int) -> NoisyPictures:
    """As `noisy_pictures`, of latents that are encoded already: their originals are what the autoencoder's decoder makes of
    them."""
    found, places = NoisyPictures([], [], []), evenly(len(cache), min(count, len(cache)))
    for first in progress_bar(range(0, len(places), batch_size), desc="decoding", unit="batch", leave=False):
        numbers = range(first, min(first + batch_size, len(places)))
        batch = collate([cache[places[number]] for number in numbers])
        clean = pipe.codec.normalise(batch["latent_mean"].to(pipe.flow.device)).float()
        found.originals.append(to_uint8(pipe.decode_latents(clean)).cpu())
        noise = held_out_noise(clean.shape[1:], 0, numbers).to(clean.device)
        found.latents.append(clean + pipe.config.noise_std * noise)
        found.conditions.append(condition_of(pipe, batch, len(numbers), with_condition=True))
    return found
