"""Seconds of a device: asynchronous ones are waited for."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
