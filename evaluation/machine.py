"""What a machine is, and what it can do: the roofs that measured speeds are compared with."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from tarflow.flows.calibration import clock


def machine(device: torch.device) -> str:
    """What measured numbers belong to."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes read per second by a large copy; it reads and writes at once, so twice its size is moved."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_of(lambda: target.copy_(source), device)


def product_speed(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second of a large matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_of(lambda: a @ b, device)


def best_of(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The shortest time in seconds, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = clock(device)
        function()
        times.append(clock(device) - start)
    return min(times[1:])
