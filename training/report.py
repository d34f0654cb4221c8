"""What a run shows of itself: held-out likelihood, sample grids, pipeline folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tarflow.flows.likelihood import bits_per_dim, log_prob, nats_per_dim
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.pipeline.text import encode_captions
from tarflow.training.config import RunConfig
from tarflow.training.setup import Parts, noisy_latents


@torch.no_grad()
def held_out_metrics(
    flow: Any, text_encoder: Any, parts: Parts, config: RunConfig, batches: list[dict[str, Any]], device: torch.device
) -> dict[str, float]:
    """Mean nats per dimension of held-out pictures with the training noise, which is the same at every call.

    The name tells what the dimensions are: ``latent_nats_per_dim`` or ``pixel_nats_per_dim`` (pixels in [−1, 1]); with
    uniform noise also ``bits_per_dim`` of the 8-bit pictures.
    """
    total, count = 0.0, 0
    generator = torch.Generator().manual_seed(config.train.seed + 1)
    for batch in batches:
        latents = noisy_latents(parts.codec, batch["image"].to(device), config.train, generator, sample=False)
        labels = cond = None
        if parts.flow_arguments.get("num_classes"):
            labels = batch["label"].to(device)
        if text_encoder is not None:
            cond = encode_captions(text_encoder, parts.tokenizer, batch["caption"], config.text.max_length)
        total += float(nats_per_dim(log_prob(flow, latents, labels, cond), latents[0].numel()).sum())
        count += len(latents)
    nats = total / count
    if not config.vae.pixels:
        return {"latent_nats_per_dim": nats}
    if config.train.noise == "uniform":
        return {"pixel_nats_per_dim": nats, "bits_per_dim": bits_per_dim(nats)}
    return {"pixel_nats_per_dim": nats}


def build_pipeline(flow: Any, text_encoder: Any, parts: Parts, config: RunConfig) -> TARFlowPipeline:
    """A pipeline around copies of the given (averaged) weights."""
    names = parts.train.class_names if parts.flow_arguments.get("num_classes") else None
    return TARFlowPipeline(
        flow=copy.deepcopy(flow).eval(),
        vae=parts.codec.vae,
        text_encoder=None if text_encoder is None else copy.deepcopy(text_encoder).eval(),
        tokenizer=parts.tokenizer,
        latents_mean=parts.codec.latents_mean,
        latents_std=parts.codec.latents_std,
        noise_std=config.train.noise_std if config.train.noise == "gaussian" else 0.0,
        id2label=dict(enumerate(names)) if names else None,
        max_sequence_length=config.text.max_length,
        guidance_scale=config.log.guidance_scale,
        guidance_method=config.log.guidance_method,
    )


def grid_conditions(parts: Parts, config: RunConfig) -> dict[str, Any]:
    """What the sample grid shows: prompts, classes in turn, or a number of unconditional pictures."""
    count = config.log.sample_images
    if config.text.kind != "none":
        prompts = config.log.prompts
        if prompts is None:
            source = parts.validation or parts.train
            prompts = [source.source.caption(i) for i in range(min(count, len(source)))]
        return {"prompt": [prompts[i % len(prompts)] for i in range(count)]}
    if classes := parts.flow_arguments.get("num_classes"):
        return {"class_labels": [i % classes for i in range(count)]}
    return {"num_images": count}


def write_grids(pipe: TARFlowPipeline, parts: Parts, config: RunConfig, folder: Path, step: int) -> None:
    """Grids from fixed noise, before and after the denoising step: samples_STEP_raw.png and samples_STEP.png."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    for denoise, suffix in ((False, "_raw"), (True, "")):
        images = pipe(
            **grid_conditions(parts, config),
            denoise=denoise,
            decoding="sequential",  # the same at every step and on every machine
            generator=[torch.Generator().manual_seed(1000 + i) for i in range(config.log.sample_images)],
        ).images
        make_grid(images).save(folder / f"samples_{step:08d}{suffix}.png")


def make_grid(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side, as many rows as columns if not said otherwise."""
    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, ((i % columns) * width, (i // columns) * height))
    return grid
