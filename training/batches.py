"""Which pictures belong to which step: a pure function of the step, so that resuming is exact on any process count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from tarflow.data.images import Images, collate

#: Data sets longer than this are endless ones, gone through in their own order.
SHUFFLE_LIMIT = 2**30


class StepSampler(Sampler[list[int]]):
    """Batches of indices for one process, from a forward pass on: epoch after epoch, each in its own shuffled order.

    Args:
        length: number of pictures.
        batch_size: of one process.
        process, processes: this process and how many there are.
        seed: of the orders.
        start: number of forward passes already done.
        total: number of forward passes at which to stop.
    """

    def __init__(
        self, length: int, batch_size: int, process: int, processes: int, seed: int, start: int = 0, total: int = 0
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.process, self.processes, self.start, self.total = process, processes, start, total

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for number in range(self.start, self.total):
            first = (number * self.processes + self.process) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                if self.length > SHUFFLE_LIMIT:
                    batch.append(position % self.length)
                    continue
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.length, generator=generator)
                batch.append(int(order[position % self.length]))
            yield batch


def train_loader(images: Images, batch_size: int, workers: int, sampler: StepSampler) -> DataLoader:
    return DataLoader(
        images, batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )


def fixed_batches(images: Images, count: int, batch_size: int) -> list[dict[str, Any]]:
    """The first ``count`` pictures as batches."""
    count = min(count, len(images))
    return [
        collate([images[i] for i in range(first, min(first + batch_size, count))])
        for first in range(0, count, batch_size)
    ]
