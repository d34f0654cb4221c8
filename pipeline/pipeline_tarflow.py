"""TARFlowPipeline: captions, class labels or nothing → images, in the habits of Diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from torch import Tensor

from tarflow.flows.decoding.method import Decoding
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel
from tarflow.flows.student import StudentModel
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.pipeline.call.arguments import check_types
from tarflow.pipeline.call.checks import check_guided
from tarflow.pipeline.call.defaults import checked_settings, default_steps
from tarflow.pipeline.call.flow_pipeline import Generators
from tarflow.pipeline.call.inputs import Labels
from tarflow.pipeline.call.settings import (
    Callback,
    Sampling,
    Subjects,
    check_temperature,
    resolve_decoding,
    resolve_size,
    resolve_temperatures,
)
from tarflow.pipeline.call.steps import conditions_of, draw_by_flow, draw_by_student, pictures, residuals
from tarflow.pipeline.call.student_sampling import check_student_call
from tarflow.pipeline.call.trajectory_sampling import draw_by_trajectory, trajectory_steps
from tarflow.pipeline.call.walk import check_own_level, check_walk, resolve_level, resolve_levels, resolve_steps
from tarflow.pipeline.editing.tools import ExactFlowTools
from tarflow.pipeline.loading.hub import PipelineFiles
from tarflow.pipeline.lora.lora import LoraLoading
from tarflow.pipeline.text.options import TextOptions
from tarflow.vae.decoder import DecoderHalf


@dataclass
class TARFlowPipelineOutput(BaseOutput):
    """Samples.

    Attributes:
        images: as ``output_type`` says.
        residual_max, residual_mean: |f(x) − z| of each sample before denoising, (B,), if asked for: how exactly the
            flow maps it back to its noise.
    """

    images: Any
    residual_max: Tensor | None = None
    residual_mean: Tensor | None = None


class TARFlowPipeline(ExactFlowTools, LoraLoading, PipelineFiles):
    """Draws images with a latent flow.

    Args:
        flow: the model: a flow, or a trajectory model.
        vae: an autoencoder with Diffusers' ``encode`` and ``decode``, or None for a flow on pixels.
        text_encoder, tokenizer: for captions, or None.
        latents_mean, latents_std: per channel of the autoencoder's scaled latents; None is 0 and 1.
        noise_std: standard deviation of the training noise, which one score step removes; of a flow of many levels the
            highest.
        id2label: names of the classes.
        max_sequence_length: captions are padded or cut to this many tokens.
        guidance_scale, guidance_method: defaults of a call; a scale of 1 is off.
        caption_template: what captions are put into, with the places {prompt} and {aspect_ratio}; None is the caption
            alone.
        decoder: the default of a call, "vae" or "finetuned".
        finetuned_decoder: a decoder that removes the training noise itself, or None.
        denoise: whether a call takes the score step before the autoencoder's decoder if it does not say; False where
            the autoencoder was trained to decode noisy latents.
        student: a network that makes a sample in one pass, see ``tarflow train-student``, or None.
        text_options: how captions are put to the text encoder, by the names of `TextOptions`; None are the defaults.
        noise_levels: the lowest and the highest level of a flow with noise_conditioning; None for one of one level.
        scheduler: how samples of such a flow go down from level to level, see `scheduler_for`; None is Diffusers'
            `EDMEulerScheduler` with levels of equal distances.
        num_inference_steps: in how many steps, by default; of a trajectory model one of the numbers that it was trained with,
            or 1, which leaves it to the model.
        temperature: of a call that draws its noise itself, by default.

    Example:
        >>> import torch
        >>> from tarflow import TARFlowPipeline
        >>> pipe = TARFlowPipeline.from_pretrained("drawings_class")  # a folder, a hub id, or the name of a shipped one
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe.labels["red triangle"]
        12
        >>> images = pipe(class_labels=["red triangle", 5], generator=torch.Generator().manual_seed(0)).images
        >>> [image.size for image in images]
        [(64, 64), (64, 64)]
        >>> pipe.log_likelihood(images, class_labels=["red triangle", 5]).log_prob.shape
        torch.Size([2])
    """

    @check_types
    def __init__(
        self,
        flow: TARFlowModel | TrajectoryFlowModel,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        noise_std: float = 0.0,
        id2label: dict[int, str] | dict[str, str] | None = None,
        max_sequence_length: int = 128,
        guidance_scale: float = 1.0,
        guidance_method: str = "gaussian",
        caption_template: str | None = None,
        decoder: str = "vae",
        finetuned_decoder: DecoderHalf | None = None,
        denoise: bool = True,
        student: StudentModel | None = None,
        text_options: dict[str, Any] | None = None,
        noise_levels: list[float] | tuple[float, float] | None = None,
        scheduler: Any = None,
        num_inference_steps: int = 1,
        temperature: float = 1.0,
    ):
        super().__init__()
        noise_levels, scheduler = resolve_levels(flow, noise_levels, scheduler)
        noise_std = noise_std if noise_levels is None else noise_levels[1]
        self.register_modules(
            flow=flow,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            finetuned_decoder=finetuned_decoder,
            student=student,
            scheduler=scheduler,
        )
        settings = checked_settings(
            latents_mean=latents_mean,
            latents_std=latents_std,
            noise_std=noise_std,
            id2label=id2label,
            max_sequence_length=max_sequence_length,
            guidance_scale=guidance_scale,
            guidance_method=guidance_method,
            caption_template=caption_template,
            decoder=decoder,
            denoise=denoise,
        )
        self.register_to_config(
            **settings,
            text_options=TextOptions.of(text_options).changed or None,
            noise_levels=noise_levels,
            num_inference_steps=default_steps(flow, noise_levels, num_inference_steps),
            temperature=check_temperature(temperature),
        )

    @torch.no_grad()
    @check_types
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        denoise: bool | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
        num_images: int | None = None,
        aspect_ratio: str | None = None,
        guidance_method: str | None = None,
        guidance_parts: str = "ab",
        guidance_annealed: bool = False,
        attention_temperature: float = 1.0,
        decoding: str | Decoding | list[Decoding] = "auto",
        tolerance: float | None = None,
        segment: int | None = None,
        return_residual: bool = False,
        decoder: str | None = None,
        temperature: float | None = None,
        num_inference_steps: int | None = None,
        noise_level: float | None = None,
        walk: str | None = None,
        guidance_blocks: str = "all",
    ) -> TARFlowPipelineOutput | tuple[Any, ...]:
        """Draw images; one step is the inversion of one flow block, or one step down from noise level to noise level.

        Args:
            prompt: captions, for a text-conditioned model.
            class_labels: indices or names, for a class-conditioned one.
            negative_prompt: what guidance leads away from; the empty caption if not given.
            height, width: of the images; the training size if not given. ``aspect_ratio`` instead, for example
                "16:9" (see `ASPECT_RATIOS`), keeps the training size's area.
            num_images_per_prompt: images of each caption or label; ``num_images``: of an unconditional model.
            guidance_scale: 1 is off; the pipeline's own default if not given.
            guidance_method: "gaussian" (STARFlow), "linear" (TARFlow) or "linear_scale" (iTARFlow); the pipeline's own
                default if not given.
            guidance_parts, guidance_annealed, attention_temperature: see `Guidance`; parts are "ab", "a" or "b".
            guidance_blocks: "all", or "deep", the one next to the noise alone.
            generator: one, or a list with one for each image, which then does not depend on the others.
            latents: the prior noise (B, C, h, w) instead of a draw.
            prompt_embeds, negative_prompt_embeds: encoded captions (B, L, E) instead of texts.
            denoise: how to remove the training noise before decoding: True or "score" by one score step, "learned" by
                the model's learned denoiser, False or "none" not at all. None is the score step with the
                autoencoder's decoder (nothing if the pipeline's setting ``denoise`` is False), and nothing with the
                finetuned one, which removes the noise itself.
            decoder: "vae", the autoencoder's, or "finetuned" (see ``tarflow finetune-decoder``), which goes with no
                other removal of noise. None is the autoencoder's if ``denoise`` names a step, else the pipeline's own
                default.
            output_type: "pil", "np", "pt" or "latent"; latents for the finetuned decoder still have their noise.
            callback_on_step_end: called after each block as (pipeline, index, index, {"latents": …}), and after each of
                several steps down from level to level with the scheduler's timestep in the third place. The dictionary
                that it returns may replace the latents. It may set the pipeline's ``_guidance_scale`` for the blocks
                to come, or ``_interrupt`` to end the call: pictures are then what the latents are at that moment, with
                no noise removed. See `CallState`.
            callback_on_step_end_tensor_inputs: names of the tensors that it wants; "latents" is the only one.
            max_sequence_length: tokens of a caption; the pipeline's own if not given.
            decoding: "student" is one pass of the pipeline's student instead of the flow's inverse. Or how blocks are
                inverted: "auto", the fastest on this device, found by a short calibration at the first call with a
                batch size (see `calibrations`; sequential where weights are fetched for each use); "sequential", exact
                to rounding; "jacobi"; "gs_jacobi", with ``segment`` tokens (a quarter of all); "fast", which is "auto"
                with a tolerance of `FAST_TOLERANCE`; a `Decoding` for all blocks, or one for each.
            tolerance: of "auto", "jacobi" and "gs_jacobi". With the default latents, which are of about unit size,
                agree with exact ones to 1e-3 up to a guidance scale of 3, with "fast" to 0.1 up to 6. Stronger guidance
                magnifies errors and is warned of; ``return_residual`` tells them.
            return_residual: also return how exact each sample is, at the cost of one parallel pass.
            temperature: factor on the prior noise; below 1 pictures are likelier and less varied. If not given, the
                pipeline's own, or 1 for given ``latents`` (not for what a trajectory model draws in its steps).
            num_inference_steps: in how many steps a flow of many noise levels removes the noise of its samples, each of
                one pass and its gradient; the pipeline's own default if not given. 1 is the score step, the only one
                that a flow of one level has. Of a trajectory model one of the numbers that it was trained with (the pipeline's own,
                or its first one, if not given), each a pass for all tokens at once; then ``decoding`` is of its shallow transporter,
                which is inverted once, and callbacks get the states as that one has them.
            noise_level: to draw at, one of the trained ones; the highest if not given.
            walk: "ode", Euler's steps, or "sde", with fresh noise at each level; the pipeline's scheduler if not given. For
                two steps and more.

        Returns:
            `TARFlowPipelineOutput`, or with ``return_dict=False`` a tuple of its fields that are not None.

        Raises:
            ValueError: for arguments that do not fit the model or each other.
            FloatingPointError: for numbers that are not finite.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        factor, step_factor = resolve_temperatures(temperature, self.config.temperature, latents is not None)
        self.check_inputs(
            prompt, class_labels, negative_prompt, prompt_embeds, scale, callback_on_step_end_tensor_inputs
        )
        subjects = Subjects(
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            num_images=num_images,
            max_sequence_length=max_sequence_length,
        )
        subjects.check(self.flow.config.conditioning, scale, callback_on_step_end is not None)
        method = guidance_method or self.config.guidance_method
        guidance = Guidance(
            scale - 1, method, guidance_parts, guidance_annealed, attention_temperature, guidance_blocks
        )
        has_callback = callback_on_step_end is not None
        check_guided(self.flow.config.conditioning, guidance_scale, self.config.guidance_scale, guidance, has_callback)
        shape, aspect_ratio = resolve_size(self, height, width, aspect_ratio)
        tokens = shape[1] * shape[2] // self.flow.config.patch_size**2
        inversion = resolve_decoding(decoding, tolerance, segment, tokens)
        steps = trajectory_steps(self, num_inference_steps, decoding, denoise, guidance)
        denoise, decoder = self.check_outputs(denoise, output_type, decoder, decoding)
        level = resolve_level(self.noise_levels, noise_level)
        check_own_level(self.config.noise_std, level, inversion is None, decoder)
        asked = num_inference_steps if steps is None else None  # else they are those along the trajectory
        walk_steps = resolve_steps(self.noise_levels, asked, self.config.num_inference_steps, bool(denoise), level)
        if inversion is None:
            check_student_call(self.check_student(), scale, guidance, subjects.names_negative, shape)
        call = Sampling(
            subjects=subjects,
            device=self._execution_device,
            shape=shape,
            aspect_ratio=aspect_ratio,
            guidance_scale=scale,
            guidance=guidance,
            decoding=inversion,
            denoise=denoise,
            decoder=decoder,
            temperature=factor,
            step_temperature=step_factor,
            return_residual=return_residual,
            num_steps=steps,
            noise_level=level,
            walk_steps=walk_steps,
            walk=check_walk(walk, self.noise_levels, walk_steps, level),
            generator=generator,
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        with self.during(call):
            conditions = conditions_of(self, call)
            noise = self.prepare_latents(conditions.count, shape, call.device, generator, latents)
            noise = call.temperature * noise
            if steps is not None:
                drawn = draw_by_trajectory(self, call, conditions, noise, generator)
            else:
                drawn = (draw_by_student if call.by_student else draw_by_flow)(self, call, conditions, noise)
            errors = residuals(self, drawn, noise) if return_residual and not drawn.stopped else (None, None)
            images = pictures(self, call, conditions, drawn, output_type)
        self.maybe_free_model_hooks()
        output = TARFlowPipelineOutput(images=images, residual_max=errors[0], residual_mean=errors[1])
        return output if return_dict else output.to_tuple()
