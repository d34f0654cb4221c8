"""Where to run."""

from __future__ import annotations

import torch


def best_device() -> str:
    """The string "cuda", "mps" or "cpu", the first that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
