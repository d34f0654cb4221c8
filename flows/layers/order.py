"""Patches as tokens, and the order in which a block goes through them."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

#: Orders that alternate from block to block.
ALTERNATING = ("row_major", "reversed")
ORDERS = (*ALTERNATING, "coarse_to_fine")
#: How many tokens a slot holds from coarse to fine: the one before, and four neighbours.
HELD = 5
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
    return tokens.index_select(dim, places(grid, tokens.device)[0]) if order == "coarse_to_fine" else tokens


def restore(tokens: Tensor, order: str, grid: tuple[int, int], dim: int = 1) -> Tensor:
    """The inverse of `reorder`."""
    if order == "coarse_to_fine":
        return tokens.index_select(dim, places(grid, tokens.device)[1])
    return reorder(tokens, order, grid, dim)


@lru_cache
@torch.inference_mode(False)  # what is kept may be used with gradients later
def places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the order "coarse_to_fine": the row-major place of each token of the sequence, (T,), and the inverse."""
    order = torch.tensor([row * grid[1] + column for row, column in coarse_to_fine(grid)])
    return order.to(device), order.argsort().to(device)


def coarse_to_fine(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of a grid's tokens, from a coarse grid to finer ones.

    Of a grid of spacing 2·s, first the middles of its squares come, then those of their sides: then there is a grid of
    spacing s. A token's neighbours are mostly in other groups than its own, and in a group tokens are far apart. So a
    chain of tokens of which each depends much on the one before is about as long as there are groups, three for each
    spacing; in row-major order it is as long as a row and a column. Sweeps carry what a token is along such chains.
    """
    found = [(0, 0)]
    for spacing in (2**level for level in reversed(range((max(grid) - 1).bit_length()))):
        for first_row, first_column in ((spacing, spacing), (0, spacing), (spacing, 0)):
            rows, columns = range(first_row, grid[0], 2 * spacing), range(first_column, grid[1], 2 * spacing)
            found += itertools.product(rows, columns)
    return found


@lru_cache
def held_tokens(grid: tuple[int, int]) -> list[list[int]]:
    """Of the order "coarse_to_fine": which tokens of the sequence each token's slot holds, `HELD` of them; T where there is
    none.

    First the one before, as in other orders: so each token is in a slot that all behind it see. Then the nearest that
    were made before: left, right, above and below at the token's spacing, or at the corners of the square whose middle it
    is. The one before is far away, and without its neighbours a token is learned slowly.
    """
    order = coarse_to_fine(grid)
    place = {token: number for number, token in enumerate(order)}
    found = [[len(order)] * HELD]
    for number, (row, column) in enumerate(order[1:], start=1):
        spacing = (row | column) & -(row | column)  # the largest power of two that divides both
        middle = row & spacing and column & spacing
        steps = ((-1, -1), (-1, 1), (1, -1), (1, 1)) if middle else ((0, -1), (0, 1), (-1, 0), (1, 0))
        near = [place.get((row + spacing * down, column + spacing * right), len(order)) for down, right in steps]
        found.append([number - 1, *(token if token < number else len(order) for token in near)])
    return found


@lru_cache
@torch.inference_mode(False)
def held_places(grid: tuple[int, int], device: torch.device) -> Tensor:
    """`held_tokens` as a tensor (T, `HELD`)."""
    return torch.tensor(held_tokens(grid), device=device)


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
