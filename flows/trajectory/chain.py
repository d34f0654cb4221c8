"""The chain of noise levels that a trajectory model goes along, as pure functions.

x_t = (1 − t)·x₀ + t·ε for a level t from 0 (data) to 1 (noise). For s < t the chain adds noise by
x_t = α·x_s + √(t² − α²·s²)·ε with α = (1 − t)/(1 − s), which gives each x_t the distribution above. At t = 1 α is 0: x₁ is
standard normal and independent of all that comes before it.

Shapes: B batch, N levels; one level for each sample is (B,), and stands for all of its numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def level_of(noise_std: float) -> float:
    """The level t at which x_t / (1 − t) = x₀ + σ·ε, for the standard deviation σ ≥ 0: σ/(1 + σ)."""
    return noise_std / (1 + noise_std)


def default_shift(tokens: int) -> float:
    """How much longer the chain stays at high levels for pictures of more tokens: e^(½ + 0.65·(tokens − 256)/3840)."""
    return math.exp(0.5 + 0.65 * (tokens - 256) / 3840)


def chain_levels(steps: int, last: float, shift: float) -> list[float]:
    """The levels of a chain of so many steps, from 1 down to ``last``.

    Args:
        steps: N − 1, at least 1.
        last: 0 ≤ t < 1.
        shift: a > 0; equal steps r from 1 to 0 become a·r/(1 + (a − 1)·r), which for a > 1 are closer near 1.

    Returns:
        N falling numbers.

    Raises:
        ValueError: for numbers out of these ranges.
    """
    if steps < 1:
        raise ValueError(f"a trajectory has at least 1 step, got {steps}")
    if not 0 <= last < 1:
        raise ValueError(f"the last level of a trajectory must be at least 0 and below 1, got {last}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite, got {shift}")
    places = [1 - step / steps for step in range(steps + 1)]
    return [1 - (1 - last) * (1 - place) / (1 + (shift - 1) * place) for place in places]


def check_levels(levels: Tensor, whole: bool = False, strict: bool = True) -> None:
    """Errors of levels that no chain has; on an accelerator, where a check would wait for all its work, there is none.

    Args:
        levels: (…, N).
        whole: they begin at 1.
        strict: none may be equal to the one before.

    Raises:
        ValueError: unless they fall, from 1 or less to 0 or more.
    """
    if levels.device.type != "cpu" or torch.compiler.is_compiling() or not levels.numel():
        return
    rows = levels.flatten(0, -2) if levels.ndim > 1 else levels[None]
    if rows.shape[1] < 2:
        raise ValueError(f"a trajectory has at least 1 step, so at least 2 levels, got {rows[0].tolist()}")
    higher, lower = rows[:, :-1], rows[:, 1:]
    falling = (lower < higher if strict else lower <= higher).all(1)
    good = falling & (rows[:, 0] <= 1) & (rows[:, -1] >= 0)
    if not good.all():
        wrong = rows[~good][0].tolist()
        raise ValueError(f"the levels of a trajectory must fall, from 1 at most to 0 at least, got {wrong}")
    if whole and not (rows[:, 0] == 1).all():
        wrong = rows[rows[:, 0] != 1][0].tolist()
        raise ValueError(f"a whole trajectory begins at the level 1, which is noise alone, got {wrong}")


def like(level: Tensor, x: Tensor) -> Tensor:
    """Levels (B,) in a shape that goes with x (B, …), at least float32."""
    return level.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, *(1,) * (x.ndim - 1))


def step_up(level: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """α and √(t² − α²·s²) of the chain's step to the level t from the lower one s, of the levels' shape."""
    alpha = (1 - level) / (1 - lower)
    return alpha, (level.square() - (alpha * lower).square()).clamp(min=0).sqrt()


def noised(x: Tensor, lower: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """x_t of x_s (B, …) at levels s < t (B,), by standard normal noise (B, …)."""
    alpha, std = step_up(like(level, x), like(lower, x))
    return alpha * x + std * noise


def states_up(x: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """The chain upward from its last state.

    Args:
        x: the last state (B, …).
        levels: (B, N), none above the one before; the last one is that of x.
        noise: standard normal (B, N − 1, …), of the steps in the order of the levels.

    Returns:
        (B, N, …), in the order of the levels.

    Raises:
        ValueError: for levels that rise, or out of range.
    """
    check_levels(levels, strict=False)
    states = [x]
    for place in range(levels.shape[1] - 2, -1, -1):
        states.append(noised(states[-1], levels[:, place + 1], levels[:, place], noise[:, place]))
    return torch.stack(states[::-1], dim=1)


def chain_entropy(levels: Sequence[float]) -> float:
    """Nats per number of x₀ of the chain's states above the last one, given that one: Σ ½·log 2πe(t² − α²·s²)."""
    stds = [step_up(torch.tensor(t).double(), torch.tensor(s).double())[1] for t, s in itertools.pairwise(levels)]
    return sum(0.5 * math.log(2 * math.pi * math.e) + math.log(float(std)) for std in stds)


def white_step_down(level: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and standard deviation of x_s given x_t, if x₀ were standard normal, of the levels' shape: with
    v_t = (1 − t)² + t² these are α·v_s/v_t and √(v_s·(1 − α²·v_s/v_t))."""
    alpha, _ = step_up(level, lower)
    variance, lower_variance = ((1 - t).square() + t.square() for t in (level, lower))
    share = alpha * lower_variance / variance
    return share, (lower_variance * (1 - alpha * share)).sqrt()


def noise_covariance(levels: Sequence[float]) -> list[list[float]]:
    """Covariances (N, N) of the noise in each two states of a chain: min(s, t)²·(1 − max(s, t))/(1 − min(s, t))."""
    return [
        [min(s, t) ** 2 * (1 - max(s, t)) / (1 - min(s, t)) if min(s, t) < 1 else 1.0 for t in levels] for s in levels
    ]
