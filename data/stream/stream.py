"""A stream of pictures as trainings take it: lanes to read from, and its first rows."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from copy import copy
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from tarflow.data.config import DataConfig
from tarflow.data.files import hash_of
from tarflow.data.images import MAX_SKIPS, Images
from tarflow.data.stream.numbered import NumberedReader, NumberedShards, reader_of
from tarflow.data.stream.reading import Lane, Source
from tarflow.data.stream.rows import Row, RowReader
from tarflow.data.stream.shards import USUAL_LANES, Shards, open_shards
from tarflow.data.stream.urls import without_query

Made = TypeVar("Made")
#: As many items as an endless data set is said to have.
LENGTH = 2**40


class Stream(Dataset[dict[str, Any]]):
    """One split of a stream. Its length is not known: it counts as endless, and items by number are its first ones, in the
    order of training, from the beginning again after as many as it has.

    Args:
        config: the data section of a configuration.
        split: "train" or "validation".
        seed: of the orders of shards and rows, and of captions.
        sizes: height and width that pictures are brought to; None is the square of ``data.image_size``.
        parts: what is read together, by name, with its weight and settings; None takes the streams that ``config`` names.
            Pictures that are no stream may be among them, as pictures alone.
        mirrored: mirror half of the pictures where ``flip`` is set, as nobody else will.

    Raises:
        ValueError: if there are no shards, columns or rows as the settings name them.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str = "train",
        seed: int = 0,
        sizes: Sequence[tuple[int, int]] | None = None,
        parts: dict[str, tuple[float, DataConfig]] | None = None,
        mirrored: bool = False,
    ):
        self.config, self.split, self.seed, self.mirrored = config, split, seed, mirrored
        self.sizes = list(sizes or [(config.image_size, config.image_size)])
        self.parts = parts or config.parts
        self.weights = [weight for weight, _ in self.parts.values()]
        self.configs = [part for _, part in self.parts.values()]
        self.shards = [shards_of(name, part, split, seed) for name, (_, part) in self.parts.items()]
        self.readers = self._readers()
        classes = {None if reader.classes is None else reader.classes.names for reader in self.readers}
        if len(classes) > 1:
            raise ValueError("the streams of data.mix have different classes: name them all by data.class_names")
        self.class_names: tuple[str, ...] | None = classes.pop()
        if len({reader.has_captions for reader in self.readers}) > 1:
            raise ValueError("some streams of data.mix have captions and others have none: give each a caption_column")
        self.has_captions = self.readers[0].has_captions
        self._first: list[Row] = []
        self._pass: Iterator[Row] | None = None

    def with_sizes(self, sizes: Sequence[tuple[int, int]]) -> Stream:
        """The same stream with pictures of other sizes."""
        found = copy(self)
        found.sizes = list(sizes)
        found.readers = found._readers()
        found._first, found._pass = [], None
        return found

    def _readers(self) -> list[RowReader | NumberedReader]:
        pairs = zip(self.configs, self.shards, strict=True)
        return [
            reader_of(part, self.split, shards, self.seed, self.sizes, self.mirrored and part.flip)
            for part, shards in pairs
        ]

    @property
    def identity(self) -> str:
        """A hash of what decides which rows a place means: shards and settings."""
        return self._hash(self.config.shuffle_buffer)

    @property
    def rows_identity(self) -> str:
        """A hash of what decides which rows there are, however many are shuffled; with the usual number it is `identity`."""
        return self._hash(DataConfig.shuffle_buffer)

    def _hash(self, buffer: int) -> str:
        # Without folders: the same shards may lie elsewhere when a run goes on.
        names = [[posixpath.basename(without_query(name)) for name in shards.names] for shards in self.shards]
        about = [(part.where, part.validation_fraction, part.key_column) for part in self.configs]
        buffers = [part.shuffle_buffer for part in self.configs]
        others = [] if set(buffers) == {self.config.shuffle_buffer} else [buffers]
        return hash_of([self.split, self.seed, buffer, self.weights, about, names, *others])

    def lane(
        self, number: int, lanes: int, state: list[Any] | None = None, pool: Executor | None = None, ahead: int = 1
    ) -> Lane:
        """One of ``lanes`` lanes, from its beginning or from a `Lane.state`."""
        return Lane(number, self.sources(lanes), self.weights, self.seed, state, pool, ahead)

    def sources(self, lanes: int, shuffled: bool = True) -> list[Source]:
        """The streams as ``lanes`` lanes read them."""
        found = enumerate(zip(self.configs, self.shards, self.readers, strict=True))
        return [
            Source(
                number,
                shards,
                reader,
                self.seed if shuffled else None,
                lanes,
                block=-(-part.shuffle_buffer // lanes),
                skip=part.on_error == "skip",
            )
            for number, (part, shards, reader) in found
        ]

    def one_pass(self, shuffled: bool = True) -> Iterator[Row | str]:
        """Each row once, from all lanes in turn and from the streams by their weights; texts say what was left out. Where
        nothing is held out, none is read to find held-out ones."""
        if self.split == "validation" and not any(
            reader.config.validation_fraction or not reader.by_hash for reader in self.readers
        ):
            return
        walks = [in_turn([source.first_pass(lane) for lane in range(source.lanes)]) for source in self._usual(shuffled)]
        rng, left = np.random.default_rng(self.seed), np.array(self.weights)
        while left.any():
            source = int(rng.choice(len(walks), p=left / left.sum()))
            row = next(walks[source], None)
            if row is None:
                left[source] = 0
            else:
                yield row

    def _usual(self, shuffled: bool) -> list[Source]:
        return self.sources(self.config.lanes or USUAL_LANES, shuffled)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item ``index`` of the first ones. With ``on_error: skip`` the next one stands for one that cannot be read."""
        return self._first_of(index, lambda row: self.readers[row.source].item(row))

    def caption(self, index: int) -> str | None:
        """The caption of item ``index`` alone, or of the next that has one."""
        if not self.has_captions:
            return None
        return self._first_of(index, lambda row: self.readers[row.source].caption(row))

    def _first_of(self, index: int, make: Callable[[Row], Made]) -> Made:
        """What is made of row ``index``, or of the next that can be read where that is wished."""
        for step in range(MAX_SKIPS):
            row = self._row(index + step)
            try:
                return make(row)
            except ValueError:
                if self.config.on_error == "raise" or step == MAX_SKIPS - 1:
                    raise
        raise AssertionError

    def check_length(self, count: int) -> None:
        """Refuse a stream of fewer rows.

        Raises:
            ValueError: that says how many it has.
        """
        self._fill(count)
        if len(self._first) < count:
            raise ValueError(
                f"the stream {', '.join(self.parts)} has only {len(self._first)} training rows, fewer than the {count} "
                "pictures of a step: lower batch_size or accumulation, or give more shards"
            )

    def forget(self, keep: int = 256) -> None:
        """Let all but some of the first rows go, with the files that are open and what was read ahead of them; whoever asks
        for more reads again."""
        self._first, self._pass = self._first[:keep], None

    def _row(self, index: int) -> Row:
        self._fill(index + 1)
        if not self._first:
            raise ValueError(
                f"no rows are left in the stream {', '.join(self.parts)} for the split {self.split!r} with "
                f"where={self.config.where}"
            )
        return self._first[index % len(self._first)]

    def _fill(self, count: int) -> None:
        """Read so many first rows, or all if there are fewer."""
        if len(self._first) >= count:
            return
        if self._pass is None:
            rows = (row for row in self.one_pass() if isinstance(row, Row))
            self._pass = islice(rows, len(self._first), None)
        self._first += islice(self._pass, count - len(self._first))


def shards_of(name: str, config: DataConfig, split: str, seed: int) -> Shards:
    """The shards of one of the things that are read together; of pictures that are no stream, of their numbers."""
    return open_shards(config, split) if config.is_stream else NumberedShards(Images(config, split), name, seed)


def in_turn(walks: Sequence[Iterator[Row | str]]) -> Iterator[Row | str]:
    """One value of each iterator after the other, until all are through."""
    left = list(walks)
    while left:
        for walk in list(left):
            row = next(walk, None)
            if row is None:
                left.remove(walk)
            else:
                yield row
