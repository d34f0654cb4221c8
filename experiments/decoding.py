"""Ways of removing the training noise side by side, on the same samples: none, score step, learned denoiser, finetuned
decoder. What each costs, how near it comes to held-out pictures, and how far its samples are from real ones."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tarflow.common.charts import markdown_table
from tarflow.common.clock import clock
from tarflow.common.files import check_writable, write_json, write_picture, write_text
from tarflow.common.machine import machine
from tarflow.common.progress import progress_bar
from tarflow.common.seeds import image_generators
from tarflow.data.images import to_uint8
from tarflow.data.stream.first import open_pictures
from tarflow.evaluation.conditions import Conditions, make_conditions
from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.features.frechet import bias_warning, frechet_distance
from tarflow.evaluation.features.statistics import Moments, compute_statistics
from tarflow.evaluation.images.sets import open_images
from tarflow.evaluation.reconstruction.noisy import available_methods, decode_by, noisy_pictures
from tarflow.evaluation.reports.fid import open_reference, versions
from tarflow.evaluation.samples.record import pipeline_hash
from tarflow.experiments.settings import ComparisonConfig
from tarflow.pipeline.call.flow_pipeline import FlowPipeline

#: A row of the table: its columns' names in the JSON file and in the table.
COLUMNS = {
    "method": "noise removed by",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "distance": "",  # named by the extractor
    "seconds": "seconds per image, noise removed and decoded",
    "total_seconds": "with sampling",
}


@torch.no_grad()
def compare_decoding(config: ComparisonConfig, pipe: FlowPipeline) -> list[dict[str, Any]]:
    """Compare, and write tables and pictures.

    Args:
        config: what to compare.
        pipe: the pipeline, on its device.

    Returns:
        a row for each method that the pipeline has the parts for: "method", "psnr", "ssim", "distance" (None without an
        extractor), "seconds" and "total_seconds".

    Raises:
        ValueError: if settings, data and pipeline do not fit.
    """
    out, methods = Path(config.out).expanduser(), available_methods(pipe)
    check_writable(out, folder=True)
    conditions = make_conditions(pipe, config.seed, config.labels, None, config.captions, config.data, config.split)
    extractor = config.load_extractor(pipe.flow.device)
    images = open_pictures(config.data, config.split, config.pictures, "pictures")
    held_out = noisy_pictures(pipe, images, config.pictures, config.batch_size, config.seed)
    rows: list[dict[str, Any]] = [{"method": method} for method in methods]
    reconstructions = {"original": held_out.originals}
    for row in rows:
        reconstructions[row["method"]] = held_out.decoded(pipe, row["method"])
        row |= held_out.quality(reconstructions[row["method"]])
    samples, distances, seconds, sampling = compare_samples(config, pipe, conditions, extractor, methods)
    for row in rows:
        row["distance"], row["seconds"] = distances.get(row["method"]), seconds[row["method"]]
        row["total_seconds"] = row["seconds"] + sampling
    write_tables(config, pipe, rows, extractor, out, sum(map(len, held_out.originals)))
    write_picture(out / "samples.png", labelled_rows(samples), optimize=True)
    first = {name: torch.cat(batches)[: config.columns] for name, batches in reconstructions.items()}
    write_picture(out / "reconstructions.png", labelled_rows(first), optimize=True)
    return rows


def compare_samples(
    config: ComparisonConfig,
    pipe: FlowPipeline,
    conditions: Conditions,
    extractor: Extractor | None,
    methods: list[str],
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float], float]:
    """Draw each sample once and decode it by all methods.

    Returns:
        the first samples by method, uint8 (columns, 3, H, W); the distances, and the seconds per image to remove the
        noise and decode, by method; and the seconds per image of sampling.
    """
    shown: dict[str, list[Tensor]] = {method: [] for method in methods}
    moments = {} if extractor is None else {method: Moments(extractor.dims) for method in methods}
    seconds: dict[str, float] = {}
    drawn: list[float] = []
    for latents, condition, spent in sampled(config, pipe, conditions):
        drawn.append(spent / len(latents))
        for method in methods:
            pictures = to_uint8(decode_by(pipe, method, latents, condition)).cpu()
            if extractor is not None:
                moments[method].update(extractor(rgb(pictures)))
            missing = config.columns - sum(map(len, shown[method]))
            shown[method].append(pictures[: max(missing, 0)])
        if not seconds:  # the loop above has warmed everything up
            seconds = time_methods(pipe, methods, latents, condition, config.repeats)
    distances = {}
    if extractor is not None:
        reference = reference_moments(config, extractor)
        for method, found in moments.items():
            distances[method] = frechet_distance(found.mean, found.covariance, reference.mean, reference.covariance)
    sampling = statistics.median(drawn[1:] or drawn)  # the first batch may calibrate
    return {method: torch.cat(parts) for method, parts in shown.items()}, distances, seconds, sampling


def sampled(
    config: ComparisonConfig, pipe: FlowPipeline, conditions: Conditions
) -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
    """Noisy latents (B, C, h, w), the flow's keyword arguments for their condition, and the seconds that they took."""
    device = pipe.flow.device
    for first in progress_bar(range(0, config.num, config.batch_size), desc="samples", unit="batch"):
        indices = range(first, min(first + config.batch_size, config.num))
        arguments = conditions.arguments(indices)
        started = clock(device)
        latents = pipe(
            **arguments,
            generator=image_generators(config.seed, indices),
            guidance_scale=config.guidance_scale,
            decoding=config.decoding,
            denoise=False,
            decoder="vae",
            output_type="latent",
        ).images
        spent = clock(device) - started
        condition: dict[str, Tensor] = {}
        if "prompt" in arguments:
            condition["cond"] = pipe.encode_prompt(arguments["prompt"], device, do_classifier_free_guidance=False)[0]
        elif "class_labels" in arguments:
            condition["class_labels"] = torch.tensor(arguments["class_labels"], device=device)
        yield latents, condition, spent


