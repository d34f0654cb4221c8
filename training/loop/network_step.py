"""One optimizer step of a network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from tarflow.training.loop.averages import WeightAverages
from tarflow.training.loop.config import OptimConfig
from tarflow.training.loop.network_config import NetworkConfig
from tarflow.training.loop.schedule import schedule_factor

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

    def facts(self) -> dict[str, Any]:
        """What must be the same when training goes on from a checkpoint, by readable names, as JSON has it."""

    def report(self, step: int, last: bool) -> dict[str, Any]:
        """Evaluate ``network`` as it is, save what is to be saved, and return metrics, numbers or lists of them. The
        main process calls this."""


class NetworkStepper:
    """Puts what learns on its device, and takes optimizer steps; subclasses say what the loss is.

    Args:
        config: of the run.
        accelerator: of the run.
        network: what to train.
        betas: of AdamW.

    Attributes:
        model: what Accelerate made of the network.
        optimizers: the network's, and those of networks that learn beside it.
        averages: of the network's weights.
        bad_steps: how many of the last steps, in a row, were not finite.
        skipped: messages of unreadable pictures.
    """

    def __init__(self, config: NetworkConfig, accelerator: Accelerator, network: nn.Module, betas: tuple[float, float]):
        self.config, self.accelerator = config, accelerator
        optimizer = torch.optim.AdamW(network.parameters(), config.lr, betas=betas, weight_decay=config.weight_decay)
        self.model, optimizer = accelerator.prepare(network, optimizer)
        self.optimizers = [optimizer]
        self.averages = WeightAverages(list(self.model.parameters()), [config.ema_decay])
        self.bad_steps = 0
        self.skipped: set[str] = set()

    def facts(self) -> dict[str, Any]:
        """What must be the same when training goes on from a checkpoint, besides the task's."""
        return {}

    def models(self, step: int) -> list[nn.Module]:
        """The networks that learn in a step, one for each of the first optimizers."""
        return [self.model]

    def rates(self, factor: float) -> list[float]:
        """The optimizers' learning rates, where the schedule's factor is this."""
        return [self.config.lr * factor]

    def backward(self, batch: dict[str, Any], step: int, total: int, places: Sequence[int]) -> dict[str, Tensor]:
        """Gradients of one pass; returns "loss" and its parts.

        Args:
            batch: of the task's training pictures.
            step: its number.
            total: steps of the run, as far as is known.
            places: of the pictures in the step's batch of all processes and passes.
        """
        raise NotImplementedError

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
        models, norm = self.models(step), torch.tensor(0.0)
        for part in range(config.accumulation):
            batch = next(batches)
            self.skipped.update(batch["skipped"])
            first = (part * accelerator.num_processes + accelerator.process_index) * config.batch_size
            with accelerator.accumulate(*models):
                losses = self.backward(batch, step, total, range(first, first + config.batch_size))
                for name, value in losses.items():
                    sums[name] += value / config.accumulation
                if accelerator.sync_gradients:
                    norm = self.update(models, float(sums["loss"]), step)
        return {**sums, "grad_norm": norm}

    def set_learning_rates(self, step: int, total: int) -> None:
        factor = schedule_factor(step, total, self.config.warmup_steps, SCHEDULE)
        for optimizer, rate in zip(self.optimizers, self.rates(factor), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate

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
