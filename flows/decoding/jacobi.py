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
#: The same of tokens at the front that are swept no more while those behind them are.
FRONT_TOLERANCE = 0.1
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

    x ← z·σ(x) + μ(x) from x = z on; after k sweeps at least the first k tokens of a segment are exact, and are swept no
    more. When no sample of the segment changes any more, a last pass writes the keys and values of its final tokens for the segments behind.

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

    What is done stops costing: tokens at the front that are final in all samples (see `final_tokens`) are swept no more, and
    when half of the batch is done, the sweeps go on with the other samples alone.
    """
    every = sweeps_between_checks(z.device)
    base, sweeps, length = run.cache.length, 0, end - start
    front = start  # the first token that is still swept
    samples = None  # indices of the samples that are swept; None: all
    part, current, target = run, x, z
    change = z.new_full((len(z),), torch.inf)
    while sweeps < length:
        turns = min(every, length - sweeps)
        for _ in range(turns):
            part.cache.truncate(base + front - start)
            shift, log_scale = part.parameters(current, front, end)
            new = affine_inverse(target[:, front:end], shift, log_scale)
            moved = (new - current[:, front:end]).abs().amax(2)  # (samples, tokens)
            moved = torch.where(moved.isfinite(), moved, torch.inf)
            before, change = change, moved.amax(1)
            # Far from the solution numbers may overflow; tokens behind exact ones recover from any finite value.
            current[:, front:end] = torch.nan_to_num(new, posinf=0.0, neginf=0.0)
            sweeps += 1
        active = (change > tolerance) & (expected_change(before, change) > tolerance)
        final = final_tokens(moved, FRONT_TOLERANCE * tolerance)
        left, done = torch.stack([active.sum(), final]).tolist()  # waits for the device once
        done = min(max(done, turns), end - front)  # each sweep makes one more token exact
        if give_up is not None and give_up():
            raise GaveUpError
        current[:, front : front + done] = new[:, :done]  # final numbers as they are, also if they are not finite
        if samples is None:
            log_scales[:, front:end] = log_scale
        else:
            x[samples, front:end], log_scales[samples, front:end] = current[:, front:end], log_scale
        front += done
        if left == 0 or front >= end:
            break
        if left <= len(change) // 2:
            samples = active.nonzero()[:, 0] if samples is None else samples[active]
            part, current, target, change = part.select(active), current[active], target[active], change[active]
    run.cache.truncate(base)
    return sweeps


def final_tokens(moved: Tensor, tolerance: float) -> Tensor:
    """How many tokens at the front will not change any more, in any sample: an int64 scalar.

    Those that stayed, and one more: it was made from tokens that stayed. So the sweep's keys and values of all of them
    are final too.

    Args:
        moved: the largest change of each sample's tokens in the last sweep, (B, S); what stands before them is final.
        tolerance: of a change that counts as none.
    """
    return (moved.amax(0) <= tolerance).long().cumprod(0).sum() + 1


def expected_change(before: Tensor, change: Tensor) -> Tensor:
    """The sum of all changes still to come, if they go on to shrink as in the last sweep; infinite if they do not
    shrink by half, or if there was no sweep before.

    Args:
        before, change: the largest change of each sample in the last sweep but one, and in the last, (B,).
    """
    rate = change / before
    return torch.where((rate < 0.5) & before.isfinite(), change * rate / (1 - rate), torch.inf)
