"""What a set of pictures to be evaluated is."""

from __future__ import annotations

import abc
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tarflow.evaluation.images.conversions import notes_of

READERS = min(8, os.cpu_count() or 1)
#: What a picture is counted as that cannot be read, where that is allowed.
REPLACED = "unreadable and replaced by others"


class ImageSet(abc.ABC):
    """Pictures of one size, in a fixed order.

    Attributes:
        name: where they come from, for messages.
        size: height and width in pixels.
        conversions: what was done to how many of the pictures that the last `batches` read in this process.
    """

    def __init__(self, name: str, length: int, size: tuple[int, int]):
        self.name, self.size, self._length = name, size, length
        self.conversions: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._length

    def batches(self, batch_size: int, process: int = 0, processes: int = 1) -> Iterator[Tensor]:
        """Batches uint8 (B, 3, H, W) in order; of several processes each gets every ``processes``-th one.

        Raises:
            ValueError: that names a picture which cannot be read.
        """
        self.conversions = Counter()
        waiting: list[list[Future[Any]]] = []
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(process * batch_size, len(self), processes * batch_size):
                indices = range(first, min(first + batch_size, len(self)))
                waiting.append([pool.submit(self._read, index) for index in indices])
                if len(waiting) > 1:  # one batch is read ahead
                    yield self._stack(waiting.pop(0))
            for futures in waiting:
                yield self._stack(futures)

    def _stack(self, futures: list[Future[Any]]) -> Tensor:
        pictures = []
        for future in futures:
            picture, conversions = future.result()
            pictures.append(picture)
            self.conversions.update(conversions)
        return torch.stack(pictures)

    @property
    def notes(self) -> list[str]:
        """Sentences on what was done to the pictures that the last `batches` read."""
        return notes_of(self.conversions)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and content, and of how the pictures are fitted to a size."""
        digest = hashlib.sha256(repr((len(self), self.size)).encode())
        self._hash_content(digest)
        return digest.hexdigest()

    def indices(self) -> list[int]:
        """The number by which each picture's condition is known."""
        return list(range(len(self)))

    def _read(self, index: int) -> tuple[Tensor, list[str]]:
        """A picture (3, H, W), and what was done to it; of sets that are read picture by picture."""
        raise NotImplementedError

    @abc.abstractmethod
    def _hash_content(self, digest: Any) -> None:
        """Feed everything to a hash that decides what the pictures are."""
