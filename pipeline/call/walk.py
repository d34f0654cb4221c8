"""From the highest noise level down: a flow that is trained for many levels removes the noise of its own samples by its
score, level by level (iTARFlow, arXiv 2604.20041).

Shapes: B images, C channels, h × w of the latents.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from tarflow.pipeline.call.choices import WALKS
from tarflow.pipeline.call.scheduler import EDMAncestralScheduler

#: Called after each step with its number, its timestep and the latents; returns the latents to go on with, and whether to
#: end there.
AfterLevel = Callable[[int, Tensor, Tensor], tuple[Tensor, bool]]


def check_levels(levels: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest of a flow's noise levels.

    Raises:
        ValueError: unless they are two, positive and in this order.
    """
    if len(levels) != 2 or not 0 < levels[0] < levels[1] < float("inf"):
        raise ValueError(f"noise_levels must be the lowest and the highest level, 0 < low < high, got {list(levels)}")
    return float(levels[0]), float(levels[1])


def default_scheduler(levels: Sequence[float]) -> EDMEulerScheduler:
    """Euler's steps over levels of equal distances, the published walk."""
    low, high = check_levels(levels)
    return EDMEulerScheduler(sigma_min=low, sigma_max=high, rho=1.0)


def resolve_levels(flow: Any, levels: Sequence[float] | None, scheduler: Any) -> tuple[tuple[float, float] | None, Any]:
    """A pipeline's noise levels and scheduler, from what it is made with.

    Raises:
        ValueError: if levels are given for a flow that knows one, or are missing for one that knows many.
    """
    if flow is not None and flow.config.get("noise_conditioning", False) != (levels is not None):
        raise ValueError(
            "the flow has noise_conditioning: give noise_levels, the lowest and the highest that it is trained for"
            if levels is None
            else f"noise_levels are {list(levels)}, but the flow knows one noise level (noise_conditioning is off): give "
            "noise_std instead"
        )
    if levels is None:
        if scheduler is not None:
            raise ValueError("a scheduler is for a flow of many noise levels: leave it out, or give noise_levels")
        return None, None
    return check_levels(levels), default_scheduler(levels) if scheduler is None else scheduler


def check_own_level(highest: float, level: float | None, by_student: bool, decoder: str) -> None:
    """An error if what learned to go with samples of the highest level is to go with others: the student, or a decoder
    that removes the noise."""
    for name, asked in (("decoding='student'", by_student), ("decoder='finetuned'", decoder == "finetuned")):
        if asked and level is not None and level != highest:
            raise ValueError(f"{name} knows samples of the highest level, {highest:g}: leave noise_level {level:g} out")


def resolve_level(levels: Sequence[float] | None, noise_level: float | None) -> float | None:
    """The level that a call draws at, or its input has: the highest if not said; None for a flow of one level.

    Raises:
        ValueError: for a level outside the trained ones, or any with a flow of one level.
    """
    if levels is None:
        if noise_level is not None:
            raise ValueError(
                f"noise_level is {noise_level!r}, but this flow knows the one level of its training: leave it out, or train "
                "a flow with train.noise_levels"
            )
        return None
    low, high = check_levels(levels)
    if noise_level is None:
        return high
    if not low <= noise_level <= high:
        raise ValueError(f"noise_level must be in the trained levels, {low:g} to {high:g}, got {noise_level!r}")
    return float(noise_level)


