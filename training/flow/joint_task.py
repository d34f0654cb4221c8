"""Training a flow, its autoencoder, and a discriminator of pictures together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tarflow.training.flow.joint import JointObjective, joint_invariants
from tarflow.training.flow.joint_report import reconstruction_metrics
from tarflow.training.flow.report import HeldOut
from tarflow.training.flow.setup import measure
from tarflow.training.flow.task import FlowTask
from tarflow.training.loop.task import Learner
from tarflow.training.losses.pictures import Decoded, PictureLoss


class JointTask(FlowTask):
    """Trains a flow and its autoencoder as a `JointObjective`; see `FlowTask`. With an adversarial loss, a
    discriminator is trained beside them."""

    objective: JointObjective
    loss: PictureLoss

    def resume_invariants(self) -> dict[str, Any]:
        return {**super().resume_invariants(), "joint": joint_invariants(self.config, self.parts.codec.vae)}

    def make_objective(self, text_encoder: nn.Module | None) -> JointObjective:
        return JointObjective(self.parts.flow, text_encoder, self.parts.codec, self.config.joint)

    def prepare(self, fresh: bool) -> None:
        super().prepare(fresh)
        self.loss = PictureLoss(self.config.joint.loss)
        self.loss.check_size(self.config.data.image_size)
        self.discriminator = self.loss.prepare(self.accelerator)
        self.moments: list[Tensor] = []

    def learners(self, step: int) -> list[Learner]:
        beside = [self.discriminator] if self.discriminator is not None and self.loss.is_adversarial(step) else []
        return [self.learner, *beside]

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.moments.clear()

    def backward_flow(self, inputs: dict[str, Any], step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the pictures' loss and the flow's, and then the discriminator's."""
        output = self.learner.model(**inputs)
        pictures = Decoded(output["decoded"], inputs["images"], self.objective.last_layer)
        losses = self.loss.backward(self.accelerator, pictures, step, output["loss"])
        self.moments.append(output["moments"])
        return {**losses, "nats_per_dim": output["nats_per_dim"].mean()}, output["z"]

    @property
    def has_after_update(self) -> bool:
        return True

    def after_update(self, step: int) -> None:
        super().after_update(step)
        self.objective.update_statistics(self.accelerator.reduce(torch.stack(self.moments).mean(0), "mean"))

    def report(self, step: int, average: int = 0, last: bool = False) -> dict[str, Any]:
        """See `Task`; the averaged autoencoder has latent statistics of its own."""
        if self.config.joint.renormalise:
            codec, count = self.parts.codec, self.config.vae.measure_images
            statistics = measure(codec.vae, self.parts.train, count, self.accelerator.device)
            codec.latents_mean, codec.latents_std = statistics
        return super().report(step, average, last)

    def held_out_metrics(self, held_out: HeldOut) -> dict[str, float]:
        found = reconstruction_metrics(held_out, self.parts.codec, self.config, self.accelerator)
        return super().held_out_metrics(held_out) | found
