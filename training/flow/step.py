"""One optimizer step."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from tarflow.training.flow.config import RunConfig, has_denoiser
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.objective import score_target
from tarflow.training.loop.averages import WeightAverages
from tarflow.training.loop.draws import place_seed
from tarflow.training.loop.schedule import peak_factor, schedule_factor, warmup_steps


class Stepper:
    """Takes optimizer steps.

    Args:
        config: of the run.
        accelerator: which has prepared the following.
        model: the `FlowObjective`.
        flow: its flow.
        optimizer, averages: of its trained parameters.
        inputs: makes what the model takes from batches.

    Attributes:
        bad_steps: how many of the last steps, in a row, were not finite.
        spikes: how many steps were left out for their gradient norm.
        skipped: messages of unreadable pictures.
        others_norm: gradient norm of networks that learn beside the model, None without any.
        waited, seconds: for data, and for whole steps.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: torch.nn.Module,
        flow: Any,
        optimizer: Any,
        averages: WeightAverages,
        inputs: InputMaker,
    ):
        self.config, self.accelerator, self.model, self.flow = config, accelerator, model, flow
        self.optimizer, self.averages, self.inputs = optimizer, averages, inputs
        self.bad_steps = self.spikes = 0
        self.skipped: set[str] = set()
        self.others_norm: torch.Tensor | None = None
        self.waited = self.seconds = 0.0

    def take(self, batches: Iterator[dict[str, Any]], step: int, total: int) -> dict[str, torch.Tensor]:
        """One optimizer step; the host waits for the device once, for the gradient's norm.

        Args:
            batches: this process's, one for each forward pass.
            step: its number.
            total: steps of the run, for the learning rate.

        Returns:
            this process's loss, nats per dimension, gradient norm, and what else `backward` gives.
        """
        config, accelerator, begun = self.config, self.accelerator, time.perf_counter()
        self.set_learning_rate(step, total)
        self.model.train()
        if config.lora.dropout:  # as all that is random a function of the step, so that interruptions change nothing
            torch.manual_seed(place_seed(config.train.seed, step, accelerator.process_index, "dropout"))
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
        latents, norm = [], torch.tensor(0.0)
        for part in range(config.train.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            self.skipped.update(batch["skipped"])
            with accelerator.accumulate(*self.learning(step)):
                losses, z = self.backward(self.inputs.training(batch, step, self.places(part)), step)
                for name, value in losses.items():
                    sums[name] += value
                if self.flow.prior_variance is not None and not config.lora.rank:
                    latents.append(z)
                if accelerator.sync_gradients:
                    norm = self.clip_gradients(step)
                    self.update(norm, sums["loss"] / config.train.accumulation, latents, step)
        self.seconds += time.perf_counter() - begun
        return {name: value / config.train.accumulation for name, value in sums.items()} | {"grad_norm": norm}

    def learning(self, step: int) -> list[torch.nn.Module]:
        """The modules whose gradients a step adds up."""
        return [self.model]

    def backward(self, inputs: dict[str, Any], step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of one pass; returns losses by name, the sum as "loss", and z (B, C, H, W)."""
        inputs["latents"].requires_grad_(has_denoiser(self.config))
        output = self.model(**inputs)
        self.accelerator.backward(output["loss"])
        losses = {"loss": output["loss"].detach(), "nats_per_dim": output["nats_per_dim"].mean()}
        if has_denoiser(self.config):
            losses["denoiser_loss"] = self.backward_denoiser(inputs)
        return losses, output["z"]

    def places(self, part: int) -> range:
        """Where this process's pictures of a pass are in the step's batch."""
        size, accelerator = self.config.train.batch_size, self.accelerator
        first = (part * accelerator.num_processes + accelerator.process_index) * size
        return range(first, first + size)

    def set_learning_rate(self, step: int, total: int) -> None:
        optim, images = self.config.optim, self.config.loop.images_per_step(self.accelerator.num_processes)
        factor = schedule_factor(step, total, warmup_steps(optim, images), optim) * peak_factor(optim, images)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def update(self, norm: torch.Tensor, loss: torch.Tensor, latents: list[torch.Tensor], step: int) -> None:
        """Change the weights, unless the gradient is not finite or larger than wished."""
        size, limit = float(norm), self.config.optim.skip_grad_norm
        others = torch.zeros(()) if self.others_norm is None else self.others_norm
        finite, scaled = math.isfinite(size) and math.isfinite(float(others)), self.accelerator.scaler is not None
        spike = limit is not None and finite and size > limit
        self.spikes += spike
        if (finite or scaled) and not spike:
            self.optimizer.step()  # with fp16 the scaler leaves out what is not finite, and lowers its scale
        elif scaled:
            self.accelerator.scaler.update()  # which it expects before gradients are unscaled again
        if finite and not spike and not self.optimizer.step_was_skipped:
            self.take_in(latents, step)
        self.optimizer.zero_grad()
        # Gradients of fp16 may overflow for some steps, until the scale fits; losses may not.
        self.count_bad_step(finite or (scaled and math.isfinite(float(loss))), loss, step)

    def take_in(self, latents: list[torch.Tensor], step: int) -> None:
        """What follows the weights, after they have changed."""
        self.averages.step()
        if latents:
            self.flow.update_prior(self.accelerator.gather(torch.cat(latents)))

    def backward_denoiser(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Backward pass of the learned denoiser, with the score that the flow's one has left; returns its loss."""
        accelerator, latents = self.accelerator, inputs["latents"]
        loss_scale = 1 / self.config.train.accumulation
        if accelerator.scaler is not None:
            loss_scale *= accelerator.scaler.get_scale()
        target = score_target(latents.grad, self.config.train.noise_std, loss_scale)
        loss = self.model(**{**inputs, "latents": latents.detach(), "score_target": target})["loss"]
        accelerator.backward(loss)
        return loss.detach()

    def clip_gradients(self, step: int) -> torch.Tensor:
        """Clip each optimizer group by itself; returns the largest norm."""
        limit, groups = self.config.optim.max_grad_norm, self.optimizer.param_groups
        if len(groups) == 1:
            norms = [self.accelerator.clip_grad_norm_(self.model.parameters(), limit)]
        else:  # Accelerate would unscale gradients of fp16 for each group
            self.accelerator.unscale_gradients()
            norms = [torch.nn.utils.clip_grad_norm_(group["params"], limit) for group in groups]
        return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).max()

    def count_bad_step(self, finite: bool, loss: torch.Tensor, step: int) -> None:
        """Stop after too many losses or gradients in a row that are not finite."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise ValueError(
                f"training stopped at step {step}: loss {float(loss)} or its gradient was not finite in "
                f"{self.bad_steps} steps in a row; lower optim.lr ({self.config.optim.lr}) or resume from a checkpoint"
            )
