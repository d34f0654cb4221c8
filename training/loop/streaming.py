"""Batches of a stream: which lanes a process reads, in which order, and how a run goes on with other processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.common.command import sentence
from tarflow.common.processes import gather_objects
from tarflow.data.folder import say_once
from tarflow.data.images import collate
from tarflow.data.stream.numbered import NumberedShards
from tarflow.data.stream.stream import USUAL_LANES, Stream
from tarflow.training.loop.batches import Reader
from tarflow.training.loop.reading import reading

#: A checkpoint's pictures that wait for others of their size, a file for each process.
WAITING = "stream_{}.pt"
#: Seconds that closing waits for threads.
PATIENCE = 5.0


@dataclass(frozen=True)
class Share:
    """How steps are divided among processes and passes.

    Attributes:
        batch_size: pictures of one process in one pass.
        process, processes: this process and how many there are.
        accumulation: passes in one step.
    """

    batch_size: int
    process: int
    processes: int
    accumulation: int

    @property
    def own(self) -> int:
        """Pictures of this process in one step."""
        return self.batch_size * self.accumulation

    def lanes(self, wanted: int | None) -> int:
        """How many lanes a new stream has: as wished, or so many that processes and passes share them evenly.

        Raises:
            ValueError: if there are fewer lanes than processes.
        """
        if wanted is None:
            units = self.processes * self.accumulation
            most = -(-USUAL_LANES // units)
            return units * max(number for number in range(1, most + 1) if self.batch_size % number == 0)
        if wanted < self.processes:
            raise ValueError(
                f"data.lanes is {wanted}, fewer than the {self.processes} processes: raise it, or leave it out"
            )
        return wanted

    def own_lanes(self, lanes: int) -> list[int]:
        """The lanes that this process reads."""
        return (
            sorted(set(self.order(lanes, 0))) if self._even(lanes) else list(range(self.process, lanes, self.processes))
        )

    def _even(self, lanes: int) -> bool:
        """Whether processes and passes share the lanes evenly."""
        unit, rest = divmod(self.own * self.processes, lanes)
        return not rest and unit > 0 and self.batch_size % unit == 0

    def order(self, lanes: int, step: int) -> list[int]:
        """The lane of each of this process's pictures of a step.

        Where processes and passes share the lanes evenly, each lane gives the same places of the step's batch whatever their
        numbers are. Otherwise lane i belongs to process i modulo their number, and a process takes one picture of each of
        its lanes in turn.
        """
        if self._even(lanes):
            unit = self.own * self.processes // lanes
            firsts = [(part * self.processes + self.process) * self.batch_size for part in range(self.accumulation)]
            return [place // unit for first in firsts for place in range(first, first + self.batch_size)]
        mine = self.own_lanes(lanes)
        return [mine[place % len(mine)] for place in range(step * self.own, (step + 1) * self.own)]


class StreamReader(Reader):
    """The batches of a process, one for each forward pass. As a context manager it ends the threads that read.

    Args:
        stream: the pictures.
        share: of this process.
        workers: threads that decode pictures; with 0 all is read when it is asked for.
        step: steps done.
        state: of `state` of all processes, None at the beginning.
        waiting: what waits for others of its size, see `read_waiting`.
        pinned: put batches into page-locked memory.

    Raises:
        ValueError: if the state is of another stream, or there are too few lanes.
    """

    def __init__(
        self,
        stream: Stream,
        share: Share,
        workers: int,
        step: int,
        state: dict[str, Any] | None = None,
        waiting: list[dict[str, Any]] | None = None,
        pinned: bool = False,
    ):
        self.stream, self.share, self.step, self.pinned = stream, share, step, pinned
        places = None if state is None else checked(state, waiting or [], stream, share)
        self.lanes = share.lanes(stream.config.lanes if places is None else len(places))
        for source in stream.sources(self.lanes) if share.process == 0 else ():
            if source.parts > 1 and not isinstance(source.shards, NumberedShards):
                shards = len(source.shards.names)
                say_once(
                    f"{source.shards.names[0]!r} and its other shards, {shards} in all, are read {source.parts} times in each "
                    f"pass, as there are {self.lanes} lanes: more shards are read once"
                )
        mine = share.own_lanes(self.lanes)
        self._pool = ThreadPoolExecutor(workers) if workers else None
        ahead = 2 * -(-share.own // len(mine)) + 1
        self._lanes = {
            number: stream.lane(number, self.lanes, places and places[number], self._pool, ahead) for number in mine
        }
        self.sizes = SizedBatches(stream, share, waiting or []) if len(stream.sizes) > 1 else None
        self._passes = self._batches()

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            ValueError: that names shard and key of what cannot be read.
        """
        try:
            batch = collate(next(self._passes))
        except (ValueError, RuntimeError):  # the second of processes that wait for each other
            raise
        except Exception as error:
            kind = type(error).__name__
            raise ValueError(f"the training data cannot be read: {kind}: {sentence(error)}") from error
        if self.pinned:
            batch = {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
        return batch

    def close(self) -> None:
        """End the threads; those in the middle of something are waited for, but not long: Python must not end before."""
        for lane in self._lanes.values():
            lane.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + PATIENCE
        for lane in self._lanes.values():
            lane.wait(end)

    def state(self) -> dict[str, Any]:
        """Where all processes' lanes stand, as JSON has it; every process calls this, between two steps."""
        places = {number: lane.state() for number, lane in self._lanes.items()}
        everyone = {number: state for found in gather_objects(places) for number, state in found.items()}
        lanes = [everyone[number] for number in range(self.lanes)]
        return {"identity": self.stream.identity, "lanes": lanes, "sizes": [list(size) for size in self.stream.sizes]}

    def write_waiting(self, folder: Path) -> None:
        """Write what waits for others of its size into a checkpoint's folder."""
        if self.sizes is not None:
            torch.save(self.sizes.state(), folder / WAITING.format(self.share.process))

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """The items of each pass."""
        while True:
            items = self._items() if self.sizes is None else self.sizes.next(self.step, self._items)
            for first in range(0, self.share.own, self.share.batch_size):
                if first + self.share.batch_size == self.share.own:
                    self.step += 1
                yield items[first : first + self.share.batch_size]

    def _items(self) -> list[dict[str, Any]]:
        """As many items as this process has in one step."""
        return [self._lanes[number].next() for number in self.share.order(self.lanes, self.step)]


class SizedBatches:
    """Pictures of several sizes in batches of one, the same on all processes: they wait until there are enough of theirs.

    Args:
        stream: of the pictures.
        share: of this process.
        waiting: states of all processes of a checkpoint.
    """

    def __init__(self, stream: Stream, share: Share, waiting: list[dict[str, Any]]):
        self.stream, self.share = stream, share
        #: Numbers of sizes of the steps to come.
        self.plan: list[int] = []
        if len(waiting) == share.processes:
            self.items = list(waiting[share.process]["items"])
            self.plan = list(waiting[share.process]["plan"])
        else:  # other processes: all that waited is dealt out anew
            self.items = [item for state in waiting for item in state["items"]][share.process :: share.processes]

    def next(self, step: int, read: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """This process's items of a step; every process calls this.

        Args:
            step: its number.
            read: gives further items, as many as a step takes.
        """
        own = self.share.own
        if not self.plan:
            while len(self.items) < 4 * own:
                self.items += read()
            counts = [sum(numbers) for numbers in zip(*gather_objects(self.counts()), strict=True)]
            self.plan = plan_sizes(counts, own * self.share.processes)
        size = self.stream.sizes[self.plan.pop(0)]
        while sum(size_of(item) == size for item in self.items) < own:
            self.items += read()
        taken = [item for item in self.items if size_of(item) == size][:own]
        chosen = {id(item) for item in taken}
        self.items = [item for item in self.items if id(item) not in chosen]
        return taken

    def counts(self) -> list[int]:
        """How many items wait, by size."""
        return [sum(size_of(item) == size for item in self.items) for size in self.stream.sizes]

    def state(self) -> dict[str, Any]:
        return {"items": self.items, "plan": self.plan}


def plan_sizes(counts: list[int], batch: int) -> list[int]:
    """Numbers of the sizes of the next steps: always the one of which most pictures wait, while there are enough; so none
    gathers without end.

    Args:
        counts: of the pictures that wait, by size.
        batch: pictures of a step.
    """
    left, plan = list(counts), list[int]()
    while not plan or max(left) >= batch:
        most = left.index(max(left))
        plan.append(most)
        left[most] -= batch
    return plan


def size_of(item: dict[str, Any]) -> tuple[int, int]:
    height, width = item["image"].shape[-2:]
    return int(height), int(width)


def read_waiting(checkpoint: Path) -> list[dict[str, Any]]:
    """What waited in each process when a checkpoint was written."""
    found: list[dict[str, Any]] = []
    while (path := checkpoint / WAITING.format(len(found))).is_file():
        with reading(path):
            found.append(torch.load(path, weights_only=True))
    return found


def checked(state: dict[str, Any], waiting: list[dict[str, Any]], stream: Stream, share: Share) -> list[list[Any]]:
    """The lanes' places of a checkpoint.

    Args:
        state: of `StreamReader.state`.
        waiting: see `read_waiting`.
        stream: of the run.
        share: of this process.

    Raises:
        ValueError: if they are of other shards, in another order, of other sizes, or too few.
    """
    if state["identity"] != stream.identity:
        raise ValueError(
            "the checkpoint is of another stream: its shards, weights, held-out rows, data.where, data.shuffle_buffer or "
            "seed were others; give the same, or start anew, a flow from its pipeline with --init_from"
        )
    check_sizes(state, waiting, stream)
    lanes, wanted = len(state["lanes"]), stream.config.lanes
    if wanted not in (None, lanes):
        raise ValueError(
            f"the checkpoint has {lanes} lanes, but data.lanes is {wanted}: set it to that, or leave it out"
        )
    if lanes < share.processes:
        raise ValueError(
            f"the checkpoint has {lanes} lanes, fewer than the {share.processes} processes: go on with at most {lanes}, or start "
            f"anew, a flow from its pipeline with --init_from"
        )
    places: list[list[Any]] = state["lanes"]
    return places


def check_sizes(state: dict[str, Any], waiting: list[dict[str, Any]], stream: Stream) -> None:
    """Refuse other sizes than a checkpoint's: pictures of those wait, and would be lost.

    Raises:
        ValueError: that names both.
    """
    here = {tuple(size) for size in stream.sizes}
    there = {size_of(item) for one in waiting for item in one["items"]}  # of checkpoints that do not tell
    if "sizes" in state:
        there, known = {tuple(size) for size in state["sizes"]}, state["sizes"] == [list(one) for one in stream.sizes]
    else:
        known = there <= here
    if not known:
        words = (", ".join(f"{height} × {width}" for height, width in sorted(sizes)) for sizes in (there, here))
        raise ValueError(
            "the checkpoint has pictures of {} (height × width), but data.aspect_ratios and data.image_size give {}: give the "
            "same in the same order, or start anew, a flow from its pipeline with --init_from".format(*words)
        )
