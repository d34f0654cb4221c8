"""Settings of noise levels (iTARFlow, arXiv 2604.20041). Apart from what computes, whose libraries take seconds to import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tarflow.common.checks import Positive, check, check_ranges


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """One flow for all levels t of the noise: y = x + t·ε, and the flow is told t.

    Attributes:
        low: the lowest level.
        high: the highest level, at which samples are drawn.
        distribution: of a picture's level: "uniform"; or "log_normal", e^(−1.2 + n) of a normal n within the bounds.
        weight: of its loss: its "level" t (the published one), "square", t², or "one".
    """

    low: Positive = 0.01
    high: Positive = 0.3
    distribution: Literal["uniform", "log_normal"] = "uniform"
    weight: Literal["level", "one", "square"] = "level"

    def __post_init__(self) -> None:
        check_ranges(self, "train.noise_levels")
        check(
            self.low < self.high < math.inf,
            f"train.noise_levels must have low below high, got low {self.low:g} and high {self.high:g}",
        )

    @property
    def shown(self) -> tuple[float, float, float]:
        """The levels at which held-out likelihoods are told: the ends, and the geometric mean to three digits."""
        return self.low, float(f"{math.sqrt(self.low * self.high):.3g}"), self.high


def level_invariants(config: Any) -> dict[str, float]:
    """What must be the same when training goes on, by readable names; nothing for a flow of one level.

    Args:
        config: a `RunConfig`.
    """
    levels = config.train.noise_levels
    names = () if levels is None else ("low", "high")
    return {f"train.noise_levels.{name}": getattr(levels, name) for name in names}
