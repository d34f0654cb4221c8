"""From a flow's samples to pictures: the training noise away, and decoding, in parts that bound the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tarflow.flows.denoising import learned_denoise, score_denoise

#: So many tokens are denoised at once, and so many pixels decoded, whatever the batch: memory stays bounded.
DENOISED_TOKENS = 2**14
DECODED_PIXELS = 2**23


class SampleDecoding:
    """`TARFlowPipeline`'s way from latents to pictures."""

    def remove_noise(
        self, latents: Tensor, denoise: bool | str, class_labels: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        """Latents (B, C, h, w) without the training noise.

        Args:
            denoise: True or "score", "learned", or False, which changes nothing.
            class_labels, cond: class indices (B,) or encoded captions (B, L, E) of a conditional model.
        """
        if not denoise or self.config.noise_std == 0:
            return latents
        self.run_offload_hook(self.flow)
        step = learned_denoise if denoise == "learned" else score_denoise
        return in_parts(
            lambda part, part_labels, part_cond: step(
                self.flow, part, self.config.noise_std, class_labels=part_labels, cond=part_cond
            ),
            max(1, DENOISED_TOKENS // (latents.shape[2] * latents.shape[3] // self.flow.config.patch_size**2)),
            (latents, class_labels, cond),
        )

    def decode_latents(self, latents: Tensor, decoder: str = "vae") -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W) float32, about [−1, 1]; ``decoder`` is "vae" or "finetuned"."""
        module = self.finetuned_decoder if decoder == "finetuned" else self.vae
        self.run_offload_hook(module)
        pixels = latents.shape[2] * latents.shape[3] * self.codec.factor**2
        size = max(1, DECODED_PIXELS // pixels)
        return in_parts(lambda part: self.codec.decode(part, module).float(), size, (latents,))


def in_parts(function: Callable[..., Tensor], size: int, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """``function`` of tensors (B, …), ``size`` rows at a time, put together again; None stays None."""
    batch = len(tensors[0])
    if batch <= size:
        return function(*tensors)
    parts = ((None if tensor is None else tensor[i : i + size] for tensor in tensors) for i in range(0, batch, size))
    return torch.cat([function(*part) for part in parts])
