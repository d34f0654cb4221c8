"""A pipeline of a flow with all steps of a call, of which `TARFlowPipeline` makes the call itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tarflow.common.progress import progress_bar
from tarflow.flows.decoding.method import Decoding
from tarflow.flows.trajectory.kinds import check_flow_kind
from tarflow.pipeline.call import inputs
from tarflow.pipeline.call.arguments import check_types
from tarflow.pipeline.call.callbacks import CallState
from tarflow.pipeline.call.checks import check_generator
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.inversion import BlockInversion
from tarflow.pipeline.call.prompts import PromptEncoding
from tarflow.pipeline.call.samples import decoded, without_noise
from tarflow.pipeline.call.student_sampling import noise_left
from tarflow.pipeline.call.walk import AfterLevel, check_walk, resolve_level, resolve_steps, scheduler_for, walk_down

Generators = torch.Generator | list[torch.Generator] | None


class FlowPipeline(PromptEncoding, BlockInversion, CallState):
    """What stands between the arguments of a call and its pictures."""

    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (the library's interface)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        class_labels: inputs.Labels | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        guidance_scale: float,
        callback_tensor_inputs: list[str] | None,
    ) -> None:
        """One sentence for each way in which arguments do not fit the model or each other."""
        inputs.check_inputs(self.flow.config, prompt, class_labels, negative_prompt, prompt_embeds, guidance_scale)
        inputs.check_callback(callback_tensor_inputs, self._callback_tensor_inputs)

    def check_outputs(
        self,
        denoise: bool | str | None,
        output_type: str,
        decoder: str | None = None,
        decoding: str | Decoding | list[Decoding] | None = None,
    ) -> tuple[bool | str, str]:
        """Whether the pipeline can do what is asked of its samples, and what that is: ``denoise`` as True (the score
        step), False or "learned", and ``decoder`` as "vae" or "finetuned"; ``decoding`` as of a call."""
        if decoding == STUDENT and not noise_left(self.student, denoise, decoder):
            denoise, decoder = False, "vae"
        config, pixels = self.flow.config, self.vae is None
        inputs.check_output_type(config, output_type, pixels)
        finetuned = self.finetuned_decoder is not None
        default = self.config.decoder, self.config.denoise
        return inputs.resolve_denoising(config, denoise, decoder, default, pixels, finetuned)

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A bar with the options of ``set_progress_bar_config``, see `tarflow.common.progress.progress_bar`.

        Raises:
            ValueError: if there is neither an iterable nor a total.
        """
        if iterable is None and total is None:
            raise ValueError("a progress bar needs an iterable or a total")
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        options = {"disable": not is_first, **getattr(self, "_progress_bar_config", {})}
        return progress_bar(iterable, total=total, **options)

    @check_types
    def prepare_latents(
        self,
        batch: int,
        shape: tuple[int, int, int],
        device: torch.device,
        generator: Generators,
        latents: Tensor | None,
    ) -> Tensor:
        """A draw from the flow's prior, (B, C, h, w), float32; of ``latents``, if given, instead of fresh numbers."""
        check_generator(generator, batch)
        self.run_offload_hook(self.flow)  # the prior's variance is its
        if latents is None:
            noise = randn_tensor((batch, *shape), generator=generator, device=device, dtype=torch.float32)
        else:
            if tuple(latents.shape) != (batch, *shape):
                raise ValueError(f"latents must have the shape {(batch, *shape)}, got {tuple(latents.shape)}")
            noise = latents.to(device=device, dtype=torch.float32)
        return self.flow.scale_noise(noise)

    @check_types
    def remove_noise(
        self,
        latents: Tensor,
        denoise: bool | str,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        noise_level: float | None = None,
        num_inference_steps: int | None = None,
        walk: str | None = None,
        generator: Generators = None,
        after_level: AfterLevel | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) without the training noise.

        Args:
            denoise: True or "score", "learned", or False or "none", which change nothing.
            class_labels, cond: class indices (B,) or encoded captions (B, L, E) of a conditional model.
            noise_level, num_inference_steps, walk, generator: as of a call, of a flow of many levels.
            after_level: see `AfterLevel`.

        Raises:
            ValueError: for another ``denoise``, or one that the flow has not learned.
        """
        if denoise is not None:
            denoise, _ = inputs.resolve_denoising(self.flow.config, denoise, "vae", ("vae", True), False, False)
        if not denoise or self.config.noise_std == 0:
            return latents
        check_flow_kind(self.flow, "removing the noise of single pictures is")
        self.run_offload_hook(self.flow)
        level = resolve_level(self.noise_levels, noise_level)
        if level is not None and self.noise_levels is not None:
            lowest, _ = self.noise_levels
            steps = resolve_steps(self.noise_levels, num_inference_steps, self.config.num_inference_steps, True, level)
            check_walk(walk, self.noise_levels, steps, level)
            scheduler = scheduler_for(self.scheduler, level, steps, walk, latents.device, lowest)

            def clean(x: Tensor, at: float) -> Tensor:
                return without_noise(self.flow, x, "score", at, class_labels, cond)

            return walk_down(scheduler, latents, clean, self.vae is None, generator, after_level)
        step = "learned" if denoise == "learned" else "score"
        return without_noise(self.flow, latents, step, self.config.noise_std, class_labels, cond)

    def decode_latents(self, latents: Tensor, decoder: str = "vae") -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W) float32, about [−1, 1]; ``decoder`` is "vae" or "finetuned".

        Raises:
            ValueError: if the pipeline does not have it.
        """
        inputs.check_decoder(decoder, self.vae is None, self.finetuned_decoder is not None)
        module = self.finetuned_decoder if decoder == "finetuned" else self.vae
        self.run_offload_hook(module)
        return decoded(self.codec, latents, module)
