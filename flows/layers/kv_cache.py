"""Keys and values of the slots that a Transformer has already seen."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """What an attention layer writes to."""

    length: int

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new slots (B, kv heads, S, head_dim) of one layer; returns all its keys and values, old and new."""

    def advance(self, slots: int) -> None:
        """Count the slots that all layers have written."""


class KVCache:
    """Preallocated keys and values of all layers, (layers, B, 2, kv heads, capacity, head_dim); keys are rotated.

    The cache is an argument of a forward pass, which writes new slots behind the ``length`` old ones of each layer;
    `advance` then counts them.
    """

    def __init__(
        self,
        layers: int,
        batch_size: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (layers, batch_size, 2, kv_heads, capacity, head_dim)
        self.keys_values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys_values.shape[4]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new slots (B, kv heads, S, head_dim) of one layer; returns all its keys and values, old and new."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots, cannot hold {end}")
        self.keys_values[layer, :, 0, :, self.length : end] = keys
        self.keys_values[layer, :, 1, :, self.length : end] = values
        return self.keys_values[layer, :, 0, :, :end], self.keys_values[layer, :, 1, :, :end]

    def advance(self, slots: int) -> None:
        self.length += slots

    def truncate(self, length: int) -> None:
        """Forget all slots from ``length`` on."""
        self.length = length

    def select(self, rows: Tensor) -> KVCache:
        """A copy with some of the B rows."""
        other = copy.copy(self)
        other.keys_values = self.keys_values[:, rows]
        return other


class GrowingCache:
    """The same for passes with gradients, which cannot write in place: each new slot makes longer tensors.

    Args:
        layers: of the network.
    """

    def __init__(self, layers: int):
        self.keys_values: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.length = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As of `KVCache`."""
        old = self.keys_values[layer]
        if old is not None:
            keys, values = torch.cat([old[0], keys], dim=2), torch.cat([old[1], values], dim=2)
        self.keys_values[layer] = keys, values
        return keys, values

    def advance(self, slots: int) -> None:
        self.length += slots
