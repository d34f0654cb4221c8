"""Sequential decoding: token after token with a key/value cache, exact up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tarflow.flows.decoding.fast_step import FastStep, FastSteps
from tarflow.flows.decoding.method import InversionState
from tarflow.flows.decoding.step import decode_step
from tarflow.flows.layers.affine import affine_inverse

#: With fewer rows than this, a CPU's threads wait for each other longer than they compute.
ROWS_FOR_THREADS = 4


@contextmanager
def fitting_threads(rows: int, device: torch.device) -> Iterator[None]:
    """One thread for steps of few rows on a CPU; as before afterwards."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or rows >= ROWS_FOR_THREADS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decode_sequential(run: InversionState, z: Tensor, fast: FastSteps | None = None) -> tuple[Tensor, Tensor]:
    """Invert a block.

    Args:
        run: the block with an empty cache but for the prefix.
        z: tokens in the block's order (B, T, C), at least float32; fewer than all give the first tokens alone.
        fast: compiled steps to use, if any.

    Returns:
        x (B, T, C) and the log-scales (B, T, C) in the block's order.
    """
    step = decode_step(run.block, run.context, run.cache, run.temperature) if fast is None else fast.get(run, z.dtype)
    if isinstance(step, FastStep):
        return step.decode(run, z)
    targets = z.unbind(1)
    made: list[Tensor] = []
    log_scales: list[Tensor] = []
    if run.first > 0:  # token 0 passes unchanged
        made, log_scales = [targets[0]], [torch.zeros_like(targets[0])]
    with fitting_threads(len(run.doubled(targets[0])), z.device):
        for token in range(run.first, z.shape[1]):
            shift, log_scale = run.combined(step(run.doubled(run.next_inputs(made, z))), token)
            made.append(affine_inverse(targets[token], shift, log_scale))
            log_scales.append(log_scale)
    return torch.stack(made, dim=1), torch.stack(log_scales, dim=1)
