"""Pictures of a comparison of flows: densities and warps of the plane, rows of samples, memory against depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarflow.common.files import replaced, write_picture
from tarflow.experiments.family.plane import EXTENT
from tarflow.experiments.family.runs import Result

#: Colours of a saved picture; a palette makes its file several times smaller.
PALETTE = 128


def save(drawing: Any, path: Path) -> None:
    """Write a Matplotlib figure with a palette, and close it."""
    from matplotlib import pyplot

    drawing.tight_layout()
    with replaced(path) as temporary:
        drawing.savefig(temporary, dpi=75, format="png")
        pyplot.close(drawing)
        with Image.open(temporary) as image:
            small = image.convert("RGB").quantize(PALETTE)
        small.save(temporary, format="PNG", optimize=True)


def axes_grid(rows: int, columns: int, size: float) -> tuple[Any, Any]:
    """A figure with rows × columns squares without ticks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(rows, columns, figsize=(size * columns, size * rows), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return drawing, axes


def plane_picture(columns: dict[str, dict[str, Result]], data: dict[str, Tensor], path: Path) -> None:
    """Two rows for each density: what each flow has learned, and where it takes a square grid of noise.

    Args:
        columns: results by density and flow, as `plane_results` gives them.
        data: points (N, 2) of each density, for the first column.
    """
    names = list(dict.fromkeys(name for flows in columns.values() for name in flows))
    drawing, axes = axes_grid(2 * len(columns), 1 + len(names), 1.55)
    box = {"xlim": (-EXTENT, EXTENT), "ylim": (-EXTENT, EXTENT)}
    for row, (density, flows) in enumerate(columns.items()):
        upper, lower = axes[2 * row], axes[2 * row + 1]
        upper[0].hist2d(*data[density].T.numpy(), bins=80, range=[[-EXTENT, EXTENT]] * 2, cmap="magma")
        upper[0].set_title(density, fontsize=8)
        upper[0].set_aspect("equal")
        lower[0].axis("off")
        brightest = max(float(tensors["density"].quantile(0.995)) for _, tensors in flows.values())
        for column, name in enumerate(names, start=1):
            if name not in flows:
                upper[column].axis("off")
                lower[column].axis("off")
                continue
            numbers, tensors = flows[name]
            extent = (-EXTENT, EXTENT, -EXTENT, EXTENT)
            upper[column].imshow(tensors["density"].numpy(), cmap="magma", vmin=0, vmax=brightest, extent=extent)
            upper[column].set_title(f"{name}\n{numbers['nats']:.3f}", fontsize=8)
            lines = tensors["lines"].numpy()
            for index, line in enumerate(lines):
                colour = "tab:blue" if index < len(lines) // 2 else "tab:orange"
                lower[column].plot(*line.T, color=colour, linewidth=0.5)
            lower[column].set(aspect="equal", **box)
    save(drawing, path)


def rows_picture(rows: dict[str, Tensor], path: Path, scale: int = 2, columns: int = 20) -> None:
    """Rows of samples under each other with their names.

    Args:
        rows: by name, digits (N, 1, H, W) with values 0 … 16 or uint8 pictures (N, 3, H, W); the first of each are shown.
        scale: screen pixels for each of theirs.
        columns: how many.
    """
    from PIL import ImageDraw, ImageFont

    font, images = ImageFont.load_default(13), {}
    for name, pictures in rows.items():
        pictures = pictures[:columns]
        if pictures.shape[1] == 1:
            pictures = (pictures * 15.9).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        strip = pictures.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (H, N·W, 3)
        images[name] = Image.fromarray(np.ascontiguousarray(strip)).resize(
            (scale * strip.shape[1], scale * strip.shape[0]), Image.Resampling.NEAREST
        )
    label = 6 + int(max(font.getlength(name) for name in rows))
    first = next(iter(images.values()))
    canvas = Image.new("RGB", (label + first.width, (first.height + 3) * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (name, image) in enumerate(images.items()):
        top = index * (first.height + 3)
        canvas.paste(image, (label, top))
        pen.text((2, top + first.height / 2), name, fill="black", font=font, anchor="lm")
    write_picture(path, canvas.quantize(PALETTE), optimize=True)


def memory_picture(memory: dict[str, dict[str, int]], path: Path) -> None:
    """Bytes of activations against the number of blocks, a line for each mode.

    Args:
        memory: by mode and number of blocks (as text).
    """
    drawing, axes = axes_grid(1, 1, 3.6)
    axis = axes[0, 0]
    for mode, sizes in memory.items():
        axis.plot([int(blocks) for blocks in sizes], [size / 2**20 for size in sizes.values()], "o-", label=mode)
    ticks = [int(blocks) for blocks in next(iter(memory.values()))]
    axis.set(xscale="log", yscale="log", xlabel="coupling blocks", ylabel="activations, MB", xticks=ticks)
    axis.set_xticklabels(ticks)
    axis.minorticks_off()

    axis.legend(fontsize=7)
    save(drawing, path)