def resolve_steps(
    levels: Sequence[float] | None, steps: int | None, default: int, removes: bool, level: float | None
) -> int:
    """In how many score steps a call removes the noise; 0 if it removes none.

    Args:
        levels: of the flow; None for a flow of one level.
        steps: of the call; None is the pipeline's ``default``.
        removes: whether the call removes noise by the score.
        level: that it starts at.

    Raises:
        ValueError: for fewer than 1, or more of them than can have an effect.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {steps!r}")
    if steps is not None and steps > 1 and levels is None:
        raise ValueError(
            f"num_inference_steps is {steps}, but this flow knows one noise level, which one score step removes: leave it "
            "at 1, or train a flow with train.noise_levels"
        )
    if not removes:
        if steps is not None and steps > 1:
            raise ValueError(
                f"num_inference_steps is {steps}, but this call removes no noise by the score (see denoise and decoder): "
                "leave num_inference_steps out"
            )
        return 0
    if levels is None:
        return 1
    if level is not None and level <= levels[0]:
        if steps is not None and steps > 1:
            raise ValueError(
                f"noise_level {level:g} is the lowest, from which there is one step: num_inference_steps=1"
            )
        return 1
    return default if steps is None else int(steps)


def check_walk(walk: str | None, levels: Sequence[float] | None, steps: int, level: float | None = None) -> str | None:
    """``walk`` of a call that removes the noise in so many ``steps`` from ``level``, see `resolve_steps`.

    Raises:
        ValueError: for another than `WALKS`, or any where it has no effect: with a flow of one level, or below two steps.
    """
    if walk is not None and walk not in WALKS:
        raise ValueError(f"walk must be None, {' or '.join(map(repr, WALKS))}, got {walk!r}")
    if walk is not None and levels is None:
        raise ValueError(
            f"walk is {walk!r}, but this flow knows one noise level, which one score step removes: leave it out"
        )
    if walk is not None and steps == 1 and levels is not None and level is not None and level <= levels[0]:
        raise ValueError(
            f"walk is {walk!r}, but noise_level {level:g} is the lowest, from which there is one step, and one step is the same "
            "by all walks: leave walk out, or give a higher noise_level"
        )
    if walk is not None and steps < 2:
        raise ValueError(
            f"walk is {walk!r}, but this call removes "
            + (
                "no noise by the score (see denoise and decoder): leave it out"
                if steps < 1
                else "the noise in one step, where all walks are the same: give num_inference_steps above 1, or leave it out"
            )
        )
    return walk


def scheduler_for(
    scheduler: Any, level: float, steps: int, walk: str | None, device: torch.device, lowest: float = 0.0
) -> Any:
    """A scheduler of a call's own, with its levels: the pipeline's, or of the class that ``walk`` names.

    Args:
        scheduler: the pipeline's.
        level: to start at.
        steps: how many.
        lowest: level that the flow knows, below which no step but the last one leads.

    Raises:
        ValueError: for a scheduler that is not one of levels.
    """
    kinds = {"ode": EDMEulerScheduler, "sde": EDMAncestralScheduler}
    if scheduler is None or "sigma_max" not in scheduler.config or not hasattr(scheduler, "precondition_outputs"):
        raise ValueError(
            f"{type(scheduler).__name__} does not walk from noise level to noise level: take EDMEulerScheduler, "
            "EDMDPMSolverMultistepScheduler or EDMAncestralScheduler, each by from_config(pipe.scheduler.config)"
        )
    kind = type(scheduler) if walk is None else kinds[walk]
    least = min(level, max(lowest, scheduler.config.sigma_min))
    least = level if steps == 1 else least  # of two ends the exponential schedule would take the lower one
    # Of names in the last of these Diffusers takes the defaults, whatever values are given.
    config = {**scheduler.config, "sigma_max": level, "sigma_min": least, "_use_default_values": []}
    own = kind.from_config(config)
    own.set_timesteps(steps, device=device)
    own.set_begin_index(0)
    check_descent(own.sigmas.tolist(), level, kind.__name__)
    return own


def check_descent(sigmas: Sequence[float], level: float, name: str) -> None:
    """An error unless a scheduler's levels begin at ``level`` and go down from there."""
    rises = any(after > before for before, after in itertools.pairwise(sigmas))
    if rises or not math.isclose(sigmas[0], level, rel_tol=1e-4) or not sigmas[-1] < sigmas[0]:
        told = ", ".join(f"{sigma:.3g}" for sigma in sigmas)
        raise ValueError(
            f"{name} goes through the levels {told}, but samples have the level {level:g}, from which it must go down: "
            "change its final_sigmas_type, sigma_schedule or rho, or give more steps"
        )


def walk_down(
    scheduler: Any,
    x: Tensor,
    clean: Callable[[Tensor, float], Tensor],
    clamp: bool = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
    after_level: AfterLevel | None = None,
) -> Tensor:
    """Noisy latents without their noise.

    Args:
        scheduler: with the levels, the first of which is that of x; see `scheduler_for`.
        x: (B, C, h, w).
        clean: x0 (B, C, h, w) from x and its level, x + s²·∇ log p(x | s).
        clamp: x0 to [−1, 1], for pixels.
        generator: of schedulers that draw noise.
        after_level: see `AfterLevel`.
    """
    takes = inspect.signature(scheduler.step).parameters
    for index, timestep in enumerate(scheduler.timesteps):
        level = float(scheduler.sigmas[index])
        original = clean(x, level)
        original = original.clamp(-1, 1) if clamp else original
        # The flow reads x as it is; schedulers want to be asked how a network would read it.
        scheduler.scale_model_input(x, timestep)
        options: dict[str, Any] = {"generator": generator} if "generator" in takes else {}
        if "pred_original_sample" in takes:
            options["pred_original_sample"], output = original, original
        else:
            output = model_output(scheduler, x, original, level)
        x = scheduler.step(output, timestep, x, return_dict=False, **options)[0]
        if after_level is not None:
            x, stop = after_level(index, timestep, x)
            if stop:
                break
    return x


def model_output(scheduler: Any, x: Tensor, original: Tensor, level: float) -> Tensor:
    """What a network would give whose output the scheduler turns into ``original``."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    skipped = scheduler.precondition_outputs(x, zero, level)
    return (original - skipped) / scheduler.precondition_outputs(zero, one, level)
