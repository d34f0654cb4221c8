"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed

from tarflow.common.files import write_text
from tarflow.common.progress import progress_bar, write_line
from tarflow.training.flow.accelerator import check_parallel, make_accelerator
from tarflow.training.flow.assembly import initialize_actnorm, make_objective, make_stepper, open_held_out, open_metric
from tarflow.training.flow.config import RunConfig, is_joint
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.joint import joint_facts
from tarflow.training.flow.joint_report import reconstruction_metrics
from tarflow.training.flow.lora import folder_name, prepare_adapters, save_adapters
from tarflow.training.flow.objective import parameter_groups, trained_parameters
from tarflow.training.flow.report import build_pipeline, metrics_of, write_grids
from tarflow.training.flow.setup import as_cached, make_parts, meaning, measure
from tarflow.training.flow.start import load_start
from tarflow.training.flow.text import check_text, cut_captions_of, text_facts
from tarflow.training.loop.averages import WeightAverages
from tarflow.training.loop.batches import BatchReader, StepSampler, groups_of, train_loader
from tarflow.training.loop.checkpoint import (
    check_state,
    checkpoint_to_resume,
    on_main,
    read_state,
    save_checkpoint,
)
from tarflow.training.loop.launcher import launcher_compilation
from tarflow.training.loop.parallel import full_weights, shard_layers, verify_caches
from tarflow.training.loop.reading import reading
from tarflow.training.loop.schedule import TimeLimit
from tarflow.training.loop.stopping import EndsEarly, Stopped, StopRequest

#: What a resumed run takes from its own settings.
OPTIMIZER_SETTINGS = ("peak_lr", "weight_decay", "betas")


