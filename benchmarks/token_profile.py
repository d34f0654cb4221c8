"""What a token of one block is made of: the profiler's table, for one screen.

A decode step is bound by memory. What its kernels take together, against what a token takes from one to the next, says
how much is lost between kernels; each kernel's share says what is worth joining.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tarflow.common.clock import clock
from tarflow.flows.decoding.fast_step import FastStep, FastSteps
from tarflow.flows.decoding.method import InversionState

#: Rows of the table, and characters of a name.
ROWS, NAME = 24, 72


@torch.no_grad()
def token_profile(run: InversionState, steps: FastSteps, tokens: int = 16, repeats: int = 3) -> dict[str, Any]:
    """Tokens in the middle of a sequence, one right after the other.

    Args:
        run: the block, with batch and guidance; its prefix is in its cache.
        steps: how tokens are made.
        tokens: that are profiled, and timed in each repeat.
        repeats: of the timing, without the profiler.

    Returns:
        "token_us" (the median), "timings_us", "kernels_us" (of all operations on the device, a token), "operations" (of
        them a token), "layers" (how the step computes them), "trials_ms" (of a token by the ways that were tried), and
        "table", text.

    Raises:
        ValueError: for a block whose tokens go through its modules.
    """
    fast = steps.get(run, torch.float32)
    if not isinstance(fast, FastStep):
        raise ValueError("this block's steps go through its modules, which cannot be profiled as one token")
    device, start = fast.position.device, fast.prefix_length + fast.num_tokens // 2
    one: Callable[[], None] = fast.function if fast.graph is None else fast.graph.replay

    def several() -> None:
        fast.position.fill_(min(start, fast.prefix_length + fast.num_tokens - tokens))
        for _ in range(tokens):
            one()

    several()
    timings = []
    for _ in range(repeats):
        begun = clock(device)
        several()
        timings.append(1e6 * (clock(device) - begun) / tokens)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        several()
        clock(device)
    rows = kernels(profiler, on_gpu)
    total = sum(microseconds for _, _, microseconds in rows) / tokens
    found = {
        "token_us": statistics.median(timings),
        "timings_us": timings,
        "kernels_us": total,
        "operations": sum(count for _, count, _ in rows) / tokens,
        "layers": fast.name,
        "trials_ms": fast.trials,
    }
    return {**found, "table": table(rows, tokens, total)}


def kernels(profiler: Any, on_gpu: bool) -> list[tuple[str, int, float]]:
    """Name, count and microseconds of what ran on the device (or, without one, on the CPU), the longest first."""
    rows = []
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0 and not (on_gpu and event.device_type == torch.autograd.DeviceType.CPU):
            rows.append((event.key, event.count, float(own)))
    return sorted(rows, key=lambda row: -row[2])


def table(rows: list[tuple[str, int, float]], tokens: int, total: float) -> str:
    """The longest operations: how often a token has each, its microseconds a token and each time, its share."""
    lines = [f"{'operation':<{NAME}} {'a token':>8} {'us a token':>11} {'us each':>8} {'share':>6}"]
    for name, count, microseconds in rows[:ROWS]:
        share = microseconds / tokens / total if total else 0.0
        lines.append(
            f"{name[:NAME]:<{NAME}} {count / tokens:>8.1f} {microseconds / tokens:>11.1f} {microseconds / count:>8.2f} {share:>6.1%}"
        )
    return "\n".join(lines)
