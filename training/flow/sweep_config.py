"""Settings of the loss that makes blocks converge in a few sweeps, checked when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tarflow.common.checks import AtLeastOne, NotNegative, check, check_ranges

if TYPE_CHECKING:
    from tarflow.training.flow.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class SweepLossConfig:
    """A loss on what Jacobi sweeps make of a training picture's noise, see `sweep_loss`.

    Attributes:
        weight: beside the negative log-likelihood per dimension; 0 is off.
        sweeps: most sweeps from the noise on; each step draws a number from 1 to this.
        gradient_sweeps: how many of them, the last ones, have gradients; each costs a forward and a backward pass of
            the blocks concerned, the others a forward pass.
        blocks: "deep", the block next to the noise, or "all".
    """

    weight: NotNegative = 0.0
    sweeps: AtLeastOne = 8
    gradient_sweeps: AtLeastOne = 1
    blocks: Literal["deep", "all"] = "deep"

    def __post_init__(self) -> None:
        check_ranges(self, "train.sweep_loss")
        check(
            self.gradient_sweeps <= self.sweeps,
            f"train.sweep_loss.gradient_sweeps ({self.gradient_sweeps}) are the last of train.sweep_loss.sweeps "
            f"({self.sweeps}), so at most as many",
        )


def check_sweep_loss(config: RunConfig) -> None:
    """Errors of a `RunConfig` whose other settings do not fit ``train.sweep_loss``."""
    if config.train.sweep_loss.weight == 0:
        return
    check(
        config.flow.get("kind", "flow") == "flow",
        f"train.sweep_loss is for flow.kind 'flow', not {config.flow.get('kind')!r}: leave it out",
    )
    check(
        not config.train.cuda_graphs,
        "train.sweep_loss takes another number of sweeps in each step, which train.cuda_graphs cannot launch as one graph: "
        "leave one of them out",
    )
    kind = config.flow.get("block", "autoregressive")
    check(
        kind == "autoregressive",
        f"train.sweep_loss is for autoregressive blocks, which sweeps can invert; those of flow.block {kind!r} are drawn "
        "in one pass: leave it out",
    )
    check(
        config.flow.get("learned_denoiser", "none") == "none",
        "flow.learned_denoiser learns from the gradient of the likelihood alone: set train.sweep_loss.weight to 0",
    )
