"""The training loop."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from tarflow.pipeline.text import encode_captions
from tarflow.training.batches import StepSampler, fixed_batches, train_loader
from tarflow.training.checkpoint import find_checkpoint, read_state, save_checkpoint
from tarflow.training.config import OptimConfig, RunConfig
from tarflow.training.objective import (
    FlowObjective,
    parameter_groups,
    score_target,
    step_generator,
    trained_parameters,
)
from tarflow.training.report import build_pipeline, held_out_metrics, write_grids
from tarflow.training.setup import make_parts, noisy_latents
from tarflow.training.text import token_ids

#: For ``max_minutes``, the speed is first measured between these steps; the first ones are slower and not counted.
TIMED_STEPS = (10, 70)


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``lr · min_lr_ratio`` at ``total`` steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """One run: `Trainer(config, resolved).run()`.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if the settings do not fit the data, the encoders or the checkpoint to resume from.
    """

    def __init__(self, config: RunConfig, resolved: str):
        self.config, self.folder = config, Path(config.output)
        train = config.train
        self.accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            gradient_accumulation_steps=train.accumulation,
            log_with=config.log.trackers or None,
            project_dir=str(self.folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=self.has_denoiser)],
        )
        set_seed(train.seed)
        device = self.accelerator.device
        # Settings are checked before anything is written.
        checkpoint = find_checkpoint(self.folder / "checkpoints", config.resume) if config.resume else None
        state = None
        if checkpoint is not None:
            state = read_state(checkpoint, config.flow)
        self.parts = make_parts(config, state and state["statistics"], device)
        self.trains_text = config.text.kind == "small"
        self.objective = FlowObjective(self.parts.flow, self.parts.text_encoder if self.trains_text else None)
        if self.parts.text_encoder is not None and not self.trains_text:
            self.parts.text_encoder.to(device)
        self.ema = EMAModel(trained_parameters(self.objective), decay=train.ema_decay, foreach=True)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            parameter_groups(self.objective, optim.lr, optim.denoiser_lr),
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.ema.to(device)
        self.accelerator.register_for_checkpointing(self.ema)
        self.step, self.total_steps, self.bad_steps = 0, train.steps, 0
        self.skipped: set[str] = set()
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
            self.step, self.total_steps = state["step"], state["total_steps"]
            if train.max_minutes is None:
                self.total_steps = train.steps
        self.lowered = self.resumed_schedule = state is not None and state["lowered"]
        self.held_out = []
        if self.parts.validation is not None:
            self.held_out = fixed_batches(self.parts.validation, config.log.eval_images, train.batch_size)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(resolved)
        if config.log.trackers:
            self.accelerator.init_trackers("logs")

    @property
    def has_denoiser(self) -> bool:
        return self.config.flow.get("learned_denoiser", "none") != "none"

    @property
    def flow(self) -> Any:
        return self.objective.flow

    @property
    def text_encoder(self) -> Any:
        return self.objective.text_encoder if self.trains_text else self.parts.text_encoder

    def run(self) -> dict[str, float]:
        """Train to the last step, then evaluate and save the pipeline; returns the last metrics."""
        config, accelerator = self.config, self.accelerator
        accumulation = config.train.accumulation
        sampler = StepSampler(
            len(self.parts.train),
            config.train.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.train.seed,
            self.step * accumulation,
            self.total_steps * accumulation,
        )
        batches = iter(train_loader(self.parts.train, config.train.batch_size, config.train.num_workers, sampler))
        global_batch = config.train.batch_size * accumulation * accelerator.num_processes
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not accelerator.is_main_process)
        started = measured_from = time.perf_counter()
        measured_step, next_estimate = 0, TIMED_STEPS[1]
        first, metrics = self.step, {}
        while self.step < self.total_steps:
            values = self.train_step(batches)
            self.step += 1
            progress.update()
            done = self.step - first
            if done == TIMED_STEPS[0]:
                measured_step, measured_from = done, time.perf_counter()
            if done == next_estimate and config.train.max_minutes is not None and not self.resumed_schedule:
                now = time.perf_counter()
                self.lower_steps(now - started, (now - measured_from) / (done - measured_step))
                progress.total = self.total_steps
                # Again and again, as a machine's speed changes.
                measured_step, measured_from = done, now
                next_estimate = done + max(TIMED_STEPS[0], min(done, self.total_steps - self.step) // 2)
            if self.step % config.log.log_every == 0:
                speed = done * global_batch / (time.perf_counter() - started)
                values |= {"images_per_second": speed, "lr": self.optimizer.param_groups[0]["lr"]}
                accelerator.log({f"train/{key}": value for key, value in values.items()}, self.step)
                progress.set_postfix({"loss": f"{values['loss']:.4f}", "images/s": f"{speed:.0f}"})
            metrics = self.at_intervals() or metrics
        progress.close()
        return self.finish(metrics)

    def train_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step; returns loss, nats per dimension, gradient norm, and the learned denoiser's loss."""
        config, accelerator = self.config, self.accelerator
        progress = learning_rate(self.step, self.total_steps, config.optim) / config.optim.lr
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * progress
        self.model.train()
        sums: dict[str, float] = defaultdict(float)
        norm = torch.tensor(0.0)
        for part in range(config.train.accumulation):
            batch = next(batches)
            self.skipped.update(batch["skipped"])
            with accelerator.accumulate(self.model):
                inputs = self.model_inputs(batch, part)
                inputs["latents"].requires_grad_(self.has_denoiser)
                output = self.model(**inputs)
                accelerator.backward(output["loss"])
                if self.has_denoiser:
                    sums["denoiser_loss"] += self.backward_denoiser(inputs)
                if accelerator.sync_gradients:
                    norm = self.clip_gradients()
                    finite = bool(torch.isfinite(norm)) or config.train.mixed_precision == "fp16"
                    if finite:
                        self.optimizer.step()
                        self.ema.step(trained_parameters(self.objective))
                        if self.flow.prior_variance is not None:
                            self.flow.update_prior(accelerator.gather(output["z"]))
                    self.count_bad_step(finite, float(output["loss"].detach()))
                    self.optimizer.zero_grad()
                sums["loss"] += float(output["loss"].detach())
                sums["nats_per_dim"] += float(output["nats_per_dim"].mean())
        values = {name: value / config.train.accumulation for name, value in sums.items()}
        return {**values, "grad_norm": float(norm)}

    def backward_denoiser(self, inputs: dict[str, Any]) -> float:
        """Backward pass of the learned denoiser, with the score that the flow's one has left; returns its loss."""
        accelerator, latents = self.accelerator, inputs["latents"]
        loss_scale = 1 / self.config.train.accumulation
        if accelerator.scaler is not None:
            loss_scale *= accelerator.scaler.get_scale()
        target = score_target(latents.grad, self.config.train.noise_std, loss_scale)
        loss = self.model(**{**inputs, "latents": latents.detach(), "score_target": target})["loss"]
        accelerator.backward(loss)
        return float(loss.detach())

    def clip_gradients(self) -> torch.Tensor:
        """Clip each optimizer group by itself; returns the largest norm."""
        limit, groups = self.config.optim.max_grad_norm, self.optimizer.param_groups
        if len(groups) == 1:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return torch.stack([self.accelerator.clip_grad_norm_(group["params"], limit) for group in groups]).max()

    def count_bad_step(self, finite: bool, loss: float) -> None:
        """Stop after too many losses or gradients in a row that are not finite."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise ValueError(
                f"training stopped at step {self.step}: loss {loss} or its gradient was not finite in "
                f"{self.bad_steps} steps in a row; lower optim.lr ({self.config.optim.lr}) or resume from a checkpoint"
            )

    @torch.no_grad()
    def model_inputs(self, batch: dict[str, Any], part: int) -> dict[str, Any]:
        """Noisy latents and conditions, some of them dropped, of one forward pass."""
        config, device, train = self.config, self.accelerator.device, self.config.train
        generator = step_generator(train.seed, self.step, part, self.accelerator.process_index, device)
        images = batch["image"].to(device)
        count = len(images)
        if config.data.flip:
            flipped = torch.rand(count, generator=generator, device=device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        with self.accelerator.autocast():
            latents = noisy_latents(self.parts.codec, images, train, generator, sample=True)
        inputs: dict[str, Any] = {"latents": latents, "latent_norm_weight": train.latent_norm_weight}
        dropped = torch.rand(count, generator=generator, device=device) < train.drop_rate
        if self.parts.flow_arguments.get("num_classes"):
            labels = batch["label"].to(device)
            inputs["class_labels"] = torch.where(dropped, torch.full_like(labels, self.flow.null_label), labels)
        if self.text_encoder is not None:
            pairs = zip(batch["caption"], dropped.tolist(), strict=True)
            captions = ["" if drop else caption for caption, drop in pairs]
            if self.trains_text:
                ids, mask = token_ids(self.parts.tokenizer, captions, config.text.max_length, device)
                inputs |= {"input_ids": ids, "attention_mask": mask}
            else:
                inputs["cond"] = encode_captions(
                    self.text_encoder, self.parts.tokenizer, captions, config.text.max_length
                )
        return inputs

    def lower_steps(self, passed: float, seconds_per_step: float) -> None:
        """Set the last step so that training ends about when ``max_minutes`` are over."""
        left = self.config.train.max_minutes * 60 - passed
        total = min(self.config.train.steps, self.step + max(1, int(left / seconds_per_step)))
        self.total_steps = broadcast_object_list([total])[0]
        self.lowered = True

    def at_intervals(self) -> dict[str, float] | None:
        """Evaluation, grids, checkpoints and pipeline folders where they are due; returns metrics if evaluated."""
        log, step, metrics = self.config.log, self.step, None
        if step >= self.total_steps:
            return None

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        if due(log.eval_every) or due(log.sample_every) or due(log.save_pipeline_every):
            with self.averaged_weights():
                if due(log.eval_every):
                    metrics = self.evaluate()
                if due(log.sample_every):
                    self.draw()
                if due(log.save_pipeline_every):
                    self.save_pipeline(f"pipeline_{step:08d}")
        if due(log.checkpoint_every):
            self.save_checkpoint()
        return metrics

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.config.log.checkpoint_every:
            self.save_checkpoint()
        with self.averaged_weights():
            metrics = self.evaluate() or metrics
            if self.config.log.sample_every:
                self.draw()
            self.save_pipeline("pipeline")
        if self.skipped and self.accelerator.is_main_process:
            tqdm.write(f"{len(self.skipped)} unreadable images were skipped, for example: {min(self.skipped)}")
        self.accelerator.end_training()
        return {**metrics, "steps": self.step}

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, in evaluation mode."""
        parameters = trained_parameters(self.objective)
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.objective.eval()
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def evaluate(self) -> dict[str, float]:
        if not self.held_out:
            return {}
        metrics = held_out_metrics(
            self.flow, self.text_encoder, self.parts, self.config, self.held_out, self.accelerator.device
        )
        self.accelerator.log({f"held_out/{name}": value for name, value in metrics.items()}, self.step)
        if self.accelerator.is_main_process:
            tqdm.write(f"step {self.step}: held-out " + ", ".join(f"{n} {v:.4f}" for n, v in metrics.items()))
        return metrics

    def draw(self) -> None:
        if self.accelerator.is_main_process:
            pipe = build_pipeline(self.flow, self.text_encoder, self.parts, self.config)
            write_grids(pipe, self.parts, self.config, self.folder / "samples", self.step)
        self.accelerator.wait_for_everyone()

    def save_pipeline(self, name: str) -> None:
        if self.accelerator.is_main_process:
            pipe = build_pipeline(self.flow, self.text_encoder, self.parts, self.config)
            pipe.save_pretrained(self.folder / name)
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self) -> None:
        mean, std = self.parts.codec.latents_mean, self.parts.codec.latents_std
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowered": self.lowered,
            "flow": self.config.flow,
            "statistics": None if mean is None else [mean, std],
        }
        save_checkpoint(self.accelerator, self.folder / "checkpoints", state, self.config.log.keep_checkpoints)
