"""Rotary positions on two spatial axes and a text axis.

Angles follow STARFlow: an image's tokens lie on row and column axes whose lengths depend on the aspect ratio but span
the same area at any size; prefix (condition) tokens lie on a third axis with eight frequencies. Positions belong to the
slots of a sequence, so they are the same for row-major and reversed order; from coarse to fine a slot has its token's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASE = 10000.0
TEXT_FREQUENCIES = 8

#: What `rotate` takes: cosines and signed sines of each number of a head, (S, d) both.
Rotation = tuple[Tensor, Tensor]


def rotary_angles(
    grid: tuple[int, int],
    head_dim: int,
    length: int,
    prefix_length: int = 0,
    text_axis: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Angles (L + T, head_dim / 2) of the prefix slots, then of the image slots.

    Args:
        grid: rows and columns of tokens, T = rows·columns.
        head_dim: even; head_dim/2, less 8 with a text axis, must be even and positive.
        length: side of the square grid that positions are scaled to.
        prefix_length: number L of prefix tokens; needs the text axis.
        text_axis: whether the model has one, even if this sequence has no prefix.
    """

    def numbers(count: int) -> Tensor:
        return torch.arange(count, device=device, dtype=dtype)

    rows, columns = grid
    spatial = head_dim // 2 - (TEXT_FREQUENCIES if text_axis else 0)
    frequencies = BASE ** (-2 * numbers(spatial // 2) / spatial)
    unit = length / math.sqrt(rows * columns)
    row = numbers(rows).repeat_interleave(columns) * unit
    column = numbers(columns).repeat(rows) * unit
    image = torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=1)  # (T, spatial)
    if not text_axis:
        return image
    image = torch.nn.functional.pad(image, (0, TEXT_FREQUENCIES))
    text_frequencies = BASE ** (-numbers(TEXT_FREQUENCIES) / TEXT_FREQUENCIES)
    text = numbers(prefix_length) / max(prefix_length, 1) * length
    prefix = torch.nn.functional.pad(text[:, None] * text_frequencies, (spatial, 0))
    return torch.cat([prefix, image])


def rotary_angles_1d(
    slots: int, head_dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Angles (slots, head_dim / 2) for a plain sequence, prefix included."""
    frequencies = BASE ** (-2 * torch.arange(head_dim // 2, device=device, dtype=dtype) / head_dim)
    return torch.arange(slots, device=device, dtype=dtype)[:, None] * frequencies


def rotation_tables(angles: Tensor) -> Rotation:
    """What `rotate` takes, from angles (S, d/2)."""
    cos, sin = angles.cos(), angles.sin()
    return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)


def slots_of(rotation: Rotation, start: int, end: int) -> Rotation:
    """The tables of some of the slots."""
    cos, sin = rotation
    return cos[start:end], sin[start:end]


def turns_of(cos: Tensor, sin: Tensor) -> Tensor:
    """cos + i·sin of each pair, (S, d/2), of the tables of `rotation_tables`: a pair (x₀, x₁) is rotated as x₀ + i·x₁."""
    return torch.complex(cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous())


def rotate(x: Tensor, tables: Rotation) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of the last axis: (x₀, x₁) → (x₀·cos − x₁·sin, x₁·cos + x₀·sin).

    Args:
        x: (B, heads, S, d).
        tables: of the S slots, see `rotation_tables`.
    """
    cos, sin = tables
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One product of complex numbers x₀ + i·x₁ takes a third of the time there; compilers do not take them.
        turns = turns_of(cos, sin)
        pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
