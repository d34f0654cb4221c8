"""How fast each decoding method samples, how exactly, and how near to what the machine can do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.benchmarks.published_sampler import generate_as_published
from tarflow.common.clock import clock
from tarflow.common.machine import copy_bandwidth, product_speed
from tarflow.flows.decoding.calibration import calibrate, decodings
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.jacobi import decode_jacobi
from tarflow.flows.decoding.method import DEFAULT_TOLERANCE, FAST_TOLERANCE, Decoding, InversionState, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.decoding.step import DecodeStep
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.order import reorder

METHODS = ("published", "sequential", "jacobi", "auto", "fast", "compiled")


@dataclass(frozen=True)
class Speed:
    """One method at one batch size; times are medians over interleaved repeats.

    Attributes:
        seconds: of one batch; images_per_second follows.
        ratio: how many times faster than the published algorithm, the median over repeats of one after the other.
        step_ms: of one token in one block, on average.
        methods: what was used for each block, the one next to the data first.
        sweeps: of each block; None where it is decoded sequentially.
        residual_max, residual_mean: |f(x) − z| over the batch.
        difference: the largest difference to sequential decoding.
        cache_mb: the largest block's keys and values; peak_mb: of the device's memory, CUDA only.
    """

    method: str
    batch: int
    seconds: float
    images_per_second: float
    ratio: float
    step_ms: float
    methods: list[str]
    sweeps: list[int | None]
    residual_max: float
    residual_mean: float
    difference: float
    cache_mb: float
    peak_mb: float | None


@torch.no_grad()
def compare(
    model: Any,
    batch: int,
    cond: Tensor | None,
    null: Tensor | None,
    guidance: Guidance | None,
    repeats: int = 5,
    compiled: bool = False,
    deadline: float = math.inf,
) -> list[Speed]:
    """All methods on the same noise, one after the other, ``repeats`` times.

    Args:
        model: a `TARFlowModel`.
        cond, null: conditions as the blocks take them.
        guidance: None for none.
        compiled: also "auto" with compiled steps; they are compiled before the clock starts.
        deadline: of `time.perf_counter`; after it only the published and the sequential method are measured, once, and
            the others left out.
    """
    size = model.config.sample_size
    noise = torch.randn(batch, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    z = model.scale_noise(noise.to(model.device))
    grid = model.patchify(z)[1]
    plans: dict[str, list[Decoding]] = {
        "sequential": [Decoding()] * len(model.blocks),
        "jacobi": [Decoding("jacobi")] * len(model.blocks),
    }
    for name, tolerance in (("auto", DEFAULT_TOLERANCE), ("fast", FAST_TOLERANCE)):
        plans[name] = decodings(calibrate(model, z, cond, null, guidance, tolerance), tolerance)
    functions: dict[str, Callable[[], Tensor]] = {
        "published": lambda: generate_as_published(model, z, cond, null, guidance)
    }
    for name, plan in plans.items():
        functions[name] = lambda plan=plan: generate(model, z, cond, null, guidance, decoding=plan)[0]

    if compiled and time.perf_counter() < deadline:
        steps = FastSteps()
        choices = calibrate(model, z, cond, null, guidance, DEFAULT_TOLERANCE, steps)
        plan = plans["compiled"] = decodings(choices, DEFAULT_TOLERANCE)
        functions["compiled"] = lambda: generate(model, z, cond, null, guidance, decoding=plan, fast=steps)[0]

    times: dict[str, list[float]] = {name: [] for name in functions}
    samples, peaks = {}, {}
    for repeat in range(repeats):
        for name, function in functions.items():
            needed = repeat == 0 and name in ("published", "sequential")
            if not needed and time.perf_counter() > deadline:
                continue
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = clock(model.device)
            samples[name] = function()
            times[name].append(clock(model.device) - start)
            if model.device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    caches = [InversionState(block, batch, grid, cond, null, guidance).cache for block in model.blocks]
    cache_mb = max(cache.keys_values.nbytes for cache in caches) / 2**20
    del caches
    speeds = []
    for name, sample in samples.items():
        seconds = statistics.median(times[name])
        pairs = zip(times["published"], times[name], strict=False)
        worst, mean = residual(model, sample, z, cond, null, guidance)
        plan = plans.get(name, plans["sequential"])
        speeds.append(
            Speed(
                name,
                batch,
                seconds,
                batch / seconds,
                statistics.median(published / ours for published, ours in pairs),
                1e3 * seconds / (grid[0] * grid[1] * len(model.blocks)),
                [f"{one.method} {one.segment}" if one.segment else one.method for one in plan],
                count_sweeps(model, z, plan, cond, null, guidance),
                float(worst.max()),
                float(mean.mean()),
                float((sample - samples["sequential"]).abs().max()),
                cache_mb,
                peaks.get(name),
            )
        )
    return speeds


def count_sweeps(
    model: Any, z: Tensor, plan: list[Decoding], cond: Tensor | None, null: Tensor | None, guidance: Guidance | None
) -> list[int | None]:
    """Parallel passes of each block of ``model.blocks``; None where it is decoded sequentially."""
    if all(decoding.method == "sequential" for decoding in plan):
        return [None] * len(plan)
    tokens, grid = model.patchify(z)
    sweeps: list[int | None] = []
    for block, decoding in zip(reversed(model.blocks), reversed(plan), strict=True):
        if decoding.method == "sequential":
            sweeps.append(None)
            tokens, _ = block.inverse(tokens, grid, cond, null, guidance)
        else:
            run = InversionState(block, len(tokens), grid, cond, null, guidance)
            x, _, count = decode_jacobi(run, reorder(tokens, block.config.order).float(), decoding)
            tokens = reorder(x, block.config.order)
            sweeps.append(count)
    return sweeps[::-1]


@dataclass(frozen=True)
class Roofline:
    """What bounds a sequential step of one block.

    Attributes:
        step_ms: measured, the median of steps in the middle of the sequence.
        bytes_ms: reading weights and cache once, at the measured bandwidth of a copy.
        flops_ms: the arithmetic, at the measured speed of a large matrix product.
        share: the larger of the two over the measured time; 1 is the roof.
        bound: which of the two, "bandwidth" or "arithmetic".
    """

    block: int
    batch: int
    step_ms: float
    bytes_ms: float
    flops_ms: float
    share: float
    bound: str


@torch.no_grad()
def roofline(
    model: Any, batch: int, cond: Tensor | None, null: Tensor | None, guidance: Guidance | None, steps: int = 32
) -> list[Roofline]:
    """For each block, a step in the middle of the sequence against what it must read and compute."""
    device, dtype = model.device, model.dtype
    bandwidth, speed = copy_bandwidth(device), product_speed(device, dtype)
    side = model.config.sample_size // model.config.patch_size
    results = []
    for index, block in enumerate(model.blocks):
        run = InversionState(block, batch, (side, side), cond, null, guidance)
        step = DecodeStep(block, run.context, run.cache, run.temperature)
        middle = run.cache.length + run.num_tokens // 2
        inputs = run.doubled(torch.randn(batch, block.config.token_dim, device=device))
        times = []
        for _ in range(steps):
            run.cache.truncate(middle)
            start = clock(device)
            step(inputs)
            times.append(clock(device) - start)
        weights = sum(
            p.numel() for name, p in block.named_parameters() if not name.startswith(("pos", "class", "proj_c"))
        )
        rows = len(inputs)
        cached = run.cache.keys_values.nbytes * middle // run.cache.capacity
        read = weights * block.proj_in.weight.element_size() + cached
        attention = (
            4
            * rows
            * block.config.transformer.layers
            * block.config.transformer.num_heads
            * block.config.transformer.head_dim
            * middle
        )
        bytes_ms, flops_ms = 1e3 * read / bandwidth, 1e3 * (2 * rows * weights + attention) / speed
        step_ms = 1e3 * statistics.median(times)
        bound = "bandwidth" if bytes_ms > flops_ms else "arithmetic"
        results.append(Roofline(index, batch, step_ms, bytes_ms, flops_ms, max(bytes_ms, flops_ms) / step_ms, bound))
    return results
