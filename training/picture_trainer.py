"""The loop that trains networks which decode pictures: a whole autoencoder, or a decoder alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from tarflow.training.averages import WeightAverages
from tarflow.training.batches import StepSampler, groups_of, train_loader
from tarflow.training.checkpoint import find_checkpoint, read_state, save_checkpoint
from tarflow.training.parallel import TIMEOUT, StopRequest, processes_on_cpus
from tarflow.training.picture_loss import PictureLoss
from tarflow.training.schedule import TimeLimit, schedule_factor


class Task(Protocol):
    """What a `PictureTrainer` trains.

    Attributes:
        network: what learns.
        train: the training pictures.
    """

    network: nn.Module
    train: Dataset

    @property
    def last_layer(self) -> nn.Parameter:
        """Weights of the layer of ``network`` that makes the pixels."""

    def facts(self) -> dict[str, Any]:
        """What must be the same when training goes on from a checkpoint, as JSON has it."""

    def decode(
        self, model: nn.Module, batch: dict[str, Any], step: int, places: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Decoded pictures and originals (B, 3, H, W) in [−1, 1], and further losses with their weights, by name.

        Args:
            model: ``network`` as it must be called, in one forward pass.
            batch: of ``train``.
            step: its number.
            places: of the pictures in the step's batch of all processes.
        """

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out metrics of ``network`` as it is; writes a grid. The main process calls this."""

    def save(self, metrics: dict[str, float]) -> None:
        """Save ``network`` as it is, at the end. The main process calls this."""


def picture_accelerator(config: Any, folder: Path) -> Accelerator:
    """The accelerator of a run with a ``train`` and a ``log`` section; it seeds everything.

    Raises:
        ValueError: if the launcher wants FSDP: these networks are small, and not divided among processes.
    """
    accelerator = Accelerator(
        cpu=processes_on_cpus(),
        mixed_precision=config.train.mixed_precision,
        log_with=config.log.trackers or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    if accelerator.is_fsdp2:
        raise ValueError("this training has no FSDP: use configs/accelerate/ddp.yaml")
    set_seed(config.train.seed)
    return accelerator


class PictureTrainer:
    """One run: `PictureTrainer(config, resolved, folder, accelerator, task).run()`.

    Args:
        config: settings with the sections ``loss`` (`PictureLossConfig`), ``optim``, ``train`` and ``log`` of
            `tarflow.training.picture_config`, and ``resume`` as of `find_checkpoint`, or None.
        resolved: their YAML, saved with the run.
        folder: of the run: settings, logs, checkpoints.
        accelerator: of `picture_accelerator`.
        task: what to train.

    Raises:
        ValueError: if the settings do not fit each other or the checkpoint to resume from.
    """

    def __init__(self, config: Any, resolved: str, folder: Path, accelerator: Accelerator, task: Task):
        self.config, self.folder, self.accelerator, self.task = config, folder, accelerator, task
        checkpoint = find_checkpoint(folder / "checkpoints", config.resume) if config.resume else None
        state = None if checkpoint is None else read_state(checkpoint)
        if state is not None:
            check_facts(checkpoint, state, self.facts())
        self.loss = PictureLoss(config.loss).to(accelerator.device)
        optim = config.optim
        options = {"betas": optim.betas, "weight_decay": optim.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(task.network.parameters(), optim.lr, **options)
        self.model, self.optimizer = accelerator.prepare(task.network, optimizer)
        self.adversary: Any = None
        if self.loss.discriminator is not None:
            rate = config.loss.discriminator_lr
            adversary = torch.optim.AdamW(self.loss.discriminator.parameters(), rate, **options)
            self.loss.discriminator, self.adversary = accelerator.prepare(self.loss.discriminator, adversary)
        self.averages = WeightAverages(list(self.model.parameters()), [config.train.ema_decay])
        self.longest = self.total_steps = config.train.steps
        self.step, self.bad_steps, self.lowered = 0, 0, False  # whether max_minutes has lowered the steps
        self.skipped: set[str] = set()
        if state is not None:
            self.load(checkpoint, state)
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / "config.yaml.tmp"
            temporary.write_text(resolved)
            temporary.rename(folder / "config.yaml")
        if config.log.trackers:
            accelerator.init_trackers("logs")

    @property
    def images_per_step(self) -> int:
        return self.config.train.batch_size * self.accelerator.num_processes

    def facts(self) -> dict[str, Any]:
        """What must be the same when training goes on."""
        own = {"train.ema_decay": self.config.train.ema_decay, "pictures per step": self.images_per_step}
        own["adversarial loss"] = self.config.loss.adversarial > 0
        return json.loads(json.dumps({**self.task.facts(), **own}))

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, with this run's optimizer settings."""
        settings = [{name: group[name] for name in ("lr", "weight_decay", "betas")} for group in self.groups()]
        self.accelerator.load_state(str(checkpoint))
        for group, own in zip(self.groups(), settings, strict=True):
            group.update(own)
        self.averages.load(checkpoint / "averages", state["ema_steps"])
        self.step, self.bad_steps, self.lowered = state["step"], state["bad_steps"], state["lowered"]
        if self.config.train.max_minutes is not None:
            self.total_steps = state["total_steps"]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of both optimizers."""
        return [group for one in (self.optimizer, self.adversary) if one is not None for group in one.param_groups]

    def run(self) -> dict[str, float]:
        """Train to the last step, then evaluate and save; returns the last metrics.

        At a SIGTERM a checkpoint is saved and training stops; the metrics then have ``stopped``.
        """
        config, accelerator, first = self.config, self.accelerator, self.step
        batches = self.batches()
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not accelerator.is_main_process)
        limit = None
        if config.train.max_minutes is not None and not self.lowered:
            limit = TimeLimit(config.train.max_minutes)
        with StopRequest() as stop:
            while self.step < self.total_steps:
                values = self.take(batches)
                self.step += 1
                progress.update()
                done = self.step - first
                if limit is not None and limit.is_due(done):
                    left = broadcast_object_list([limit.steps_left(done, self.longest - self.step)])[0]
                    limit.agree(done, left)
                    self.total_steps = progress.total = self.step + left
                    self.lowered = True
                if self.step % config.log.log_every == 0:
                    self.log(values, progress)
                if self.step == self.total_steps:
                    break
                if stop.agreed(accelerator):
                    return self.stop(progress)
                if config.log.eval_every and self.step % config.log.eval_every == 0:
                    self.evaluate()
                if config.log.checkpoint_every and self.step % config.log.checkpoint_every == 0:
                    self.save_checkpoint()
            progress.close()
            return self.finish()

    def batches(self) -> Iterator[dict[str, Any]]:
        """This process's batches from the current step on."""
        train, accelerator = self.config.train, self.accelerator
        process, processes = accelerator.process_index, accelerator.num_processes
        groups = groups_of(self.task.train)
        sampler = StepSampler(groups, train.batch_size, process, processes, 1, train.seed, self.step, self.longest)
        pinned = accelerator.device.type == "cuda"
        return iter(train_loader(self.task.train, train.batch_size, train.num_workers, sampler, pinned))

    def take(self, batches: Iterator[dict[str, Any]]) -> dict[str, Tensor]:
        """One step of the network and then of its discriminator; returns this process's losses by name."""
        accelerator, optim, size = self.accelerator, self.config.optim, self.config.train.batch_size
        batch = next(batches)
        self.skipped.update(batch["skipped"])
        self.model.train()
        factor = schedule_factor(self.step, self.total_steps, optim.warmup_steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.lr * factor
        first = accelerator.process_index * size
        decoded, images, further = self.task.decode(self.model, batch, self.step, range(first, first + size))
        with accelerator.autocast():
            loss, parts = self.loss(decoded, images, self.task.last_layer, self.step)
        loss = sum(further.values(), start=loss)
        accelerator.backward(loss)
        norm = self.update(self.optimizer, self.model)
        if norm.isfinite():
            self.averages.step()
        self.count_bad_step(bool(norm.isfinite()), loss)
        values = {"loss": loss.detach(), **parts, "grad_norm": norm}
        values |= {name: value.detach() for name, value in further.items()}
        with accelerator.autocast():
            adversary_loss = self.loss.discriminator_loss(decoded, images, self.step)
        if adversary_loss is not None:
            accelerator.backward(adversary_loss)
            self.update(self.adversary, self.loss.discriminator)
            values["discriminator"] = adversary_loss.detach()
        return values

    def update(self, optimizer: Any, model: nn.Module) -> Tensor:
        """Change the weights unless the gradient is not finite; returns its norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.config.optim.max_grad_norm).detach()
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        return norm

    def count_bad_step(self, finite: bool, loss: Tensor) -> None:
        """Stop after too many losses or gradients in a row that are not finite."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise ValueError(
                f"training stopped at step {self.step}: loss {float(loss)} or its gradient was not finite in "
                f"{self.bad_steps} steps in a row; lower optim.lr ({self.config.optim.lr}) or resume from a checkpoint"
            )

    def log(self, values: dict[str, Tensor], progress: tqdm) -> None:
        """Write means over all processes."""
        names = sorted(values)
        stacked = torch.stack([values[name].detach().float().to(self.accelerator.device) for name in names])
        means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        means["lr"] = self.optimizer.param_groups[0]["lr"]
        self.accelerator.log({f"train/{key}": value for key, value in means.items()}, self.step)
        progress.set_postfix({name: f"{means[name]:.4f}" for name in ("loss", "l1")})

    def evaluate(self, save: bool = False) -> dict[str, float]:
        """Held-out metrics of the averaged weights, on the main process; with ``save`` they are saved too."""
        metrics: dict[str, float] = {}
        if self.accelerator.is_main_process:
            self.model.eval()
            with self.averages.applied():
                metrics = self.task.evaluate(self.step)
                if save:
                    self.task.save(metrics)
            self.accelerator.log({f"held_out/{key}": value for key, value in metrics.items()}, self.step)
            words = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if math.isfinite(value))
            tqdm.write(f"step {self.step}: held-out {words}" if words else f"step {self.step}: nothing is held out")
        self.accelerator.wait_for_everyone()
        return metrics

    def finish(self) -> dict[str, float]:
        if self.config.log.checkpoint_every:
            self.save_checkpoint()
        metrics = self.evaluate(save=True)
        if self.skipped and self.accelerator.is_main_process:
            tqdm.write(f"{len(self.skipped)} unreadable images were skipped, for example: {min(self.skipped)}")
        self.accelerator.end_training()
        return {**metrics, "steps": self.step}

    def stop(self, progress: tqdm) -> dict[str, float]:
        """Save a checkpoint and end before the last step."""
        progress.close()
        path = self.save_checkpoint()
        if self.accelerator.is_main_process:
            tqdm.write(f"stopped by SIGTERM at step {self.step}: {path} is saved; go on with --resume latest")
        self.accelerator.end_training()
        return {"steps": self.step, "stopped": True}

    def save_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowered": self.lowered,
            "bad_steps": self.bad_steps,
            "ema_steps": self.averages.steps,
            "facts": self.facts(),
        }
        keep = self.config.log.keep_checkpoints
        return save_checkpoint(self.accelerator, self.folder / "checkpoints", state, self.averages, keep)


def check_facts(path: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Whether a run can go on from a checkpoint.

    Raises:
        ValueError: that names the first difference.
    """
    there = state.get("facts", {})
    for name, here in facts.items():
        if there.get(name) != here:
            raise ValueError(f"the checkpoint {str(path)!r} has {name} {there.get(name)!r}, but this run has {here!r}")
