"""What the exact-flow tools have in common: pictures → noisy latents → z, and back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tarflow.flows import editing
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.likelihood import dequantize, log_prob
from tarflow.pipeline.editing.inputs import as_many, read_images

Generators = torch.Generator | list[torch.Generator] | None


class ExactFlowSteps:
    """Steps of `ExactFlowTools`; pictures here are floats (B, 3, H, W) in [−1, 1], conditions keyword arguments of the
    flow."""

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width of the model's pictures."""
        channels, height, width = self.latent_shape(None, None)
        if self.vae is None and channels != 3:
            raise ValueError(f"this model has {channels} channels; pictures have 3")
        return height * self.codec.factor, width * self.codec.factor

    def _condition(self, batch: int, prompt: Any = None, class_labels: Any = None, embeds: Any = None) -> dict:
        """The flow's keyword arguments for a batch; "no condition" if none is given."""
        kind, device = self.flow.config.conditioning, self._execution_device
        given = [name for name, value in (("prompt", prompt), ("prompt_embeds", embeds)) if value is not None]
        if len(given) == 2:
            raise ValueError("give either prompt or prompt_embeds, not both")
        if given and kind != "prefix":
            raise ValueError(f"this model has the conditioning {kind!r} and takes no {given[0]}")
        if class_labels is not None and kind in ("none", "prefix"):
            raise ValueError(f"this model has the conditioning {kind!r} and takes no class labels")
        if kind == "prefix":
            if embeds is None:
                captions = as_many("" if prompt is None else prompt, batch, "prompt")
                embeds, _ = self.encode_prompt(captions, device, do_classifier_free_guidance=False)
            self.run_offload_hook(self.flow)
            self.flow.condition(None, embeds, batch)  # an error for another width
            return {"cond": embeds.to(device).expand(batch, -1, -1)}
        if kind == "none" or class_labels is None:
            return {}
        labels = self.label_indices(as_many(class_labels, batch, "class_labels"))
        return {"class_labels": torch.tensor(labels, device=device)}

    def _latents(self, images: Tensor) -> Tensor:
        """The autoencoder's latents (B, C, h, w), or the pixels themselves, in the flow's dtype, at least float32."""
        self.run_offload_hook(self.vae)
        latents = self.codec.encode(images.to(self._execution_device))
        return latents.to(torch.promote_types(self.flow.dtype, torch.float32))

    def _noisy(self, latents: Tensor, generator: Generators, noise: bool) -> Tensor:
        """Latents as the flow was trained on them: with Gaussian noise, or pixels as uniform 8-bit ones."""
        if not noise:
            return latents
        fresh = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        if self.vae is None and self.config.noise_std == 0:
            return dequantize((latents + 1) * 127.5, torch.special.ndtr(fresh))
        return latents + self.config.noise_std * fresh

    def _read(self, image: Any, fit: bool, generator: Generators, noise: bool) -> Tensor:
        """A caller's pictures as latents, as the flow was trained on them."""
        return self._noisy(self._latents(read_images(image, self._size, fit)), generator, noise)

    def _encoded(self, x: Tensor, condition: dict) -> Tensor:
        """Noisy latents → standard normal z."""
        self.run_offload_hook(self.flow)
        z, _ = self.flow(x, **condition)
        variance = self.flow.prior_variance_image()
        return z if variance is None else z / variance.sqrt()

    def _decoded(self, z: Tensor, condition: dict, guidance_scale: float = 1.0) -> Tensor:
        """z → noisy latents, sequentially: the inverse of `_encoded` if guidance is off."""
        self.run_offload_hook(self.flow)
        guidance = Guidance(guidance_scale - 1, self.config.guidance_method)
        null = self._condition(len(z)).get("cond") if guidance.weight > 0 else None
        return self.flow.inverse(self.flow.scale_noise(z), **condition, null_cond=null, guidance=guidance)[0]

    def _log_prob(self, x: Tensor, condition: dict) -> Tensor:
        """log p of noisy latents, (B,)."""
        self.run_offload_hook(self.flow)
        return log_prob(self.flow, x, **condition)

    def _denoised(self, x: Tensor, condition: dict) -> tuple[Tensor, str]:
        """Latents for the pipeline's decoder, and which that is: a finetuned one takes them as they are."""
        denoise, decoder = self.check_outputs(None, "pil")
        return self.remove_noise(x, denoise, **condition), decoder

    def _postprocessed(self, images: Tensor, latents: Tensor, output_type: str) -> Any:
        self.check_outputs(None, output_type)
        self.maybe_free_model_hooks()
        return latents if output_type == "latent" else self.image_processor.postprocess(images, output_type)

    def _composed(
        self, x: Tensor, known: tuple[Tensor, Tensor], hidden: Tensor, hole: Tensor, condition: dict
    ) -> tuple[Tensor, Tensor]:
        """The picture and latents of a filled hole.

        Args:
            x: noisy latents with the hole filled.
            known: the pictures, and latents without noise, that stay outside the hole.
            hidden: pixels to make, (B, 1, H, W); hole: the tokens that they touch, (B, h, w).
        """
        pixels, clean = known
        latents, decoder = self._denoised(x, condition)
        if decoder == "vae":
            patch = self.flow.config.patch_size
            inside = hole.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]  # (B, 1, H, W) of latents
            latents = torch.where(inside, latents, clean)
        made = self.decode_latents(latents, decoder).clamp(-1, 1)
        return torch.where(hidden, made.to(pixels.dtype), pixels), latents

    def _fill(self, x: Tensor, hole: Tensor, condition: dict, generator: Generators, first: bool) -> Tensor:
        """Noisy latents with the hole made anew; ``first`` if there is nothing of worth in it yet."""
        self.run_offload_hook(self.flow)
        tokens, grid = self.flow.patchify(x)
        if first:
            fresh = randn_tensor(tokens.shape, generator, x.device, x.dtype)
            x = self.flow.unpatchify(torch.where(hole.flatten(1)[..., None], fresh, tokens), grid)
        held = editing.HeldFlow(self.flow, x, hole, **condition)
        return held.inverse(randn_tensor(tokens.shape, generator, x.device, x.dtype))[0]

    def _chain(
        self, x: Tensor, hole: Tensor, condition: dict, steps: int, step_size: float, generator: Generators
    ) -> editing.Chain:
        """`tarflow.flows.editing.metropolis` with the generator's numbers."""
        self.run_offload_hook(self.flow)
        shape = self.flow.patchify(x)[0].shape

        def draw() -> tuple[Tensor, Tensor]:
            fresh = randn_tensor(shape, generator, x.device, x.dtype)
            return fresh, torch.special.ndtr(randn_tensor(shape[:1], generator, x.device, x.dtype))

        return editing.metropolis(editing.HeldFlow(self.flow, x, hole, **condition), x, draw, steps, step_size)
