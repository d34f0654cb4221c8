"""Rotary positions, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from tarflow.flows.layers.positions import rotary_angles, rotary_angles_1d, rotate, rotation_tables


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("text", [0, 3, None])
def test_angles_are_the_formulas(grid: tuple[int, int], text: int | None) -> None:
    """``text`` is the number of prefix tokens, None for a model without a text axis."""
    head_dim, length = 32, 5
    angles = rotary_angles(grid, head_dim, length, text or 0, text is not None, dtype=torch.float64)
    m = head_dim // 2 - (0 if text is None else 8)
    expected = []
    for k in range(text or 0):
        expected.append([0.0] * m + [k / text * length * 10000 ** (-j / 8) for j in range(8)])
    for row in range(grid[0]):
        for column in range(grid[1]):
            unit = length / math.sqrt(grid[0] * grid[1])
            line = [row * unit * 10000 ** (-2 * i / m) for i in range(m // 2)]
            line += [column * unit * 10000 ** (-2 * i / m) for i in range(m // 2)]
            expected.append(line + ([] if text is None else [0.0] * 8))
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float64))


def test_angles_in_one_dimension() -> None:
    angles = rotary_angles_1d(5, 6, dtype=torch.float64)
    expected = [[slot * 10000 ** (-2 * i / 6) for i in range(3)] for slot in range(5)]
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float64))


def test_every_aspect_ratio_spans_the_same_area() -> None:
    for rows, columns in ((4, 4), (2, 8), (1, 16)):
        angles = rotary_angles((rows, columns), 32, 4, dtype=torch.float64)
        first = angles.reshape(rows, columns, 16)
        row_step = first[1, 0, 0] - first[0, 0, 0] if rows > 1 else torch.tensor(1.0)
        column_step = first[0, 1, 8] - first[0, 0, 8]
        assert row_step == pytest.approx(1.0)
        assert column_step == pytest.approx(1.0)


def test_rotation_turns_pairs() -> None:
    angles = torch.randn(3, 2, dtype=torch.float64)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    y = rotate(x, rotation_tables(angles))
    as_complex = torch.view_as_complex(x.reshape(2, 1, 3, 2, 2)) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(y, torch.view_as_real(as_complex).reshape(x.shape))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_products_depend_on_differences_of_positions() -> None:
    angles = rotary_angles((3, 3), 32, 3, dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    rotation = rotation_tables(angles)
    products = rotate(q.expand(1, 1, 9, 32), rotation)[0, 0] @ rotate(k.expand(1, 1, 9, 32), rotation)[0, 0].T
    torch.testing.assert_close(products[0, 4], products[4, 8])  # one row and one column on
    torch.testing.assert_close(products[0, 1], products[7, 8])  # one column on
    assert abs(products[0, 1] - products[0, 3]) > 1e-6


def test_the_dtype_of_what_is_rotated_stays() -> None:
    angles = rotary_angles_1d(3, 4)
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    assert rotate(x, rotation_tables(angles)).dtype == torch.bfloat16
