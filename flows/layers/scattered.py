"""Orders that go over the grid from many places at once, so that few tokens depend on the one before.

Sweeps carry what a token is along chains of tokens of which each depends much on the one before. In row-major order such a
chain is as long as a row and a column; here it is a few tokens long. The token before is far away then, so a slot holds the
neighbours that were made before too: without them a token is learned slowly.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

#: Steps (down, right) to the neighbours that a slot holds: those nearest, and for "outward" all within two steps.
SIDES = ((0, -1), (0, 1), (-1, 0), (1, 0))
CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
WITHIN_TWO = (*SIDES, *CORNERS, (0, -2), (0, 2), (-2, 0), (2, 0))
#: How many tokens a slot holds: the one before, and neighbours.
HELD = {"coarse_to_fine": 1 + len(SIDES), "outward": 1 + len(WITHIN_TWO)}
SCATTERED = tuple(HELD)


def scattered(order: str, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of a grid's tokens in one of the orders `SCATTERED`."""
    return coarse_to_fine(grid) if order == "coarse_to_fine" else outward(grid)


def coarse_to_fine(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """From a coarse grid to finer ones.

    Of a grid of spacing 2·s, first the middles of its squares come, then those of their sides: then there is a grid of
    spacing s. A token's neighbours are mostly in other groups than its own, and in a group tokens are far apart. So a
    chain is about as long as there are groups, three for each spacing.
    """
    found = [(0, 0)]
    for spacing in (2**level for level in reversed(range((max(grid) - 1).bit_length()))):
        for first_row, first_column in ((spacing, spacing), (0, spacing), (spacing, 0)):
            rows, columns = range(first_row, grid[0], 2 * spacing), range(first_column, grid[1], 2 * spacing)
            found += itertools.product(rows, columns)
    return found


def outward(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Outward from the middles of the grid's four quarters, by the steps over rows and columns to the nearest of them.

    Of the tokens as many steps away, those an odd number of rows away come first: they are not beside each other. Nearly
    every token has a neighbour that is there already, and a chain is about twice as long as the way out.
    """
    (top, bottom), (left, right) = ((side // 4, 3 * side // 4) for side in grid)
    starts = ((top, left), (bottom, right), (top, right), (bottom, left))

    def turn(token: tuple[int, int]) -> tuple[int, ...]:
        away = [(abs(token[0] - row) + abs(token[1] - column), row, column) for row, column in starts]
        steps, row, _ = min(away)
        return (0, starts.index(token)) if steps == 0 else (steps, 1 - abs(token[0] - row) % 2, *token)

    return sorted(itertools.product(range(grid[0]), range(grid[1])), key=turn)


@lru_cache
def held_tokens(order: str, grid: tuple[int, int]) -> list[list[int]]:
    """Which tokens of the sequence each token's slot holds, as many as `HELD` says; T where there is none.

    First the one before, as in other orders: so each token is in a slot that all behind it see. Then those of the
    neighbours that were made before.
    """
    sequence = scattered(order, grid)
    number_of = {token: number for number, token in enumerate(sequence)}
    found = [[len(sequence)] * HELD[order]]
    for number, (row, column) in enumerate(sequence[1:], start=1):
        steps, spacing = neighbours(order, row, column)
        near = [number_of.get((row + spacing * down, column + spacing * right), number) for down, right in steps]
        found.append([number - 1, *(token if token < number else len(sequence) for token in near)])
    return found


def neighbours(order: str, row: int, column: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Steps to the neighbours of a token, and how long a step is.

    From coarse to fine it is the token's own spacing, and for the middle of a square its corners stand in for its sides.
    """
    if order == "outward":
        return WITHIN_TWO, 1
    spacing = (row | column) & -(row | column)  # the largest power of two that divides both
    return (CORNERS if row & spacing and column & spacing else SIDES), spacing
