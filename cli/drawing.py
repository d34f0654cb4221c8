"""`tarflow generate`: from checked options to written pictures."""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from tarflow.cli.pictures import Target, file_stems
from tarflow.cli.quiet import quiet_libraries
from tarflow.cli.subjects import subjects_of
from tarflow.common.grids import make_grid
from tarflow.common.seeds import image_generators
from tarflow.common.words import rounded
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.limits import available_bytes, check_num_images, gigabytes, largest_count
from tarflow.pipeline.call.settings import resolve_size
from tarflow.pipeline.call.trajectory_sampling import trajectory_steps
from tarflow.pipeline.call.walk import check_own_level, check_walk, resolve_level, resolve_steps
from tarflow.pipeline.loading.place import Facts
from tarflow.pipeline.opening import open_pipeline

#: Pictures that are drawn at once, if the memory holds them.
BATCH = 32
#: A seed that is not given is below this, so that it is easily typed.
NEW_SEEDS = 1_000_000
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory")


def draw(args: argparse.Namespace, target: Target) -> None:
    """Draw and write pictures, and print where they are.

    Args:
        args: of `tarflow.cli.generate`, checked.
        target: where to write.

    Raises:
        ValueError: for options that do not fit the pipeline, or more pictures than the memory holds.
        OSError: if a picture cannot be written.
        FloatingPointError: for numbers that are not finite.
    """
    quiet_libraries()
    pipe = open_pipeline(args.pipeline, args.device)
    if args.lora is not None:
        pipe.load_lora_weights(args.lora)
    seed = random.randrange(NEW_SEEDS) if args.seed is None else args.seed
    config = pipe.flow.config
    name, values = subjects_of(Facts(config.conditioning, config.num_classes, names_of(pipe)), args)
    options = call_options(pipe, args)
    width, height = picture_size(pipe, args)
    total = len(values) * args.num
    columns = args.num if len(values) > 1 else max(1, round(total**0.5))
    guided = options["guidance_scale"] > 1
    batch = largest_count(pipe, min(BATCH, total), guided, None, height, width)
    check_num_images(pipe, max(1, batch), guided, None, height, width)
    if not target.is_folder:
        check_grid(target, total, columns, width, height)

    stems = file_stems(args.prompt or args.classes or ["image"])
    started, held = time.perf_counter(), []
    pictures = draw_batches(pipe, name, values, args.num, seed, batch, options)
    for place, picture in enumerate(tqdm(pictures, total=total, unit=" pictures", disable=None, leave=False)):
        if target.is_folder:
            target.save(picture, f"{stems[place // args.num]}-s{seed}-{place % args.num:04d}")
        else:
            held.append(picture)
    seconds = (time.perf_counter() - started) / total
    if held:
        target.save(held[0] if total == 1 else make_grid(held, columns))
    what = f"{total} pictures" if total > 1 else "1 picture"
    grid = " in a grid" if total > 1 and not target.is_folder else ""
    print(f"{target.path}: {what} of {width} × {height} pixels{grid}, seed {seed}, {rounded(seconds)} seconds each")


def names_of(pipe: FlowPipeline) -> dict[int, str]:
    """Names of a pipeline's classes, by index."""
    return {int(index): name for index, name in (pipe.config.id2label or {}).items()}


def call_options(pipe: FlowPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments that are the same for all pictures."""
    guidance = pipe.config.guidance_scale if args.guidance is None else args.guidance
    if args.negative_prompt and guidance == 1:
        raise ValueError("--negative-prompt needs --guidance-scale above 1")
    along = trajectory_steps(pipe, args.steps, args.decoding, args.denoise)
    denoise, decoder = pipe.check_outputs(args.denoise, "pil", args.decoder, args.decoding)
    levels, default = pipe.noise_levels, pipe.config.num_inference_steps
    level = resolve_level(levels, args.noise_level)
    check_own_level(pipe.config.noise_std, level, args.decoding == STUDENT, decoder)
    steps = resolve_steps(levels, args.steps if along is None else None, default, bool(denoise), level)
    check_walk(args.walk, levels, steps, level)
    width, height = args.size or (None, None)
    return {
        "guidance_scale": guidance,
        "negative_prompt": args.negative_prompt,
        "height": height,
        "width": width,
        "aspect_ratio": args.aspect_ratio,
        "decoding": args.decoding,
        "denoise": args.denoise,
        "decoder": args.decoder,
        "num_inference_steps": args.steps,
        "noise_level": args.noise_level,
        "walk": args.walk,
        "temperature": args.temperature,
    }


def picture_size(pipe: FlowPipeline, args: argparse.Namespace) -> tuple[int, int]:
    """Width and height in pixels; an error if the model cannot draw them."""
    width, height = args.size or (None, None)
    (_, rows, columns), _ = resolve_size(pipe, height, width, args.aspect_ratio)
    return columns * pipe.codec.factor, rows * pipe.codec.factor


def check_grid(target: Target, total: int, columns: int, width: int, height: int) -> None:
    """Whether a grid fits its file, and with its pictures the memory."""
    rows = -(-total // columns)
    target.check_size(columns * width, rows * height)
    needed, available = 6 * total * width * height, available_bytes("cpu")  # the pictures and the grid, 3 bytes a pixel
    if available is not None and needed > available:
        raise ValueError(
            f"a grid of {total:,} pictures takes {gigabytes(needed)} of memory, and {gigabytes(available)} are "
            "available: write to a folder"
        )


def draw_batches(
    pipe: FlowPipeline, name: str, values: list[Any], num: int, seed: int, batch: int, options: dict[str, Any]
) -> Iterator[Image.Image]:
    """``num`` pictures of each value, in their order, at most ``batch`` at once.

    Picture j of each value depends on the seed and j alone: all values' start from the same noise, so that they can be
    compared.
    """
    total = len(values) * num
    for first in range(0, total, batch):
        places = range(first, min(first + batch, total))
        wanted = len(places) if name == "num_images" else [values[place // num] for place in places]
        generators = image_generators(seed, (place % num for place in places))
        try:
            images = pipe(**{name: wanted}, generator=generators, **options).images
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
                at_once = "1 picture" if len(places) == 1 else f"{len(places)} pictures at once"
                raise ValueError(f"the memory did not hold {at_once}: take a smaller --num or --size") from error
            raise
        yield from images
