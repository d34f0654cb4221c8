"""Reading a stream in lanes: which rows come in which order, and where a lane stands.

A pass over a source holds each of its rows once. The shards of a pass, in an order that is drawn anew for each, are dealt to
the lanes in turn; a lane reads its shards one after the other, in blocks of rows that are shuffled. When it is through, it
begins the next pass, though others may still be in this one. All of that is a function of the seed, so where a lane stands
is four numbers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from tarflow.data.images import MAX_SKIPS
from tarflow.data.stream.ahead import Ahead
from tarflow.data.stream.numbered import NumberedReader
from tarflow.data.stream.rows import Row, RowReader
from tarflow.data.stream.shards import Shards
from tarflow.data.stream.tar import KEY
from tarflow.data.stream.urls import UnreachableError

#: So many passes without a row in a lane mean that there is none at all.
EMPTY_PASSES = 100
#: Seconds to wait before a shard that cannot be reached is tried again.
WAITS = (1.0, 5.0, 25.0)


@dataclass(frozen=True)
class Place:
    """Where a lane stands in a source.

    Attributes:
        turn: the pass.
        shard: how many of the lane's shards of this pass lie behind.
        row: of that shard, where the block begins.
        given: how many rows of the block were given.
    """

    turn: int = 0
    shard: int = 0
    row: int = 0
    given: int = 0


@dataclass(frozen=True)
class Source:
    """One stream.

    Attributes:
        number: among several.
        shards, reader: its rows, and what they are to training.
        seed: of the orders; None reads shards and rows as they lie.
        lanes: how many there are.
        block: rows of a lane that are shuffled among each other.
        skip: whether rows and shards that cannot be read are left out and counted.
    """

    number: int
    shards: Shards
    reader: RowReader | NumberedReader
    seed: int | None
    lanes: int
    block: int
    skip: bool

    @property
    def parts(self) -> int:
        """Into how many parts each shard is divided, so that no lane is without: part i has the rows i, i + parts, …"""
        return -(-self.lanes // len(self.shards.names))

    def order(self, turn: int, lane: int) -> list[tuple[int, int]]:
        """Shards, with the part of them, that a lane reads in a pass."""
        count = len(self.shards.names) * self.parts
        order = np.arange(count)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.number, turn)).permutation(count)
        return [divmod(int(unit), self.parts) for unit in order[lane :: self.lanes]]

    def walk(self, lane: int, place: Place) -> Iterator[tuple[Place, Row | str | None]]:
        """A lane's rows from a place on without end, each with the place behind it; a text says what was left out, None
        is a pass's end.

        Raises:
            ValueError: that names shard and key of what cannot be read.
        """
        turn, first, start = place.turn, place.shard, place.row
        while True:
            for position, (shard, part) in list(enumerate(self.order(turn, lane)))[first:]:
                yield from self._walk_shard(Place(turn, position, start), shard, part)
                start = 0
            turn, first = turn + 1, 0
            yield Place(turn), None

    def _walk_shard(self, place: Place, shard: int, part: int) -> Iterator[tuple[Place, Row | str | None]]:
        try:
            for number, values in shard_rows(self.shards, shard, place.row):
                if number % self.parts == part:
                    yield from self._wanted(place, shard, number, values)
        except ValueError as error:
            if not self.skip:
                raise
            yield Place(place.turn, place.shard + 1), str(error)

    def _wanted(
        self, place: Place, shard: int, number: int, values: dict[str, Any]
    ) -> Iterator[tuple[Place, Row | str]]:
        """A row, if it is of this split and wished for."""
        name, key, behind = self.shards.names[shard], values.get(KEY), replace(place, row=number + 1)
        said = f"row {number} of the shard {name!r}" if key is None else f"{key!r} of the shard {name!r}"
        row = Row(values, self.number, shard, number, place.turn, said)
        try:
            if self.reader.wanted(row):
                yield behind, row
        except ValueError as error:
            if not self.skip:
                raise
            yield behind, str(error)

    def blocks(self, lane: int, place: Place) -> Iterator[tuple[Place, list[Row | str]]]:
        """A lane's rows in blocks, shuffled, each with the place where it begins. A block is of one pass.

        Raises:
            ValueError: what `walk` raises, and if there are no rows at all.
        """
        begin, rows, empty = replace(place, given=0), list[Row | str](), 0
        for behind, row in self.walk(lane, begin):
            if row is not None:
                rows.append(row)
                empty = 0
            if rows and (row is None or len(rows) == self.block):
                yield begin, self.shuffled(rows, lane, begin)
                begin, rows = behind, []
            elif row is None:
                begin, empty = behind, empty + 1
            if empty == EMPTY_PASSES:
                raise ValueError(f"no rows are left in {self.shards.names[0]!r} and its other shards: see data.where")

    def first_pass(self, lane: int) -> Iterator[Row | str]:
        """A lane's rows of the first pass, in their order.

        Raises:
            ValueError: what `walk` raises.
        """
        begin, rows = Place(), list[Row | str]()
        for behind, row in self.walk(lane, begin):
            if row is not None:
                rows.append(row)
            if row is None or len(rows) == self.block or self.seed is None:  # unshuffled, no row waits for others
                yield from self.shuffled(rows, lane, begin)
                begin, rows = behind, []
            if row is None:
                return

    def shuffled(self, rows: list[Row | str], lane: int, begin: Place) -> list[Row | str]:
        if self.seed is None:
            return rows
        place = (self.seed, self.number, lane, begin.turn, begin.shard, begin.row)
        return [rows[int(index)] for index in np.random.default_rng(place).permutation(len(rows))]


def shard_rows(shards: Shards, shard: int, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """A shard's rows with their numbers; a connection that breaks is made again, three times without a row between."""
    number, waits = start, list(WAITS)
    while True:
        try:
            for values in shards.rows(shard, number):
                yield number, values
                number, waits = number + 1, list(WAITS)
            return
        except UnreachableError:
            if not waits:
                raise
            time.sleep(waits.pop(0))


