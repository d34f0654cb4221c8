"""The training loop of autoencoders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import Tensor
from tqdm.auto import tqdm

from tarflow.data.images import Images
from tarflow.training.autoencoder_config import TrainVaeConfig
from tarflow.training.autoencoder_model import copy_for_use, plain, save_autoencoder
from tarflow.training.autoencoder_report import HeldOutPictures, write_metrics
from tarflow.training.autoencoder_step import AutoencoderStepper
from tarflow.training.batches import StepSampler, train_loader
from tarflow.training.checkpoint import checkpoints, find_checkpoint, read_state, save_checkpoint
from tarflow.training.mixture import Mixture
from tarflow.training.parallel import TIMEOUT, StopRequest, processes_on_cpus
from tarflow.training.schedule import TimeLimit


class AutoencoderTrainer:
    """One run: `AutoencoderTrainer(config, resolved).run()`.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if the settings do not fit the data, the weights or the checkpoint to resume from.
    """

    def __init__(self, config: TrainVaeConfig, resolved: str):
        self.config, self.output = config, Path(config.output)
        self.folder = self.output.with_name(self.output.name + "_run")
        self.accelerator = Accelerator(
            cpu=processes_on_cpus(),
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation,
            log_with=config.trackers or None,
            project_dir=str(self.folder),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        if self.accelerator.distributed_type is DistributedType.FSDP:
            raise ValueError("autoencoders are not sharded: start with configs/accelerate/ddp.yaml")
        set_seed(config.seed)
        # Settings are checked before anything is written.
        checkpoint = self.find_checkpoint()
        sources = [Images(source.data, "train") for source in config.sources.values()]
        self.pictures = Mixture(sources, [source.share for source in config.sources.values()], config.seed)
        self.held_out = HeldOutPictures(config)
        self.stepper = AutoencoderStepper(config, self.accelerator)
        self.step, self.total_steps, self.lowered = 0, config.steps, False  # whether max_minutes has lowered the steps
        if checkpoint is not None:
            self.load(checkpoint)
        self.metrics = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(resolved)
            if checkpoint is None:
                self.metrics.unlink(missing_ok=True)
        if config.trackers:
            self.accelerator.init_trackers("logs")

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, None for a new run, which must not be mixed with an earlier one."""
        folder = self.folder / "checkpoints"
        if self.config.resume is not None:
            return find_checkpoint(folder, self.config.resume)
        if found := checkpoints(folder):
            raise ValueError(
                f"{str(self.folder)!r} has checkpoints of an earlier run, up to {found[-1].name}: go on with --resume "
                "latest, or remove it"
            )
        return None

    @property
    def images_per_step(self) -> int:
        """Pictures of all processes and passes in one optimizer step."""
        return self.config.batch_size * self.config.accumulation * self.accelerator.num_processes

    def facts(self) -> dict[str, Any]:
        """What must be the same when training goes on."""
        loss, vae = self.config.loss, self.stepper.reconstruction.vae
        network = [loss.discriminator_width, loss.discriminator_layers] if loss.adversarial > 0 else None
        model = {key: plain(value) for key, value in vae.config.items() if not key.startswith("_")}
        return {
            **{f"model.{key}": value for key, value in model.items()},
            "ema_decay": self.config.ema_decay,
            "pictures per step": self.images_per_step,
            "loss.discriminator_width and layers": network,
        }

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        state = read_state(checkpoint)
        for name, here in self.facts().items():
            there = state.get("facts", {}).get(name)
            if there != here:
                raise ValueError(f"the checkpoint {str(checkpoint)!r} differs: {name} is {there} there and {here} here")
        self.accelerator.load_state(str(checkpoint))
        self.stepper.averages.load(checkpoint / "averages", state["ema_steps"])
        for group in self.stepper.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay  # this run's, not the checkpoint's
        self.step, self.lowered = state["step"], state["lowered"]
        if self.config.max_minutes is not None:
            self.total_steps = state["total_steps"]

    def save_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowered": self.lowered,
            "ema_steps": self.stepper.averages.steps,
            "facts": self.facts(),
        }
        folder = self.folder / "checkpoints"
        return save_checkpoint(self.accelerator, folder, state, self.stepper.averages, self.config.keep_checkpoints)

    def run(self) -> dict[str, Any]:
        """Train to the last step, then evaluate and save the autoencoder; returns the last metrics.

        At a SIGTERM a checkpoint is saved and training stops; the metrics then have ``stopped``.
        """
        accelerator, config = self.accelerator, self.config
        batches, first, limit = self.batches(), self.step, None
        progress = tqdm(total=self.total_steps, initial=first, unit="step", disable=not accelerator.is_main_process)
        if config.max_minutes is not None and not self.lowered:
            limit = TimeLimit(config.max_minutes)
        with StopRequest() as stop:
            while self.step < self.total_steps:
                values = self.stepper.take(batches, self.step, self.total_steps)
                self.step += 1
                progress.update()
                done = self.step - first
                if limit is not None and limit.is_due(done):
                    left = broadcast_object_list([limit.steps_left(done, config.steps - self.step)])[0]
                    limit.agree(done, left)
                    self.total_steps = progress.total = self.step + left
                    self.lowered = True
                if self.step % config.log_every == 0:
                    self.log(values, progress)
                if self.step < self.total_steps:
                    if stop.agreed(accelerator):
                        progress.close()
                        return self.stop()
                    self.at_intervals()
        progress.close()
        return self.finish()

    def batches(self) -> Iterator[dict[str, Any]]:
        """This process's batches from the current step on, one for each forward pass."""
        config, accelerator = self.config, self.accelerator
        sampler = StepSampler(
            [range(len(self.pictures))],
            config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.accumulation,
            config.seed,
            self.step,
            config.steps,
        )
        pinned = accelerator.device.type == "cuda"
        return iter(train_loader(self.pictures, config.batch_size, config.num_workers, sampler, pinned))

    def log(self, values: dict[str, Tensor], progress: tqdm) -> None:
        """Write means over all processes."""
        names = sorted(values)
        stacked = torch.stack([values[name].detach().float().to(self.accelerator.device) for name in names])
        means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        means["lr"] = self.stepper.optimizer.param_groups[0]["lr"]
        self.accelerator.log({f"train/{name}": value for name, value in means.items()}, self.step)
        progress.set_postfix(loss=f"{means['loss']:.4f}", kl=f"{means['kl']:.2f}", l1=f"{means['l1']:.4f}")

    def at_intervals(self) -> None:
        """Evaluation and checkpoints where they are due."""
        if self.config.eval_every and self.step % self.config.eval_every == 0:
            self.evaluate_and_save()
        if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
            self.save_checkpoint()

    def evaluate_and_save(self) -> dict[str, Any]:
        """Evaluate and save the averaged weights; the main process does it, and returns the metrics."""
        metrics: dict[str, Any] = {"step": self.step}
        if self.accelerator.is_main_process:
            with self.stepper.averages.applied():
                vae = copy_for_use(self.stepper.reconstruction.vae, self.config.constant_std)
            metrics |= self.held_out.report(vae, self.folder / "grids", self.step)
            write_metrics(self.metrics, metrics)
            numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
            self.accelerator.log({f"held_out/{name}": value for name, value in numbers.items()}, self.step)
            tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
            save_autoencoder(vae, self.output, self.config.dtype, self.config.card)
        self.accelerator.wait_for_everyone()
        return metrics

    def finish(self) -> dict[str, Any]:
        if self.config.checkpoint_every:
            self.save_checkpoint()
        metrics = self.evaluate_and_save()
        if self.stepper.skipped and self.accelerator.is_main_process:
            tqdm.write(
                f"{len(self.stepper.skipped)} unreadable images were skipped, for example: {min(self.stepper.skipped)}"
            )
        self.accelerator.end_training()
        return metrics

    def stop(self) -> dict[str, Any]:
        """Save a checkpoint and end before the last step."""
        path = self.save_checkpoint()
        if self.accelerator.is_main_process:
            tqdm.write(f"stopped by SIGTERM at step {self.step}: {path} is saved; go on with --resume latest")
        self.accelerator.end_training()
        return {"step": self.step, "stopped": True}
