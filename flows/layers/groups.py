"""Tokens of a grid in two groups: a coupling block changes those of one by what it sees of the other."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = ("checkerboard", "halves")


def seen_group(grid: tuple[int, int], groups: str, swapped: bool, device: torch.device | None = None) -> Tensor:
    """Which row-major tokens pass unchanged and are seen, (T,) booleans; the others are changed.

    Args:
        grid: rows and columns of tokens.
        groups: "checkerboard" (the squares of one colour) or "halves" (the first half of the row-major tokens).
        swapped: the two groups change places.

    Raises:
        ValueError: for other groups.
    """
    rows, columns = grid
    if groups == "checkerboard":
        seen = (torch.arange(rows, device=device)[:, None] + torch.arange(columns, device=device)) % 2 == 0
        seen = seen.flatten()
    elif groups == "halves":
        seen = torch.arange(rows * columns, device=device) < (rows * columns + 1) // 2
    else:
        raise ValueError(f"groups must be one of {', '.join(GROUPS)}, got {groups!r}")
    return ~seen if swapped else seen