class Reading:
    """A lane's items of one source, from a place on.

    Args:
        source: the stream.
        lane: its number.
        place: where to begin.
        pool: decodes ahead, ``ahead`` rows at once; None decodes a row when it is asked for.

    Attributes:
        place: where the lane stands, behind the item that was given last.
    """

    def __init__(self, source: Source, lane: int, place: Place, pool: Executor | None, ahead: int):
        self.source, self.place, self._pool, self._ahead = source, place, pool, ahead if pool else 1
        self._rows = self._places(source.blocks(lane, place), place.given)
        self._feeder = None if pool is None else Ahead(self._rows, source.block)
        self._waiting: deque[tuple[Place, Callable[[], dict[str, Any] | str]]] = deque()

    def next(self) -> dict[str, Any]:
        """The next item; what had to be left out before it is named in its ``skipped``.

        Raises:
            ValueError: that names shard and key of what cannot be read.
        """
        skipped: list[str] = []
        while True:
            while len(self._waiting) < self._ahead:
                place, row = next(self._rows if self._feeder is None else self._feeder)
                self._waiting.append((place, self._decoded(row)))
            self.place, result = self._waiting.popleft()
            found = result()
            if not isinstance(found, str):
                return {**found, "skipped": [*found["skipped"], *skipped]}
            skipped.append(found)
            if len(skipped) > MAX_SKIPS:
                raise ValueError(f"{len(skipped)} rows in a row cannot be read, the last: {found}")

    def close(self) -> None:
        """End what reads ahead."""
        if self._feeder is not None:
            self._feeder.close()

    def wait(self, end: float) -> None:
        """After `close`, wait until it has ended, or until the monotonic clock shows ``end``."""
        if self._feeder is not None:
            self._feeder.wait(end)

    def _places(self, blocks: Iterator[tuple[Place, list[Row | str]]], given: int) -> Iterator[tuple[Place, Row | str]]:
        for begin, rows in blocks:
            for number, row in enumerate(rows[given:], given + 1):
                yield replace(begin, given=number), row
            given = 0

    def _decoded(self, row: Row | str) -> Callable[[], dict[str, Any] | str]:
        if isinstance(row, str):
            return lambda: row
        if self._pool is None:
            return lambda: self._item(row)
        future: Future[dict[str, Any] | str] = self._pool.submit(self._item, row)
        return future.result

    def _item(self, row: Row) -> dict[str, Any] | str:
        try:
            return self.source.reader.item(row)
        except ValueError as error:
            if not self.source.skip:
                raise
            return str(error)


class Lane:
    """A lane through several sources, of which each item's is drawn by weight.

    Args:
        number: of the lane.
        sources: the streams.
        weights: of the sources.
        seed: of the draws.
        state: of `state`, where to begin; None is the beginning.
        pool, ahead: see `Reading`.
    """

    def __init__(
        self,
        number: int,
        sources: list[Source],
        weights: list[float],
        seed: int,
        state: list[Any] | None = None,
        pool: Executor | None = None,
        ahead: int = 1,
    ):
        self.number, self.seed = number, seed
        self.shares = np.array(weights) / sum(weights)
        self.count: int = 0 if state is None else state[0]
        places = [(0, 0, 0, 0)] * len(sources) if state is None else state[1]
        pairs = zip(sources, places, strict=True)
        self.readings = [Reading(source, number, Place(*place), pool, ahead) for source, place in pairs]

    def next(self) -> dict[str, Any]:
        """The next item, see `Reading.next`."""
        chosen = 0
        if len(self.readings) > 1:
            rng = np.random.default_rng((self.seed, self.number, self.count))
            chosen = int(rng.choice(len(self.readings), p=self.shares))
        item = self.readings[chosen].next()
        self.count += 1
        return item

    def state(self) -> list[Any]:
        """Where the lane stands: how many items it gave, and its place in each source, as JSON has it."""
        return [self.count, [list(astuple(reading.place)) for reading in self.readings]]

    def close(self) -> None:
        for reading in self.readings:
            reading.close()

    def wait(self, end: float) -> None:
        """See `Reading.wait`."""
        for reading in self.readings:
            reading.wait(end)
