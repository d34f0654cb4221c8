"""The training loop."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from tarflow.training.averages import WeightAverages
from tarflow.training.batches import StepSampler, groups_of, train_loader
from tarflow.training.checkpoint import check_state, find_checkpoint, read_state, save_checkpoint
from tarflow.training.config import RunConfig
from tarflow.training.inputs import InputMaker
from tarflow.training.objective import FlowObjective, parameter_groups, score_target, trained_parameters
from tarflow.training.parallel import StopRequest, check_parallel, full_weights, make_accelerator, verify_caches
from tarflow.training.report import HeldOut, build_pipeline, metrics_of, write_grids
from tarflow.training.schedule import TimeLimit, peak_factor, schedule_factor, total_steps, warmup_steps
from tarflow.training.setup import as_cached, make_parts
from tarflow.training.start import load_start

#: What a resumed run takes from its own settings.
OPTIMIZER_SETTINGS = ("peak_lr", "weight_decay", "betas")


class Trainer:
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
        self.accelerator = make_accelerator(config, unused_parameters=self.has_denoiser)
        check_parallel(self.accelerator, config)
        set_seed(config.train.seed)
        self.images_per_step = config.train.batch_size * config.train.accumulation * self.accelerator.num_processes
        # Settings are checked before anything is written.
        checkpoint = find_checkpoint(self.folder / "checkpoints", config.resume) if config.resume else None
        state = None if checkpoint is None else read_state(checkpoint)
        self.parts = make_parts(config, state and state["statistics"], self.accelerator.device, start)
        if state is not None:
            check_state(checkpoint, state, self.checkpoint_facts())
        elif config.data.verify:
            verify_caches(self.accelerator, self.parts.train, self.parts.validation)
        self.prepare_model()
        self.longest = self.total_steps = total_steps(config, self.images_per_step)
        self.step = self.bad_steps = self.spikes = 0
        self.lowered = False  # whether max_minutes has lowered the steps
        self.skipped: set[str] = set()
        self.waited = self.stepped = 0.0  # seconds for data, and for steps, data included
        if state is not None:
            self.load(checkpoint, state)
        self.held_out = self.open_held_out()
        self.metric = self.open_metric()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / "config.yaml.tmp"
            temporary.write_text(resolved)
            temporary.rename(self.folder / "config.yaml")
        if config.log.trackers:
            self.accelerator.init_trackers("logs")

    def prepare_model(self) -> None:
        """Flow, optimizer and averages, on their devices, compiled, divided and so on as the settings have it."""
        config, accelerator, parts = self.config, self.accelerator, self.parts
        train, optim = config.train, config.optim
        inside = config.text.kind == "small" or (config.text.shard and accelerator.is_fsdp2)
        parts.flow.set_checkpointing(train.checkpointing, train.checkpointing_every)
        if train.compile:
            parts.flow.compile_repeated_blocks(dynamic=False)
        if parts.text_encoder is not None and not inside:
            parts.text_encoder.to(accelerator.device)
        self.objective = FlowObjective(parts.flow, parts.text_encoder if inside else None)
        self.inputs = InputMaker(config, parts, accelerator.device, inside, accelerator.autocast)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.objective, optim.lr, optim.denoiser_lr),
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(self.objective, optimizer)
        self.averages = WeightAverages(trained_parameters(self.model), train.ema_decays)

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        wanted = [{name: group[name] for name in OPTIMIZER_SETTINGS} for group in self.optimizer.param_groups]
        self.accelerator.load_state(str(checkpoint))
        for group, settings in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(settings)  # this run's, not the checkpoint's
        self.averages.load(checkpoint / "averages", state["ema_steps"])
        self.step, self.spikes, self.lowered = state["step"], state["spikes"], state["lowered"]
        if self.config.train.max_minutes is not None:
            self.total_steps = state["total_steps"]

    def open_held_out(self) -> HeldOut | None:
        if self.parts.validation is None:
            return None
        count, size = self.config.log.eval_images, self.config.train.batch_size
        accelerator = self.accelerator
        return HeldOut(self.parts.validation, count, size, accelerator.process_index, accelerator.num_processes)

    def open_metric(self) -> Any:
        """What measures samples, on the main process."""
        if self.config.metric.every == 0 or not self.accelerator.is_main_process:
            return None
        if self.parts.validation is None:
            raise ValueError("metric.every is set, but nothing is held out: raise data.validation_fraction")
        from tarflow.training.metric import SampleMetric  # imported here: few runs need its libraries

        return SampleMetric(self.config.metric, self.parts.validation, self.accelerator.device)

    @property
    def has_denoiser(self) -> bool:
        return self.config.flow.get("learned_denoiser", "none") != "none"

    @property
    def flow(self) -> Any:
        return self.objective.flow

    def run(self) -> dict[str, float]:
        """Train to the last step, then evaluate and save the pipeline; returns the last metrics.

        At a SIGTERM a checkpoint is saved and training stops; the metrics then have ``stopped``.
        """
        accelerator = self.accelerator
        batches = self.batches()
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not accelerator.is_main_process)
        first, metrics = self.step, {}
        limit = None
        if self.config.train.max_minutes is not None and not self.lowered:
            limit = TimeLimit(self.config.train.max_minutes)
        with StopRequest() as stop:
            while self.step < self.total_steps:
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
                if self.step < self.total_steps and stop.agreed(accelerator):
                    return self.stop(progress)
                metrics = self.at_intervals() or metrics
            progress.close()
            return self.finish(metrics)

    def batches(self) -> Iterator[dict[str, Any]]:
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
        return iter(train_loader(self.parts.train, train.batch_size, train.num_workers, sampler, pinned))

    def train_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One optimizer step; returns this process's loss, nats per dimension, gradient norm, and the learned
        denoiser's loss. The host waits for the device once, for the norm."""
        config, accelerator, begun = self.config, self.accelerator, time.perf_counter()
        self.set_learning_rate()
        self.model.train()
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
        latents, norm = [], torch.tensor(0.0)
        for part in range(config.train.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            self.skipped.update(batch["skipped"])
            with accelerator.accumulate(self.model):
                inputs = self.inputs.training(batch, self.step, self.places(part))
                inputs["latents"].requires_grad_(self.has_denoiser)
                output = self.model(**inputs)
                accelerator.backward(output["loss"])
                if self.has_denoiser:
                    sums["denoiser_loss"] += self.backward_denoiser(inputs)
                sums["loss"] += output["loss"].detach()
                sums["nats_per_dim"] += output["nats_per_dim"].mean()
                if self.flow.prior_variance is not None:
                    latents.append(output["z"])
                if accelerator.sync_gradients:
                    norm = self.clip_gradients()
                    self.update(norm, sums["loss"], latents)
        self.stepped += time.perf_counter() - begun
        return {name: value / config.train.accumulation for name, value in sums.items()} | {"grad_norm": norm}

    def places(self, part: int) -> range:
        """Where this process's pictures of a pass are in the step's batch."""
        size, accelerator = self.config.train.batch_size, self.accelerator
        first = (part * accelerator.num_processes + accelerator.process_index) * size
        return range(first, first + size)

    def set_learning_rate(self) -> None:
        optim = self.config.optim
        warmup = warmup_steps(optim, self.images_per_step)
        factor = schedule_factor(self.step, self.total_steps, warmup, optim) * peak_factor(optim, self.images_per_step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def update(self, norm: torch.Tensor, loss: torch.Tensor, latents: list[torch.Tensor]) -> None:
        """Change the weights, unless the gradient is not finite or larger than wished."""
        size, limit = float(norm), self.config.optim.skip_grad_norm
        finite, scaled = math.isfinite(size), self.accelerator.scaler is not None
        spike = limit is not None and finite and size > limit
        self.spikes += spike
        if (finite or scaled) and not spike:
            self.optimizer.step()  # with fp16 the scaler leaves out what is not finite, and lowers its scale
        if finite and not spike and not self.optimizer.step_was_skipped:
            self.averages.step()
            if latents:
                self.flow.update_prior(self.accelerator.gather(torch.cat(latents)))
        self.optimizer.zero_grad()
        # Gradients of fp16 may overflow for some steps, until the scale fits; losses may not.
        self.count_bad_step(finite or (scaled and math.isfinite(float(loss))), loss)

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

    def clip_gradients(self) -> torch.Tensor:
        """Clip each optimizer group by itself; returns the largest norm."""
        limit, groups = self.config.optim.max_grad_norm, self.optimizer.param_groups
        if len(groups) == 1:
            norms = [self.accelerator.clip_grad_norm_(self.model.parameters(), limit)]
        else:  # Accelerate would unscale gradients of fp16 for each group
            self.accelerator.unscale_gradients()
            norms = [torch.nn.utils.clip_grad_norm_(group["params"], limit) for group in groups]
        return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).max()

    def count_bad_step(self, finite: bool, loss: torch.Tensor) -> None:
        """Stop after too many losses or gradients in a row that are not finite."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise ValueError(
                f"training stopped at step {self.step}: loss {float(loss)} or its gradient was not finite in "
                f"{self.bad_steps} steps in a row; lower optim.lr ({self.config.optim.lr}) or resume from a checkpoint"
            )

    def log(self, values: dict[str, torch.Tensor], done: int, progress: tqdm) -> None:
        """Write means over all processes, and of this process's steps so far, without evaluation and the like, the
        speed and the share of the time that they waited for data."""
        names = sorted(values)
        stacked = torch.stack([values[name].detach().float().to(self.accelerator.device) for name in names])
        means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        speed, waiting = done * self.images_per_step / self.stepped, self.waited / self.stepped
        means |= {"images_per_second": speed, "images": self.step * self.images_per_step}
        means |= {"lr": self.optimizer.param_groups[0]["lr"], "waiting_for_data": waiting}
        if self.config.optim.skip_grad_norm is not None:
            means["skipped_steps"] = self.spikes
        self.accelerator.log({f"train/{key}": value for key, value in means.items()}, self.step)
        shown = {"loss": f"{means['loss']:.4f}", "images/s": f"{speed:.0f}", "waiting": f"{waiting:.1%}"}
        progress.set_postfix(shown)

    def at_intervals(self) -> dict[str, float] | None:
        """Evaluation, grids, checkpoints and pipeline folders where they are due; returns metrics if evaluated."""
        log, step, metrics = self.config.log, self.step, None
        if step >= self.total_steps:
            return None

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        measure = due(self.config.metric.every)
        if due(log.eval_every) or due(log.sample_every) or due(log.save_pipeline_every) or measure:
            with self.averages.applied():
                if due(log.eval_every):
                    metrics = self.evaluate()
                saved = f"pipeline_{step:08d}" if due(log.save_pipeline_every) else None
                self.show(due(log.sample_every), saved, measure)
        if due(log.checkpoint_every):
            self.save_checkpoint()
        return metrics

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.config.log.checkpoint_every:
            self.save_checkpoint()
        with self.averages.applied():
            metrics = self.evaluate() or metrics
            metrics |= self.show(self.config.log.sample_every > 0, "pipeline", self.config.metric.every > 0)
        for number, decay in enumerate(self.averages.decays[1:], start=1):
            with self.averages.applied(number):
                self.evaluate(f"held_out_ema_{decay}")
                self.show(False, f"pipeline_ema_{decay}")
        if self.skipped and self.accelerator.is_main_process:
            tqdm.write(f"{len(self.skipped)} unreadable images were skipped, for example: {min(self.skipped)}")
        if self.spikes and self.accelerator.is_main_process:
            limit = self.config.optim.skip_grad_norm
            tqdm.write(f"{self.spikes} steps with a gradient norm above {limit} were left out")
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

    def evaluate(self, name: str = "held_out") -> dict[str, float]:
        """Held-out metrics of the weights as they are."""
        if self.held_out is None:
            return {}
        self.model.eval()
        metrics = metrics_of(self.held_out.nats_per_dim(self.model, self.inputs, self.accelerator), self.config)
        self.accelerator.log({f"{name}/{key}": value for key, value in metrics.items()}, self.step)
        if self.accelerator.is_main_process:
            words = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            tqdm.write(f"step {self.step}: {name.replace('held_out', 'held-out')} {words}")
        return metrics

    def show(self, draw: bool, save_as: str | None, measure: bool = False) -> dict[str, float]:
        """Grids, a pipeline folder and the metric of the weights as they are, if wanted; the main process makes them
        and returns the metric."""
        metrics: dict[str, float] = {}
        if not draw and save_as is None and not measure:
            return metrics
        weights = full_weights(self.accelerator, self.model)
        if self.accelerator.is_main_process:
            pipe = build_pipeline(weights, self.parts, self.config)
            if save_as is not None:
                pipe.save_pretrained(self.folder / save_as)
            if draw or measure:
                pipe.to(self.accelerator.device)
            if draw:
                write_grids(pipe, self.parts, self.config, self.folder / "samples", self.step)
            if measure:
                pipe.set_progress_bar_config(disable=True)
                metrics = self.metric.measure(pipe)
                self.accelerator.log({f"samples/{key}": value for key, value in metrics.items()}, self.step)
                tqdm.write(f"step {self.step}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        self.accelerator.wait_for_everyone()
        return metrics

    def checkpoint_facts(self) -> dict[str, Any]:
        """What must be the same when training goes on."""
        return {
            "flow": self.parts.flow_arguments,
            "ema_decays": self.config.train.ema_decays,
            "images_per_step": self.images_per_step,
            "sharded": self.accelerator.is_fsdp2,
        }

    def save_checkpoint(self) -> Path:
        mean, std = self.parts.codec.latents_mean, self.parts.codec.latents_std
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowered": self.lowered,
            "spikes": self.spikes,
            "statistics": None if mean is None else [mean, std],
            "ema_steps": self.averages.steps,
            **self.checkpoint_facts(),
        }
        keep = self.config.log.keep_checkpoints
        return save_checkpoint(self.accelerator, self.folder / "checkpoints", state, self.averages, keep)
