"""Pictures side by side."""

from __future__ import annotations

from PIL import Image


def make_grid(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side, as many rows as columns if not said otherwise."""
    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, ((i % columns) * width, (i // columns) * height))
    return grid
