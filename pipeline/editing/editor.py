"""What the exact-flow tools have in common: pictures → noisy latents → z, and back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tarflow.flows import editing
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.likelihood import dequantize, log_prob
from tarflow.flows.trajectory.kinds import check_flow_kind
from tarflow.pipeline.call.checks import check_generator, check_kind
from tarflow.pipeline.call.flow_pipeline import FlowPipeline, Generators
from tarflow.pipeline.call.inputs import Labels
from tarflow.pipeline.call.walk import resolve_level
from tarflow.pipeline.editing.inputs import Pictures, as_many, read_images
from tarflow.pipeline.editing.outputs import EditingOutput


class FlowEditor:
    """Steps of `ExactFlowTools` for a pipeline; pictures here are floats (B, 3, H, W) in [−1, 1], conditions keyword
    arguments of the flow.

    Args:
        pipe: the pipeline.
        noise_level: of the noise that pictures get, for a flow of many levels; None is its highest.
        generator: of the noise that a stochastic scheduler draws on the way down from it.
        output_type: of the pictures that are made, checked before anything is computed; None makes none.

    Attributes:
        level: that level; None for a flow of one.
    """

    def __init__(
        self,
        pipe: FlowPipeline,
        noise_level: float | None = None,
        generator: Generators = None,
        output_type: str | None = None,
    ):
        check_flow_kind(pipe.flow, "encoding, likelihoods and editing are")
        if output_type is not None:
            pipe.check_outputs(None, output_type)
        self.pipe, self.flow = pipe, pipe.flow
        self.level, self.generator = resolve_level(pipe.noise_levels, noise_level), generator

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's pictures."""
        channels, height, width = self.pipe.latent_shape(None, None)
        if self.pipe.vae is None and channels != 3:
            raise ValueError(f"this model has {channels} channels; pictures have 3")
        return height * self.pipe.codec.factor, width * self.pipe.codec.factor

    def condition(
        self,
        batch: int,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        embeds: Tensor | None = None,
    ) -> dict[str, Any]:
        """The flow's keyword arguments for a batch; "no condition" if none is given, and its level if it has several."""
        leveled: dict[str, Any] = {} if self.level is None else {"noise_level": self.level}
        kind, device = self.flow.config.conditioning, self.pipe._execution_device
        if prompt is not None and embeds is not None:
            raise ValueError("give either prompt or prompt_embeds, not both")
        check_kind(kind, {"prompt": prompt, "prompt_embeds": embeds}, {"class labels": class_labels})
        if kind == "prefix":
            if embeds is None:
                captions = as_many("" if prompt is None else prompt, batch, "prompt")
                embeds, _ = self.pipe.encode_prompt(captions, device, do_classifier_free_guidance=False)
            self.pipe.run_offload_hook(self.flow)
            self.flow.condition(None, embeds, batch, self.level)  # an error for another width
            return {"cond": embeds.to(device).expand(batch, -1, -1), **leveled}
        if kind == "none" or class_labels is None:
            return leveled
        labels = self.pipe.label_indices(as_many(class_labels, batch, "class_labels"))
        return {"class_labels": torch.tensor(labels, device=device), **leveled}

    def exactly(self) -> torch.autocast:
        """A context in which the flow computes in its weights' dtype, as its inverse always does."""
        return torch.autocast(self.pipe._execution_device.type, enabled=False)

    def latents(self, images: Tensor) -> Tensor:
        """The autoencoder's latents (B, C, h, w), or the pixels themselves, in the flow's dtype, at least float32."""
        self.pipe.run_offload_hook(self.pipe.vae)
        latents = self.pipe.codec.encode(images.to(self.pipe._execution_device))
        return latents.to(torch.promote_types(self.flow.dtype, torch.float32))

    def noisy(self, latents: Tensor, generator: Generators, noise: bool) -> Tensor:
        """Latents as the flow was trained on them: with Gaussian noise, or pixels as uniform 8-bit ones."""
        if not noise:
            return latents
        check_generator(generator, len(latents))
        fresh = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        if self.pipe.vae is None and self.pipe.config.noise_std == 0:
            return dequantize((latents + 1) * 127.5, torch.special.ndtr(fresh))
        return latents + (self.pipe.config.noise_std if self.level is None else self.level) * fresh

    def read(self, image: Pictures, fit: bool, generator: Generators, noise: bool) -> Tensor:
        """A caller's pictures as latents, as the flow was trained on them."""
        return self.noisy(self.latents(read_images(image, self.size, fit)), generator, noise)

    def encoded(self, x: Tensor, condition: dict[str, Any]) -> Tensor:
        """Noisy latents → standard normal z."""
        self.pipe.run_offload_hook(self.flow)
        with self.exactly():
            z, _ = self.flow(x, **condition)
        variance = self.flow.prior_variance_image()
        return z if variance is None else z / variance.sqrt()

    def decoded(self, z: Tensor, condition: dict[str, Any], guidance_scale: float = 1.0) -> Tensor:
        """z → noisy latents, sequentially: the inverse of `encoded` if guidance is off."""
        self.pipe.run_offload_hook(self.flow)
        guidance = Guidance(guidance_scale - 1, self.pipe.config.guidance_method)
        null = self.condition(len(z)).get("cond") if guidance.weight > 0 else None
        return self.flow.inverse(self.flow.scale_noise(z), **condition, null_cond=null, guidance=guidance)[0]

    def log_prob(self, x: Tensor, condition: dict[str, Any]) -> Tensor:
        """log p of noisy latents, (B,)."""
        self.pipe.run_offload_hook(self.flow)
        with self.exactly():
            return log_prob(self.flow, x, **condition)

    def denoised(self, x: Tensor, condition: dict[str, Any]) -> tuple[Tensor, str]:
        """Latents for the pipeline's decoder, and which that is: a finetuned one takes them as they are."""
        denoise, decoder = self.pipe.check_outputs(None, "pil")
        generator = self.generator
        if isinstance(generator, list) and len(generator) != len(x):
            generator = generator[0]  # there are more pictures than those that were given
        return self.pipe.remove_noise(x, denoise, **condition, generator=generator), decoder

    def postprocessed(self, images: Tensor, latents: Tensor, output_type: str) -> Any:
        """Decoded images, or latents, as ``output_type`` says; parts that were brought for the call are let go."""
        self.pipe.maybe_free_model_hooks()
        return latents if output_type == "latent" else self.pipe.image_processor.postprocess(images, output_type)

    def edited(
        self, z: Tensor, condition: dict[str, Any], output_type: str, guidance_scale: float = 1.0
    ) -> EditingOutput:
        """z as pictures, with their log p."""
        x = self.decoded(z, condition, guidance_scale)
        return self.finished(x, condition, output_type, self.log_prob(x, condition))

    def finished(self, x: Tensor, condition: dict[str, Any], output_type: str, values: Tensor) -> EditingOutput:
        """Noisy latents as pictures; ``values`` is their log p."""
        latents, decoder = self.denoised(x, condition)
        images = self.postprocessed(self.pipe.decode_latents(latents, decoder), latents, output_type)
        return EditingOutput(images=images, latents=latents, log_prob=values)

    def composed(
        self, x: Tensor, known: tuple[Tensor, Tensor], hidden: Tensor, hole: Tensor, condition: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The picture and latents of a filled hole.

        Args:
            x: noisy latents with the hole filled.
            known: the pictures, and latents without noise, that stay outside the hole.
            hidden: pixels to make, (B, 1, H, W); hole: the tokens that they touch, (B, h, w).
        """
        pixels, clean = known
        latents, decoder = self.denoised(x, condition)
        if decoder == "vae":
            patch = self.flow.config.patch_size
            inside = hole.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]  # (B, 1, H, W) of latents
            latents = torch.where(inside, latents, clean)
        made = self.pipe.decode_latents(latents, decoder).clamp(-1, 1)
        return torch.where(hidden, made.to(pixels.dtype), pixels), latents

    def fill(self, x: Tensor, hole: Tensor, condition: dict[str, Any], generator: Generators, first: bool) -> Tensor:
        """Noisy latents with the hole made anew; ``first`` if there is nothing of worth in it yet."""
        self.pipe.run_offload_hook(self.flow)
        tokens, grid = self.flow.patchify(x)
        if first:
            fresh = randn_tensor(tokens.shape, generator, x.device, x.dtype)
            x = self.flow.unpatchify(torch.where(hole.flatten(1)[..., None], fresh, tokens), grid)
        held = editing.HeldFlow(self.flow, x, hole, **condition)
        return held.inverse(randn_tensor(tokens.shape, generator, x.device, x.dtype))[0]

    def chain(
        self, x: Tensor, hole: Tensor, condition: dict[str, Any], steps: int, step_size: float, generator: Generators
    ) -> editing.Chain:
        """`tarflow.flows.editing.metropolis` with the generator's numbers."""
        self.pipe.run_offload_hook(self.flow)
        shape = self.flow.patchify(x)[0].shape

        def draw() -> tuple[Tensor, Tensor]:
            fresh = randn_tensor(shape, generator, x.device, x.dtype)
            return fresh, torch.special.ndtr(randn_tensor(shape[:1], generator, x.device, x.dtype))

        return editing.metropolis(editing.HeldFlow(self.flow, x, hole, **condition), x, draw, steps, step_size)
