"""One optimizer step of a network that decodes pictures, and of its discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from tarflow.training.loop.network_step import NetworkStepper, Task
from tarflow.training.losses.pictures import PictureLoss


class PictureTask(Task, Protocol):
    """What is trained, see `Task`."""

    @property
    def last_layer(self) -> nn.Parameter:
        """Weights of the layer of ``network`` that makes the pixels."""

    def decode(
        self, model: nn.Module, batch: dict[str, Any], step: int, places: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
        """Decoded pictures and originals (B, 3, H, W) in [−1, 1], and further losses by name with their weights.

        Args:
            model: ``network`` as it must be called, in one forward pass.
            batch: of ``train``.
            step: its number.
            places: of the pictures in the step's batch of all processes and passes.
        """


class PictureStepper(NetworkStepper):
    """Takes optimizer steps that make decoded pictures like their originals.

    Args:
        config: of the run, also with loss (`PictureLossConfig`) and image_size.
        accelerator: of the run.
        task: what to train.

    Raises:
        ValueError: if the loss does not fit the weights or the pictures.
    """

    def __init__(self, config: Any, accelerator: Accelerator, task: PictureTask):
        self.task, self.loss = task, PictureLoss(config.loss)
        self.loss.check_size(config.image_size)
        super().__init__(config, accelerator, task.network, betas=(0.9, 0.99))
        optimizer = self.loss.prepare(accelerator)
        if optimizer is not None:
            self.optimizers.append(optimizer)

    def facts(self) -> dict[str, Any]:
        return {"loss.discriminator_width and layers": self.config.loss.discriminator_shape}

    def models(self, step: int) -> list[nn.Module]:
        return [self.model, *([self.loss.discriminator] if self.loss.is_adversarial(step) else [])]

    def rates(self, factor: float) -> list[float]:
        return [self.config.lr * factor, self.config.loss.discriminator_lr][: len(self.optimizers)]

    def backward(self, batch: dict[str, Any], step: int, total: int, places: Sequence[int]) -> dict[str, Tensor]:
        """Gradients of one pass, the network's and then the discriminator's; returns the losses."""
        accelerator = self.accelerator
        decoded, images, further = self.task.decode(self.model, batch, step, places)
        with accelerator.autocast():
            loss, parts = self.loss(decoded, images, self.task.last_layer, step)
        for name, (weight, value) in further.items():
            loss, parts[name] = loss + weight * value, value.detach()
        accelerator.backward(loss)
        with accelerator.autocast():
            discriminator_loss = self.loss.discriminator_loss(decoded, images, step)
        if discriminator_loss is not None:
            accelerator.backward(discriminator_loss)
            parts["discriminator"] = discriminator_loss.detach()
        return {"loss": loss.detach(), **parts}
