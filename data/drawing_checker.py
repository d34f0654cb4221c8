"""Reads shape, colour and background back from a picture of a drawing, without learned weights.

The background is the median colour of the border; what differs from it is the shape's mask. The colour is the median
of the mask's inner pixels. The mask, moved to its centroid and scaled to unit area, is compared with templates of
every shape at every allowed tilt: the largest overlap (intersection over union) names the shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from tarflow.data.drawings import BACKGROUNDS, CLASS_NAMES, COLOURS, MAX_TILT, SHAPES, Drawing, render

TEMPLATE_SIDE = 40
MASK_SPREAD = 2.2  # side of the normalised window in units of the square root of the area (a star spans 1.75)
MIN_OVERLAP = 0.68  # below this no template fits, and the shape is "none"
MIN_AREA, MAX_AREA = 0.01, 0.6  # of the picture; a smaller or larger mask is no shape (the largest circle has 0.5)
MAX_COLOUR_DISTANCE = 110.0  # in RGB units; a colour farther from every named one is "none"


@dataclass(frozen=True)
class Reading:
    """What the checker sees; a field is "none" where nothing fits. ``overlap`` is the shape's IoU with its template."""

    shape: str
    colour: str
    background: str
    overlap: float


def read_drawing(image: Image.Image | np.ndarray) -> Reading:
    """Read a picture: PIL image or uint8 array (H, W, 3)."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float32)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an RGB picture (H, W, 3), got shape {pixels.shape}")
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background_rgb = np.median(border, axis=0)
    background = nearest_name(background_rgb, BACKGROUNDS)

    distance = np.linalg.norm(pixels - background_rgb, axis=2)
    # Half of the shape's own contrast, so that antialiased and blurred edges fall where the outline was.
    contrast = np.quantile(distance, 0.99)
    mask = distance > max(contrast / 2, 25.0)
    if not MIN_AREA <= mask.mean() <= MAX_AREA:
        return Reading("none", "none", background, 0.0)
    inner = erode(mask)
    colour = nearest_name(np.median(pixels[inner if inner.any() else mask], axis=0), COLOURS)
    overlaps = overlap(normalise_mask(mask), templates())  # (shapes, tilts)
    best = int(overlaps.max(axis=1).argmax())
    score = float(overlaps[best].max())
    return Reading(SHAPES[best] if score >= MIN_OVERLAP else "none", colour, background, score)


def caption_attributes(caption: str) -> dict[str, str]:
    """Shape, colour and background that a drawing's caption names.

    Raises:
        ValueError: if the caption lacks one of the three.
    """
    words = caption.lower().split()
    found = {}
    for name, known in (("shape", SHAPES), ("colour", COLOURS), ("background", BACKGROUNDS)):
        match = [word for word in words if word in known]
        if len(match) != 1:
            raise ValueError(f"the caption {caption!r} names {len(match)} {name}s of {', '.join(known)}, expected one")
        found[name] = match[0]
    return found


def match_shares(images: list[Image.Image], captions: list[str]) -> dict[str, float]:
    """Share of pictures whose shape, colour and background (each, and all three) are what the caption says."""
    if not images or len(images) != len(captions):
        raise ValueError(f"expected as many captions as images, at least one; got {len(captions)} and {len(images)}")
    return shares_of(images, ("shape", "colour", "background"), map(caption_attributes, captions))


def class_shares(images: Iterable[Any], labels: Iterable[int | str]) -> dict[str, float]:
    """Shares of pictures whose shape, colour, and both are those of their class, by index or name.

    Raises:
        ValueError: for a label that is no class of the drawings.
    """
    return shares_of(images, ("shape", "colour"), map(class_attributes, labels))


def class_attributes(label: int | str) -> dict[str, str]:
    """The colour and shape of a class of the drawings, by index or name."""
    if isinstance(label, int) and not 0 <= label < len(CLASS_NAMES):
        raise ValueError(f"the label {label} is no class of the drawings, which are 0 to {len(CLASS_NAMES) - 1}")
    colour, shape = (label if isinstance(label, str) else CLASS_NAMES[label]).split()
    return {"colour": colour, "shape": shape}


def shares_of(images: Iterable[Any], attributes: tuple[str, ...], wanted: Iterable[dict[str, str]]) -> dict[str, float]:
    """Shares of pictures that are read as wanted, by attribute, and "all" of them."""
    hits: dict[str, list[bool]] = {name: [] for name in attributes}
    for image, one in zip(images, wanted, strict=True):
        reading = read_drawing(image)
        for name, values in hits.items():
            values.append(getattr(reading, name) == one[name])
    shares = {name: float(np.mean(values)) for name, values in hits.items()}
    shares["all"] = float(np.mean(np.all(list(hits.values()), axis=0)))
    return shares


def nearest_name(rgb: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in names.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= MAX_COLOUR_DISTANCE else "none"


def erode(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask whose four neighbours are in it too."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def normalise_mask(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) resampled about its centroid so that its area is always the same: (S, S) booleans."""
    rows, columns = np.nonzero(mask)
    offsets = (np.arange(TEMPLATE_SIDE) + 0.5) / TEMPLATE_SIDE - 0.5
    step = MASK_SPREAD * np.sqrt(mask.sum())
    padding = int(step) + 2
    padded = np.pad(mask, padding)
    r = np.clip(np.rint(rows.mean() + offsets * step).astype(int) + padding, 0, padded.shape[0] - 1)
    c = np.clip(np.rint(columns.mean() + offsets * step).astype(int) + padding, 0, padded.shape[1] - 1)
    return padded[np.ix_(r, c)]


def overlap(mask: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one mask (S, S) with many (..., S, S)."""
    return (mask & others).sum((-1, -2)) / np.maximum((mask | others).sum((-1, -2)), 1)


@lru_cache(maxsize=1)
def templates() -> np.ndarray:
    """Normalised masks of every shape at tilts from −MAX_TILT to MAX_TILT: (shapes, tilts, S, S) booleans."""
    tilts = np.linspace(-MAX_TILT, MAX_TILT, 9)
    white, black = (255, 255, 255), (0, 0, 0)

    def mask(shape: str, tilt: float) -> np.ndarray:
        drawing = Drawing(shape, "", "", "", (0.5, 0.5), 0.4, float(tilt), white, black)
        return normalise_mask(np.asarray(render(drawing, 128))[:, :, 0] > 127)

    return np.stack([[mask(shape, tilt) for tilt in tilts] for shape in SHAPES])