class Trainer(EndsEarly):
    """One run: `Trainer(config, resolved).run()`.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if the settings do not fit the data, the encoders or the checkpoint to resume from.
    """

    def __init__(self, config: RunConfig, resolved: str):
        self.folder = Path(config.output)
        start = None if config.init_from is None else load_start(config.init_from)
        if start is not None:
            config = replace(config, flow=start.flow_settings(config.flow))
        if config.data.source == "latents":
            config, resolved = as_cached(config, resolved)
        self.config = config
        self.accelerator = make_accelerator(config)
        check_parallel(self.accelerator, config)
        set_seed(config.train.seed)
        self.images_per_step = config.loop.images_per_step(self.accelerator.num_processes)
        # Settings are checked before anything is written.
        checkpoint = checkpoint_to_resume(self.folder, config.resume)
        state = None if checkpoint is None else read_state(checkpoint)
        self.parts = make_parts(config, state and state["statistics"], self.accelerator.device, start)
        self.text_facts = text_facts(config.text, self.parts.text_encoder)
        self.adapter = prepare_adapters(config, self.parts, start)
        if state is not None:
            check_state(checkpoint, state, self.checkpoint_facts())
            check_text(checkpoint, state.get("text"), self.text_facts)
        elif config.data.verify:
            verify_caches(self.accelerator, self.parts.train, self.parts.validation)
        self.prepare_model(fresh=state is None and start is None)
        self.longest = self.total_steps = config.loop.total_steps(self.accelerator.num_processes)
        self.step, self.lowered = 0, False  # whether max_minutes has lowered the steps
        self.saved = checkpoint  # the last one
        if state is not None:
            self.load(checkpoint, state)
        self.held_out = open_held_out(config, self.parts, self.accelerator)
        self.metric = on_main(self.accelerator, lambda: open_metric(config, self.parts, self.accelerator))
        on_main(self.accelerator, lambda: self.begin(resolved))

    def begin(self, resolved: str) -> None:
        """Write the settings, and start the trackers."""
        write_text(self.folder / "config.yaml", resolved)
        if sentence := cut_captions_of(self.parts, self.config.text):
            write_line(sentence)
        if self.config.log.trackers:
            self.accelerator.init_trackers("logs")

    def prepare_model(self, fresh: bool) -> None:
        """Flow, optimizer and averages, on their devices, compiled, divided and so on as the settings have it; ``fresh``
        if their weights are not to come from elsewhere."""
        config, accelerator, parts = self.config, self.accelerator, self.parts
        train, optim = config.train, config.optim
        inside = config.text.kind == "small" or (config.text.shard and accelerator.is_fsdp2)
        parts.flow.set_checkpointing(train.checkpointing, train.checkpointing_every)
        if train.compile or (wanted := launcher_compilation()):
            parts.flow.compile_repeated_blocks(**{"dynamic": False, **({} if train.compile else wanted)})
        if parts.text_encoder is not None and not inside:
            parts.text_encoder.to(accelerator.device)
        if inside and config.text.shard:
            shard_layers(accelerator, parts.text_encoder)
        self.objective = make_objective(config, parts, parts.text_encoder if inside else None)
        self.inputs = InputMaker(config, parts, accelerator.device, inside, accelerator.autocast)
        if fresh:
            initialize_actnorm(self.objective, self.inputs, parts)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.objective, optim.lr, optim.denoiser_lr, config.joint.lr),
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(self.objective, optimizer)
        self.averages = WeightAverages(trained_parameters(self.model), train.ema_decays)
        self.stepper = make_stepper(
            self.objective, config, accelerator, self.model, self.flow, self.optimizer, self.averages, self.inputs
        )

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        wanted = [{name: group[name] for name in OPTIMIZER_SETTINGS} for group in self.optimizer.param_groups]
        with reading(checkpoint):
            self.accelerator.load_state(str(checkpoint))
        for group, settings in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(settings)  # this run's, not the checkpoint's
        self.averages.load(checkpoint / "averages", state["ema_steps"])
        self.step, self.stepper.spikes, self.lowered = state["step"], state["spikes"], state["lowered"]
        if self.config.train.max_minutes is not None:
            self.total_steps = state["total_steps"]

    @property
    def flow(self) -> Any:
        return self.objective.flow

    def run(self) -> dict[str, float]:
        """Train to the last step, then evaluate and save the pipeline; returns the last metrics.

        At a SIGTERM or SIGINT a checkpoint is saved and training stops; the metrics then have the signal's name as
        ``stopped``.
        """
        with StopRequest() as stop:
            try:
                with self.batches() as batches:
                    name, metrics = self.train(batches, stop)
                return self.stop(name) if name else self.finish(metrics, stop)
            except Stopped as signal:
                return self.stop(signal.name)
            except RuntimeError:  # of a collective whose other processes a signal has ended
                if not (stop.received and self.is_saved):
                    raise
                return self.stop(stop.received)

    def train(self, batches: BatchReader, stop: StopRequest) -> tuple[str, dict[str, float]]:
        """Train to the last step; returns the name of a signal that is to stop the run before, and the last metrics."""
        accelerator, name = self.accelerator, ""
        progress = progress_bar(
            total=self.total_steps, initial=self.step, unit="step", disable=not accelerator.is_main_process
        )
        first, metrics = self.step, {}
        limit = None
        if self.config.train.max_minutes is not None and not self.lowered:
            limit = TimeLimit(self.config.train.max_minutes)
        with closing(progress):
            while self.step < self.total_steps and not name:
                values = self.train_step(batches)
                self.step += 1
                progress.update()
                done = self.step - first
                if limit is not None and limit.is_due(done):
                    left = broadcast_object_list([limit.steps_left(done, self.longest - self.step)])[0]
                    limit.agree(done, left)
                    self.total_steps = progress.total = self.step + left
                    self.lowered = True
                if self.step % self.config.log.log_every == 0:
                    self.log(values, done, progress)
                name = stop.agreed(accelerator)
                if not name:
                    metrics = self.at_intervals(stop) or metrics
        return name, metrics

    def batches(self) -> BatchReader:
        """This process's batches from the current step on, one for each forward pass."""
        train, accelerator = self.config.train, self.accelerator
        sampler = StepSampler(
            groups_of(self.parts.train),
            train.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            train.accumulation,
            train.seed,
            self.step,
            self.total_steps,
        )
        pinned = accelerator.device.type == "cuda"
        return BatchReader(train_loader(self.parts.train, train.batch_size, train.num_workers, sampler, pinned))

    def train_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One optimizer step, see `Stepper`."""
        return self.stepper.take(batches, self.step, self.total_steps)

    def log(self, values: dict[str, torch.Tensor], done: int, progress: Any) -> None:
        """Write means over all processes, and of this process's steps so far, without evaluation and the like, the
        speed and the share of the time that they waited for data."""
        names = sorted(values)
        stacked = torch.stack([values[name].detach().float().to(self.accelerator.device) for name in names])
        means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        seconds = self.stepper.seconds
        speed, waiting = done * self.images_per_step / seconds, self.stepper.waited / seconds
        means |= {"images_per_second": speed, "images": self.step * self.images_per_step}
        means |= {"lr": self.optimizer.param_groups[0]["lr"], "waiting_for_data": waiting}
        if self.config.optim.skip_grad_norm is not None:
            means["skipped_steps"] = self.stepper.spikes
        self.accelerator.log({f"train/{key}": value for key, value in means.items()}, self.step)
        shown = {"loss": f"{means['loss']:.4f}", "images/s": f"{speed:.0f}", "waiting": f"{waiting:.1%}"}
        progress.set_postfix(shown)

    def at_intervals(self, stop: StopRequest) -> dict[str, float] | None:
        """Evaluation, grids, checkpoints and pipeline folders where they are due; returns metrics if evaluated."""
        log, step, metrics = self.config.log, self.step, None
        if step >= self.total_steps:
            return None

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        measure = due(self.config.metric.every)
        if due(log.eval_every) or due(log.sample_every) or due(log.save_pipeline_every) or measure:
            # Several processes would end at different places, and could not save a checkpoint any more. The weights are
            # changed and put back as a whole: a checkpoint must not have those of the average.
            with self.averaged(), stop.at_once(self.accelerator.num_processes == 1):
                if due(log.eval_every):
                    metrics = self.evaluate()
                saved = f"pipeline_{step:08d}" if due(log.save_pipeline_every) else None
                self.show(due(log.sample_every), saved, measure)
        if due(log.checkpoint_every):
            self.save_checkpoint()
        return metrics

    def finish(self, metrics: dict[str, float], stop: StopRequest) -> dict[str, float]:
        if self.config.log.checkpoint_every:
            self.save_checkpoint()
        # What a signal ends here is done again when the run goes on.
        allowed = bool(self.config.log.checkpoint_every) or self.accelerator.num_processes == 1
        with self.averaged(), stop.at_once(allowed):
            metrics = self.evaluate() or metrics
            metrics |= self.show(self.config.log.sample_every > 0, "pipeline", self.config.metric.every > 0)
        for number, decay in enumerate(self.averages.decays[1:], start=1):
            with self.averaged(number), stop.at_once(allowed):
                self.evaluate(f"held_out_ema_{decay}")
                self.show(False, f"pipeline_ema_{decay}")
        if self.stepper.skipped and self.accelerator.is_main_process:
            write_line(
                f"{len(self.stepper.skipped)} unreadable images were skipped, for example: {min(self.stepper.skipped)}"
            )
        if self.stepper.spikes and self.accelerator.is_main_process:
            limit = self.config.optim.skip_grad_norm
            write_line(f"{self.stepper.spikes} steps with a gradient norm above {limit} were left out")
        self.accelerator.end_training()
        return {**metrics, "steps": self.step}

    def stop(self, name: str) -> dict[str, Any]:
        """End before all is done, see `save_and_end`."""
        self.save_and_end(name)
        return {"steps": self.step, "stopped": name}

    @contextmanager
    def averaged(self, number: int = 0) -> Iterator[None]:
        """The weights are those of one average, with latent statistics of their own if the autoencoder learns."""
        with self.averages.applied(number):
            if is_joint(self.config) and self.config.joint.renormalise:
                codec, config = self.parts.codec, self.config.vae
                statistics = measure(codec.vae, self.parts.train, config.measure_images, self.accelerator.device)
                codec.latents_mean, codec.latents_std = statistics
            yield

    def evaluate(self, name: str = "held_out") -> dict[str, float]:
        """Held-out metrics of the weights as they are."""
        if self.held_out is None:
            return {}
        self.model.eval()
        metrics = metrics_of(self.held_out.nats_per_dim(self.model, self.inputs, self.accelerator), self.config)
        if is_joint(self.config):
            metrics |= reconstruction_metrics(self.held_out, self.parts.codec, self.config, self.accelerator)
        self.accelerator.log({f"{name}/{key}": value for key, value in metrics.items()}, self.step)
        if self.accelerator.is_main_process:
            words = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            write_line(f"step {self.step}: {name.replace('held_out', 'held-out')} {words}")
        return metrics

    def show(self, draw: bool, save_as: str | None, measure: bool = False) -> dict[str, float]:
        """Grids, a pipeline folder and the metric of the weights as they are, if wanted; the main process makes them
        and returns the metric."""
        if not draw and save_as is None and not measure:
            return {}
        weights = full_weights(self.accelerator, self.model)

        def work() -> dict[str, float]:
            metrics: dict[str, float] = {}
            pipe = build_pipeline(weights, self.parts, self.config)
            if save_as is not None and self.adapter:
                save_adapters(pipe, self.config, self.folder / folder_name(save_as), self.step)
            elif save_as is not None:
                pipe.save_pretrained(self.folder / save_as)
            if draw or measure:
                pipe.to(self.accelerator.device)
            if draw:
                write_grids(pipe, self.parts, self.config, self.folder / "samples", self.step)
            if measure:
                pipe.set_progress_bar_config(disable=True)
                metrics = self.metric.measure(pipe)
                self.accelerator.log({f"samples/{key}": value for key, value in metrics.items()}, self.step)
                write_line(f"step {self.step}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
            return metrics

        return on_main(self.accelerator, work) or {}

    def checkpoint_facts(self) -> dict[str, Any]:
        """What must be the same when training goes on."""
        return {
            "flow": self.parts.flow_arguments,
            "ema_decays": self.config.train.ema_decays,
            "images_per_step": self.images_per_step,
            "sharded": self.accelerator.is_fsdp2,
            "joint": joint_facts(self.config, self.parts.codec.vae) if is_joint(self.config) else None,
            "text": self.text_facts,
            "lora": self.adapter,
            **meaning(self.parts),
        }

    def save_checkpoint(self) -> None:
        mean, std = self.parts.codec.latents_mean, self.parts.codec.latents_std
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowered": self.lowered,
            "spikes": self.stepper.spikes,
            "statistics": None if mean is None else [mean, std],
            "ema_steps": self.averages.steps,
            **self.checkpoint_facts(),
        }
        keep = self.config.log.keep_checkpoints
        self.saved = save_checkpoint(self.accelerator, self.folder / "checkpoints", state, self.averages, keep)
