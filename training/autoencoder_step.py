"""One optimizer step of an autoencoder, and of its discriminator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tarflow.data.images import to_model
from tarflow.training.autoencoder_config import TrainVaeConfig
from tarflow.training.autoencoder_model import Reconstruction, kl_divergence, make_autoencoder
from tarflow.training.averages import WeightAverages
from tarflow.training.config import OptimConfig
from tarflow.training.draws import draw_noise
from tarflow.training.picture_loss import PictureLoss
from tarflow.training.schedule import schedule_factor

#: So many losses or gradients in a row that are not finite are skipped before training stops.
MAX_BAD_STEPS = 5
#: A cosine down to 0 after the warm-up.
SCHEDULE = OptimConfig(min_lr_ratio=0.0)


class AutoencoderStepper:
    """Makes everything that learns, and takes optimizer steps.

    Args:
        config: of the run.
        accelerator: puts models and optimizers on their devices.

    Attributes:
        reconstruction: the autoencoder in its training form; ``model`` is what Accelerate made of it.
        optimizer, averages: of its weights.
        loss: with the discriminator, whose optimizer is ``discriminator_optimizer``; None without one.
        bad_steps: how many of the last steps, in a row, were not finite.
        skipped: messages of unreadable pictures.

    Raises:
        ValueError: if the settings of model and loss do not fit the pictures or the weights.
    """

    def __init__(self, config: TrainVaeConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        vae = make_autoencoder(config)
        self.reconstruction = Reconstruction(vae, config.constant_std)
        side = config.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (vae.config.latent_channels, side, side)
        self.loss = PictureLoss(config.loss)
        self.loss.check_size(config.image_size)
        optimizer = torch.optim.AdamW(
            self.reconstruction.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.model, self.optimizer = accelerator.prepare(self.reconstruction, optimizer)
        self.loss.to(accelerator.device)
        self.discriminator_optimizer = None
        if self.loss.discriminator is not None:
            optimizer = torch.optim.Adam(
                self.loss.discriminator.parameters(), config.loss.discriminator_lr, betas=(0.5, 0.9)
            )
            prepared = accelerator.prepare(self.loss.discriminator, optimizer)
            self.loss.discriminator, self.discriminator_optimizer = prepared
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
        discriminator = [self.loss.discriminator] if self.loss.is_adversarial(step) else []
        norm = torch.tensor(0.0)
        for part in range(config.accumulation):
            batch = next(batches)
            self.skipped.update(batch["skipped"])
            images = to_model(batch["image"].to(accelerator.device))
            first = (part * accelerator.num_processes + accelerator.process_index) * config.batch_size
            places = range(first, first + config.batch_size)
            noise = draw_noise(config.seed, step, places, self.latent_shape, accelerator.device)
            with accelerator.accumulate(self.model, *discriminator):
                for name, value in self.backward(images, noise, step).items():
                    sums[name] += value / config.accumulation
                if accelerator.sync_gradients:
                    norm = self.update(float(sums["loss"]), step)
        return {**sums, "grad_norm": norm}

    def set_learning_rates(self, step: int, total: int) -> None:
        config = self.config
        factor = schedule_factor(step, total, config.warmup_steps, SCHEDULE)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        if self.discriminator_optimizer is not None:
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = config.loss.discriminator_lr

    def backward(self, images: Tensor, noise: Tensor, step: int) -> dict[str, Tensor]:
        """Gradients of one pass, the autoencoder's and then the discriminator's; returns the losses."""
        mean, log_variance, decoded = self.model(images, noise)
        kl = kl_divergence(mean, log_variance)
        with self.accelerator.autocast():
            loss, parts = self.loss(decoded, images, self.reconstruction.last_layer, step)
        loss = loss + self.config.kl_weight * kl
        self.accelerator.backward(loss)
        with self.accelerator.autocast():
            discriminator_loss = self.loss.discriminator_loss(decoded, images, step)
        if discriminator_loss is not None:
            self.accelerator.backward(discriminator_loss)
            parts["discriminator"] = discriminator_loss.detach()
        return {"loss": loss.detach(), "kl": kl.detach(), **parts}

    def update(self, loss: float, step: int) -> Tensor:
        """Change the weights, unless a gradient is not finite; returns the norm of the autoencoder's."""
        accelerator, limit = self.accelerator, self.config.max_grad_norm
        optimizers = [self.optimizer]
        norms = [accelerator.clip_grad_norm_(self.model.parameters(), limit)]
        if self.loss.is_adversarial(step):
            optimizers.append(self.discriminator_optimizer)
            norms.append(accelerator.clip_grad_norm_(self.loss.discriminator.parameters(), limit))
        finite = all(math.isfinite(float(norm)) for norm in norms)
        for optimizer in optimizers:
            if finite or accelerator.scaler is not None:  # which leaves out what is not finite, and lowers its scale
                optimizer.step()
            optimizer.zero_grad()
        if finite and not self.optimizer.step_was_skipped:
            self.averages.step()
        # Gradients of fp16 may overflow for some steps, until the scale fits; losses may not.
        fine = finite or (accelerator.scaler is not None and math.isfinite(loss))
        self.bad_steps = 0 if fine else self.bad_steps + 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"training stopped at step {step}: the loss ({loss}) or its gradient was not finite in {self.bad_steps} "
                f"steps in a row; lower lr ({self.config.lr}) or resume from a checkpoint"
            )
        return norms[0]
