"""Seeds of single pictures, so that a picture is the same whatever is drawn beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def image_seed(seed: int, index: int) -> int:
    """The seed of an image's noise. It grows by 1 with the index: torch's CPU generators use 32 bits of a seed, so
    hashes would soon give two images the same noise."""
    return seed * 1_000_003 + index


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image, see `image_seed`."""
    return [torch.Generator().manual_seed(image_seed(seed, index)) for index in indices]
