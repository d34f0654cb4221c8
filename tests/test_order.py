"""Patches, and the orders of blocks."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tarflow.flows.layers.order import PATCH_LAYOUTS, block_order, patchify, reorder, unpatchify


@pytest.mark.parametrize("layout", PATCH_LAYOUTS)
@pytest.mark.parametrize(("patch_size", "height", "width"), [(1, 3, 5), (2, 4, 6), (3, 3, 9)])
def test_unpatchify_undoes_patchify(layout: str, patch_size: int, height: int, width: int) -> None:
    x = torch.randn(2, 5, height, width)
    grid = (height // patch_size, width // patch_size)
    tokens = patchify(x, patch_size, layout)
    assert tokens.shape == (2, grid[0] * grid[1], 5 * patch_size**2)
    assert torch.equal(unpatchify(tokens, patch_size, layout, grid), x)


def test_every_number_is_where_the_layout_says() -> None:
    channels, p, rows, columns = 3, 2, 2, 3
    x = torch.arange(channels * rows * p * columns * p).reshape(1, channels, rows * p, columns * p)
    first, last = patchify(x, p, "channel_first"), patchify(x, p, "channel_last")
    places = product(range(rows), range(columns), range(channels), range(p), range(p))
    for row, column, channel, i, j in places:
        value = x[0, channel, row * p + i, column * p + j]
        assert first[0, row * columns + column, (channel * p + i) * p + j] == value
        assert last[0, row * columns + column, (i * p + j) * channels + channel] == value


@pytest.mark.parametrize("order", ["row_major", "reversed"])
def test_reordering_twice_changes_nothing(order: str) -> None:
    tokens = torch.randn(2, 6, 3)
    assert torch.equal(reorder(reorder(tokens, order), order), tokens)
    assert torch.equal(reorder(tokens, order)[:, 0], tokens[:, 0 if order == "row_major" else -1])
    assert torch.equal(reorder(tokens[0], order, dim=0), reorder(tokens, order)[0])


def test_orders_alternate() -> None:
    assert [block_order(i, "row_major") for i in range(3)] == ["row_major", "reversed", "row_major"]
    assert [block_order(i, "reversed") for i in range(3)] == ["reversed", "row_major", "reversed"]
    with pytest.raises(ValueError, match="row_major, reversed, got 'spiral'"):
        block_order(0, "spiral")
