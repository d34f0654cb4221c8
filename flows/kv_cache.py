"""Keys and values of the slots that a Transformer has already seen."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of all layers, (layers, B, kv heads, capacity, head_dim) each; keys are rotated.

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
        shape = (layers, batch_size, kv_heads, capacity, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new slots (B, kv heads, S, head_dim) of one layer; returns all its keys and values, old and new."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots, cannot hold {end}")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, slots: int) -> None:
        self.length += slots

    def truncate(self, length: int) -> None:
        """Forget all slots from ``length`` on."""
        self.length = length
