"""The process's default dtype, which libraries change while they build a model, and how exact float32 is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def kept_default_dtype() -> Iterator[None]:
    """Restore the default dtype at the end. ``from_pretrained(torch_dtype=…)`` changes it while it builds a model, and
    an error would leave it changed for everything that is made later."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def exact_convolutions() -> AbstractContextManager[None]:
    """Convolutions in float32 and by one algorithm. By default CUDA rounds their factors to ten bits, and may take another
    algorithm each time."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
