"""TARFlowPipeline: captions, class labels or nothing → images, in the habits of Diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tarflow.common.progress import progress_bar
from tarflow.flows.decoding import sampling
from tarflow.flows.decoding.calibration_store import CalibrationStore
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import DEFAULT_TOLERANCE, FAST_TOLERANCE, Decoding, residual
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel
from tarflow.flows.student import StudentModel
from tarflow.pipeline.call import checks as call_checks
from tarflow.pipeline.call import inputs as checks
from tarflow.pipeline.call import student_sampling as one_pass
from tarflow.pipeline.call.aspect import aspect_size, nearest_aspect_ratio
from tarflow.pipeline.call.callbacks import AfterBlock, CallState, warn_beyond_promise
from tarflow.pipeline.call.components import Components
from tarflow.pipeline.call.inversion import BlockInversion
from tarflow.pipeline.call.prompts import PromptEncoding
from tarflow.pipeline.call.samples import SampleDecoding
from tarflow.pipeline.editing.tools import ExactFlowTools
from tarflow.pipeline.loading.hub import PipelineFiles
from tarflow.pipeline.loading.offload import Offloading
from tarflow.pipeline.lora.lora import LoraLoading
from tarflow.pipeline.text.options import TextOptions
from tarflow.vae.codec import LatentCodec
from tarflow.vae.decoder import LatentDecoder

Labels = int | str | list[int | str]


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


class TARFlowPipeline(
    ExactFlowTools,
    PromptEncoding,
    BlockInversion,
    SampleDecoding,
    CallState,
    Components,
    Offloading,
    LoraLoading,
    PipelineFiles,
    DiffusionPipeline,
):
    """Draws images with a latent flow.

    Args:
        flow: the model.
        vae: an autoencoder with Diffusers' ``encode`` and ``decode``, or None for a flow on pixels.
        text_encoder, tokenizer: for captions, or None.
        latents_mean, latents_std: per channel of the autoencoder's scaled latents; None is 0 and 1.
        noise_std: standard deviation of the training noise, which one score step removes.
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
    """

    model_cpu_offload_seq = "text_encoder->flow->student->vae->finetuned_decoder"
    _optional_components = ["vae", "text_encoder", "tokenizer", "finetuned_decoder", "student"]  # noqa: RUF012 (the library's interface)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        flow: TARFlowModel,
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
        finetuned_decoder: LatentDecoder | None = None,
        denoise: bool = True,
        student: StudentModel | None = None,
        text_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            flow=flow,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            finetuned_decoder=finetuned_decoder,
            student=student,
        )
        self.register_to_config(
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
            text_options=TextOptions.of(text_options).changed or None,
        )
        self._fast_steps: FastSteps | None = None
        self._fast_student: tuple[StudentModel, Callable[..., Any]] | None = None
        self._calibration_store: CalibrationStore | None = None
        self._calibrated_state: tuple | None = None
        self._decodings: list[Decoding] | None = None
        self._checked_student: tuple[StudentModel, tuple] | None = None
        LatentCodec(vae, latents_mean, latents_std)  # an error for statistics that cannot be

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        denoise: bool | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
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
        temperature: float = 1.0,
    ) -> TARFlowPipelineOutput | tuple:
        """Draw images; one step is the inversion of one flow block.

        Args:
            prompt: captions, for a text-conditioned model.
            class_labels: indices or names, for a class-conditioned one.
            negative_prompt: what guidance leads away from; the empty caption if not given.
            height, width: of the images; the training size if not given. ``aspect_ratio`` instead, for example
                "16:9" (see `ASPECT_RATIOS`), keeps the training size's area.
            num_images_per_prompt: images of each caption or label; ``num_images``: of an unconditional model.
            guidance_scale: 1 is off; the pipeline's own default if not given.
            guidance_method: "gaussian" (STARFlow) or "linear" (TARFlow); the pipeline's own default if not given; with ``guidance_parts`` "ab", "a" or "b",
                ``guidance_annealed`` and ``attention_temperature``: see `Guidance`.
            generator: one, or a list with one for each image, which then does not depend on the others.
            latents: the prior noise (B, C, h, w) instead of a draw.
            prompt_embeds, negative_prompt_embeds: encoded captions (B, L, E) instead of texts.
            denoise: how to remove the training noise before decoding: True or "score" by one score step, "learned" by
                the model's learned denoiser, False not at all. None is the score step with the autoencoder's decoder
                (nothing if the pipeline's setting ``denoise`` is False) and nothing with the finetuned one, which
                removes the noise itself.
            decoder: "vae", the autoencoder's, or "finetuned" (see ``tarflow finetune-decoder``), which goes with no
                other removal of noise. None is the autoencoder's if ``denoise`` names a step, else the pipeline's own
                default.
            output_type: "pil", "np", "pt" or "latent"; latents for the finetuned decoder still have their noise.
            callback_on_step_end: called after each block as (pipeline, index, index, {"latents": …}); the dictionary
                that it returns may replace the latents. It may set ``_guidance_scale`` of the pipeline for the blocks to
                come, or ``_interrupt`` to end the call: pictures are then what the latents are at that moment, with no
                noise removed. See `CallState`.
            decoding: "student", one pass of the pipeline's student instead of the flow's inverse; or how blocks are
                inverted: "auto" (the fastest on this device, found by a short calibration at the first call with a batch
                size, see `calibrations`; sequential where weights are fetched for each use), "sequential" (exact to
                rounding), "jacobi", "gs_jacobi" with ``segment`` tokens, or "fast" ("auto" with a tolerance of `FAST_TOLERANCE`); or a
                `Decoding` for all blocks, or one for each. With the default ``tolerance`` latents, which are of about
                unit size, agree with exact ones to 1e-3 up to a guidance scale of 3, with "fast" to 0.1 up to 6; stronger
                guidance magnifies errors and is warned of; ``return_residual`` tells.
            return_residual: also return how exact each sample is, at the cost of one parallel pass.
            temperature: factor on the prior noise; below 1 pictures are likelier and less varied.

        Returns:
            `TARFlowPipelineOutput`, or with ``return_dict=False`` a tuple of its fields that are not None.

        Raises:
            ValueError: for arguments that do not fit the model or each other.
            FloatingPointError: for numbers that are not finite.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt, class_labels, negative_prompt, prompt_embeds, scale, callback_on_step_end_tensor_inputs
        )
        kind, learned = self.flow.config.conditioning, decoding == one_pass.STUDENT
        call_checks.check_counts(kind, num_images, num_images_per_prompt)
        call_checks.check_negative(
            kind, negative_prompt, negative_prompt_embeds, scale, callback_on_step_end is not None
        )
        call_checks.check_caption_options(kind, max_sequence_length)
        call_checks.check_decoding(decoding, tolerance, segment)
        method = guidance_method or self.config.guidance_method
        guidance = Guidance(scale - 1, method, guidance_parts, guidance_annealed, attention_temperature)
        denoise, decoder = self.check_outputs(denoise, output_type, decoder, decoding)
        if learned:
            one_pass.check_call(self, scale, guidance, not (negative_prompt is None and negative_prompt_embeds is None))
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
        if decoding == "fast":
            decoding, tolerance = "auto", FAST_TOLERANCE
        if isinstance(decoding, str) and not learned:
            decoding = Decoding(decoding, tolerance, segment)
        if aspect_ratio is not None:
            if height is not None or width is not None:
                raise ValueError("give either aspect_ratio or height and width, not both")
            unit = self.codec.factor * self.flow.config.patch_size
            height, width = aspect_size(aspect_ratio, self.flow.config.sample_size * self.codec.factor, unit)
        shape = self.latent_shape(height, width)
        device = self._execution_device
        self._guidance_scale, self._interrupt = scale, False
        self._num_timesteps = 1 if learned else len(self.flow.blocks)
        guided = guidance.active and (not learned or return_residual)  # a student needs no second condition

        # 1. Conditions
        labels = cond = null = None

        def encode(both: bool) -> tuple[Tensor, Tensor | None]:
            return self.encode_prompt(
                prompt,
                device,
                num_images_per_prompt,
                both,
                negative_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                max_sequence_length,
                aspect_ratio or nearest_aspect_ratio(*shape[1:]),
            )

        if kind == "prefix":
            cond, null = encode(guided)
            batch = len(cond)
        elif kind == "none":
            batch = (num_images or 1) * num_images_per_prompt
        else:
            indices = self.label_indices(class_labels)
            labels = torch.tensor(indices, device=device).repeat_interleave(num_images_per_prompt)
            batch = len(labels)

        # 2. Noise
        noise = temperature * self.prepare_latents(batch, shape, device, generator, latents)

        # 3. Noise to latents, block after block or by the student
        def null_condition() -> Tensor | None:
            """What guidance leads away from, also if a callback turns it on later."""
            embeds = encode(True)[1] if kind == "prefix" and null is None else null
            self.run_offload_hook(self.flow)
            return self.flow.condition(None, embeds, batch)

        condition = away = None
        if not learned or return_residual:
            self.run_offload_hook(self.flow)
            condition = self.flow.condition(labels, cond, batch)
            away = null_condition() if guided else None
        module = self.student if learned else self.flow
        with self.progress_bar(total=self._num_timesteps) as progress:
            after_block = AfterBlock(
                self,
                progress,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                module,
                guidance,
                None if learned else null_condition,
            )
            self.run_offload_hook(module)
            if learned:
                x, exact = one_pass.draw(self.student, noise, labels, cond, scale - 1, self.compiled_student())
                changed = after_block(0, x).latents
                x = x if changed is None else changed
            else:
                methods, timed = self.resolve_decoding(decoding, noise, condition, away, guidance)
                self._decodings = after_block.decodings = methods
                warn_beyond_promise(methods, scale)
                x, _ = sampling.generate(
                    self.flow, noise, condition, away, guidance, after_block, methods, self.usable_fast_steps(), timed
                )
                exact = x
        errors = (None, None)
        if return_residual and not after_block.stopped:
            self.run_offload_hook(self.flow)
            used = guidance if learned else after_block.used[::-1]
            errors = residual(self.flow, exact, noise, condition, after_block.null(away), used)

        # 4. Training noise away, then pixels
        if not after_block.stopped:
            x = self.remove_noise(x, denoise, labels, cond)
        images: Any = x
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(x, decoder), output_type=output_type)
        self.maybe_free_model_hooks()
        output = TARFlowPipelineOutput(images=images, residual_max=errors[0], residual_mean=errors[1])
        return output if return_dict else output.to_tuple()

    def check_inputs(
        self,
        prompt: Any,
        class_labels: Any,
        negative_prompt: Any,
        prompt_embeds: Any,
        guidance_scale: float,
        callback_tensor_inputs: list[str] | None,
    ) -> None:
        """One sentence for each way in which arguments do not fit the model or each other."""
        checks.check_inputs(self.flow.config, prompt, class_labels, negative_prompt, prompt_embeds, guidance_scale)
        checks.check_callback(callback_tensor_inputs, self._callback_tensor_inputs)

    def check_outputs(
        self, denoise: bool | str | None, output_type: str, decoder: str | None = None, decoding: Any = None
    ) -> tuple[bool | str, str]:
        """Whether the pipeline can do what is asked of its samples, and what that is: ``denoise`` as True (the score
        step), False or "learned", and ``decoder`` as "vae" or "finetuned"; ``decoding`` as of a call."""
        if decoding == one_pass.STUDENT and not one_pass.noise_left(self, denoise, decoder):
            denoise, decoder = False, "vae"
        config, pixels = self.flow.config, self.vae is None
        checks.check_output_type(config, output_type, pixels)
        finetuned = self.finetuned_decoder is not None
        default = self.config.decoder, self.config.denoise
        return checks.resolve_denoising(config, denoise, decoder, default, pixels, finetuned)

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> Any:
        """A bar with the options of ``set_progress_bar_config``, see `tarflow.common.progress.progress_bar`.

        Raises:
            ValueError: if there is neither an iterable nor a total.
        """
        if iterable is None and total is None:
            raise ValueError("a progress bar needs an iterable or a total")
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        options = {"disable": not is_first, **getattr(self, "_progress_bar_config", {})}
        return progress_bar(iterable, total=total, **options)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Channels, height and width of the latents for an image size."""
        return checks.latent_shape(self.flow.config, self.codec.factor, height, width)

    def label_indices(self, class_labels: Labels) -> list[int]:
        """Class labels, given by index or name, as indices."""
        return checks.label_indices(class_labels, self.labels, self.flow.config.num_classes)

    def prepare_latents(
        self,
        batch: int,
        shape: tuple[int, int, int],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """A draw from the flow's prior, (B, C, h, w), float32."""
        self.run_offload_hook(self.flow)  # the prior's variance is its
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"got {len(generator)} generators for {batch} images; give one, or one for each image")
        if latents is None:
            noise = randn_tensor((batch, *shape), generator=generator, device=device, dtype=torch.float32)
        else:
            if tuple(latents.shape) != (batch, *shape):
                raise ValueError(f"latents must have the shape {(batch, *shape)}, got {tuple(latents.shape)}")
            noise = latents.to(device=device, dtype=torch.float32)
        return self.flow.scale_noise(noise)
