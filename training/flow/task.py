"""Training a flow by maximum likelihood: its parts, its loss, its reports, and what its checkpoints keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tarflow.common.progress import write_line
from tarflow.data.latents import CachedLatents
from tarflow.flows.trajectory.kinds import kind_of
from tarflow.pipeline.loading.examples import write_examples
from tarflow.training.flow.assembly import initialize_actnorm, open_held_out, open_metric
from tarflow.training.flow.config import RunConfig, has_denoiser, noise_invariants
from tarflow.training.flow.earlier import check_start, set_aside
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.levels_config import level_invariants
from tarflow.training.flow.lora import folder_name, prepare_adapters, save_adapters
from tarflow.training.flow.objective import FlowObjective, parameter_groups, score_target, trained_parameters
from tarflow.training.flow.report import (
    HeldOut,
    build_pipeline,
    drawing_line_of,
    metrics_of,
    own_captions,
    write_grids,
    write_held_out,
)
from tarflow.training.flow.resume import check_state, data_invariants
from tarflow.training.flow.setup import SPREAD, Parts, frozen_autoencoder, make_parts, meaning
from tarflow.training.flow.start import Start
from tarflow.training.flow.text import caption_reports, check_text, text_invariants
from tarflow.training.loop.agreement import main_alone
from tarflow.training.loop.draws import sample_seed
from tarflow.training.loop.launcher import launcher_compilation
from tarflow.training.loop.optimizer import make_optimizer
from tarflow.training.loop.parallel import full_weights, shard_layers, verify_caches
from tarflow.training.loop.replay import ReplayedPass, check_graphs
from tarflow.training.loop.task import Batch, Learner, State, Task, is_due

if TYPE_CHECKING:
    from tarflow.training.flow.metric import SampleMetric

#: So many captions of the data are kept in the pipeline's folder, as examples of what it draws.
EXAMPLE_CAPTIONS = 128


class FlowTask(Task):
    """What is trained: a flow, with a small text encoder if there is one, or an adapter of them.

    Args:
        config: of the run.
        accelerator: of the run.
        start: the pipeline that training starts from, None for a flow with new weights.

    Attributes:
        parts: data, autoencoder, text encoder, flow.
        objective: what is minimised, as it is without what Accelerate makes of it.
        inputs: makes what the objective takes from batches.
    """

    parts: Parts
    objective: FlowObjective
    inputs: InputMaker
    inputs_class: type[InputMaker] = InputMaker

    def __init__(self, config: RunConfig, accelerator: Accelerator, start: Start | None):
        self.config, self.log, self.accelerator, self.start = config, config.log, accelerator, start
        self.folder = config.loop.folder
        self.latents: list[Tensor] = []  # z of the passes of a step
        self.notes: list[str] = []  # on what is otherwise than in the pipeline that training starts from
        self.held_out: HeldOut | None = None
        self.metric: SampleMetric | None = None
        self.replayed: ReplayedPass | None = None

    def make_parts(self, state: State | None) -> None:
        config = self.config
        if state is None:
            check_start(config, self.folder)
        self.vocabulary = SPREAD if state is None else state.get("vocabulary")
        self.parts = make_parts(config, state, self.accelerator.device, self.start)
        self.autoencoder = frozen_autoencoder(config, self.parts)
        self.train, self.validation = self.parts.train, self.parts.validation
        if self.parts.null_cond is not None:  # whether the encoder of the cached captions is still the one that it was
            main_alone(self.accelerator, lambda: self.parts.load_text() and None)
        self.text = text_invariants(config.text, self.parts.text_encoder)
        if self.start is not None:
            names = self.parts.train.class_names if self.parts.flow_arguments.get("num_classes") else None
            self.notes = self.start.differences(config.text, names)
        self.adapter = prepare_adapters(config, self.parts, self.start)
        self.begins_anew, self.start = self.start is None, None  # of a pipeline only the parts are kept
        if state is None and config.data.verify:
            verify_caches(self.accelerator, self.parts.train, self.parts.validation)

    def resume_invariants(self) -> dict[str, Any]:
        return {
            "flow": self.parts.flow_arguments,
            "kind": kind_of(self.config.flow)[0],
            "ema_decays": self.config.train.ema_decays,
            "images_per_step": self.config.loop.images_per_step(self.accelerator.num_processes),
            "sharded": self.accelerator.is_fsdp2,
            "joint": None,
            "text": self.text,
            "lora": self.adapter,
            "order": getattr(self.parts.train, "order", None),
            "noise_levels": level_invariants(self.config),
            "autoencoder": self.autoencoder,
            "noise": noise_invariants(self.config),
            "data": data_invariants(self.config, self.parts),
            **meaning(self.parts),
        }

    def check_resume(self, checkpoint: Path, state: State) -> None:
        check_state(checkpoint, state, self.resume_invariants())
        check_text(checkpoint, state.get("text"), self.text)

    def prepare(self, fresh: bool) -> None:
        config, accelerator, parts = self.config, self.accelerator, self.parts
        train, optim = config.train, config.optim
        inside = config.text.kind == "small" or (config.text.shard and accelerator.is_fsdp2)
        parts.flow.set_checkpointing(train.checkpointing, train.checkpointing_every)
        wanted = {} if train.compile else launcher_compilation()
        if wanted is not None:
            parts.flow.compile_repeated_blocks(**{"dynamic": False, **wanted})
        if parts.text_encoder is not None and not inside:
            parts.text_encoder.to(accelerator.device)
        if inside and config.text.shard:
            shard_layers(accelerator, parts.text_encoder)
        self.objective = self.make_objective(parts.text_encoder if inside else None)
        self.inputs = self.inputs_class(config, parts, accelerator.device, inside, accelerator.autocast)
        if fresh and self.begins_anew:
            initialize_actnorm(self.objective, self.inputs, parts)
        groups = parameter_groups(self.objective, optim.lr, optim.denoiser_lr, config.joint.lr)
        optimizer = make_optimizer(groups, optim, self.objective)
        self.learner = Learner(*accelerator.prepare(self.objective, optimizer))
        if train.cuda_graphs:
            check_graphs(accelerator)
            self.replayed = ReplayedPass(
                lambda inputs: self.backward_flow(inputs, 0), trained_parameters(self.objective)
            )

    def make_objective(self, text_encoder: torch.nn.Module | None) -> FlowObjective:
        """What is minimised, with a text encoder that is trained or sharded along."""
        return FlowObjective(self.parts.flow, text_encoder, self.config.text.hidden_layer)

    def prepare_reports(self) -> None:
        config, parts, accelerator = self.config, self.parts, self.accelerator
        self.held_out = open_held_out(config, parts, accelerator)
        self.metric = main_alone(accelerator, lambda: open_metric(config, parts, accelerator))

    def begin(self, fresh: bool) -> None:
        aside = set_aside(self.folder, "lora" if self.adapter else "pipeline") if fresh else None
        if aside is not None:
            write_line(f"what an earlier run saved in {self.folder} is in {aside.name} there")
        train = self.parts.train
        cache = train.about() if isinstance(train, CachedLatents) else ()
        for sentence in (*self.notes, *cache, *caption_reports(self.parts, self.config.text, fresh)):
            if sentence:
                write_line(sentence)

    def begin_step(self, step: int) -> None:
        self.latents.clear()
        if (
            self.config.lora.dropout
        ):  # as all that is random a function of the step, so that interruptions change nothing
            torch.manual_seed(sample_seed(self.config.train.seed, step, self.accelerator.process_index, "dropout"))

    def backward(self, batch: Batch, step: int, total: int, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        inputs = self.inputs.training(batch, step, sample_ids)
        losses, z = self.backward_flow(inputs, step) if self.replayed is None else self.replayed(inputs)
        if self.has_after_update:
            self.latents.append(z)
        return losses

    def backward_flow(self, inputs: dict[str, Any], step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of one pass; returns losses by name, the sum as "loss", and z (B, C, H, W)."""
        inputs["latents"].requires_grad_(has_denoiser(self.config))
        output = self.learner.model(**inputs)
        self.accelerator.backward(output["loss"])
        losses = {"loss": output["loss"].detach(), "nats_per_dim": output["nats_per_dim"].mean()}
        if has_denoiser(self.config):
            losses["denoiser_loss"] = self.backward_denoiser(inputs)
        return losses, output["z"]

    def backward_denoiser(self, inputs: dict[str, Any]) -> Tensor:
        """Backward pass of the learned denoiser, with the score that the flow's one has left; returns its loss."""
        accelerator, latents = self.accelerator, inputs["latents"]
        loss_scale = 1 / self.config.train.accumulation
        if accelerator.scaler is not None:
            loss_scale *= accelerator.scaler.get_scale()
        target = score_target(latents.grad, self.config.train.noise_std, loss_scale)
        loss: Tensor = self.learner.model(**{**inputs, "latents": latents.detach(), "score_target": target})["loss"]
        accelerator.backward(loss)
        return loss.detach()

    @property
    def has_after_update(self) -> bool:
        return getattr(self.objective.flow, "prior_variance", None) is not None and not self.config.lora.rank

    def after_update(self, step: int) -> None:
        if self.latents:
            self.objective.flow.update_prior(self.accelerator.gather(torch.cat(self.latents)))

    def is_report_due(self, step: int) -> bool:
        log, metric = self.config.log, self.config.metric
        intervals = (log.eval_every, log.sample_every, log.save_pipeline_every, metric.every)
        return any(is_due(step, every) for every in intervals)

    def report(self, step: int, average: int = 0, last: bool = False) -> dict[str, Any]:
        log, decay = self.config.log, self.config.train.ema_decays[average]
        if average:  # at the end, of averages beside the one that is the run's
            metrics = self.evaluate(step, f"held_out_ema_{decay}")
            self.show(step, f"pipeline_ema_{decay}", held_out=metrics)
            return metrics
        if last:
            metrics = self.evaluate(step)
            return metrics | self.show(step, "pipeline", log.sample_every > 0, self.config.metric.every > 0, metrics)
        metrics = self.evaluate(step) if is_due(step, log.eval_every) else {}
        saved = f"pipeline_{step:08d}" if is_due(step, log.save_pipeline_every) else None
        self.show(step, saved, is_due(step, log.sample_every), is_due(step, self.config.metric.every), metrics)
        return metrics

    def evaluate(self, step: int, name: str = "held_out") -> dict[str, float]:
        """Held-out metrics of the weights as they are."""
        if self.held_out is None:
            return {}
        self.learner.model.eval()
        metrics = self.held_out_metrics(self.held_out)
        self.accelerator.log({f"{name}/{key}": value for key, value in metrics.items()}, step)
        if self.accelerator.is_main_process:
            words = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            write_line(f"step {step}: {name.replace('held_out', 'held-out')} {words}")
        return metrics

    def held_out_metrics(self, held_out: HeldOut) -> dict[str, float]:
        """By name, of the weights as they are; every process calls this."""
        given = self.learner.model, self.inputs, self.accelerator
        if (levels := self.config.train.noise_levels) is None:
            return metrics_of(held_out.nats_per_dim(*given), self.config)
        found = {level: metrics_of(held_out.nats_per_dim(*given, level), self.config) for level in levels.shown}
        return {f"{name}_at_{level:g}": value for level, one in found.items() for name, value in one.items()}

    def show(
        self,
        step: int,
        save_as: str | None,
        draw: bool = False,
        measure: bool = False,
        held_out: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Save a pipeline folder with the ``held_out`` metrics, draw grids and measure samples, of the weights as they
        are, each if wanted. The main process does it and returns the samples' metric."""
        if not draw and save_as is None and not measure:
            return {}
        weights, log = full_weights(self.accelerator, self.learner.model), self.config.log

        def work() -> dict[str, float]:
            metrics: dict[str, float] = {}
            pipe = build_pipeline(weights, self.parts, self.config)
            if save_as is not None and self.adapter:
                save_adapters(pipe, self.config, self.folder / folder_name(save_as), step)
            elif save_as is not None:
                pipe.save_pretrained(self.folder / save_as)
                count = 0 if self.validation is None else min(log.eval_images, len(self.validation))
                write_held_out(self.folder / save_as, held_out or {}, count)
                if self.config.text.kind != "none":
                    captions = own_captions(self.parts.validation or self.parts.train, EXAMPLE_CAPTIONS)
                    write_examples(self.folder / save_as, captions)
            if draw or measure:
                pipe.to(self.accelerator.device)
            if draw:
                grid = write_grids(pipe, self.parts, self.config, self.folder / "samples", step)
                write_line(f"step {step}: samples in {grid}")
            if measure and self.metric is not None:
                pipe.set_progress_bar_config(disable=True)
                metrics = self.metric.measure(pipe)
                self.accelerator.log({f"samples/{key}": value for key, value in metrics.items()}, step)
                write_line(f"step {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
            return metrics

        return main_alone(self.accelerator, work) or {}

    def ending(self) -> str:
        base = self.config.init_from
        if self.adapter and base is not None:
            adapter = self.folder / folder_name("pipeline")
            line = drawing_line_of(self.parts, self.config, base, ("--lora", str(adapter)))
            return f"the adapter is {adapter}; to draw with it:\n  {line}"
        pipeline = self.folder / "pipeline"
        return f"the pipeline is {pipeline}; to draw from it:\n  {drawing_line_of(self.parts, self.config, pipeline)}"

    def state(self) -> State:
        mean, std = self.parts.codec.latents_mean, self.parts.codec.latents_std
        statistics = None if mean is None else [mean, std]
        return {"statistics": statistics, "vocabulary": self.vocabulary, **self.resume_invariants()}
