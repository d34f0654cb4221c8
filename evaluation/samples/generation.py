"""Images by the thousand from a saved pipeline, on any number of processes, resumable.

What is guaranteed: the noise and the condition of image i depend on the seed and i alone. Images are drawn in chunks of
``batch_size`` consecutive indices, each chunk whole by one process, so the number of processes and any number of stops
do not change a byte (on the same kind of device, with the same libraries). Another batch size has matrix products of
other shapes, whose last bit may differ: with decoding "sequential" a few values then differ by one grey level. "auto"
and "fast" choose their method by timing, so their images are reproducible to their tolerance only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tarflow.common.files import check_writable
from tarflow.common.progress import progress_bar
from tarflow.common.seeds import image_generators
from tarflow.evaluation.conditions import Conditions, make_conditions
from tarflow.evaluation.images.store import NpzStore, PngStore
from tarflow.evaluation.samples.record import (
    check_conditions,
    check_record,
    pictures_in,
    read_record,
    refuse_strangers,
    settings_of,
    write_conditions,
    write_record,
)
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.evaluation.samples.told import CONDITIONS
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.opening import load_pipeline
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline, TARFlowPipelineOutput


def generate_images(
    config: GenerationConfig,
    process: int = 0,
    processes: int = 1,
    device: str | torch.device = "cpu",
    wait: Callable[[], None] | None = None,
    pipe: TARFlowPipeline | None = None,
) -> dict[str, Any]:
    """Draw the images of one process that are not there yet; chunk k belongs to process k modulo ``processes``.

    Args:
        config: what to generate.
        process, processes: the number of this process, and how many there are.
        device: where to draw.
        wait: blocks until all processes have called it. Without it process 0 must be called last.
        pipe: the pipeline, if it is loaded already (and compiled, if wanted).

    Returns:
        ``out``, ``images`` (where they are: the folder, or the ``.npz``), ``num``, ``complete``, ``generated`` (by this
        process in this call), and ``images_per_second`` of drawing without writing, by this process; None if nothing
        was drawn here yet. The first chunk does not count if there are others, as it may compile and calibrate.

    Raises:
        ValueError: if settings do not fit the model, or the folder holds images of other settings or origin.
        OSError: if the pipeline cannot be loaded or a file cannot be written; no image is left half-written.
        FloatingPointError: for numbers that are not finite.
    """
    if not 0 <= process < processes:
        raise ValueError(f"process must be 0 to {processes - 1}, got {process}")
    check_writable(config.out, folder=True)
    pipe = pipeline_of(config, device) if pipe is None else pipe
    pipe.check_outputs(config.denoise, "np", config.decoder, config.decoding)
    if pipe.noise_levels is not None and config.noise_std is not None:
        raise ValueError(
            f"noise_std is {config.noise_std:g}, but this flow knows many noise levels, and which its samples have: give "
            "noise_level to draw at another"
        )
    if config.noise_std is not None and isinstance(pipe.flow, TrajectoryFlowModel):
        raise ValueError(
            f"noise_std is {config.noise_std:g}, but a trajectory model's chain ends at the noise of its training: leave it out"
        )
    conditions = conditions_of(pipe, config)
    out, first = Path(config.out).expanduser(), process == 0
    record = begin(out, config, pipe, conditions, first, wait is not None or processes == 1)
    if wait is not None:
        wait()  # so that no image is there without the record of its settings

    store = NpzStore(out) if config.format == "npz" else PngStore(out)
    starts = range(0, config.num, config.batch_size)
    chunks = [range(start, min(start + config.batch_size, config.num)) for start in starts]
    generated, speed = draw_missing(pipe, config, conditions, store, chunks[process::processes], first)
    record["images_per_second"] = speed or record["images_per_second"]
    if wait is not None:
        wait()
    if first:
        complete = all(map(store.has, chunks))
        if complete:
            store.finish(chunks, map(conditions.values, chunks) if conditions.kind == "label" else None)
        write_record(out, record | {"complete": complete, "processes": processes, "device": str(device)})
    if wait is not None:
        wait()  # so that the images are there wherever this returns
    complete = (read_record(out) or {}).get("complete", False)
    result = {"out": str(out), "images": str(store.images) if complete else None, "num": config.num}
    return {**result, "complete": complete, "generated": generated, "images_per_second": record["images_per_second"]}


def conditions_of(pipe: FlowPipeline, config: GenerationConfig) -> Conditions:
    """What the images of a configuration are drawn from.

    Raises:
        ValueError: for conditions that the model does not take, lacks or cannot find.
    """
    return make_conditions(
        pipe, config.seed, config.labels, config.label_counts, config.captions, config.data, config.split
    )


def begin(
    out: Path, config: GenerationConfig, pipe: TARFlowPipeline, conditions: Conditions, writes: bool, alone: bool
) -> dict[str, Any]:
    """The record of a generation, which is in its folder before any image is.

    Args:
        out: the folder.
        writes: whether this process writes it.
        alone: no other process can have drawn already.

    Raises:
        ValueError: if the folder holds images of other settings or origin.
    """
    record = {"settings": settings_of(config, conditions, pipe), "num": config.num}
    if alone:
        refuse_strangers(out)
    begun = next(pictures_in(out), None) is not None or (out / "parts").exists()
    earlier = read_record(out) if begun else None  # of no picture it tells nothing
    check_record(config, earlier, record)
    if earlier is not None:
        check_conditions(out, conditions, earlier["num"], config.batch_size)
    known = earlier or {}
    record["images_per_second"] = known.get("images_per_second")
    if writes:
        if known.get("num") != config.num or not (out / CONDITIONS).exists():
            write_conditions(out, conditions, config.num, config.batch_size)
        write_record(out, record | {"complete": False})
    return record


def pipeline_of(config: GenerationConfig, device: str | torch.device) -> TARFlowPipeline:
    """The pipeline with the wanted dtype on a device, without progress bars of its own.

    Raises:
        ValueError: if there is none, or it cannot be opened.
    """
    pipe = load_pipeline(config.pipeline, getattr(torch, config.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if config.fast:
        pipe.enable_fast_decoding()
    return pipe


def draw_missing(
    pipe: TARFlowPipeline,
    config: GenerationConfig,
    conditions: Conditions,
    store: PngStore | NpzStore,
    chunks: list[range],
    show_progress: bool,
) -> tuple[int, float | None]:
    """Draw and write chunks that are not there; returns how many images, and how many a second."""
    missing = [chunk for chunk in chunks if not store.has(chunk)]
    total, left = sum(map(len, chunks)), sum(map(len, missing))
    seconds: list[float] = []
    with progress_bar(total=total, initial=total - left, unit=" images", disable=not show_progress) as progress:
        for chunk in missing:
            started = time.perf_counter()
            images = draw_chunk(pipe, config, conditions, chunk)
            seconds.append(time.perf_counter() - started)
            store.write(chunk, images)
            progress.update(len(chunk))
    timed = slice(1 if len(missing) > 1 else 0, None)
    speed = sum(map(len, missing[timed])) / sum(seconds[timed]) if missing else None
    return left, speed


def draw_chunk(pipe: TARFlowPipeline, config: GenerationConfig, conditions: Conditions, indices: range) -> np.ndarray:
    """uint8 images (B, H, W, 3) of some indices."""
    with denoising_for(pipe, config.noise_std):
        output = pipe(
            **conditions.arguments(indices),
            generator=image_generators(config.seed, indices),
            guidance_scale=config.guidance_scale,
            denoise=config.denoise,
            decoder=config.decoder,
            decoding=config.decoding,
            tolerance=config.tolerance,
            num_inference_steps=config.num_inference_steps,
            noise_level=config.noise_level,
            walk=config.walk,
            temperature=config.temperature,
            output_type="np",
        )
    assert isinstance(output, TARFlowPipelineOutput)
    images = output.images
    pixels = (images * 255).round().astype(np.uint8)  # (B, H, W, C)
    return pixels if pixels.shape[3] == 3 else pixels.repeat(3, axis=3)


@contextmanager
def denoising_for(pipe: TARFlowPipeline, noise_std: float | None) -> Iterator[None]:
    """Let a pipeline denoise for another σ; None leaves it."""
    own = pipe.config.noise_std
    pipe.register_to_config(noise_std=own if noise_std is None else noise_std)
    try:
        yield
    finally:
        pipe.register_to_config(noise_std=own)
