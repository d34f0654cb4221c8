"""What a call is asked for, resolved once: nothing of it is looked up or checked again by the steps that follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from tarflow.flows.decoding.method import DEFAULT_TOLERANCE, FAST_TOLERANCE, Decoding
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.trajectory.kinds import FlowModel
from tarflow.pipeline.call.aspect import aspect_size, nearest_aspect_ratio
from tarflow.pipeline.call.checks import check_caption_options, check_counts, check_decoding, check_negative, names_text
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.inputs import Labels
from tarflow.pipeline.call.parts import PipelineParts

logger: Any = logging.get_logger(__name__)

#: By this factor the number of pixels may differ from that of training without a warning.
FAR = 1.5
#: Segments of "gs_jacobi", unless a call says how long they are.
SEGMENTS = 4
#: A user's function of pipeline, step, step and tensors by name; its tensors, if any, take the place of those.
Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subjects:
    """What the images of a call are of, as the caller names it; see `TARFlowPipeline` for each."""

    prompt: str | list[str] | None = None
    class_labels: Labels | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    num_images_per_prompt: int = 1
    num_images: int | None = None
    max_sequence_length: int | None = None

    @property
    def names_negative(self) -> bool:
        """Whether the caller says what guidance leads away from."""
        return names_text(self.negative_prompt) or self.negative_prompt_embeds is not None

    def check(self, conditioning: str, guidance_scale: float, has_callback: bool) -> None:
        """Whether each of them can have an effect on a flow with this conditioning.

        Raises:
            ValueError: that names the one that cannot.
        """
        check_counts(conditioning, self.num_images, self.num_images_per_prompt)
        check_negative(conditioning, self.negative_prompt, self.negative_prompt_embeds, guidance_scale, has_callback)
        check_caption_options(conditioning, self.max_sequence_length, self.prompt_embeds)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """All that decides what a call makes of its noise.

    Attributes:
        subjects: what the images are of.
        device: where the call computes.
        shape: channels, height and width of the latents.
        aspect_ratio: that captions name.
        guidance_scale: 1 is off; ``guidance`` is the same with its method.
        decoding: how blocks are inverted, all alike or each; None is one pass of the student.
        denoise: True (the score step), "learned" or False.
        decoder: "vae" or "finetuned".
        temperature: factor on the prior noise.
        step_temperature: factor on the noise that the steps of a trajectory model draw themselves.
        return_residual: whether to tell how exact each sample is.
        num_steps: of a trajectory model; None inverts a flow's blocks.
        noise_level: that the flow draws at; None for a flow of one level.
        walk_steps: in how many steps its score removes the noise; 0 if it does not.
        walk: "ode", "sde", or None for the pipeline's scheduler.
        generator: of the noise.
        callback, callback_tensors: called after each step with these tensors; None is all.
    """

    subjects: Subjects
    device: torch.device
    shape: tuple[int, int, int]
    aspect_ratio: str
    guidance_scale: float
    guidance: Guidance
    decoding: Decoding | list[Decoding] | None
    denoise: bool | str
    decoder: str
    temperature: float = 1.0
    step_temperature: float = 1.0
    return_residual: bool = False
    num_steps: int | None = None
    noise_level: float | None = None
    walk_steps: int = 1
    walk: str | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    callback: Callback | None = None
    callback_tensors: list[str] | None = None

    @property
    def by_student(self) -> bool:
        """Whether the student draws instead of the flow."""
        return self.decoding is None

    @property
    def asks_flow(self) -> bool:
        """Whether the flow itself sees the condition; a student needs it, and a second one, for the residual alone."""
        return not self.by_student or self.return_residual

    def drawing_steps(self, flow: FlowModel) -> int:
        """Steps from noise to a sample: one for each block, or step of a trajectory, or one of the student."""
        if self.num_steps is not None:
            return self.num_steps
        return 1 if self.by_student else len(flow.blocks)

    def steps(self, flow: FlowModel) -> int:
        """How often the callback is called: after each step of the drawing, and of a walk of several steps."""
        return self.drawing_steps(flow) + (self.walk_steps if self.walk_steps > 1 else 0)


def resolve_decoding(
    decoding: str | Decoding | list[Decoding], tolerance: float | None, segment: int | None, tokens: int
) -> Decoding | list[Decoding] | None:
    """How blocks are inverted, from a call's arguments; None is one pass of the student.

    Args:
        decoding, tolerance, segment: as of the call; without a segment "gs_jacobi" has `SEGMENTS` of them.
        tokens: of the latents.

    Raises:
        ValueError: for an unknown way, or a tolerance or segment that is not for it.
    """
    check_decoding(decoding, tolerance, segment)
    if not isinstance(decoding, str):
        return decoding
    if decoding == STUDENT:
        return None
    if decoding == "fast":
        return Decoding("auto", FAST_TOLERANCE)
    if decoding == "gs_jacobi" and segment is None:
        segment = -(-tokens // SEGMENTS)
    return Decoding(decoding, DEFAULT_TOLERANCE if tolerance is None else tolerance, segment)


def check_temperature(temperature: float) -> float:
    """A factor on the prior noise.

    Raises:
        ValueError: if it is not a positive number.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    return float(temperature)


def resolve_temperatures(temperature: float | None, default: float, latents_given: bool) -> tuple[float, float]:
    """The factors that a call takes, on the prior noise and on that of a trajectory model's steps: its own, or the
    pipeline's for noise that the call draws, as z of a picture leads back to it only as it is.

    Raises:
        ValueError: as of `check_temperature`.
    """
    factor = check_temperature(default if temperature is None else temperature)
    return (1.0 if latents_given and temperature is None else factor), factor


def resolve_size(
    pipe: PipelineParts, height: int | None, width: int | None, aspect_ratio: str | None
) -> tuple[tuple[int, int, int], str]:
    """The latents' channels, height and width, and the aspect ratio that captions name.

    Raises:
        ValueError: if the model cannot draw this size, or it is said twice.
    """
    if aspect_ratio is not None:
        if height is not None or width is not None:
            raise ValueError("give either aspect_ratio or height and width, not both")
        config, factor = pipe.flow.config, pipe.codec.factor
        height, width = aspect_size(aspect_ratio, config.sample_size * factor, factor * config.patch_size)
    shape = pipe.latent_shape(height, width)
    warn_of_size(shape, pipe.flow.config.sample_size, pipe.codec.factor)
    return shape, aspect_ratio or nearest_aspect_ratio(*shape[1:])


def warn_of_size(shape: tuple[int, int, int], trained: int, factor: int) -> None:
    """Say that images of much more or fewer pixels than the model was trained on are rarely pictures.

    Args:
        shape: of the latents.
        trained: side of the latents that the model was trained on.
        factor: pixels per latent position along each side.
    """
    rows, columns = shape[1:]
    if not trained**2 / FAR < rows * columns < trained**2 * FAR:
        side = trained * factor
        logger.warning_once(
            f"the model was trained on pictures of about {side} × {side} pixels; at {columns * factor} × {rows * factor} it "
            "draws little that can be recognized: take its own size, and resize the pictures"
        )
