"""Pairs of noise and data that a flow has made, kept so that the student sees each several times.

The flow's pass is the larger part of a student's step. A pair stays right as long as the flow does, which is not trained.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(kw_only=True)
class Conditioned:
    """Latents (B, C, h, w) of pictures with their conditions.

    Attributes:
        clean: without the training noise.
        labels: class indices (B,), or None.
        cond: encoded captions (B, L, E), or None.
        weight: guidance weights (B,).
    """

    clean: Tensor
    labels: Tensor | None
    cond: Tensor | None
    weight: Tensor


@dataclass(kw_only=True)
class Pictures(Conditioned):
    """A batch as the flow was trained on it; ``noisy`` are its latents with the training noise (B, C, h, w)."""

    noisy: Tensor


@dataclass(kw_only=True)
class Pairs(Conditioned):
    """What the flow makes of pictures: its ``states`` (B, S, C, h, w), the noise z, what comes before each block on the
    way back, and at last the latents with the training noise."""

    states: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, without those that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class KeptPairs:
    """The last pairs, up to ``size`` of them: a new one takes the place of the oldest."""

    def __init__(self, size: int):
        self.size, self.count = size, 0
        self.kept: dict[str, Tensor] = {}

    def add(self, pairs: Pairs) -> None:
        """Keep pairs, the last ``size`` if there are more."""
        given = {name: value[-self.size :] for name, value in pairs.tensors().items()}
        if not self.kept:
            self.kept = {name: value.new_empty(self.size, *value.shape[1:]) for name, value in given.items()}
        number = len(given["clean"])
        places = (torch.arange(number) + self.count) % self.size
        for name, value in given.items():
            self.kept[name][places.to(value.device)] = value
        self.count += number

    def among(self, pairs: Pairs, chances: Tensor) -> Pairs:
        """Pairs with kept ones behind them, one for each number in [0, 1) of ``chances`` (N,); as they are if none is
        kept."""
        if self.count == 0:
            return pairs
        places = (chances * min(self.count, self.size)).long()
        more = {name: torch.cat([value, self.kept[name][places]]) for name, value in pairs.tensors().items()}
        return replace(pairs, **more)

    def write(self, path: Path) -> None:
        """Write what is kept to a safetensors file."""
        filled = {name: value[: self.count].cpu().contiguous() for name, value in self.kept.items()}
        save_file({**filled, "count": torch.tensor(self.count)}, path)

    def read(self, path: Path, device: torch.device) -> None:
        """Read what another of this ``size`` wrote.

        Raises:
            OSError, SafetensorError, KeyError, RuntimeError: if it cannot be read.
        """
        filled = load_file(path)
        self.count = int(filled.pop("count"))
        self.kept = {}
        for name, value in filled.items():
            self.kept[name] = value.new_empty(self.size, *value.shape[1:], device=device)
            self.kept[name][: len(value)] = value
