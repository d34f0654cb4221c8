"""Some pictures of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tarflow.data.drawings import ENDLESS
from tarflow.data.images import Pictures


class Subset:
    """Pictures of a split by number; what `Images` has otherwise.

    Args:
        images: the split.
        indices: of the pictures there.
    """

    def __init__(self, images: Pictures, indices: Sequence[int]):
        self.images, self.indices = images, indices
        self.config, self.split, self.class_names = images.config, images.split, images.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.images[self.indices[index]]


def spread(images: Pictures, count: int) -> Subset:
    """At most ``count`` pictures that lie evenly in a split, as folders are sorted by class; of endless drawings, which
    are not, the first ones."""
    return Subset(images, spread_places(len(images), count))


def spread_places(length: int, count: int) -> Sequence[int]:
    """At most ``count`` numbers below ``length`` at equal distances; of what is endless the first ones."""
    count = min(count, length)
    return range(count) if length >= ENDLESS else evenly(length, count)


def check_not_empty(count: int, split: str) -> None:
    """Refuse a split of so many pictures if there are none."""
    if not count:
        raise ValueError(f"the data's split {split!r} is empty; raise data.validation_fraction or take another")


def evenly(length: int, count: int) -> list[int]:
    """``count`` numbers below ``length``, ascending, at equal distances."""
    return [i * length // count for i in range(count)]
