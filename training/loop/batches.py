"""Which pictures belong to which step: a pure function of the step, so that resuming is exact on any process count."""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import active_children
from threading import Timer
from typing import Any, Protocol, Self, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tarflow.common.command import sentence
from tarflow.data.images import collate
from tarflow.data.stream.ahead import Ahead
from tarflow.data.subset import evenly
from tarflow.training.loop.order import Shards, shuffled, stream_batches

#: Data sets longer than this are endless ones, gone through in their own order.
SHUFFLE_LIMIT = 2**30
#: Ends a reading process.
END = getattr(signal, "SIGUSR1", None)
#: Seconds that it may take to end by itself.
PATIENCE = 2.0


class Items(Protocol):
    """A data set: pictures, with what belongs to them, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class StepSampler(Sampler[list[int]]):
    """Batches of indices for one process, one for each forward pass: epoch after epoch, each in its own shuffled order.

    All passes of all processes in one step share one batch, of pictures of one shape. Where there are several shapes, a
    shape's last batch of an epoch is filled up with pictures from the epoch's beginning.

    Args:
        groups: indices of the pictures of each shape.
        batch_size: of one process in one pass.
        process, processes: this process and how many there are.
        accumulation: passes in one step.
        seed: of the orders.
        start, total: steps already done, and at which to stop.
        streams: what is gone through in an order of its own, see `stream_batches`; None mixes all pictures of a shape.
        window: shards that are mixed at a time there, 0 for all.
    """

    def __init__(
        self,
        groups: Sequence[range],
        batch_size: int,
        process: int,
        processes: int,
        accumulation: int,
        seed: int,
        start: int,
        total: int,
        streams: Sequence[Shards] | None = None,
        window: int = 0,
    ):
        self.streams, self.window = streams, window
        self.groups, self.batch_size, self.seed = [group for group in groups if len(group)], batch_size, seed
        self.process, self.processes, self.accumulation = process, processes, accumulation
        self.start, self.total = start, total

    def __len__(self) -> int:
        return (self.total - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.processes * self.accumulation
        if self.streams is not None:
            batches = stream_batches(self.streams, self.window, size, self.seed, self.start, self.total)
        else:
            batches = self._of_one_shape(size) if len(self.groups) == 1 else self._of_several_shapes(size)
        for batch in batches:
            for part in range(self.accumulation):
                first = (part * self.processes + self.process) * self.batch_size
                yield batch[first : first + self.batch_size]

    def _of_one_shape(self, size: int) -> Iterator[list[int]]:
        (group,) = self.groups
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.total):
            batch = []
            for position in range(step * size, (step + 1) * size):
                if len(group) > SHUFFLE_LIMIT:
                    batch.append(group[position % len(group)])
                    continue
                if position // len(group) != epoch:
                    epoch = position // len(group)
                    order = self._shuffled(len(group), epoch)
                batch.append(group[int(order[position % len(group)])])
            yield batch

    def _of_several_shapes(self, size: int) -> Iterator[list[int]]:
        counts = [-(-len(group) // size) for group in self.groups]
        epoch = -1
        batches: list[torch.Tensor] = []
        for step in range(self.start, self.total):
            if step // sum(counts) != epoch:
                epoch = step // sum(counts)
                batches = []
                for number, (group, count) in enumerate(zip(self.groups, counts, strict=True), start=1):
                    order = self._shuffled(len(group), epoch, number)
                    order = order.repeat(-(-count * size // len(group)))[: count * size] + group.start
                    batches += order.split(size)
                places = self._shuffled(len(batches), epoch)
            yield batches[int(places[step % sum(counts)])].tolist()

    def _shuffled(self, length: int, epoch: int, group: int = 0) -> torch.Tensor:
        return shuffled(length, self.seed, epoch, group)


class Announced(Sampler[list[int]]):
    """Batches of a sampler, of which a data set hears some pictures before they are needed: it fetches them meanwhile.

    Args:
        sampler: gives the batches of one process.
        images: what hears of them, by ``expect``.
        ahead: how many batches before.
    """

    def __init__(self, sampler: Sampler[list[int]], images: Any, ahead: int):
        self.sampler, self.images, self.ahead = sampler, images, ahead

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # a `StepSampler`

    def __iter__(self) -> Iterator[list[int]]:
        waiting: deque[list[int]] = deque()
        for batch in self.sampler:
            self.images.expect(batch)
            waiting.append(batch)
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting


def step_sampler(
    images: Items, batch_size: int, process: int, processes: int, accumulation: int, seed: int, start: int, total: int
) -> Sampler[list[int]]:
    """The batches of a process in a data set's own order, arguments as of `StepSampler`. Of data that is fetched from
    elsewhere what comes next is announced."""
    streams = getattr(images, "streams", None)
    window = getattr(images, "mixed", 0)
    if not window and getattr(images, "weights", None) is None:
        streams = None
    sampler = StepSampler(
        groups_of(images), batch_size, process, processes, accumulation, seed, start, total, streams, window
    )
    ahead = getattr(images, "ahead", 0)
    return Announced(sampler, images, ahead // (batch_size * processes)) if ahead else sampler


def groups_of(images: Items) -> Sequence[range]:
    """Indices of a data set's pictures of each shape; pictures that are not cached have one."""
    return getattr(images, "groups", [range(len(images))])


