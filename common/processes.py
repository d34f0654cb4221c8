"""One evaluation on several processes: each reads its share, all know the whole.

Without an initialised process group everything here is that of a single process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_and_count() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_main(function: Callable[[], Any]) -> Any:
    """Call ``function`` in the first process alone; all get its result, or all raise its error."""
    if process_and_count()[1] == 1:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = ValueError(str(error))
        except Exception as error:  # noqa: BLE001 (the others would wait for ever)
            outcome[1] = RuntimeError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(tensor: Tensor) -> list[Tensor]:
    """Every process's tensor, in the order of their numbers; all must have the same shape."""
    if process_and_count()[1] == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in the order of their numbers."""
    count = process_and_count()[1]
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values
