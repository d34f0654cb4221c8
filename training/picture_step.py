"""One optimizer step of a network that decodes pictures, and of its discriminator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from tarflow.training.averages import WeightAverages
from tarflow.training.config import OptimConfig
from tarflow.training.picture_loss import PictureLoss
from tarflow.training.schedule import schedule_factor

#: So many losses or gradients in a row that are not finite are skipped before training stops.
MAX_BAD_STEPS = 5
#: A cosine down to 0 after the warm-up.
SCHEDULE = OptimConfig(min_lr_ratio=0.0)


class Task(Protocol):
    """What is trained.

    Attributes:
        network: what learns.
        train: the training pictures, as `Images` or another endless or finite data set has them.
    """

    network: nn.Module
    train: Dataset

    @property
    def last_layer(self) -> nn.Parameter:
        """Weights of the layer of ``network`` that makes the pixels."""

    def facts(self) -> dict[str, Any]:
        """What must be the same when training goes on from a checkpoint, by readable names, as JSON has it."""

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

    def report(self, step: int, last: bool) -> dict[str, Any]:
        """Evaluate ``network`` as it is, save what is to be saved, and return metrics, numbers or lists of them. The
        main process calls this."""


class PictureStepper:
    """Puts what learns on its device, and takes optimizer steps.

    Args:
        config: of the run, see `PictureTrainer`.
        accelerator: of the run.
        task: what to train.

    Attributes:
        model: what Accelerate made of the task's network.
        optimizers: the network's, and the discriminator's if there is one.
        averages: of the network's weights.
        bad_steps: how many of the last steps, in a row, were not finite.
        skipped: messages of unreadable pictures.

    Raises:
        ValueError: if the loss does not fit the weights or the pictures.
    """

    def __init__(self, config: Any, accelerator: Accelerator, task: Task):
        self.config, self.accelerator, self.task = config, accelerator, task
        self.loss = PictureLoss(config.loss)
        self.loss.check_size(config.image_size)
        optimizer = torch.optim.AdamW(
            task.network.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.model, optimizer = accelerator.prepare(task.network, optimizer)
        self.optimizers = [optimizer]
        self.loss.to(accelerator.device)
        if self.loss.discriminator is not None:
            optimizer = torch.optim.Adam(
                self.loss.discriminator.parameters(), config.loss.discriminator_lr, betas=(0.5, 0.9)
            )
            self.loss.discriminator, optimizer = accelerator.prepare(self.loss.discriminator, optimizer)
            self.optimizers.append(optimizer)
        self.averages = WeightAverages(list(self.model.parameters()), [config.ema_decay])
        self.bad_steps = 0
        self.skipped: set[str] = set()

    def take(self, batches: Iterator[dict[str, Any]], step: int, total: int) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            batches: this process's, one for each forward pass.
            step: its number.
            total: steps of the run, for the learning rate.

        Returns:
            this process's loss, its parts and the gradient's norm.
        """
        config, accelerator = self.config, self.accelerator
        self.set_learning_rates(step, total)
        self.model.train()
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
        models, norm = [self.model], torch.tensor(0.0)
        if self.loss.is_adversarial(step):
            models.append(self.loss.discriminator)
        for part in range(config.accumulation):
            batch = next(batches)
            self.skipped.update(batch["skipped"])
            first = (part * accelerator.num_processes + accelerator.process_index) * config.batch_size
            with accelerator.accumulate(*models):
                losses = self.backward(batch, step, range(first, first + config.batch_size))
                for name, value in losses.items():
                    sums[name] += value / config.accumulation
                if accelerator.sync_gradients:
                    norm = self.update(models, float(sums["loss"]), step)
        return {**sums, "grad_norm": norm}

    def set_learning_rates(self, step: int, total: int) -> None:
        config = self.config
        factor = schedule_factor(step, total, config.warmup_steps, SCHEDULE)
        rates = [config.lr * factor, config.loss.discriminator_lr]
        for optimizer, rate in zip(self.optimizers, rates, strict=False):  # there may be no discriminator
            for group in optimizer.param_groups:
                group["lr"] = rate

    def backward(self, batch: dict[str, Any], step: int, places: Sequence[int]) -> dict[str, Tensor]:
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

    def update(self, models: list[nn.Module], loss: float, step: int) -> Tensor:
        """Change the weights, unless a gradient is not finite; returns the norm of the network's."""
        accelerator = self.accelerator
        norms = [accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm) for model in models]
        finite = all(math.isfinite(float(norm)) for norm in norms)
        for optimizer in self.optimizers[: len(models)]:
            if finite or accelerator.scaler is not None:  # which leaves out what is not finite, and lowers its scale
                optimizer.step()
            optimizer.zero_grad()
        if finite and not self.optimizers[0].step_was_skipped:
            self.averages.step()
        # Gradients of fp16 may overflow for some steps, until the scale fits; losses may not.
        fine = finite or (accelerator.scaler is not None and math.isfinite(loss))
        self.bad_steps = 0 if fine else self.bad_steps + 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"training stopped at step {step}: the loss ({loss}) or its gradient was not finite in {self.bad_steps} "
                f"steps in a row; lower lr ({self.config.lr}) or resume from a checkpoint"
            )
        return norms[0].detach()
