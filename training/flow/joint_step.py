"""One optimizer step of a flow, its autoencoder, and a discriminator of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tarflow.training.flow.joint import JointObjective
from tarflow.training.flow.step import Stepper
from tarflow.training.losses.pictures import PictureLoss


class JointStepper(Stepper):
    """Takes optimizer steps of a `JointObjective`; the discriminator, if there is one, is made and prepared here.

    Args:
        objective: the plain objective in the prepared model.
        rest: as of `Stepper`.

    Raises:
        ValueError: if the loss does not fit the pictures.
    """

    def __init__(self, objective: JointObjective, *rest: Any):
        super().__init__(*rest)
        self.objective, self.loss = objective, PictureLoss(self.config.joint.loss)
        self.loss.check_size(self.config.data.image_size)
        self.discriminator_optimizer = self.loss.prepare(self.accelerator)
        self.moments: list[Tensor] = []

    def learning(self, step: int) -> list[nn.Module]:
        return [self.model, self.loss.discriminator] if self.loss.is_adversarial(step) else [self.model]

    def backward(self, inputs: dict[str, Any], step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the pictures' loss and the flow's, and then the discriminator's."""
        accelerator, images = self.accelerator, inputs["images"]
        output = self.model(**inputs)
        with accelerator.autocast():
            loss, parts = self.loss(output["decoded"], images, self.objective.last_layer, step)
        loss = loss + output["loss"]
        accelerator.backward(loss)
        with accelerator.autocast():
            discriminator_loss = self.loss.discriminator_loss(output["decoded"], images, step)
        if discriminator_loss is not None:
            accelerator.backward(discriminator_loss)
            parts["discriminator"] = discriminator_loss.detach()
        self.moments.append(output["moments"])
        return {"loss": loss.detach(), "nats_per_dim": output["nats_per_dim"].mean(), **parts}, output["z"]

    def clip_gradients(self, step: int) -> Tensor:
        norm, self.others_norm = super().clip_gradients(step), None
        if self.loss.is_adversarial(step):
            limit, parameters = self.config.optim.max_grad_norm, self.loss.discriminator.parameters()
            self.others_norm = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm

    def update(self, norm: Tensor, loss: Tensor, latents: list[Tensor], step: int) -> None:
        super().update(norm, loss, latents, step)
        self.moments.clear()
        if self.discriminator_optimizer is not None:
            self.discriminator_optimizer.zero_grad()

    def take_in(self, latents: list[Tensor], step: int) -> None:
        super().take_in(latents, step)
        self.objective.update_statistics(self.accelerator.reduce(torch.stack(self.moments).mean(0), "mean"))
        if self.loss.is_adversarial(step):
            self.discriminator_optimizer.step()
