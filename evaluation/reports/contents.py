"""What a report on a pipeline shows: gathered here, laid out in `tarflow.evaluation.reports.html`."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.common.machine import machine
from tarflow.common.progress import progress_bar
from tarflow.common.statistics import mean_and_error
from tarflow.data.config import DataConfig
from tarflow.data.images import collate
from tarflow.data.stream.first import AnyPictures, open_pictures
from tarflow.data.subset import Subset, evenly, spread
from tarflow.evaluation.conditions import Conditions
from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.likelihood.held_out import picture_likelihoods
from tarflow.evaluation.reports.fid import versions
from tarflow.evaluation.reports.files import read_curves, read_metrics
from tarflow.evaluation.reports.neighbours import Describe, Neighbours, nearest_neighbours, pixel_description
from tarflow.evaluation.reports.settings import NEIGHBOURS, ReportConfig
from tarflow.evaluation.reports.svg_charts import Series
from tarflow.evaluation.samples.generation import conditions_of, draw_chunk, pipeline_of
from tarflow.evaluation.samples.record import pipeline_hash
from tarflow.evaluation.samples.settings import GenerationConfig, Split
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.trajectory_sampling import trajectory_steps
from tarflow.pipeline.call.walk import resolve_level, resolve_steps
from tarflow.pipeline.loading.place import title_of

PIXELS = "pixels"


@dataclass
class Likelihoods:
    """Values of each picture (mean over its draws) by split, and the quantity's name as in `Likelihood`."""

    name: str
    values: dict[str, Tensor]

    def summary(self, split: str) -> tuple[float, float]:
        """Mean and its standard error."""
        return mean_and_error(self.values[split])


@dataclass
class Contents:
    """Everything that a report shows.

    Attributes:
        settings: by heading, names and values.
        images: samples uint8 (N, 3, H, W); ``texts``: what each was drawn from.
        train: the training pictures that were searched.
        spaces: by name of the space and group ("samples", "train", perhaps "held-out").
        curves: by title.
        metrics: names and values; ``warnings`` that belong to them.
    """

    title: str
    settings: dict[str, dict[str, Any]]
    images: Tensor
    texts: list[str]
    train: Subset
    spaces: dict[str, dict[str, Neighbours]]
    shown_neighbours: int
    likelihoods: Likelihoods | None
    curves: dict[str, Series]
    metrics: dict[str, str]
    warnings: list[str]


def gather(config: ReportConfig, device: str | torch.device = "cpu") -> Contents:
    """Draw, search, evaluate and read.

    Raises:
        ValueError: if model, data and files do not fit.
        OSError: if the pipeline cannot be loaded.
    """
    metrics, warnings = read_metrics(config.metrics) if config.metrics else ({}, [])
    curves = read_curves(config.run) if config.run else {}
    wanted = {"train": config.train_images, "validation": max(config.likelihood_images, config.yardstick_images)}
    images: dict[str, AnyPictures] = {
        split: open_pictures(config.data, split, count, "train_images") for split, count in wanted.items()
    }
    extractor = config.load_extractor(device)
    gen = generation_of(config, images)
    pipe = pipeline_of(gen, device)
    along = trajectory_steps(pipe, gen.num_inference_steps, gen.decoding, gen.denoise)
    if config.likelihood_images and along is not None:
        raise ValueError(
            f"likelihood_images is {config.likelihood_images}, but a trajectory model has no likelihoods of single pictures: "
            "set it to 0"
        )
    train = spread(images["train"], config.train_images)
    if len(train) <= NEIGHBOURS:
        raise ValueError(f"the training split has {len(train)} pictures, too few to search for {NEIGHBOURS} neighbours")
    conditions = conditions_of(pipe, gen)
    likelihoods = all_likelihoods(config, pipe, images) if config.likelihood_images else None
    samples = draw(config, gen, pipe, conditions)
    spaces = search(config, train, images["validation"], samples, extractor)
    return Contents(
        title=config.title or title_of(config.pipeline),
        settings=settings_of(config, gen, pipe, device),
        images=samples,
        texts=texts_of(pipe, conditions, config.samples),
        train=train,
        spaces=spaces,
        shown_neighbours=min(config.shown_neighbours, config.samples),
        likelihoods=likelihoods,
        curves=curves,
        metrics=metrics,
        warnings=warnings,
    )


def generation_of(config: ReportConfig, images: dict[str, AnyPictures]) -> GenerationConfig:
    """How the samples are drawn; nothing is written to ``out``."""
    split: Split = "validation" if len(images["validation"]) else "train"
    more = {"out": config.out, "batch_size": config.batch_size, "num": config.samples, "split": split}
    return GenerationConfig(**config.sample_settings() | more, data=config.data)


