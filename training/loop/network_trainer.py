"""The loop that trains networks other than the flow: a whole autoencoder, a decoder alone, a student."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import Tensor

from tarflow.common.files import read_json_lines, write_text
from tarflow.common.progress import progress_bar, write_line
from tarflow.training.loop.batches import BatchReader, StepSampler, groups_of, train_loader
from tarflow.training.loop.checkpoint import (
    check_facts,
    checkpoint_to_resume,
    on_main,
    read_state,
    save_checkpoint,
)
from tarflow.training.loop.launcher import accumulating, check_launcher, check_trackers, is_on
from tarflow.training.loop.network_config import NetworkConfig
from tarflow.training.loop.network_step import NetworkStepper, Task
from tarflow.training.loop.parallel import TIMEOUT, processes_on_cpus
from tarflow.training.loop.reading import reading
from tarflow.training.loop.schedule import TimeLimit
from tarflow.training.loop.stopping import EndsEarly, Stopped, StopRequest


def network_accelerator(config: NetworkConfig, folder: Path) -> Accelerator:
    """The accelerator of a run in ``folder``; it seeds everything.

    Raises:
        ValueError: if the launcher wants what these trainings do not know, FSDP for example, or a tracker is not there.
    """
    if is_on("ACCELERATE_USE_FSDP"):
        raise ValueError("this network is not sharded: start with --config_file $(tarflow configs accelerate/ddp)")
    check_launcher(config.mixed_precision, config.accumulation)
    check_trackers(config.trackers, "trackers")
    accelerator = Accelerator(
        cpu=processes_on_cpus(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=accumulating(config.accumulation),
        log_with=config.trackers or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    set_seed(config.seed)
    return accelerator


class NetworkTrainer(EndsEarly):
    """One run: `NetworkTrainer(config, resolved, folder, accelerator, task, stepper).run()`.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.
        folder: of the run: settings, logs, metrics.jsonl, checkpoints.
        accelerator: of `network_accelerator`.
        task: what to train.
        stepper: takes its steps.

    Raises:
        ValueError: if the settings do not fit the checkpoint to resume from.
    """

    def __init__(
        self,
        config: NetworkConfig,
        resolved: str,
        folder: Path,
        accelerator: Accelerator,
        task: Task,
        stepper: NetworkStepper,
    ):
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.task, self.stepper = task, stepper
        # Settings are checked before anything is written.
        checkpoint = checkpoint_to_resume(folder, config.resume)
        state = None if checkpoint is None else read_state(checkpoint)
        if state is not None:
            check_facts(checkpoint, state.get("facts", {}), self.facts())
        self.metrics = folder / "metrics.jsonl"
        self.step, self.total_steps, self.lowered = 0, config.steps, False  # whether max_minutes has lowered the steps
        self.saved = checkpoint  # the last one
        if state is not None:
            self.load(checkpoint, state)
        on_main(accelerator, lambda: self.begin(resolved, fresh=checkpoint is None))

    def begin(self, resolved: str, fresh: bool) -> None:
        """Write the settings, and start the trackers."""
        write_text(self.folder / "config.yaml", resolved)
        if fresh:
            self.metrics.unlink(missing_ok=True)
        if self.config.trackers:
            self.accelerator.init_trackers("logs")

    def facts(self) -> dict[str, Any]:
        """What must be the same when training goes on."""
        config = self.config
        own = {
            "ema_decay": config.ema_decay,
            "pictures per step": config.batch_size * config.accumulation * self.accelerator.num_processes,
        }
        return json.loads(json.dumps({**self.task.facts(), **own, **self.stepper.facts()}))

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        with reading(checkpoint):
            self.accelerator.load_state(str(checkpoint))
        self.stepper.averages.load(checkpoint / "averages", state["ema_steps"])
        for group in self.stepper.optimizers[0].param_groups:
            group["weight_decay"] = self.config.weight_decay  # this run's, not the checkpoint's
        self.step, self.lowered = state["step"], state["lowered"]
        if self.config.max_minutes is not None:
            self.total_steps = state["total_steps"]

    def save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowered": self.lowered,
            "ema_steps": self.stepper.averages.steps,
            "facts": self.facts(),
        }
        folder = self.folder / "checkpoints"
        keep = self.config.keep_checkpoints
        self.saved = save_checkpoint(self.accelerator, folder, state, self.stepper.averages, keep)

    def run(self) -> dict[str, Any]:
        """Train to the last step, then evaluate and save; returns the last metrics.

        At a SIGTERM or SIGINT a checkpoint is saved and training stops; the metrics then have the signal's name as
        ``stopped``.
        """
        with StopRequest() as stop:
            try:
                with self.batches() as batches:
                    name = self.train(batches, stop)
                return self.stop(name) if name else self.finish(stop)
            except Stopped as signal:
                return self.stop(signal.name)
            except (RuntimeError, ValueError):  # the main process was ended by a signal that has come here too
                if not (stop.received and self.is_saved):
                    raise
                return self.stop(stop.received)

    def train(self, batches: BatchReader, stop: StopRequest) -> str:
        """Train to the last step; returns the name of a signal that is to stop the run before."""
        accelerator, config = self.accelerator, self.config
        first, limit, name = self.step, None, ""
        progress = progress_bar(
            total=self.total_steps, initial=first, unit="step", disable=not accelerator.is_main_process
        )
        if config.max_minutes is not None and not self.lowered:
            limit = TimeLimit(config.max_minutes)
        with closing(progress):
            while self.step < self.total_steps and not name:
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
                name = stop.agreed(accelerator)
                if self.step < self.total_steps and not name:
                    self.at_intervals(stop)
        return name

    def batches(self) -> BatchReader:
        """This process's batches from the current step on, one for each forward pass."""
        config, accelerator, pictures = self.config, self.accelerator, self.task.train
        sampler = StepSampler(
            groups_of(pictures),
            config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.accumulation,
            config.seed,
            self.step,
            config.steps,
        )
        pinned = accelerator.device.type == "cuda"
        return BatchReader(train_loader(pictures, config.batch_size, config.num_workers, sampler, pinned))

    def log(self, values: dict[str, Tensor], progress: Any) -> None:
        """Write means over all processes."""
        names = sorted(values)
        stacked = torch.stack([values[name].detach().float().to(self.accelerator.device) for name in names])
        means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        means["lr"] = self.stepper.optimizers[0].param_groups[0]["lr"]
        self.accelerator.log({f"train/{name}": value for name, value in means.items()}, self.step)
        progress.set_postfix({name: f"{means[name]:.4f}" for name in ("loss", "kl", "l1") if name in means})

    def at_intervals(self, stop: StopRequest) -> None:
        """Evaluation and checkpoints where they are due."""
        if self.config.eval_every and self.step % self.config.eval_every == 0:
            self.report(stop, self.accelerator.num_processes == 1)
        if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
            self.save_checkpoint()

    def report(self, stop: StopRequest, at_once: bool, last: bool = False) -> dict[str, Any]:
        """The task's report on the averaged weights; the main process makes it, and returns the metrics. A signal ends it
        ``at_once`` or not at all, but never while the weights are changed and put back: a checkpoint must not have those
        of the average."""
        metrics: dict[str, Any] = {"step": self.step}

        def report() -> None:
            self.stepper.model.eval()
            with self.stepper.averages.applied(), stop.at_once(at_once):
                metrics.update(self.task.report(self.step, last))
            write_metrics(self.metrics, metrics)
            numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
            self.accelerator.log({f"held_out/{name}": value for name, value in numbers.items()}, self.step)
            write_line(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

        on_main(self.accelerator, report)
        return metrics

    def finish(self, stop: StopRequest) -> dict[str, Any]:
        if self.config.checkpoint_every:
            self.save_checkpoint()
        # What a signal ends here is done again when the run goes on.
        at_once = bool(self.config.checkpoint_every) or self.accelerator.num_processes == 1
        metrics = self.report(stop, at_once, last=True)
        skipped = self.stepper.skipped
        if skipped and self.accelerator.is_main_process:
            write_line(f"{len(skipped)} unreadable images were skipped, for example: {min(skipped)}")
        self.accelerator.end_training()
        return metrics

    def stop(self, name: str) -> dict[str, Any]:
        """End before all is done, see `save_and_end`."""
        self.save_and_end(name)
        return {"step": self.step, "stopped": name}


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Add metrics, with their "step", to a file of one JSON object a line. Lines of the same or later steps, which a run
    wrote that was interrupted, are dropped."""
    before = [value for _, value in read_json_lines(path)] if path.is_file() else []
    kept = [value for value in before if value["step"] < metrics["step"]]
    write_text(path, "".join(f"{json.dumps(value)}\n" for value in [*kept, metrics]))
