"""Pictures by number as a stream has them, so that a training may take them and streams together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tarflow.data.config import DataConfig
from tarflow.data.images import Images
from tarflow.data.stream.rows import Row, RowReader, mirrors
from tarflow.data.stream.shards import Shards

#: The column that a picture's number has.
NUMBER = "__number__"
#: Into so many shards pictures by number are dealt; longer ones, of endless data, are not shuffled.
SHARDS, SHUFFLED = 64, 2**24


class NumberedShards:
    """The numbers of some pictures, dealt to shards in turn, and shuffled in each: folders are sorted.

    Args:
        images: the pictures.
        name: of them, for messages.
        seed: of the shuffling.
    """

    classes: list[str] | None = None

    def __init__(self, images: Images, name: str, seed: int):
        self.images, self.seed = images, seed
        count = min(SHARDS, len(images))
        if count == 0:
            raise ValueError(f"the split {images.split!r} of {name!r} is empty")
        self.names = [f"{name} ({len(images)}), part {number + 1} of {count}" for number in range(count)]

    def rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        """Rows of a shard from number ``start`` on, which are numbers of pictures."""
        numbers = range(shard, len(self.images), len(self.names))
        places: Sequence[int] | np.ndarray = range(len(numbers))
        if len(numbers) <= SHUFFLED:
            places = np.random.default_rng((self.seed, shard)).permutation(len(numbers))
        for place in places[start:]:
            yield {NUMBER: numbers[int(place)]}


class NumberedReader:
    """Makes items of such rows, see `RowReader`: pictures alone.

    Args:
        shards: the pictures.
        seed: of what is mirrored.
        mirrored: mirror half of them.
    """

    classes = None
    has_captions = by_hash = False

    def __init__(self, shards: NumberedShards, seed: int, mirrored: bool):
        self.images, self.config, self.seed, self.mirrored = shards.images, shards.images.config, seed, mirrored

    def wanted(self, row: Row) -> bool:
        """All are."""
        return True

    def item(self, row: Row) -> dict[str, Any]:
        """``{"image": uint8 (3, S, S), "key": str, "skipped": [messages]}``.

        Raises:
            ValueError: that names a picture which cannot be read.
        """
        found = self.images[row.values[NUMBER]]
        image = found["image"].flip(-1) if self.mirrored and mirrors(row, self.seed) else found["image"]
        return {"image": image, "key": row.place, "skipped": found["skipped"]}

    def caption(self, row: Row) -> str:
        """There is none."""
        raise ValueError(f"{row.place} has no caption")

    def label(self, row: Row) -> int:
        """There is none."""
        raise ValueError(f"{row.place} has no label")


def reader_of(
    config: DataConfig, split: str, shards: Shards, seed: int, sizes: Sequence[tuple[int, int]], mirrored: bool
) -> RowReader | NumberedReader:
    """What makes items of some shards' rows, arguments as of `RowReader`."""
    if isinstance(shards, NumberedShards):
        return NumberedReader(shards, seed, mirrored)
    return RowReader(config, split, shards, seed, sizes, mirrored)
