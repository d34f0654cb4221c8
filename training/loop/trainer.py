"""The loop of all trainings: opening and resuming, steps, time limit, signals, logs, reports, checkpoints, the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from tarflow.common.files import write_text
from tarflow.common.processes import gather_objects
from tarflow.common.progress import progress_bar, write_line
from tarflow.data.stream.stream import Stream
from tarflow.training.loop.agreement import agreed, main_alone
from tarflow.training.loop.averages import WeightAverages
from tarflow.training.loop.batches import BatchReader, Reader, step_sampler, train_loader
from tarflow.training.loop.checkpoint import checkpoint_name, checkpoint_to_resume, read_state, save_checkpoint
from tarflow.training.loop.config import LoopSettings
from tarflow.training.loop.parallel import forget_gathered
from tarflow.training.loop.reading import check_random_states, check_scaler, reading
from tarflow.training.loop.schedule import TimeLimit
from tarflow.training.loop.step import Stepper
from tarflow.training.loop.stopping import Stopped, StopRequest
from tarflow.training.loop.streaming import Share, StreamReader, checked, read_waiting
from tarflow.training.loop.summary import TimeEstimate, beginning, number_of_pictures
from tarflow.training.loop.task import Batch, State, Task, is_due
from tarflow.training.loop.trackers import start_trackers

#: What a resumed run takes from its own settings.
OPTIMIZER_SETTINGS = ("peak_lr", "weight_decay", "betas", "momentum")
#: What the progress bar shows of a step, where there is such: a flow's likelihood, the same quantity as the held-out one.
SHOWN = ("nats_per_dim", "loss", "kl", "l1")


class Trainer:
    """One run: `Trainer(settings, resolved, accelerator, task).run()`.

    Args:
        settings: of the loop.
        resolved: the YAML of all settings, saved with the run.
        accelerator: of the run.
        task: what to train.

    Attributes:
        step: steps done.
        total_steps: at which the run ends.
        saved: the last checkpoint, None if there is none.
        speed: what was last logged of it: "images" so far, "images_per_second", and "waiting_for_data", a share; also
            "images_per_second_later", of the steps after the first logged ones, in which things are compiled.

    Raises:
        ValueError: if settings, data and weights do not fit each other, or the checkpoint to resume from.
    """

    def __init__(self, settings: LoopSettings, resolved: str, accelerator: Accelerator, task: Task):
        self.settings, self.accelerator, self.task, self.folder = settings, accelerator, task, settings.folder
        # Settings are checked before anything is written.
        self.saved = checkpoint_to_resume(self.folder, settings.resume)
        state = None if self.saved is None else read_state(self.saved)
        task.make_parts(state)
        self.check_stream(state)
        if self.saved is not None and state is not None:
            task.check_resume(self.saved, state)
            self.check_optimizer(self.saved, state)
        task.prepare(fresh=state is None)
        trained = [parameter for parameter in task.learner.model.parameters() if parameter.requires_grad]
        self.averages = WeightAverages(trained, settings.ema_decays)
        self.stepper = Stepper(settings, accelerator, task, self.averages)
        self.longest = self.total_steps = settings.total_steps(accelerator.num_processes)
        self.step, self.lowered = 0, False  # whether max_minutes has lowered the steps
        self.speed: dict[str, float] = {}
        self.first_logged: tuple[int, float] | None = None  # steps and seconds
        self.reader: Reader | None = None
        self.stream: dict[str, Any] | None = None  # of the checkpoint, where the training pictures are a stream
        if self.saved is not None and state is not None:
            self.load(self.saved, state)
        task.prepare_reports()
        main_alone(accelerator, lambda: self.begin(resolved, fresh=state is None))
        if isinstance(task.train, Stream):  # what was read of it for the start
            task.train.forget()

    def check_stream(self, state: State | None) -> None:
        """Whether a stream is long enough, and the checkpoint's, of which a run that is no stream knows nothing."""
        streams = isinstance(self.task.train, Stream)
        if state is not None and state["step"] and ("stream" in state) != streams:
            there, here = ("pictures by number", "a stream") if streams else ("a stream", "pictures by number")
            raise ValueError(
                f"the checkpoint {str(self.saved)!r} was trained on {there}, but the data here is {here}, in another order: give "
                "the same, or start anew, a flow from its pipeline with --init_from"
            )
        if not isinstance(self.task.train, Stream):
            return
        self.task.train.check_length(self.settings.images_per_step(self.accelerator.num_processes))
        if self.saved is not None and state is not None and "stream" in state:
            checked(state["stream"], read_waiting(self.saved), self.task.train, self.share())

    def share(self) -> Share:
        """This process's share of steps."""
        train, accelerator = self.settings.train, self.accelerator
        return Share(train.batch_size, accelerator.process_index, accelerator.num_processes, train.accumulation)

    def check_optimizer(self, checkpoint: Path, state: State) -> None:
        """An error if a checkpoint is of the other optimizer; those from before there were two are of AdamW."""
        there, here = state.get("optimizer", "adamw"), self.settings.optim.name
        if there != here:
            name = "optim.name" if self.settings.sections else "optimizer"
            raise ValueError(
                f"the checkpoint {str(checkpoint)!r} was trained with {name} {there!r}, not {here!r}: set it to that, or "
                "start anew from the pipeline"
            )

    def begin(self, resolved: str, fresh: bool) -> None:
        """Write the settings, and start the trackers."""
        self.task.begin(fresh)
        # Of a new run from this file nobody means that it goes on from where this one did.
        write_text(self.folder / "config.yaml", re.sub(r"(?m)^resume: (?!auto).*$", "resume: null", resolved))
        processes, model = self.accelerator.num_processes, self.task.learner.model
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        batch = self.settings.images_per_step(processes)
        items, total = number_of_pictures(self.task.train), self.total_steps
        minutes = None if self.lowered else self.settings.train.max_minutes
        for line in beginning(self.task.about(), items, parameters, total, batch, self.folder, self.step, minutes):
            write_line(line)
        if self.settings.log.trackers:
            start_trackers(self.accelerator, self.folder, resolved)

    def load(self, checkpoint: Path, state: State) -> None:
        """Go on from a checkpoint."""
        groups = self.task.learner.optimizer
        wanted = [{name: group[name] for name in OPTIMIZER_SETTINGS if name in group} for group in groups.param_groups]
        accelerator = self.accelerator
        check_scaler(accelerator, checkpoint)
        if accelerator.scaler is not None:  # FSDP steps the optimizer while it loads, before a scale would be made
            accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
        check_random_states(checkpoint, accelerator.process_index)
        with reading(checkpoint):
            accelerator.load_state(str(checkpoint))
        agreed(accelerator, lambda: self.task.read_own(checkpoint, accelerator.process_index))
        # Passes are counted within a step: a checkpoint of other numbers of them would shift the gradients' exchange.
        accelerator.step = 0
        for group, own in zip(groups.param_groups, wanted, strict=True):
            group.update(own)  # this run's, not the checkpoint's
        self.averages.load(checkpoint / "averages", state["ema_steps"])
        minutes = self.settings.train.max_minutes
        same_limit = minutes is not None and state.get("max_minutes", minutes) == minutes
        self.step, self.lowered = state["step"], state["lowered"] and same_limit
        self.stepper.spikes = state.get("spikes", 0)
        self.stream = state.get("stream")
        if self.lowered:
            self.total_steps = state["total_steps"]

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step, and note it as ``saved``."""
        self.stepper.settle()
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowered": self.lowered,
            "max_minutes": self.settings.train.max_minutes,
            "spikes": self.stepper.spikes,
            "ema_steps": self.averages.steps,
            "optimizer": self.settings.optim.name,
            **self.task.state(),
        }
        stream = self.reader if isinstance(self.reader, StreamReader) else None
        if stream is not None:
            state["stream"] = stream.state()

        def write_own(checkpoint: Path) -> None:
            self.task.write_own(checkpoint, self.accelerator.process_index)
            if stream is not None:
                stream.write_waiting(checkpoint)

        keep = self.settings.log.keep_checkpoints
        folder = self.folder / "checkpoints"
        self.saved = save_checkpoint(self.accelerator, folder, state, self.averages, keep, write_own)

    def run(self) -> dict[str, Any]:
        """Train to the last step, then evaluate and save; returns the last metrics, with "steps".

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
            except (RuntimeError, ValueError):  # of work in common with a process that a signal has ended
                if not (stop.received and self.is_saved):
                    raise
                return self.stop(stop.received)

    def train(self, batches: Reader, stop: StopRequest) -> str:
        """Train to the last step; returns the name of a signal that is to stop the run before."""
        accelerator, name, first, limit = self.accelerator, "", self.step, None
        progress = progress_bar(
            total=self.total_steps, initial=first, unit="step", disable=not accelerator.is_main_process
        )
        if self.settings.train.max_minutes is not None and not self.lowered:
            limit = TimeLimit(self.settings.train.max_minutes)
        estimate = TimeEstimate(f"--{self.settings.name('train', 'max_minutes')}")
        with closing(progress):
            while self.step < self.total_steps and not name:
                values = self.train_step(batches)
                self.step += 1
                progress.update()
                done = self.step - first
                if limit is not None and limit.is_due(done):
                    left = broadcast_object_list([limit.steps_left(done, self.longest - self.step)])[0]
                    limit.agree(done, left)
                    if left is not None:
                        self.total_steps = progress.total = self.step + left
                        self.lowered = True
                told = estimate.after(done, self.total_steps - self.step, self.stepper.seconds)
                if told and accelerator.is_main_process:
                    write_line(told)
                if self.step % self.settings.log.log_every == 0:
                    self.log(values, done, progress)
                name = stop.agreed(accelerator)
                if not name and self.step < self.total_steps:
                    self.at_intervals(stop)
        return name

    def batches(self) -> Reader:
        """This process's batches from the current step on, one for each forward pass."""
        train, accelerator, pictures = self.settings.train, self.accelerator, self.task.train
        pinned = accelerator.device.type == "cuda"
        if isinstance(pictures, Stream):
            waiting = [] if self.saved is None else read_waiting(self.saved)
            self.reader = StreamReader(
                pictures, self.share(), train.num_workers, self.step, self.stream, waiting, pinned
            )
            return self.reader
        sampler = step_sampler(
            pictures,
            train.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            train.accumulation,
            train.seed,
            self.step,
            self.total_steps,
        )
        return BatchReader(train_loader(pictures, train.num_workers, sampler, pinned))

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer step, see `Stepper`."""
        return self.stepper.take(batches, self.step, self.total_steps)

    def log(self, values: dict[str, Tensor], done: int, progress: tqdm) -> None:
        """Log means over all processes; and of this process's steps so far, evaluation and the like not counted, the
        speed and the share of time spent waiting for data."""
        names = sorted(values)
        stacked = torch.stack([values[name].detach().float().to(self.accelerator.device) for name in names])
        means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        pictures = self.settings.images_per_step(self.accelerator.num_processes)
        seconds = self.stepper.seconds
        speed, waiting = done * pictures / seconds, self.stepper.waited / seconds
        self.speed = {"images_per_second": speed, "images": self.step * pictures, "waiting_for_data": waiting}
        means |= {**self.speed, "lr": self.task.learner.optimizer.param_groups[0]["lr"]}
        if self.first_logged is None:
            self.first_logged = done, seconds
        first_done, first_seconds = self.first_logged
        if done > first_done:
            self.speed["images_per_second_later"] = (done - first_done) * pictures / (seconds - first_seconds)
        if self.settings.optim.skip_grad_norm is not None:
            means["skipped_steps"] = self.stepper.spikes
        self.accelerator.log({f"train/{key}": value for key, value in means.items()}, self.step)
        shown = {name: f"{means[name]:.4f}" for name in SHOWN if name in means}
        if "nats_per_dim" in shown:
            shown.pop("loss")  # the same without a constant, or with parts that the held-out line does not have
        progress.set_postfix({**shown, "images/s": f"{speed:.0f}", "waiting": f"{waiting:.1%}"})

    def at_intervals(self, stop: StopRequest) -> None:
        """Reports and checkpoints where they are due."""
        if is_due(self.step, self.settings.log.checkpoint_every):
            self.save_checkpoint()  # first, as a report may fail
        if self.task.is_report_due(self.step):
            # Several processes would end at different places, and could not save a checkpoint any more.
            self.report(stop, at_once=self.accelerator.num_processes == 1)

    def report(self, stop: StopRequest, at_once: bool, average: int = 0, last: bool = False) -> dict[str, Any]:
        """The task's report on averaged weights. A signal ends it ``at_once`` or not at all, but never while weights
        are swapped: a checkpoint must not contain the average."""
        self.stepper.settle()
        try:
            with self.averages.applied(average), stop.at_once(at_once):
                return self.task.report(self.step, average, last)
        finally:
            forget_gathered(self.task.learner.model)

    def finish(self, stop: StopRequest) -> dict[str, Any]:
        """After the last step: checkpoint, reports of all averages, and what else is to be said."""
        if self.settings.log.checkpoint_every:
            self.save_checkpoint()
        # What a signal ends here is done again when the run goes on.
        at_once = bool(self.settings.log.checkpoint_every) or self.accelerator.num_processes == 1
        metrics = self.report(stop, at_once, last=True)
        for average in range(1, len(self.averages.decays)):
            self.report(stop, at_once, average, last=True)
        skipped = set[str]().union(*gather_objects(self.stepper.skipped))
        spikes = self.stepper.spikes
        if skipped and self.accelerator.is_main_process:
            write_line(f"{len(skipped)} unreadable images were skipped, for example: {min(skipped)}")
        if spikes and self.accelerator.is_main_process:
            limit = self.settings.optim.skip_grad_norm
            write_line(f"{spikes} steps with a gradient norm above {limit} were left out")
        told = self.task.ending()
        if told and self.accelerator.is_main_process:
            write_line(told)
        self.accelerator.end_training()
        return {**metrics, "steps": self.step}

    @property
    def is_saved(self) -> bool:
        """Whether the last checkpoint is of this step."""
        return self.saved is not None and self.saved.name == checkpoint_name(self.step)

    def stop(self, name: str) -> dict[str, Any]:
        """End before all is done: save a checkpoint, if it is not there yet, and say that the signal ``name`` stopped
        the run."""
        if not self.is_saved:
            self.save_checkpoint()
        if self.accelerator.is_main_process:
            write_line(f"stopped by {name} at step {self.step}: {self.saved} is saved; go on with --resume latest")
        self.accelerator.end_training()
        return {"steps": self.step, "stopped": name}
