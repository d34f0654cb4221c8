"""Patches as tokens, and the order in which a block goes through them."""

from __future__ import annotations

from torch import Tensor

ORDERS = ("row_major", "reversed")
PATCH_LAYOUTS = ("channel_first", "channel_last")


def block_order(index: int, first_order: str) -> str:
    """The order of block ``index`` (0 at the data): orders alternate, starting with ``first_order``."""
    if first_order not in ORDERS:
        raise ValueError(f"first_order must be one of {', '.join(ORDERS)}, got {first_order!r}")
    return ORDERS[(ORDERS.index(first_order) + index) % 2]


def reorder(tokens: Tensor, order: str, dim: int = 1) -> Tensor:
    """Row-major tokens into a block's order, or back: both are their own inverse."""
    return tokens.flip(dim) if order == "reversed" else tokens


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