def time_methods(
    pipe: FlowPipeline, methods: list[str], latents: Tensor, condition: dict[str, Tensor], repeats: int
) -> dict[str, float]:
    """Median seconds per image to remove the noise and decode, by method; they take turns."""
    spent: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats):
        for method in methods:
            started = clock(latents.device)
            decode_by(pipe, method, latents, condition)
            spent[method].append((clock(latents.device) - started) / len(latents))
    return {method: statistics.median(times) for method, times in spent.items()}


def reference_moments(config: ComparisonConfig, extractor: Extractor) -> Moments:
    """Of the features of real pictures."""
    if config.ref is not None:
        return open_reference(config.ref, extractor, config.batch_size, None, None, 0).moments
    endless = config.data.source == "drawings" or config.data.is_stream
    images = open_images(config.data, config.split, num=config.num if endless else None)
    return compute_statistics(images, extractor, config.batch_size, keep_features=0).moments


def rgb(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) of pictures with one or three colours."""
    return pictures.expand(-1, 3, -1, -1)


def labelled_rows(rows: dict[str, Tensor], least: int = 96) -> Image.Image:
    """uint8 pictures (N, 3, H, W) of each row side by side, behind its name; small ones are enlarged to ``least``."""
    height, width = next(iter(rows.values())).shape[2:]
    scale = max(1, least // height)
    font, margin, gap = ImageFont.load_default(size=12), 80, 4
    cell_width, cell_height = width * scale + gap, height * scale + gap
    columns = max(len(pictures) for pictures in rows.values())
    canvas = Image.new("RGB", (margin + columns * cell_width, len(rows) * cell_height), "white")
    for number, (name, pictures) in enumerate(rows.items()):
        top = number * cell_height
        ImageDraw.Draw(canvas).text((gap, top + cell_height // 2 - 6), name, fill="black", font=font)
        for place, picture in enumerate(rgb(pictures)):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            enlarged = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + place * cell_width, top))
    return canvas


def write_tables(
    config: ComparisonConfig,
    pipe: FlowPipeline,
    rows: list[dict[str, Any]],
    extractor: Extractor | None,
    out: Path,
    pictures: int,
) -> None:
    """Write ``comparison.json``, with all that the numbers depend on, and ``comparison.md``; so many ``pictures`` were
    rebuilt."""
    warning = None if extractor is None else bias_warning(config.num, extractor.dims)
    report: dict[str, Any] = {
        "rows": rows,
        "pictures": pictures,
        "noise_std": pipe.config.noise_std,
        "distance": None if extractor is None else extractor.metric_name,
        "warnings": [] if warning is None else [warning],
        "settings": dataclasses.asdict(config),
        "pipeline": pipeline_hash(pipe),
        "machine": machine(pipe.flow.device),
        "versions": versions(),
    }
    write_json(out / "comparison.json", report, nan_as_null=True)
    names = [name for name in COLUMNS if extractor is not None or name != "distance"]
    titles = [COLUMNS[name] or report["distance"] for name in names]
    lines = [
        markdown_table(titles, [[row[name] for name in names] for row in rows]),
        "",
        f"PSNR and SSIM: of {pictures:,} pictures whose latents got noise of σ {pipe.config.noise_std:g}.",
    ]
    lines += [f"Times: medians of {config.repeats}, batches of {min(config.batch_size, config.num)}."]
    lines += [] if warning is None else [warning]
    write_text(out / "comparison.md", "\n".join(lines) + "\n")
