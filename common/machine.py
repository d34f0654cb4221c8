"""What a machine is, and what it can do: the roofs that measured speeds are compared with."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tarflow.common.clock import clock

#: Seconds of a turn: one call right after the other's would find none of its weights in the caches.
TURN = 0.3


def machine(device: torch.device) -> str:
    """What measured numbers belong to."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def copy_size(device: torch.device) -> int:
    """Bytes of a copy that takes long beside launching it and waiting for it: half a millisecond on a GPU of 8 TB/s."""
    return 2**31 if device.type == "cuda" else 2**28


def product_size(device: torch.device) -> int:
    """Rows of square matrices whose product takes long beside launching it and waiting for it: a millisecond."""
    return 8192 if device.type == "cuda" else 2048


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second of a large copy; it reads and writes at once, so twice its size is moved."""
    size = size or copy_size(device)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_of(lambda: target.copy_(source), device)


def product_speed(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = size or product_size(device)
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


def timed(ways: Mapping[str, Callable[[], Any]], batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Measure two ways in turns of at least `TURN` seconds, after one warm-up call each. Returns the medians of images
    per second, and the median "ratio" of the second's speed to the first's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            began, calls = clock(device), 0
            while calls == 0 or clock(device) - began < TURN:
                way()
                calls += 1
            seconds[name].append((clock(device) - began) / calls)
    first, second = seconds.values()
    ratio = statistics.median(slow / fast for slow, fast in zip(first, second, strict=True))
    return {**{name: batch / statistics.median(times) for name, times in seconds.items()}, "ratio": ratio}
