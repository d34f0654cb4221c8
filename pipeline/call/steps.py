"""The steps of a call: conditions, then noise to latents by the flow or its student, then pictures.

Shapes: B images, C channels, h × w of the latents, L tokens of a caption, E numbers of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.decoding import sampling as flow_sampling
from tarflow.flows.decoding.method import residual
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.pipeline.call.callbacks import AfterStep, warn_beyond_promise
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.samples import check_finite_latents
from tarflow.pipeline.call.settings import Sampling
from tarflow.pipeline.call.student_sampling import student_samples


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the images of a call are drawn from, a row for each.

    Attributes:
        count: B.
        class_labels: indices (B,), or None.
        cond: encoded captions (B, L, E), or None.
        null_cond: those that guidance leads away from, (B, L, E), or None.
    """

    count: int
    class_labels: Tensor | None = None
    cond: Tensor | None = None
    null_cond: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples, and what they are the inverse of.

    Attributes:
        latents: (B, C, h, w); with the training noise, unless a student has removed it.
        noisy: what the flow would take back to the noise.
        condition, null_condition: of the flow's blocks.
        guidance: of all blocks, or of each in the order of ``flow.blocks``.
        stopped: a callback has ended the call before the last block.
        source: what ``noisy`` is the inverse of, (B, C, h, w); None for the call's noise.
        clean: the training noise is removed already.
    """

    latents: Tensor
    noisy: Tensor
    condition: Condition
    null_condition: Condition
    guidance: Guidance | list[Guidance]
    stopped: bool
    source: Tensor | None = None
    clean: bool = False


def conditions_of(pipe: FlowPipeline, call: Sampling) -> Conditions:
    """What each image is drawn from; captions are encoded, with guidance also negative ones."""
    kind, subjects = pipe.flow.config.conditioning, call.subjects
    if kind == "prefix":
        cond, null = encoded_captions(pipe, call, call.guidance.active and call.asks_flow)
        return Conditions(len(cond), cond=cond, null_cond=null)
    if kind == "none" or subjects.class_labels is None:
        return Conditions((subjects.num_images or 1) * subjects.num_images_per_prompt)
    indices = pipe.label_indices(subjects.class_labels)
    labels = torch.tensor(indices, device=call.device)
    labels = labels.repeat_interleave(subjects.num_images_per_prompt)
    return Conditions(len(labels), class_labels=labels)


def encoded_captions(pipe: FlowPipeline, call: Sampling, guided: bool) -> tuple[Tensor, Tensor | None]:
    """See `PromptEncoding.encode_prompt`; ``guided`` asks for the second result."""
    subjects = call.subjects
    return pipe.encode_prompt(
        subjects.prompt,
        call.device,
        subjects.num_images_per_prompt,
        guided,
        subjects.negative_prompt,
        subjects.prompt_embeds,
        subjects.negative_prompt_embeds,
        subjects.max_sequence_length,
        call.aspect_ratio,
    )


def null_condition(pipe: FlowPipeline, call: Sampling, conditions: Conditions) -> Condition:
    """What guidance leads the flow's blocks away from, also if a callback turns it on later."""
    embeds = conditions.null_cond
    if pipe.flow.config.conditioning == "prefix" and embeds is None:
        embeds = encoded_captions(pipe, call, True)[1]
    pipe.run_offload_hook(pipe.flow)
    return pipe.flow.condition(None, embeds, conditions.count, call.noise_level)


def block_conditions(pipe: FlowPipeline, call: Sampling, conditions: Conditions) -> tuple[Condition, Condition]:
    """What the flow's blocks see, and with guidance what it leads them away from."""
    pipe.run_offload_hook(pipe.flow)
    condition = pipe.flow.condition(conditions.class_labels, conditions.cond, conditions.count, call.noise_level)
    return condition, null_condition(pipe, call, conditions) if call.guidance.active else None


def draw_by_flow(pipe: FlowPipeline, call: Sampling, conditions: Conditions, noise: Tensor) -> Drawn:
    """Noise (B, C, h, w) through the flow's inverse, block after block."""
    assert call.decoding is not None
    condition, null = block_conditions(pipe, call, conditions)
    with pipe.progress_bar(total=call.drawing_steps(pipe.flow)) as progress:
        after_block = AfterStep(pipe, progress, call, pipe.flow, lambda: null_condition(pipe, call, conditions))
        pipe.run_offload_hook(pipe.flow)
        methods, timed = pipe.resolve_decoding(call.decoding, noise, condition, null, call.guidance)
        pipe._decodings = after_block.decodings = methods
        warn_beyond_promise(methods, call.guidance_scale)
        fast = pipe.usable_fast_steps()
        x, _ = flow_sampling.generate(
            pipe.flow, noise, condition, null, call.guidance, after_block, methods, fast, timed
        )
    return Drawn(x, x, condition, after_block.null(null), after_block.used[::-1], after_block.stopped)


def draw_by_student(pipe: FlowPipeline, call: Sampling, conditions: Conditions, noise: Tensor) -> Drawn:
    """Noise (B, C, h, w) through one pass of the student."""
    student = pipe.student
    assert student is not None  # the call's arguments were checked
    condition, null = block_conditions(pipe, call, conditions) if call.asks_flow else (None, None)
    with pipe.progress_bar(total=1) as progress:
        after_pass = AfterStep(pipe, progress, call, student)
        pipe.run_offload_hook(student)
        labels, cond, weight = conditions.class_labels, conditions.cond, call.guidance_scale - 1
        latents, noisy = student_samples(student, noise, labels, cond, weight, pipe.compiled_student())
        check_finite_latents(latents, "the student")
        changed = after_pass(0, latents).latents
    return Drawn(latents if changed is None else changed, noisy, condition, null, call.guidance, after_pass.stopped)


def residuals(pipe: FlowPipeline, drawn: Drawn, noise: Tensor) -> tuple[Tensor, Tensor]:
    """|f(x) − z| of each sample, the largest and the mean, (B,) each."""
    pipe.run_offload_hook(pipe.flow)
    source = noise if drawn.source is None else drawn.source
    return residual(pipe.flow, drawn.noisy, source, drawn.condition, drawn.null_condition, drawn.guidance)


def clean_latents(pipe: FlowPipeline, call: Sampling, conditions: Conditions, latents: Tensor) -> Tensor:
    """Samples without their noise; several steps from level to level are steps of the call."""
    given = (latents, call.denoise, conditions.class_labels, conditions.cond)
    if call.walk_steps < 1 or call.noise_level is None:
        return pipe.remove_noise(*given)
    walk = (call.noise_level, call.walk_steps, call.walk, call.generator)
    if call.walk_steps == 1:
        return pipe.remove_noise(*given, *walk)
    first = call.drawing_steps(pipe.flow)
    with pipe.progress_bar(total=call.walk_steps) as progress:
        after = AfterStep(pipe, progress, call, pipe.flow)
        return pipe.remove_noise(*given, *walk, lambda index, step, x: after.after_level(first + index, step, x))


def pictures(pipe: FlowPipeline, call: Sampling, conditions: Conditions, drawn: Drawn, output_type: str) -> Any:
    """Samples without their noise, or as they are if a callback has ended the call; decoded, unless latents are asked
    for."""
    latents = drawn.latents
    if not drawn.stopped and not drawn.clean:
        latents = clean_latents(pipe, call, conditions, latents)
        check_finite_latents(latents, "removing the training noise" if call.denoise else "the model")
    if output_type == "latent":
        return latents
    images = pipe.decode_latents(latents, call.decoder)
    return pipe.image_processor.postprocess(images, output_type=output_type)
