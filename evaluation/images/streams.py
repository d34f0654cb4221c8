"""Pictures of a stream to be evaluated, read as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from tarflow.data.config import DataConfig
from tarflow.data.stream.first import square_stream, without_conditions
from tarflow.data.stream.rows import Row, RowReader
from tarflow.data.stream.shards import PICTURE
from tarflow.evaluation.images.conversions import conversions_of
from tarflow.evaluation.images.image_set import READERS, REPLACED, ImageSet


class StreamImages(ImageSet):
    """The first pictures of a stream's split in the order of its shards; none is kept. One that cannot be read is replaced,
    where that is allowed, by the next of its batch.

    Raises:
        ValueError: if nobody says how many, or (by `batches`) if there are fewer.
    """

    def __init__(self, config: DataConfig, split: str, num: int | None):
        self.config, self.split = config, split
        self.stream = square_stream(without_conditions(config), split, config.seed)
        name = f"{config.source} {', '.join(self.stream.parts)}, {split}"
        if num is None:
            raise ValueError(
                f"the stream {name!r} does not tell how many pictures it has: say how many to take with num"
            )
        super().__init__(name, num, (config.image_size, config.image_size))

    def captions(self) -> list[str]:
        """Of all pictures.

        Raises:
            ValueError: that names shard and key of a row without one, or if there are none.
        """
        told = square_stream(self.config, self.split, self.config.seed)
        if not told.has_captions:
            raise ValueError("the data has no captions: name their column by data.caption_column")
        return [told.readers[row.source].caption(row) for row in self._rows(counts=False)]

    def batches(self, batch_size: int, process: int = 0, processes: int = 1) -> Iterator[Tensor]:
        """As of `ImageSet`; each process reads all rows, and decodes its own."""
        self.conversions = Counter()
        rows = self._rows(process == 0)
        waiting: list[list[Future[Any]]] = []
        with ThreadPoolExecutor(READERS) as pool:
            for number in count():
                if not (batch := list(islice(rows, batch_size))):
                    break
                if number % processes == process:
                    waiting.append([pool.submit(self._decoded, row) for row in batch])
                if len(waiting) > 1:  # one batch is read ahead
                    yield self._filled(waiting.pop(0))
            for futures in waiting:
                yield self._filled(futures)

    def _rows(self, counts: bool) -> Iterator[Row]:
        """As many rows as are wished; what is left out on the way is noted where that ``counts``."""
        left = len(self)
        for row in self.stream.one_pass(shuffled=False):
            if isinstance(row, Row):
                left -= 1
                yield row
            else:
                self.conversions[REPLACED] += counts
            if left == 0:
                return
        raise ValueError(f"{len(self)} pictures are asked for, but {self.name!r} has {len(self) - left}")

    def _decoded(self, row: Row) -> tuple[Tensor, list[str]] | ValueError:
        reader = self.stream.readers[row.source]
        assert isinstance(reader, RowReader)  # a data section names streams alone
        try:
            image = reader.picture(row)
            return reader.pixels(row, image), conversions_of(image, row.values[PICTURE])
        except ValueError as error:
            if self.stream.config.on_error == "raise":
                raise
            return error

    def _filled(self, futures: list[Future[Any]]) -> Tensor:
        """A batch, uint8 (B, 3, S, S)."""
        found = [future.result() for future in futures]
        usable = [one for one in found if not isinstance(one, ValueError)]
        if not usable:
            raise ValueError(f"no picture of a batch can be read, the last: {found[-1]}")
        pictures: list[Tensor] = []
        for one in reversed(found):
            broken = isinstance(one, ValueError)
            pictures.append((pictures or [usable[0][0]])[-1] if broken else one[0])
            self.conversions.update([REPLACED] if broken else one[1])
        return torch.stack(pictures[::-1])

    def _hash_content(self, digest: Any) -> None:
        config = self.stream.config
        about = (config.image_size, config.background, config.seed, config.on_error)
        digest.update(repr((about, self.stream.identity)).encode())
        for row in self._rows(counts=False):
            content = row.values[PICTURE] or b""
            digest.update(f"{row.shard} {row.number} {len(content)}\0".encode())
            digest.update(content)
