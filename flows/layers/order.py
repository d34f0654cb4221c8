"""Patches as tokens, and the order in which a block goes through them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tarflow.flows.layers.scattered import SCATTERED, held_tokens, scattered

#: Orders that alternate from block to block.
ALTERNATING = ("row_major", "reversed")
ORDERS = (*ALTERNATING, *SCATTERED)
PATCH_LAYOUTS = ("channel_first", "channel_last")


def block_order(index: int, first_order: str) -> str:
    """The order of block ``index`` (0 at the data): orders alternate, starting with ``first_order``."""
    if first_order not in ALTERNATING:
        raise ValueError(f"first_order must be one of {', '.join(ALTERNATING)}, got {first_order!r}")
    return ALTERNATING[(ALTERNATING.index(first_order) + index) % 2]


def reorder(tokens: Tensor, order: str, grid: tuple[int, int], dim: int = 1) -> Tensor:
    """Row-major tokens of a grid (rows, columns) into a block's order."""
    if order == "reversed":
        return tokens.flip(dim)
    return tokens.index_select(dim, places(order, grid, tokens.device)[0]) if order in SCATTERED else tokens


def restore(tokens: Tensor, order: str, grid: tuple[int, int], dim: int = 1) -> Tensor:
    """The inverse of `reorder`."""
    if order in SCATTERED:
        return tokens.index_select(dim, places(order, grid, tokens.device)[1])
    return reorder(tokens, order, grid, dim)


@lru_cache
@torch.inference_mode(False)  # what is kept may be used with gradients later
def places(order: str, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of one of `SCATTERED`: the row-major place of each token of the sequence, (T,), and the inverse."""
    sequence = torch.tensor([row * grid[1] + column for row, column in scattered(order, grid)])
    return sequence.to(device), sequence.argsort().to(device)


@lru_cache
@torch.inference_mode(False)
def held_places(order: str, grid: tuple[int, int], device: torch.device) -> Tensor:
    """`held_tokens` as a tensor (T, H)."""
    return torch.tensor(held_tokens(order, grid), device=device)


def patchify(x: Tensor, patch_size: int, layout: str) -> Tensor:
    """(B, C, H, W) → (B, T, C·p·p) in row-major order, T = H/p · W/p.

    Inside a token the numbers are ordered (channel, row, column) for "channel_first", which is TARFlow's layout, and
    (row, column, channel) for "channel_last", STARFlow's.
    """
    batch, channels, height, width = x.shape
    p, h, w = patch_size, height // patch_size, width // patch_size
    x = x.reshape(batch, channels, h, p, w, p)
    axes = (0, 2, 4, 1, 3, 5) if layout == "channel_first" else (0, 2, 4, 3, 5, 1)
    return x.permute(axes).reshape(batch, h * w, channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, layout: str, grid: tuple[int, int]) -> Tensor:
    """(B, T, C·p·p) → (B, C, H, W), the inverse of `patchify`; ``grid`` is (H/p, W/p)."""
    batch, (h, w), p = tokens.shape[0], grid, patch_size
    channels = tokens.shape[2] // (p * p)
    if layout == "channel_first":
        x = tokens.reshape(batch, h, w, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    else:
        x = tokens.reshape(batch, h, w, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, h * p, w * p)
