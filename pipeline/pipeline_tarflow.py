"""TARFlowPipeline: captions, class labels or nothing → images, in the habits of Diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tarflow.flows import sampling
from tarflow.flows.calibration import CalibrationStore
from tarflow.flows.decoding import DEFAULT_TOLERANCE, FAST_TOLERANCE, Decoding, residual
from tarflow.flows.fast_step import FastSteps
from tarflow.flows.guidance import Guidance
from tarflow.flows.model import TARFlowModel
from tarflow.flows.student import StudentModel
from tarflow.pipeline import checks, one_pass
from tarflow.pipeline.aspect import aspect_size, nearest_aspect_ratio
from tarflow.pipeline.editing import ExactFlowTools
from tarflow.pipeline.hub import PipelineFiles
from tarflow.pipeline.inversion import BlockInversion
from tarflow.pipeline.offload import Offloading
from tarflow.pipeline.prompts import PromptEncoding
from tarflow.pipeline.samples import SampleDecoding
from tarflow.pipeline.text_options import TextOptions
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
    ExactFlowTools, PromptEncoding, BlockInversion, SampleDecoding, Offloading, PipelineFiles, DiffusionPipeline
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
        student: a network that makes a sample in one pass, see ``train_student.py``, or None.
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
        self.codec = LatentCodec(vae, latents_mean, latents_std)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.codec.factor)
        self._fast_steps: FastSteps | None = None
        self._calibration_store: CalibrationStore | None = None
        self._calibrated_state: tuple[TARFlowModel, list[int]] | None = None
        self._checked_student: tuple[StudentModel, tuple] | None = None
        self._fast_student: Callable[..., Any] | None = None
        self.labels = {name.lower(): int(index) for index, name in (id2label or {}).items()}

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
        tolerance: float = DEFAULT_TOLERANCE,
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
            decoder: "vae", the autoencoder's, or "finetuned" (see ``scripts/finetune_decoder.py``), which goes with no
                other removal of noise. None is the autoencoder's if ``denoise`` names a step, else the pipeline's own
                default.
            output_type: "pil", "np", "pt" or "latent"; latents for the finetuned decoder still have their noise.
            callback_on_step_end: called after each block as (pipeline, index, index, {"latents": …}); the dictionary
                that it returns may replace the latents.

            decoding: "student", one pass of the pipeline's student instead of the flow's inverse; or how blocks are
                inverted: "auto" (the fastest on this device, found by a short calibration at the
                first call with a batch size, see `calibrations`), "sequential" (exact to rounding), "jacobi",
                "gs_jacobi" with ``segment`` tokens, or "fast" ("auto" with a tolerance of `FAST_TOLERANCE`); or a
                `Decoding` for all blocks, or one for each. With the default ``tolerance`` latents, which are of about
                unit size, agree with sequential ones to 1e-3, with "fast" to 0.1; ``return_residual`` tells.
            return_residual: also return how exact each sample is, at the cost of one parallel pass.
            temperature: factor on the prior noise; below 1 pictures are likelier and less varied.

        Returns:
            `TARFlowPipelineOutput`, or with ``return_dict=False`` a tuple of its fields that are not None.

        Raises:
            ValueError: for arguments that do not fit the model or each other.
            FloatingPointError: for numbers that are not finite.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        self.check_inputs(
            prompt, class_labels, negative_prompt, prompt_embeds, scale, callback_on_step_end_tensor_inputs
        )
        learned = decoding == one_pass.STUDENT
        method = guidance_method or self.config.guidance_method
        guidance = Guidance(scale - 1, method, guidance_parts, guidance_annealed, attention_temperature)
        guided = guidance.weight > 0
        denoise, decoder = self.check_outputs(denoise, output_type, decoder, decoding)
        if learned:
            one_pass.check_call(self, scale, guidance, not (negative_prompt is None and negative_prompt_embeds is None))
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if decoding == "fast":
            decoding, tolerance = "auto", FAST_TOLERANCE
        if isinstance(decoding, str) and not learned:
            decoding = Decoding(decoding, tolerance, segment)
        if aspect_ratio is not None:
            if height is not None or width is not None:
                raise ValueError("give either aspect_ratio or height and width, not both")
            side, unit = (
                self.flow.config.sample_size * self.codec.factor,
                self.codec.factor * self.flow.config.patch_size,
            )
            height, width = aspect_size(aspect_ratio, side, unit)
        shape = self.latent_shape(height, width)
        aspect_ratio = aspect_ratio or nearest_aspect_ratio(*shape[1:])
        device = self._execution_device
        guided = guided and (not learned or return_residual)  # a student needs no second condition

        # 1. Conditions
        kind = self.flow.config.conditioning
        labels = cond = null = None
        if kind == "prefix":
            cond, null = self.encode_prompt(
                prompt,
                negative_prompt,
                device,
                num_images_per_prompt,
                guided,
                prompt_embeds,
                negative_prompt_embeds,
                max_sequence_length,
                aspect_ratio,
            )
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
        condition = null_condition = None
        if not learned or return_residual:
            self.run_offload_hook(self.flow)
            condition = self.flow.condition(labels, cond, batch)
            null_condition = self.flow.condition(None, null, batch) if guided else None
        with self.progress_bar(total=1 if learned else len(self.flow.blocks)) as progress:

            def after_block(index: int, block_latents: Tensor) -> Tensor | None:
                progress.update()
                if callback_on_step_end is None:
                    return None
                wanted = callback_on_step_end_tensor_inputs
                tensors = {"latents": block_latents} if wanted is None or "latents" in wanted else {}
                return (callback_on_step_end(self, index, index, tensors) or {}).get("latents")

            if learned:
                self.run_offload_hook(self.student)
                x, exact = one_pass.draw(self.student, noise, labels, cond, scale - 1, self._fast_student)
                changed = after_block(0, x)
                x = x if changed is None else changed
            else:
                methods = self.resolve_decoding(decoding, noise, condition, null_condition, guidance)
                x, _ = sampling.generate(
                    self.flow, noise, condition, null_condition, guidance, after_block, methods, self._fast_steps
                )
                exact = x
        errors = (None, None)
        if return_residual:
            errors = residual(self.flow, exact, noise, condition, null_condition, guidance)

        # 4. Training noise away, then pixels
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
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"got {len(generator)} generators for {batch} images; give one, or one for each image")
        if latents is None:
            noise = randn_tensor((batch, *shape), generator=generator, device=device, dtype=torch.float32)
        else:
            if tuple(latents.shape) != (batch, *shape):
                raise ValueError(f"latents must have the shape {(batch, *shape)}, got {tuple(latents.shape)}")
            noise = latents.to(device=device, dtype=torch.float32)
        return self.flow.scale_noise(noise)
