"""Jacobi and Gauss–Seidel–Jacobi decoding: all tokens of a segment at once, swept until they stay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tarflow.flows.decoding.method import Decoding, InversionState
from tarflow.flows.layers.affine import affine_inverse
from tarflow.flows.layers.prepared import compute_dtype


class GaveUpError(Exception):
    """Raised where the sweeps took longer than the caller wanted to wait."""


#: The tolerance of all segments but the last, as a share of the given one: segments behind magnify what is left.
EARLIER_SEGMENTS = 0.1
#: The smallest change that sweeps of a network with such weights can be asked to end at. Below it rounding moves numbers
#: from sweep to sweep, so that the sweeps would go on until each token is exact: as many as there are tokens.
SMALLEST_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 1e-3}


def smallest_tolerance(run: InversionState) -> float:
    """The floor of tolerances for a block, by the dtype that its network computes in; 0 for float32 and float64."""
    return SMALLEST_TOLERANCES.get(compute_dtype(run.block.proj_in), 0.0)


def sweeps_between_checks(device: torch.device) -> int:
    """How many sweeps run before asking which samples are done; asking makes the host wait for an accelerator."""
    return 1 if device.type == "cpu" else 4


def decode_jacobi(
    run: InversionState, z: Tensor, decoding: Decoding, give_up: Callable[[], bool] | None = None
) -> tuple[Tensor, Tensor, int]:
    """Invert a block segment by segment.

    x ← z·σ(x) + μ(x) from x = z on; after k sweeps the first k tokens of a segment are exact. When no sample of the
    segment changes any more, a last pass writes the keys and values of its final tokens for the segments behind.

    Args:
        run: the block with an empty cache but for the prefix.
        z: tokens in the block's order (B, T, C), at least float32.
        decoding: tolerance (at least `smallest_tolerance`) and segment; method "jacobi" has one segment.
        give_up: asked each time that the device has finished its sweeps, whether to stop.

    Returns:
        x (B, T, C) and the log-scales (B, T, C) in the block's order, and the number of sweeps, last passes included.

    Raises:
        GaveUpError: if ``give_up`` said so.
    """
    tokens = run.num_tokens
    length = tokens if decoding.method == "jacobi" else min(decoding.segment or tokens, tokens)
    x, log_scales, sweeps = z.clone(), torch.zeros_like(z), 0
    for start in range(run.first, tokens, length):
        end = min(start + length, tokens)
        base = run.cache.length
        tolerance = max(decoding.tolerance * (EARLIER_SEGMENTS if end < tokens else 1), smallest_tolerance(run))
        sweeps += sweep_segment(run, z, x, log_scales, start, end, tolerance, give_up)
        if end < tokens:
            run.cache.truncate(base)
            run.parameters(x, start, end)
            sweeps += 1
    return x, log_scales, sweeps


def sweep_segment(
    run: InversionState,
    z: Tensor,
    x: Tensor,
    log_scales: Tensor,
    start: int,
    end: int,
    tolerance: float,
    give_up: Callable[[], bool] | None = None,
) -> int:
    """Sweep tokens start … end − 1 of ``x`` and ``log_scales`` in place; returns the number of sweeps.

    Samples that are done stop costing: when half of the batch is, the sweeps go on with the others alone.
    """
    every = sweeps_between_checks(z.device)
    base, sweeps, length = run.cache.length, 0, end - start
    samples = None  # indices of the samples that are swept; None: all
    part, current, target = run, x, z
    change = z.new_full((len(z),), torch.inf)
    while sweeps < length:
        for _ in range(min(every, length - sweeps)):
            part.cache.truncate(base)
            shift, log_scale = part.parameters(current, start, end)
            new = affine_inverse(target[:, start:end], shift, log_scale)
            before, change = change, (new - current[:, start:end]).abs().flatten(1).amax(1)  # (samples,)
            change = torch.where(change.isfinite(), change, torch.inf)
            if sweeps + 1 < length:
                # Far from the solution numbers may overflow; tokens behind exact ones recover from any finite value.
                new = torch.nan_to_num(new, posinf=0.0, neginf=0.0)
            current[:, start:end] = new
            sweeps += 1
        if samples is None:
            log_scales[:, start:end] = log_scale
        else:
            x[samples, start:end], log_scales[samples, start:end] = current[:, start:end], log_scale
        active = (change > tolerance) & (expected_change(before, change) > tolerance)
        left = int(active.sum())
        if give_up is not None and give_up():
            raise GaveUpError
        if left == 0:
            break
        if left <= len(change) // 2:
            samples = active.nonzero()[:, 0] if samples is None else samples[active]
            part, current, target, change = part.select(active), current[active], target[active], change[active]
    run.cache.truncate(base)
    return sweeps


def expected_change(before: Tensor, change: Tensor) -> Tensor:
    """The sum of all changes still to come, if they go on to shrink as in the last sweep; infinite if they do not
    shrink by half, or if there was no sweep before.

    Args:
        before, change: the largest change of each sample in the last sweep but one, and in the last, (B,).
    """
    rate = change / before
    return torch.where((rate < 0.5) & before.isfinite(), change * rate / (1 - rate), torch.inf)
