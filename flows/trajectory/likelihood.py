"""The exact likelihood of trajectories, whole and step by step, in nats.

Shapes: B batch, N states of a trajectory, C channels, H × W size of the latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tarflow.flows.layers.affine import affine_forward
from tarflow.flows.trajectory.chain import check_levels
from tarflow.flows.trajectory.model import TrajectoryFlowModel


def gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(u; mean, std²) summed over all but the first axis, (B,)."""
    z, log_det = affine_forward(u, mean, log_std)
    return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def step_log_probs(
    model: TrajectoryFlowModel, states: Tensor, levels: Tensor, condition: Tensor | None = None
) -> Tensor:
    """log p(x_{t_i} | x_{t_(i − 1)}) = log N(u_{t_i}; μ, σ²) + log|det ∂f/∂x| of each step, (B, N − 1).

    Args:
        model: the model.
        states: (B, N, C, H, W); two of them are a step by itself.
        levels: their levels (B, N), falling.
        condition: of ``model.condition``.

    Raises:
        ValueError: for levels of another shape or that do not fall.
    """
    if levels.shape != states.shape[:2]:
        raise ValueError(f"states {tuple(states.shape[:2])} need as many levels, got {tuple(levels.shape)}")
    check_levels(levels)
    batch, count = states.shape[:2]
    levels = levels.to(torch.promote_types(states.dtype, torch.float32))
    u, log_det = model(states.flatten(0, 1), levels.flatten())
    u, log_det = u.unflatten(0, (batch, count)), log_det.unflatten(0, (batch, count))
    if condition is not None:
        condition = condition.repeat_interleave(count - 1, dim=0)
    higher, lower = levels[:, :-1].flatten(), levels[:, 1:].flatten()
    mean, log_std = model.predict(u[:, :-1].flatten(0, 1), higher, lower, condition)
    gaussian = gaussian_log_prob(u[:, 1:].flatten(0, 1), mean, log_std)
    return gaussian.unflatten(0, (batch, count - 1)) + log_det[:, 1:]


def trajectory_log_prob(
    model: TrajectoryFlowModel, states: Tensor, levels: Tensor, condition: Tensor | None = None
) -> Tensor:
    """log p of whole chains, exact: (B,).

    The chain's first state x₁ is standard normal whatever the data, so its term is log N(x₁; 0, 1); the others are those
    of `step_log_probs`, whose arguments these are too, with levels from 1 on.
    """
    check_levels(levels, whole=True)
    first = states[:, 0]
    start = gaussian_log_prob(first, torch.zeros_like(first), torch.zeros_like(first))
    return start + step_log_probs(model, states, levels, condition).sum(1)
