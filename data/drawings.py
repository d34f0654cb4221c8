"""Captioned pictures that the project draws itself: one coloured shape on a plain background.

A picture is a pure function of its seed and index, so the data set is endless, needs no download and is the same on
every machine. One combination of shape, colour and background in nine is never drawn for training; the held-out
split draws only those.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (222, 34, 42),
    "green": (28, 150, 62),
    "blue": (36, 86, 222),
    "yellow": (244, 206, 36),
    "purple": (146, 52, 182),
    "orange": (244, 128, 26),
}
BACKGROUNDS = {"light": (244, 244, 240), "dark": (24, 24, 32), "grey": (140, 146, 152)}
SIZES = {"small": (0.26, 0.29), "large": (0.36, 0.4)}  # radius as a fraction of the picture's side

#: Labels of the class-conditional variant, "red circle" first; the label of a drawing is its position here.
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

RING_HOLE = 0.58  # inner radius of a ring over its outer radius
STAR_INNER = 0.45  # radius of a star's inner corners over that of its points
CROSS_ARM = 0.34  # half the width of a cross's arm over its radius
MAX_TILT = 8.0  # degrees
MAX_OFFSET = 0.06  # of a shape's centre from the picture's, along each side
SUPERSAMPLING = 4
#: As many as are said to be there, which are made as they are asked for.
ENDLESS = 2**31 - 1


@dataclass(frozen=True)
class Drawing:
    """What one picture shows, in words (shape, colour, background, size) and numbers."""

    shape: str
    colour: str
    background: str
    size: str
    centre: tuple[float, float]
    radius: float
    tilt: float
    colour_rgb: tuple[int, int, int]
    background_rgb: tuple[int, int, int]

    @property
    def caption(self) -> str:
        return caption_of(self.shape, self.colour, self.background, self.size)

    @property
    def label(self) -> int:
        return CLASS_NAMES.index(f"{self.colour} {self.shape}")


def caption_of(shape: str, colour: str, background: str, size: str) -> str:
    return f"a {size} {colour} {shape} on a {background} background"


def all_captions() -> list[str]:
    """One caption for each of the 108 combinations of shape, colour and background; the two sizes alternate."""
    combinations = itertools.product(SHAPES, COLOURS, BACKGROUNDS)
    sizes = itertools.cycle(SIZES)
    return [caption_of(*combination, size) for combination, size in zip(combinations, sizes, strict=False)]


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Whether the combination belongs to the held-out split (12 of the 108)."""
    s, c, b = SHAPES.index(shape), list(COLOURS).index(colour), list(BACKGROUNDS).index(background)
    return b == (s + 2 * c) % 3 and (s + c) % 3 == 0


def random_drawing(seed: int, index: int, split: str = "train") -> Drawing:
    """Draw the attributes of picture ``index``: the same for the same arguments, on every machine.

    Raises:
        ValueError: if ``split`` is neither "train" nor "validation".
    """
    if split not in ("train", "validation"):
        raise ValueError(f"the drawings have the splits 'train' and 'validation', not {split!r}")
    rng = np.random.default_rng((seed, index, split == "validation"))

    def one_of(names: Iterable[str]) -> str:  # what `rng.choice` gives, without an array of the names
        return (known := list(names))[rng.integers(len(known))]

    while True:
        shape, colour, background = one_of(SHAPES), one_of(COLOURS), one_of(BACKGROUNDS)
        if is_held_out(shape, colour, background) == (split == "validation"):
            break
    size = one_of(SIZES)
    radius = rng.uniform(*SIZES[size])
    offset = min(MAX_OFFSET, 0.5 - radius - 0.03)  # the shape stays inside

    def jitter(rgb: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
        r, g, b = (min(max(v + change, 0), 255) for v, change in zip(rgb, steps(amount), strict=True))
        return r, g, b

    def steps(amount: int) -> list[int]:
        return rng.integers(-amount, amount + 1, 3).tolist()

    return Drawing(
        shape=shape,
        colour=colour,
        background=background,
        size=size,
        centre=(0.5 + rng.uniform(-offset, offset), 0.5 + rng.uniform(-offset, offset)),
        radius=radius,
        tilt=rng.uniform(-MAX_TILT, MAX_TILT),
        colour_rgb=jitter(COLOURS[colour], 5),
        background_rgb=jitter(BACKGROUNDS[background], 3),
    )


def outline(shape: str, tilt: float) -> np.ndarray:
    """Corners of a shape of radius 1 about the origin, (N, 2), y downwards; ``tilt`` in degrees."""
    if shape in ("circle", "ring"):
        angles, radii = np.linspace(0, 2 * math.pi, 72, endpoint=False), np.ones(72)
    elif shape == "square":
        angles, radii = math.pi / 4 + np.arange(4) * math.pi / 2, np.ones(4)
    elif shape == "triangle":
        angles, radii = -math.pi / 2 + np.arange(3) * 2 * math.pi / 3, np.ones(3)
    elif shape == "star":
        angles, radii = -math.pi / 2 + np.arange(10) * math.pi / 5, np.where(np.arange(10) % 2, STAR_INNER, 1.0)
    elif shape == "cross":
        a = CROSS_ARM
        corner = np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)])
        corners = np.concatenate([corner, -corner])
        angles, radii = np.arctan2(corners[:, 1], corners[:, 0]), np.hypot(corners[:, 0], corners[:, 1])
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    angles = angles + math.radians(tilt)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def render(drawing: Drawing, image_size: int = 64) -> Image.Image:
    """Paint a drawing as an RGB picture of ``image_size`` × ``image_size``, antialiased."""
    side = image_size * SUPERSAMPLING
    picture = Image.new("RGB", (side, side), drawing.background_rgb)
    canvas = ImageDraw.Draw(picture)
    centre, corners = np.array(drawing.centre), outline(drawing.shape, drawing.tilt)

    def paint(radius: float, rgb: tuple[int, int, int]) -> None:
        canvas.polygon([(float(x), float(y)) for x, y in (centre + radius * corners) * side], fill=rgb)

    paint(drawing.radius, drawing.colour_rgb)
    if drawing.shape == "ring":
        paint(drawing.radius * RING_HOLE, drawing.background_rgb)
    return picture.reduce(SUPERSAMPLING)


class Drawings:
    """Endless map-style data set of drawings: item i is ``{"image": PIL, "caption": str, "label": int}``.

    Args:
        split: "train", or "validation" for the combinations that training never shows.
        image_size: side of the pictures in pixels.
        seed: another seed gives other pictures.
        length: how many items an epoch has; None for 2³¹ − 1, which no training exhausts.
    """

    class_names = CLASS_NAMES
    has_captions = True

    def __init__(self, split: str = "train", image_size: int = 64, seed: int = 0, length: int | None = None):
        random_drawing(seed, 0, split)  # a wrong split fails here, not at the first item
        self.split, self.image_size, self.seed = split, image_size, seed
        self.length = ENDLESS if length is None else length

    def __len__(self) -> int:
        return self.length

    def caption(self, index: int) -> str:
        return random_drawing(self.seed, index, self.split).caption

    def size(self, index: int) -> tuple[int, int]:
        return self.image_size, self.image_size

    def facts(self, count: int) -> dict[str, str]:
        """Nothing: settings decide what is drawn."""
        return {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        drawing = random_drawing(self.seed, index, self.split)
        return {"image": render(drawing, self.image_size), "caption": drawing.caption, "label": drawing.label}
