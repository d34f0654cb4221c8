"""Orders in which shards of latents are gone through, each a pure function of the position: where all pictures are not
mixed at once, or caches have weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

#: Streams take turns in patterns of so many: shares are exact to one in so many.
PATTERN = 10_000


class Shards(Protocol):
    """What is gone through in an order of its own, see `tarflow.data.joining.Stream`."""

    @property
    def group(self) -> int: ...

    @property
    def share(self) -> float: ...

    @property
    def shards(self) -> list[range]: ...


def shuffled(length: int, seed: int, epoch: int, number: int = 0) -> Tensor:
    """The order of an epoch: a permutation (length,)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_009 + number)
    return torch.randperm(length, generator=generator)


class WindowOrder:
    """Endless passes over shards: in each, shards come in a shuffled order, so many at a time, and the items of these are
    shuffled. Nothing is as long as the data.

    Args:
        shards: items of each.
        window: how many shards at a time; 0 takes all.
        seed, number: of the orders.
    """

    def __init__(self, shards: Sequence[range], window: int, seed: int, number: int):
        self.shards, self.window, self.seed, self.number = shards, window or len(shards), seed, number
        self.length = sum(map(len, shards))
        self._epoch, self._order, self._starts = -1, torch.empty(0), [0]
        self._at, self._items = (-1, -1), torch.empty(0)

    def take(self, first: int, count: int) -> Tensor:
        """Items at positions ``first`` to ``first + count`` of the endless passes."""
        parts = []
        while count > 0:
            epoch, offset = divmod(first, self.length)
            window = self._window(epoch, offset)
            part = self._items_of(epoch, window)[offset - self._starts[window] :][:count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return torch.cat(parts)

    def _window(self, epoch: int, offset: int) -> int:
        """Number of the window of a place in an epoch."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self.shards), self.seed, epoch, self.number)
            ends = list(accumulate((len(self.shards[shard]) for shard in self._order.tolist()), initial=0))
            self._starts = ends[: -1 : self.window]
        return bisect_right(self._starts, offset) - 1

    def _items_of(self, epoch: int, window: int) -> Tensor:
        """The items of a window, shuffled."""
        if (epoch, window) != self._at:
            chosen = self._order[window * self.window :][: self.window].tolist()
            items = torch.cat([torch.arange(self.shards[shard].start, self.shards[shard].stop) for shard in chosen])
            # Orders of windows are drawn apart from those of shards.
            order = shuffled(len(items), self.seed + 1 + window, epoch, self.number + 500)
            self._at, self._items = (epoch, window), items[order]
        return self._items


class Turns:
    """Which stream each place of an endless sequence belongs to: in each `PATTERN` of places as many as is its share,
    shuffled.

    Args:
        shares: of the streams; each gets at least one place of a pattern.
        seed: of the patterns.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        self.seed = seed
        self.counts = counts_of(shares, PATTERN)
        self._base = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(self.counts))
        self._at, self._kinds, self._ranks = -1, torch.empty(0), torch.empty(0)

    def take(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Of ``count`` places from ``first`` on: the stream of each, and its number among those of its stream."""
        kinds, ranks = [], []
        while count > 0:
            pattern, offset = divmod(first, PATTERN)
            self._make(pattern)
            kinds.append(self._kinds[offset : offset + count])
            ranks.append(self._ranks[offset : offset + count] + pattern * torch.tensor(self.counts)[kinds[-1]])
            first, count = first + len(kinds[-1]), count - len(kinds[-1])
        return torch.cat(kinds), torch.cat(ranks)

    def _make(self, pattern: int) -> None:
        if pattern == self._at:
            return
        self._at, self._kinds = pattern, self._base[shuffled(PATTERN, self.seed, pattern, 997)]
        self._ranks = torch.empty_like(self._kinds)
        for kind in range(len(self.counts)):
            mine = self._kinds == kind
            self._ranks[mine] = torch.arange(int(mine.sum()))


def counts_of(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the ratios of the shares, of this sum, none of them 0: by largest remainders."""
    exact = [share / sum(shares) * total for share in shares]
    counts = [max(1, int(number)) for number in exact]
    while (rest := total - sum(counts)) != 0:
        step = 1 if rest > 0 else -1
        open_ones = [place for place, count in enumerate(counts) if count > 1 or step > 0]
        counts[max(open_ones, key=lambda place: step * (exact[place] - counts[place]))] += step
    return counts


def stream_batches(
    streams: Sequence[Shards], window: int, size: int, seed: int, start: int, total: int
) -> Iterator[list[int]]:
    """The items of each step from ``start`` to ``total``: a pure function of the step.

    Streams of one shape share each batch, picture by picture, by their shares; of several shapes each batch is of one
    stream, and as many batches as is its share. No picture of a stream comes again before all have come.

    Args:
        streams: with items.
        window: shards that are mixed at a time, see `WindowOrder`.
        size: of a batch, of all processes and passes.
        seed: of the orders.
        start, total: steps already done, and at which to stop.
    """
    orders = [WindowOrder(stream.shards, window, seed, number) for number, stream in enumerate(streams)]
    turns = Turns([stream.share for stream in streams], seed)
    one_shape = len({stream.group for stream in streams}) == 1
    for step in range(start, total):
        if len(orders) == 1:
            yield orders[0].take(step * size, size).tolist()
        elif not one_shape:
            kinds, ranks = turns.take(step, 1)
            yield orders[int(kinds)].take(int(ranks) * size, size).tolist()
        else:
            kinds, ranks = turns.take(step * size, size)
            batch = torch.empty(size, dtype=torch.int64)
            for kind in kinds.unique().tolist():
                mine = kinds == kind
                batch[mine] = orders[kind].take(int(ranks[mine][0]), int(mine.sum()))
            yield batch.tolist()