def train_loader(images: Items, workers: int, sampler: Sampler[list[int]], pin_memory: bool = False) -> DataLoader[Any]:
    return DataLoader(
        cast(Dataset[dict[str, Any]], images),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=follow_trainer,
    )


def follow_trainer(worker: int) -> None:
    """A scheduler's SIGTERM goes to all processes, and so does a terminal's Ctrl-C; the one that trains decides, and ends
    those that read."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if END is not None:
        signal.signal(END, lambda *_: os._exit(0))


class Reader(ABC):
    """Batches of a process, one after the other. As a context manager it ends what reads them, also after an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def __next__(self) -> dict[str, Any]:
        """The next batch."""

    @abstractmethod
    def close(self) -> None:
        """End what reads, within seconds."""


class BatchReader(Reader):
    """The batches of a process. As a context manager it ends the reading processes, also after an error: they ignore
    the SIGTERM by which Python would end them at exit, and Python would wait for them. Data that says how many
    ``batches_ahead`` it wants is read by a thread if no processes read it.

    Args:
        loader: of `train_loader`.
    """

    def __init__(self, loader: DataLoader[Any]):
        self._images = loader.dataset
        before = set(active_children())
        batches = iter(loader)
        ahead = 0 if loader.num_workers else getattr(self._images, "batches_ahead", 0)
        self._thread = Ahead(batches, ahead) if ahead else None
        self._batches = self._thread or batches
        self._readers = [process for process in active_children() if process not in before]

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            ValueError: if it cannot be read; reading processes give no other type back.
        """
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(sentence(error)) from error
        except Exception as error:
            kind = "" if str(error).startswith("Caught ") else f"{type(error).__name__}: "
            raise ValueError(f"the training data cannot be read: {kind}{sentence(error)}") from error

    def close(self) -> None:
        """End what reads, processes and threads, which may be in the middle of something, within seconds."""
        if self._thread is not None:
            self._thread.close()
            self._thread.wait(time.monotonic() + PATIENCE)
        if (close := getattr(self._images, "close", None)) is not None:
            close()
        if not self._readers:
            return
        timer = Timer(PATIENCE, self._end)
        timer.start()
        # The loader's own way, which has no public name, ends its threads too.
        with suppress(Exception):
            getattr(self._batches, "_shutdown_workers", self._end)()
        timer.cancel()
        self._end()
        for process in self._readers:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        self._readers = []

    def _end(self) -> None:
        for process in self._readers:
            if process.is_alive() and END is not None and process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, END)


def fixed_batches(images: Items, count: int, batch_size: int) -> list[list[int]]:
    """Indices of ``count`` pictures in batches of one shape, with each shape's share. They are spread evenly over the
    data, as folders are sorted by class; of endless data the first are taken. Data of many shards says itself where."""
    batches, total, spread = [], len(images), getattr(images, "spread", None)
    for group in groups_of(images):
        share = -(-min(count, total) * len(group) // total)
        if spread is not None:
            indices = spread(group, share)
        else:
            chosen = range(share) if len(group) > SHUFFLE_LIMIT else evenly(len(group), share)
            indices = [group[place] for place in chosen]
        batches += [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    return batches


def read_batch(images: Items, indices: Sequence[int]) -> dict[str, Any]:
    """Some pictures as a batch."""
    return collate(read_items(images, indices))


def read_batches(images: Items, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Some pictures as batches of one size each, the largest first; of a cache those of one shape."""
    found = read_items(images, indices)
    if isinstance(found, dict):
        return [found]
    sizes: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for item in found:
        sizes.setdefault(tuple(item["image" if "image" in item else "latent_mean"].shape), []).append(item)
    return [collate(items) for items in sorted(sizes.values(), key=len, reverse=True)]


def read_items(images: Items, indices: Sequence[int]) -> list[dict[str, Any]] | dict[str, Any]:
    """Some pictures, or a batch of them where the data makes one."""
    read = getattr(images, "__getitems__", None)
    found: list[dict[str, Any]] | dict[str, Any] = [images[i] for i in indices] if read is None else read(indices)
    return found


def chosen(batch: dict[str, Any], name: str, flipped: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Pictures or cached latents of a batch (B, …) on a device or, where ``flipped`` (B,), those of the mirror images.

    Args:
        name: "image", "latent_mean" or "latent_std".
    """
    values: torch.Tensor = batch[name].to(device, non_blocking=True)
    if flipped is None:
        return values
    mirrored = values.flip(-1) if name == "image" else batch[f"{name}_flipped"].to(device, non_blocking=True)
    return torch.where(flipped[:, None, None, None], mirrored, values)
