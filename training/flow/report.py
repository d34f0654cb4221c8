"""What a run shows of itself: held-out likelihood, sample grids, pipeline folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import T5EncoderModel

from tarflow.common.files import write_json, write_picture
from tarflow.common.grids import make_grid
from tarflow.data.subset import spread_places
from tarflow.flows.likelihood import bits_per_dim
from tarflow.flows.trajectory.kinds import KINDS, kind_of
from tarflow.pipeline.loading.folder import HELD_OUT
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.flow.config import RunConfig, is_joint, noise_std
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.joint import trained_autoencoder
from tarflow.training.flow.lora import add_adapters
from tarflow.training.flow.setup import Data, Parts
from tarflow.training.loop.batches import Items, fixed_batches, read_batch
from tarflow.training.loop.summary import drawing_line

#: Steps down from level to level that pipelines of many noise levels take, if the run does not say.
WALK_STEPS = 10


class HeldOut:
    """Held-out pictures, divided among the processes.

    Args:
        images: of the validation split.
        count: how many.
        batch_size: of one process.
        process, processes: this process and how many there are.
    """

    def __init__(self, images: Items, count: int, batch_size: int, process: int, processes: int):
        self.batches: list[tuple[dict[str, Any], list[int], int]] = []
        for indices in fixed_batches(images, count, batch_size * processes):
            mine = indices[process * batch_size : (process + 1) * batch_size]
            # Every process must pass as often through a sharded model: one without pictures takes one, not counted.
            shown = mine or indices[:1]
            self.batches.append((read_batch(images, shown), shown, len(mine)))

    @torch.no_grad()
    def nats_per_dim(
        self, model: nn.Module, inputs: InputMaker, accelerator: Accelerator, noise_level: float | None = None
    ) -> float:
        """Mean over the pictures with the training noise, which is the same at every call; every process calls this.

        Args:
            noise_level: of the noise, for a flow of many levels.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, sample_ids, counted in self.batches:
            nats = model(**inputs.evaluation(batch, sample_ids, noise_level))["nats_per_dim"]
            # On the CPU, as MPS has no float64; a sum of a few thousand numbers does not need it to be passed on.
            sums += torch.tensor([float(nats[:counted].cpu().double().sum()), counted], dtype=torch.float64)
        total, count = accelerator.reduce(sums.float().to(accelerator.device), "sum").tolist()
        return total / count


def metrics_of(nats: float, config: RunConfig) -> dict[str, float]:
    """Held-out nats per dimension under a name that tells what the dimensions are: ``latent_nats_per_dim`` or
    ``pixel_nats_per_dim`` (pixels in [−1, 1]); with uniform noise also ``bits_per_dim`` of the 8-bit pictures."""
    if not config.vae.pixels:
        return {"latent_nats_per_dim": nats}
    if config.train.noise == "uniform":
        return {"pixel_nats_per_dim": nats, "bits_per_dim": bits_per_dim(nats)}
    return {"pixel_nats_per_dim": nats}


def build_pipeline(weights: dict[str, Tensor], parts: Parts, config: RunConfig) -> TARFlowPipeline:
    """A pipeline with given weights, whatever trained them, in the host's memory: a device may have none to spare.

    Args:
        weights: of `FlowObjective`, whole, by name.
    """
    flow = KINDS[kind_of(config.flow)[0]](**parts.flow_arguments)
    text_encoder, tokenizer = parts.load_text()
    if config.text.kind == "small":
        text_encoder = T5EncoderModel(text_encoder.config)
    if config.lora.rank:
        add_adapters(config.lora, flow, text_encoder, config.train.seed)
    flow.load_state_dict(part_of(weights, "flow."))
    if config.text.kind == "small":
        text_encoder.load_state_dict(part_of(weights, "text_encoder."))
    vae = parts.load_vae()
    if is_joint(config):
        deviations = parts.codec.latents_std or ()
        vae = trained_autoencoder(part_of(weights, "vae."), vae, deviations, noise_std(config))
    names = parts.train.class_names if parts.flow_arguments.get("num_classes") else None
    return TARFlowPipeline(
        flow=flow.eval(),
        vae=vae,
        text_encoder=None if text_encoder is None else text_encoder.eval(),
        tokenizer=tokenizer,
        latents_mean=parts.codec.latents_mean,
        latents_std=parts.codec.latents_std,
        noise_std=noise_std(config),
        noise_levels=None if (levels := config.train.noise_levels) is None else (levels.low, levels.high),
        num_inference_steps=1 if levels is None else config.log.num_inference_steps or WALK_STEPS,
        denoise=not is_joint(config),
        id2label=dict(enumerate(names)) if names else None,
        max_sequence_length=config.text.max_length,
        guidance_scale=config.log.guidance_scale,
        guidance_method=config.log.guidance_method,
        temperature=config.log.temperature,
        text_options=config.text.options.changed or None,
    )


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one part of a module, under their names in that part."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def grid_conditions(parts: Parts, config: RunConfig) -> dict[str, Any]:
    """What the sample grid shows: prompts, classes in turn, or a number of unconditional pictures."""
    count = config.log.sample_images
    if config.text.kind != "none":
        prompts = config.log.prompts
        if prompts is None:
            prompts = own_captions(parts.validation or parts.train, count)
        return {"prompt": [prompts[i % len(prompts)] for i in range(count)]}
    if classes := parts.flow_arguments.get("num_classes"):
        return {"class_labels": [i % classes for i in range(count)]}
    return {"num_images": count}


def write_held_out(folder: Path, metrics: Mapping[str, float], images: int) -> None:
    """Write means of held-out pictures into a pipeline's folder; nothing without any."""
    if metrics and images:
        write_json(folder / HELD_OUT, {"images": images, **{name: float(value) for name, value in metrics.items()}})


def drawing_line_of(parts: Parts, config: RunConfig, pipeline: str | Path, options: Sequence[str] = ()) -> str:
    """The command that draws from the run's pipeline, with a caption or class of its grids."""
    shown = grid_conditions(parts, config)
    names = parts.train.class_names or ()
    classes = [names[i] if names else str(i) for i in shown.get("class_labels", ())[:1]]
    return drawing_line(pipeline, shown.get("prompt", ()), classes, options)


def own_captions(data: Data, count: int) -> list[str]:
    """At most ``count`` captions that lie evenly in a data set, as neighbours are often alike; of endless drawings, which
    are not, the first ones."""
    return [data.caption(i) or "" for i in spread_places(len(data), count)]


def write_grids(pipe: TARFlowPipeline, parts: Parts, config: RunConfig, folder: Path, step: int) -> Path:
    """Write grids from fixed noise: samples_STEP_raw.png before the score step, or steps, and samples_STEP.png after it.
    Pipelines that take no such step get the second only. Returns the second's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    for denoise, suffix in ((False, "_raw"), (True, "")) if pipe.config.denoise else ((False, ""),):
        images, *_ = pipe(
            **grid_conditions(parts, config),
            denoise=denoise,
            decoding="sequential",  # the same at every step and on every machine
            generator=[torch.Generator().manual_seed(1000 + i) for i in range(config.log.sample_images)],
            return_dict=False,
        )
        path = folder / f"samples_{step:08d}{suffix}.png"
        write_picture(path, make_grid(images))
    return path
