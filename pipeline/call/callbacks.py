"""What a call's callback sees of the pipeline, and what it may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from threading import local
from typing import Any

from diffusers.utils import logging
from torch import Tensor, nn

from tarflow.flows.decoding.method import Decoding, beyond_promise
from tarflow.flows.decoding.sampling import Change
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.pipeline.call.parts import PipelineParts
from tarflow.pipeline.call.samples import check_finite_latents
from tarflow.pipeline.call.settings import Sampling

logger: Any = logging.get_logger(__name__)


OF_THREAD = local()


def calling_back() -> set[int]:
    """The pipelines, by ``id``, that are within a callback in this thread: a call of theirs there, a preview for example, is
    made in the midst of another."""
    if not hasattr(OF_THREAD, "pipes"):
        OF_THREAD.pipes = set()
    return OF_THREAD.pipes


class CallState(PipelineParts):
    """`TARFlowPipeline`'s attributes that are a call's own; before the first call they are the defaults."""

    _interrupt = False
    _num_timesteps = 0
    _guidance_scale: float | None = None

    @contextmanager
    def during(self, call: Sampling) -> Iterator[None]:
        """Set them for a call. After one that another call's callback makes they are that one's again."""
        before = self._guidance_scale, self._interrupt, self._num_timesteps
        self._guidance_scale, self._interrupt = call.guidance_scale, False
        self._num_timesteps = call.steps(self.flow)
        try:
            yield
        finally:
            if id(self) in calling_back():
                self._guidance_scale, self._interrupt, self._num_timesteps = before

    @contextmanager
    def within_callback(self, scale: float, steps: int) -> Iterator[None]:
        """While a callback is called, they are those of its own call, whatever other threads draw."""
        pipes, outermost = calling_back(), id(self) not in calling_back()
        self._guidance_scale, self._num_timesteps = scale, steps
        pipes.add(id(self))
        try:
            yield
        finally:
            if outermost:
                pipes.discard(id(self))

    @property
    def guidance_scale(self) -> float:
        """Of the call. A callback sets ``_guidance_scale`` for the blocks to come; 1 or less is off."""
        return self.config.guidance_scale if self._guidance_scale is None else self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is on."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many steps the call takes: one for each block, or one with a student, and those of a walk of several steps
        from noise level to noise level."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``_interrupt``, which ends the call after the current step."""
        return self._interrupt


def warn_beyond_promise(decodings: Sequence[Decoding], guidance_scale: float) -> None:
    """Say, once for each scale, if guidance is stronger than what tolerances promise; see `beyond_promise`."""
    if warning := beyond_promise(decodings, guidance_scale):
        logger.warning_once(warning)


class AfterStep:
    """Tells a call's callback of each block, or of a student's pass, or of a step down from a noise level, and the blocks
    to come of what it changed.

    Args:
        pipe: the pipeline, whose `CallState` is the call's.
        progress: a progress bar.
        call: the call, with its callback and its guidance.
        module: what the callback may have taken from its device, by decoding a preview.
        null_condition: makes the condition that guidance leads away from, if it was not needed at the start.

    Attributes:
        decodings: how each block is inverted, in the order of ``flow.blocks``; none with a student.
        guidance: of the blocks to come.
        used: the guidance of each block that was inverted, in the order of inversion.
        stopped: blocks are left that were not inverted.
        added: the null condition, if a callback turned guidance on.
    """

    def __init__(
        self,
        pipe: CallState,
        progress: Any,
        call: Sampling,
        module: nn.Module | None,
        null_condition: Callable[[], Condition] | None = None,
    ):
        self.pipe, self.progress, self.call, self.module = pipe, progress, call, module
        self.guidance, self.null_condition = call.guidance, null_condition
        self.scale, self.steps = call.guidance_scale, call.steps(pipe.flow)
        self.decodings: Sequence[Decoding] = ()
        self.used: list[Guidance] = []
        self.stopped = False
        self.added: Condition = None

    def __call__(self, index: int, latents: Tensor) -> Change:
        """After step ``index`` of the call, 0 for the first; latents (B, C, h, w)."""
        self.used.append(self.guidance)
        self.progress.update()
        if self.call.callback is None:
            return Change()
        returned = self.returned(index, index, latents)
        before = self.guidance
        null = self.change_guidance(self.scale)
        if self.guidance != before:
            warn_beyond_promise(self.decodings[: max(len(self.decodings) - index - 1, 0)], self.scale)  # those to come
        self.pipe.run_offload_hook(self.module)
        self.stopped = bool(self.pipe.interrupt) and index + 1 < self.steps
        return Change(returned.get("latents"), self.guidance, null, self.stopped)

    def after_level(self, index: int, timestep: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
        """As `AfterLevel`: latents for the level to come, and whether the callback has ended the call."""
        self.progress.update()
        if self.call.callback is None:
            return latents, False
        changed = self.returned(index, timestep, latents).get("latents")
        self.pipe.run_offload_hook(self.module)
        return latents if changed is None else changed, bool(self.pipe.interrupt)

    def returned(self, index: int, timestep: Any, latents: Tensor) -> dict[str, Any]:
        """What the callback returns; nothing is an empty dictionary."""
        callback, tensors = self.call.callback, self.call.callback_tensors
        assert callback is not None
        wanted = tensors is None or "latents" in tensors
        with self.pipe.within_callback(self.scale, self.steps):
            found = callback(self.pipe, index, timestep, {"latents": latents} if wanted else {})
            scale = self.pipe.guidance_scale
        scale = scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 else scale
        if isinstance(scale, bool) or not isinstance(scale, Real) or not scale < math.inf:
            raise ValueError(f"the callback set _guidance_scale to {scale!r}, expected a number")
        self.scale = float(scale)
        if found is not None and not isinstance(found, Mapping):
            raise ValueError(
                f"the callback returned {type(found).__name__}, expected nothing, or a dictionary that may have latents"
            )
        changed = (found or {}).get("latents")
        if changed is not None:
            check_changed(changed, latents)
        return dict(found or {})

    def change_guidance(self, scale: float) -> Condition:
        """Take over the scale that a callback may have set; returns the null condition if it is needed now."""
        before, self.guidance = self.guidance, replace(self.guidance, weight=max(scale - 1.0, 0.0))
        if self.guidance.active and not before.active and self.added is None and self.null_condition is not None:
            self.added = self.null_condition()
        return self.added

    def null(self, first: Condition) -> Condition:
        """The null condition that was used at last; ``first`` is the call's."""
        return first if self.added is None else self.added


def check_changed(changed: Any, latents: Tensor) -> None:
    """Whether what a callback returns can take the place of ``latents``."""
    if not isinstance(changed, Tensor):
        raise ValueError(f"the callback returned latents that are a {type(changed).__name__}, expected a tensor")
    if changed.shape != latents.shape:
        raise ValueError(
            f"the callback returned latents of the shape {tuple(changed.shape)}, expected {tuple(latents.shape)}, as it was "
            "given them"
        )
    check_finite_latents(changed, "the callback")