def draw(config: ReportConfig, gen: GenerationConfig, pipe: FlowPipeline, conditions: Conditions) -> Tensor:
    """Samples uint8 (N, 3, H, W)."""
    parts = []
    for first in progress_bar(range(0, config.samples, config.batch_size), desc="samples", unit="batch"):
        chunk = range(first, min(first + config.batch_size, config.samples))
        parts.append(torch.from_numpy(draw_chunk(pipe, gen, conditions, chunk)))
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()


def texts_of(pipe: FlowPipeline, conditions: Conditions, count: int) -> list[str]:
    """What each sample was drawn from, in words."""
    values = conditions.values(range(count))
    if conditions.kind == "label":
        names = {index: name for name, index in pipe.labels.items()}
        return [names.get(value, f"class {value}") for value in values]
    return values or [""] * count


def search(
    config: ReportConfig, train: Subset, held_out: AnyPictures, samples: Tensor, extractor: Extractor | None
) -> dict[str, dict[str, Neighbours]]:
    """Nearest training pictures of the samples, and of the pictures that are the yardstick."""
    own = evenly(len(train), min(config.yardstick_images, len(train)))
    queries = {"samples": samples, "train": collate([train[i] for i in own])["image"]}
    if len(held_out):
        some = spread(held_out, config.yardstick_images)
        queries["held-out"] = collate([some[i] for i in range(len(some))])["image"]
    spaces: dict[str, Describe] = {PIXELS: pixel_description}
    if extractor is not None:
        spaces[f"features of {extractor.name}"] = extractor
    return nearest_neighbours(queries, train, spaces, {"train": torch.tensor(own)}, NEIGHBOURS)


def all_likelihoods(config: ReportConfig, pipe: FlowPipeline, images: dict[str, AnyPictures]) -> Likelihoods:
    """Of some pictures of each split that has any."""
    values, name = {}, ""
    for group, split in (("training", "train"), ("held-out", "validation")):
        if len(images[split]):
            name, found, _ = picture_likelihoods(
                pipe,
                spread(images[split], config.likelihood_images),
                draws=config.draws,
                batch_size=config.batch_size,
                seed=config.seed,
            )
            values[group] = found.mean(1)
    return Likelihoods(name, values)


def settings_of(
    config: ReportConfig, gen: GenerationConfig, pipe: FlowPipeline, device: str | torch.device
) -> dict[str, dict[str, Any]]:
    """Everything that the numbers depend on."""
    side = pipe.flow.config.sample_size * pipe.codec.factor
    model: dict[str, Any] = {"pipeline": config.pipeline, "pictures": f"{side} × {side} pixels"}
    for part in ("flow", "vae", "finetuned_decoder", "text_encoder"):
        module = getattr(pipe, part)
        if module is not None:
            millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
            model[part.replace("_", " ")] = f"{type(module).__name__}, {millions:,.1f} million parameters"
    if pipe.noise_levels is not None:
        model["noise levels"] = "{:g} to {:g}".format(*pipe.noise_levels)
    model |= {"training noise σ": pipe.config.noise_std, "SHA-256": pipeline_hash(pipe)}
    guidance_scale = pipe.config.guidance_scale if gen.guidance_scale is None else gen.guidance_scale
    denoise, decoder = pipe.check_outputs(gen.denoise, "np", gen.decoder, gen.decoding)
    steps = trajectory_steps(pipe, gen.num_inference_steps, gen.decoding, gen.denoise)
    level = resolve_level(pipe.noise_levels, gen.noise_level)
    if pipe.noise_levels is not None and denoise:
        steps = resolve_steps(pipe.noise_levels, gen.num_inference_steps, pipe.config.num_inference_steps, True, level)
    sampling = {
        "guidance scale": guidance_scale,
        "guidance method": pipe.config.guidance_method,
        "denoise": denoise,
        "decoder": decoder,
        "σ": pipe.config.noise_std if gen.noise_std is None else gen.noise_std,
        "decoding": gen.decoding,
        "noise level": level,
        "steps": steps,
        "walk": gen.walk,
        "temperature": pipe.config.temperature if gen.temperature is None else gen.temperature,
        "seed": gen.seed,
    }
    defaults = DataConfig(source=config.data.source, path=config.data.path, name=config.data.name)
    data = {k: v for k, v in dataclasses.asdict(config.data).items() if k == "image_size" or v != getattr(defaults, k)}
    data = {"source": config.data.source, "path": config.data.path, "name": config.data.name} | data
    flow = {key: value for key, value in pipe.flow.config.items() if key[0] != "_"}
    computer = {"python": platform.python_version(), "machine": machine(torch.device(device))}
    tables = {"Model": model, "Sampling": sampling, "Data": data, "Flow": flow, "Versions": versions() | computer}
    return {heading: {k: v for k, v in table.items() if v is not None} for heading, table in tables.items()}
