"""Settings of training a trajectory model, checked when built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tarflow.common.checks import check
from tarflow.flows.trajectory.names import TRAJECTORY

if TYPE_CHECKING:
    from tarflow.training.flow.config import RunConfig


def check_trajectory_run(config: RunConfig) -> None:
    """Errors of a `RunConfig` whose other settings do not fit a trajectory model, or are of one that it does not have."""
    train = config.train
    if config.flow.get("kind") != TRAJECTORY:
        check(train.trajectory == "pair", f"train.trajectory {train.trajectory!r} is for flow.kind 'trajectory'")
        return
    check(
        train.noise == "gaussian",
        "flow.kind 'trajectory' needs gaussian noise, at which its chain ends: train.noise gaussian",
    )
    check(
        train.noise_std > 0 or not config.flow.get("transporter_levels"),
        "flow.transporter_levels needs train.noise_std above 0: the last level's logarithm is what the transporter sees",
    )
    check(train.noise_levels is None, "train.noise_levels are for flow.kind 'flow': a trajectory has levels of its own")
    check(config.vae.train == "frozen", "flow.kind 'trajectory' goes with vae.train 'frozen'")
    check(config.lora.rank == 0, "flow.kind 'trajectory' has no adapters: set lora.rank to 0")
    check(train.latent_norm_weight == 0, "train.latent_norm_weight is for flow.kind 'flow': set it to 0")
