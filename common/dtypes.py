"""The process's default dtype, which libraries change while they build a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_default_dtype() -> Iterator[None]:
    """The default dtype afterwards as before: ``from_pretrained(torch_dtype=…)`` builds models under another one, and an
    error would leave that behind for all that is made later."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)
