"""Training a network that decodes pictures, and its discriminator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from tarflow.training.loop.network_config import NetworkConfig
from tarflow.training.loop.network_task import NetworkTask
from tarflow.training.loop.task import Batch, Learner
from tarflow.training.losses.config import PictureLossConfig
from tarflow.training.losses.pictures import Decoded, PictureLoss


class PictureTask(NetworkTask):
    """A network that is to make decoded pictures like their originals.

    Args:
        config, accelerator, folder: see `NetworkTask`.
        loss: what makes them so.
        image_size: side of the pictures in pixels.
    """

    betas = (0.9, 0.99)

    def __init__(
        self, config: NetworkConfig, accelerator: Accelerator, folder: Path, loss: PictureLossConfig, image_size: int
    ):
        super().__init__(config, accelerator, folder)
        self.loss_config, self.image_size = loss, image_size

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """Weights of the layer of ``network`` that makes the pixels."""

    @abstractmethod
    def decode(
        self, model: nn.Module, batch: Batch, step: int, sample_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
        """Decoded pictures and originals (B, 3, H, W) in [−1, 1], and further losses by name with their weights.

        Args:
            model: ``network`` as it must be called, in one forward pass.
            batch: of ``train``.
            step: its number.
            sample_ids: of the pictures in the step's batch of all processes and passes.
        """

    def loss_invariants(self) -> dict[str, Any]:
        return {"loss.discriminator_width and layers": self.loss_config.discriminator_shape}

    def prepare(self, fresh: bool) -> None:
        self.loss = PictureLoss(self.loss_config)
        self.loss.check_size(self.image_size)
        super().prepare(fresh)
        self.discriminator = self.loss.prepare(self.accelerator)

    def learners(self, step: int) -> list[Learner]:
        beside = [self.discriminator] if self.discriminator is not None and self.loss.is_adversarial(step) else []
        return [self.learner, *beside]

    def backward(self, batch: Batch, step: int, total: int, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        decoded, images, further = self.decode(self.learner.model, batch, step, sample_ids)
        pictures = Decoded(decoded, images, self.last_layer)
        added = [weight * value for weight, value in further.values()]
        losses = self.loss.backward(self.accelerator, pictures, step, sum(added[1:], added[0]) if added else None)
        return losses | {name: value.detach() for name, (_, value) in further.items()}
