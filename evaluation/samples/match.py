"""How well a trained pipeline draws what it is asked for, and how exactly it inverts itself."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from tarflow.common.seeds import image_generators
from tarflow.data.drawing_checker import class_shares, match_shares
from tarflow.data.drawings import CLASS_NAMES, all_captions
from tarflow.flows.decoding import sampling
from tarflow.flows.trajectory.kinds import FlowModel
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.flows.trajectory.sampling import transported
from tarflow.pipeline.call.flow_pipeline import FlowPipeline


def generate(
    pipe: FlowPipeline, conditions: dict[str, list[Any]], batch_size: int, seed: int = 0, **options: Any
) -> list[Any]:
    """Pictures for prompts or class labels, in batches; picture i depends on seed and i alone."""
    ((name, values),) = conditions.items()
    images: list[Any] = []
    for first in range(0, len(values), batch_size):
        part = values[first : first + batch_size]
        generators = image_generators(seed, range(first, first + len(part)))
        images += pipe(**{name: part}, generator=generators, **options).images
    return images


def drawn_caption_shares(
    pipe: FlowPipeline, rounds: int = 3, batch_size: int = 108, **options: Any
) -> dict[str, float]:
    """Shares of samples whose shape, colour and background match, over rounds × 108 captions; ``options`` are of the
    pipeline's call."""
    captions = all_captions() * rounds
    return match_shares(generate(pipe, {"prompt": captions}, batch_size, **options), captions)


def drawn_class_shares(pipe: FlowPipeline, rounds: int = 9, batch_size: int = 108, **options: Any) -> dict[str, float]:
    """The same for class labels, which name colour and shape, over rounds × 36 labels."""
    names = list(CLASS_NAMES) * rounds
    return class_shares(generate(pipe, {"class_labels": names}, batch_size, **options), names)


@torch.no_grad()
def round_trip_error(
    flow: FlowModel,
    cond: torch.Tensor | None = None,
    class_labels: Any = None,
    count: int = 8,
    noise_level: float | None = None,
) -> float:
    """Largest |f(f⁻¹(z)) − z| over ``count`` draws of noise, without guidance; of a trajectory model's transporter, which
    sees no condition."""
    size = flow.config.sample_size
    noise = torch.randn(count, flow.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(flow.device)
    if isinstance(flow, TrajectoryFlowModel):
        x = transported(flow, noise, 0.5)
        z, _ = flow(x, 0.5)
    else:
        x, _ = sampling.generate(flow, noise, flow.condition(class_labels, cond, count, noise_level))
        z, _ = flow(x, class_labels=class_labels, cond=cond, noise_level=noise_level)
    return float((z - noise).abs().max())


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int = 6, scale: int = 2) -> Image.Image:
    """Pictures, enlarged, with their captions below, wrapped to two lines."""
    width, height = (side * scale for side in images[0].size)
    font, line = ImageFont.load_default(size=10), 12
    rows = -(-len(images) // columns)
    cell_width, cell_height = width + 8, height + 2 * line + 8
    grid = Image.new("RGB", (columns * cell_width + 8, rows * cell_height + 8), "white")
    canvas = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + (i % columns) * cell_width, 8 + (i // columns) * cell_height
        grid.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        for number, text in enumerate(wrap(caption, font, width)[:2]):
            canvas.text((x, y + height + 1 + number * line), text, fill="black", font=font)
    return grid


def wrap(text: str, font: Any, width: int) -> list[str]:
    """The text broken into lines that are not wider than ``width`` pixels; each space of any kind is a plain one, and
    what has no width is left out, as fonts would draw boxes for it."""
    lines, seen = [""], "".join(one for one in text if one.isprintable() or one.isspace())
    for word in seen.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
