"""A flow's training run, from its settings."""

from __future__ import annotations

from dataclasses import replace

from tarflow.flows.trajectory.kinds import kind_of
from tarflow.flows.trajectory.names import TRAJECTORY
from tarflow.training.flow.accelerator import flow_accelerator
from tarflow.training.flow.config import RunConfig, is_joint
from tarflow.training.flow.joint_task import JointTask
from tarflow.training.flow.setup import as_cached
from tarflow.training.flow.start import load_start
from tarflow.training.flow.task import FlowTask
from tarflow.training.flow.trajectory_task import TrajectoryTask
from tarflow.training.loop.trainer import Trainer


def flow_trainer(config: RunConfig, resolved: str) -> Trainer:
    """One run: `flow_trainer(config, resolved).run()`.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if the settings do not fit the data, the encoders or the checkpoint to resume from.
    """
    start = None if config.init_from is None else load_start(config.init_from)
    if start is not None:
        own = config.data.source == "latents" or config.vae.name == "new"  # autoencoder of the run
        config = replace(config, flow=start.flow_settings(config.flow, None if own else config.vae))
    if config.data.source == "latents":
        config, resolved = as_cached(config, resolved)
    accelerator = flow_accelerator(config)
    kind: type[FlowTask] = JointTask if is_joint(config) else FlowTask
    if kind_of(config.flow)[0] == TRAJECTORY:
        kind = TrajectoryTask
    return Trainer(config.loop, resolved, accelerator, kind(config, accelerator, start))
