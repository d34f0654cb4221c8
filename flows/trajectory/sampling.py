"""Noise to the last state of a trajectory, and from there to pictures without noise.

Shapes: B batch, N states of a trajectory, C channels, H × W size of the latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tarflow.flows.decoding import sampling
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import Decoding, check_finite
from tarflow.flows.denoising import recordable, recordable_call
from tarflow.flows.layers.affine import affine_inverse, at_least_float32
from tarflow.flows.layers.condition import parts_of
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.trajectory.chain import check_levels, noise_covariance
from tarflow.flows.trajectory.likelihood import trajectory_log_prob
from tarflow.flows.trajectory.model import TrajectoryFlowModel


def predicted(
    model: TrajectoryFlowModel,
    u: Tensor,
    levels: tuple[float, float],
    condition: Tensor | None,
    null_condition: Tensor | None,
    guidance: Guidance | None,
    place: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Mean and log-deviation of u_s given u_t, guided: (B, C, H, W) each.

    Args:
        levels: t and s.
        place, steps: the number of the step, from 0, and how many there are; annealed guidance grows with it.
    """
    active = guidance is not None and guidance.active and model.config.conditioning != "none"
    rows = torch.cat([u, u]) if active else u
    level, lower = (torch.full((len(rows),), at, device=u.device, dtype=at_least_float32(u).dtype) for at in levels)
    both = condition
    if active and null_condition is not None and condition is not None:
        both = torch.cat([condition, null_condition])
    mean, log_std = model.predict(rows, level, lower, both)
    if not active or guidance is None:
        return mean, log_std
    cond, uncond = zip(mean.chunk(2), log_std.chunk(2), strict=True)
    return guidance(cond, uncond, place, steps)


@torch.no_grad()
def generate_trajectory(
    model: TrajectoryFlowModel,
    noise: Sequence[Tensor],
    levels: Sequence[float],
    condition: Tensor | None = None,
    null_condition: Tensor | None = None,
    guidance: Guidance | None = None,
    callback: Callable[[int, Tensor], sampling.Change] | None = None,
) -> list[Tensor]:
    """The states of a trajectory as the predictor has them, u = f(x), from the first to the last.

    Args:
        model: the model.
        noise: standard normal (B, C, H, W) each, N of them: the first state x₁, and for each step.
        levels: N, falling from 1, see `TrajectoryFlowModel.levels`.
        condition, null_condition: of ``model.condition``.
        guidance: applied to each step's Gaussian.
        callback: called after each step with its number and u (B, C, H, W); its `Change` is of the steps to come.

    Returns:
        N tensors (B, C, H, W), fewer if the callback ends it.

    Raises:
        ValueError: for levels that do not fall from 1, or another number of draws.
        FloatingPointError: for numbers that are not finite.
    """
    check_levels(torch.tensor(levels, dtype=torch.float64), whole=True)
    if len(noise) != len(levels):
        raise ValueError(f"a trajectory of {len(levels)} levels needs as many draws of noise, got {len(noise)}")
    with torch.autocast(noise[0].device.type, enabled=False):
        u, _ = model(noise[0], levels[0])
        states = [u]
        for place, (level, lower) in enumerate(itertools.pairwise(levels)):
            pair, steps = (level, lower), len(levels) - 1
            mean, log_std = predicted(model, states[-1], pair, condition, null_condition, guidance, place, steps)
            u = affine_inverse(noise[place + 1], mean, log_std)
            check_finite(model.patchify(u)[0], f"step {place} of the trajectory")
            change = sampling.Change() if callback is None else callback(place, u)
            states.append(u if change.latents is None else change.latents)
            guidance = guidance if change.guidance is None else change.guidance
            null_condition = null_condition if change.null_cond is None else parts_of(change.null_cond)[0]
            if change.stop:
                break
    return states


@torch.no_grad()
def transported(
    model: TrajectoryFlowModel,
    u: Tensor,
    level: Tensor | float,
    decoding: Decoding | Sequence[Decoding] | None = None,
    fast: FastSteps | None = None,
    timed: Callable[[int, float], None] | None = None,
) -> Tensor:
    """x = f⁻¹(u) of states u (B, C, H, W) of a level, one for all or (B,); decoding, fast and timed as of `generate`."""
    x, _ = sampling.generate(model, u, model.at_level(level, len(u)), decoding=decoding, fast=fast, timed=timed)
    return x


class ChainLogProb(nn.Module):
    """`trajectory_log_prob` of a model, as a module, for calls with other weights than its own."""

    def __init__(self, model: TrajectoryFlowModel):
        super().__init__()
        self.model = model

    def forward(self, states: Tensor, levels: Tensor, condition: Tensor | None) -> Tensor:
        return trajectory_log_prob(self.model, states, levels, condition)


def joint_score_denoise(
    model: TrajectoryFlowModel, states: Tensor, levels: Sequence[float], condition: Tensor | None = None
) -> Tensor:
    """E[x₀ | the trajectory] as the model has it, by one gradient of the trajectory's log-likelihood.

    The noise in a chain's states is Gaussian, with the covariance `noise_covariance`, so Tweedie's formula holds for all
    of them together: (1 − t)·x₀ ≈ x_t + Σ_s S_ts·∇_{x_s} log p. It is applied to the last state.

    Args:
        model: the model.
        states: (B, N, C, H, W), in the order of the levels.
        levels: N, falling from 1.
        condition: of ``model.condition``.

    Returns:
        x₀ (B, C, H, W), detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        states = at_least_float32(recordable(states.detach())).requires_grad_()
        rows = states.new_tensor(levels).expand(len(states), -1)
        given = {"levels": rows, "condition": None if condition is None else recordable(condition.detach())}
        total = recordable_call(ChainLogProb(model), states, given).sum()
        (score,) = torch.autograd.grad(total, states)
    weights = torch.tensor(noise_covariance(levels)[-1], device=score.device, dtype=score.dtype)
    moved = states.detach()[:, -1] + torch.einsum("n,bnchw->bchw", weights, score)
    return moved / (1 - levels[-1])
