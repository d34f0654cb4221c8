"""Image sizes by aspect ratio, and captions that name it: STARFlow's conventions."""

from __future__ import annotations

import math

#: The published buckets, width:height.
ASPECT_RATIOS = ("21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21")


def aspect_size(aspect_ratio: str, side: int, multiple: int) -> tuple[int, int]:
    """Height and width of about side² pixels with an aspect ratio, both multiples of ``multiple``.

    Args:
        aspect_ratio: one of `ASPECT_RATIOS`.
        side: of the square picture of the same area.

    Raises:
        ValueError: for an unknown aspect ratio.
    """
    check_aspect_ratio(aspect_ratio)
    return bucket_size(ratio_of(aspect_ratio), side, multiple)


def check_aspect_ratio(aspect_ratio: str) -> None:
    """An error for one that is none of `ASPECT_RATIOS`."""
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"aspect_ratio must be one of {', '.join(ASPECT_RATIOS)}, got {aspect_ratio!r}")


def ratio_of(aspect_ratio: str) -> float:
    """Width over height of "16:9"."""
    width, height = map(float, aspect_ratio.split(":"))
    return width / height


def bucket_size(ratio: float, side: int, multiple: int) -> tuple[int, int]:
    """Height and width of about side² pixels whose width is ``ratio`` times the height, multiples of ``multiple``."""
    height, width = side / math.sqrt(ratio), side * math.sqrt(ratio)
    return max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple


def nearest_aspect_ratio(height: int, width: int) -> str:
    """The bucket whose ratio is nearest to a size's, on a logarithmic scale."""

    return min(ASPECT_RATIOS, key=lambda name: abs(math.log(ratio_of(name)) - math.log(width / height)))


def fill_template(template: str | None, captions: list[str], aspect_ratio: str) -> list[str]:
    """Captions in a template with the places {prompt} and {aspect_ratio}; unchanged if there is none.

    The empty caption, which is the null condition, is put in too, as the published code does.
    """
    if template is None:
        return captions
    return [template.replace("{aspect_ratio}", aspect_ratio).replace("{prompt}", caption) for caption in captions]
