"""Training a trajectory model: its inputs, loss and metrics, and all else as of a flow."""

from __future__ import annotations

from typing import cast

from torch import nn

from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.training.flow.objective import FlowObjective
from tarflow.training.flow.report import HeldOut
from tarflow.training.flow.task import FlowTask
from tarflow.training.flow.trajectory import TrajectoryInputs, TrajectoryObjective, trajectory_metrics


class TrajectoryTask(FlowTask):
    """Trains a `TrajectoryFlowModel`; see `FlowTask`."""

    inputs_class = TrajectoryInputs
    inputs: TrajectoryInputs

    def make_objective(self, text_encoder: nn.Module | None) -> FlowObjective:
        return TrajectoryObjective(self.parts.flow, text_encoder, self.config.text.hidden_layer)

    def held_out_metrics(self, held_out: HeldOut) -> dict[str, float]:
        """Of chains of each number of steps: nats per number of the chain, and a bound on a flow's."""
        found, what = {}, "pixel" if self.config.vae.pixels else "latent"
        for steps in cast(TrajectoryFlowModel, self.parts.flow).config.steps:
            inputs = self.inputs.of_steps(steps)
            nats = held_out.nats_per_dim(self.learner.model, inputs, self.accelerator)
            chain, bound = trajectory_metrics(nats, inputs.chain(steps), self.config.train.noise_std)
            found[f"trajectory_nats_per_dim_{steps}"] = chain
            found[f"{what}_nats_per_dim_bound_{steps}"] = bound
        return found
