"""Patches, and the orders of blocks."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import small_model

from tarflow.flows.layers.order import (
    ORDERS,
    PATCH_LAYOUTS,
    block_order,
    patchify,
    reorder,
    restore,
    unpatchify,
)
from tarflow.flows.layers.scattered import SCATTERED, coarse_to_fine, outward, scattered
from tarflow.training.flow.setup import check_shapes
from tarflow.training.flow.start import Start


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


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (1, 5), (8, 8), (7, 4)])
@pytest.mark.parametrize("order", ORDERS)
def test_an_order_has_each_token_once(order: str, grid: tuple[int, int]) -> None:
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    ordered = reorder(tokens, order, grid)
    assert torch.equal(restore(ordered, order, grid), tokens)
    first = {"reversed": -1, "outward": grid[0] // 4 * grid[1] + grid[1] // 4}.get(order, 0)
    assert torch.equal(ordered[:, 0], tokens[:, first])
    assert torch.equal(reorder(tokens[0], order, grid, dim=0), ordered[0])
    assert sorted(ordered.flatten().tolist()) == sorted(tokens.flatten().tolist())


def test_each_finer_grid_lies_between_the_coarser_ones() -> None:
    """All that was made before a spacing's groups is the grid of twice that spacing, whole."""
    order = coarse_to_fine((8, 8))
    assert order[:4] == [(0, 0), (4, 4), (0, 4), (4, 0)]
    for spacing in (1, 2, 4, 8):
        made = order[: (8 // spacing) ** 2]
        assert sorted(made) == [(row, column) for row in range(0, 8, spacing) for column in range(0, 8, spacing)]


def test_outward_each_token_has_a_neighbour_before_it_and_none_of_its_turn_beside_it() -> None:
    starts = [(2, 2), (6, 6), (2, 6), (6, 2)]
    made: list[tuple[int, int]] = []
    for row, column in outward((8, 8)):
        beside = [(row + down, column + right) in made for down, right in ((0, -1), (0, 1), (-1, 0), (1, 0))]
        assert any(beside) or (row, column) in starts
        made.append((row, column))
    assert made[:4] == starts and set(made[4:12]) == {(a + d, b) for a, b in starts for d in (-1, 1)}


def test_neighbours_in_a_field_need_fewer_sweeps_in_scattered_orders() -> None:
    """A Gaussian field whose covariance is exp(−distance / 2), with noise, drawn token by token: its exact conditionals
    are known, and each sweep is a product with what a token owes to those before it."""
    grid = (8, 8)
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
    covariance = torch.exp(-torch.cdist(place, place) / 2) + 0.09 * torch.eye(64)
    needed = {}
    for order in ORDERS:
        ordered = reorder(reorder(covariance, order, grid, dim=0), order, grid, dim=1)
        factor = torch.linalg.cholesky(ordered)  # x = factor · z
        scale = factor.diagonal()[:, None]
        ties = torch.eye(64) - scale * torch.linalg.inv(factor)  # x = scale · z + ties · x
        z = torch.randn(64, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = z
        for sweep in range(64):
            x = scale * z + ties @ x
            if (x - factor @ z).abs().max() < 1e-3:
                needed[order] = sweep + 1
                break
    assert needed["coarse_to_fine"] <= 9 and needed["outward"] <= 10
    assert min(needed["row_major"], needed["reversed"]) > 1.8 * needed["outward"]


def test_orders_alternate() -> None:
    assert [block_order(i, "row_major") for i in range(3)] == ["row_major", "reversed", "row_major"]
    assert [block_order(i, "reversed") for i in range(3)] == ["reversed", "row_major", "reversed"]
    with pytest.raises(ValueError, match="row_major, reversed, got 'spiral'"):
        block_order(0, "spiral")


@pytest.mark.parametrize("order", SCATTERED)
@pytest.mark.parametrize("conditioning", ["none", "class_prefix"])
def test_in_a_scattered_order_a_slot_has_the_rotary_position_of_its_token(conditioning: str, order: str) -> None:
    options = {"sample_size": 6, "patch_size": 1, "conditioning": conditioning, "num_classes": 2}
    tables = []
    for deep_order in (None, order):
        model = small_model(**options, deep_order=deep_order)
        labels = None if conditioning == "none" else torch.tensor([1])
        context = model.blocks[-1].context(model.condition(labels, None, 1), (6, 6))
        tables.append([part[context.prefix_length :] for part in context.rotation or ()])
        assert context.prefix_length == (conditioning != "none") and len(tables[-1]) == 2
    for plain, ordered in zip(*tables, strict=True):
        for slot, (row, column) in enumerate(scattered(order, (6, 6))):
            torch.testing.assert_close(ordered[slot], plain[6 * row + column])


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"deep_order": "coarse_to_fine"}, "flow.deep_order coarse_to_fine"),
        ({"positions": "learned"}, "flow.positions learned"),
        ({"learned_prior": True}, "flow.learned_prior true"),
    ],
)
def test_what_has_one_shape_is_named_where_data_has_several(setting: dict[str, object], name: str) -> None:
    check_shapes({"deep_order": None, "positions": "rotary", "learned_prior": False})
    with pytest.raises(ValueError, match=f"several shapes, .* a flow without {name}"):
        check_shapes(setting)


def test_a_pipeline_of_another_order_is_no_start() -> None:
    start = Start(SimpleNamespace(flow=small_model()), "runs/a")
    with pytest.raises(
        ValueError, match=r"flow.deep_order is coarse_to_fine, .*: give --flow.deep_order null, or --flow '{}'"
    ):
        start.flow_settings({"deep_order": "coarse_to_fine"})
