"""How fast each decoding method samples, how exactly, and how near to what the machine can do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarflow.benchmarks.published_sampler import generate_as_published
from tarflow.common.clock import clock
from tarflow.common.machine import copy_bandwidth, product_speed
from tarflow.flows.decoding.calibration import BlockChoice, calibrate, decodings
from tarflow.flows.decoding.fast_step import FastStep, FastSteps
from tarflow.flows.decoding.jacobi import decode_jacobi
from tarflow.flows.decoding.method import DEFAULT_TOLERANCE, FAST_TOLERANCE, Decoding, InversionState, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.decoding.step import DecodeStep
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.order import reorder, restore

#: In the order in which they are measured. "graphs" and "compiled" decode all blocks sequentially by `FastSteps`, replayed as
#: CUDA graphs there; "auto", "fast", "graphs auto" and "compiled auto" by what was calibrated, the last two with such steps.
METHODS = ("published", "sequential", "graphs", "compiled", "jacobi", "auto", "fast", "graphs auto", "compiled auto")
PLAIN = ("published", "sequential", "jacobi", "auto", "fast")


@dataclass(frozen=True)
class Speed:
    """One method at one batch size; times are medians over interleaved repeats.

    Attributes:
        seconds: of one batch; images_per_second follows.
        ratio: how many times faster than the published algorithm, the median over repeats of one after the other; None
            without it.
        step_ms: of one token in one block, on average.
        methods: what was used for each block, the one next to the data first.
        sweeps: of each block; None where it is decoded sequentially.
        residual_max, residual_mean: |f(x) − z| over the batch.
        difference: the largest difference to sequential decoding; None without it.
        cache_mb: the largest block's keys and values; peak_mb: of the device's memory, CUDA only.
        spread: seconds between the shortest and the longest repeat; timings: all of them.
    """

    method: str
    batch: int
    seconds: float
    images_per_second: float
    ratio: float | None
    step_ms: float
    methods: list[str]
    sweeps: list[int | None]
    residual_max: float
    residual_mean: float
    difference: float | None
    cache_mb: float
    peak_mb: float | None
    spread: float = 0.0
    timings: list[float] = field(default_factory=list)


@dataclass
class Way:
    """A method while it is measured: what it does with each block, what draws, and what was found."""

    plan: list[Decoding]
    draw: Callable[[], Tensor]
    sweeps: list[int | None]
    sample: Tensor | None = None
    residual: tuple[float, float] = (0.0, 0.0)
    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None


class Comparison:
    """All methods on the same noise, the same weights and conditions.

    Args:
        model: a `TARFlowModel`.
        batch: number of samples.
        cond, null: conditions as the blocks take them.
        guidance: None for none.
        limit: seconds for each calibration.

    Attributes:
        published_limit: seconds for the published algorithm, which ends with a TimeoutError then.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        cond: Tensor | None,
        null: Tensor | None,
        guidance: Guidance | None,
        limit: float = math.inf,
    ):
        self.model, self.batch, self.conditions, self.limit = model, batch, (cond, null, guidance), limit
        self.published_limit = math.inf
        size = model.config.sample_size
        noise = torch.randn(batch, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
        self.z = model.scale_noise(noise.to(model.device))
        self.grid = model.patchify(self.z)[1]
        caches = (InversionState(block, batch, self.grid, *self.conditions).cache for block in model.blocks)
        self.cache_mb = max(cache.keys_values.nbytes for cache in caches) / 2**20
        self.compiled: FastSteps | None = None
        self.graphs: FastSteps | None = None
        self.choices: list[BlockChoice] = []  # of the last calibration
        self.ways: dict[str, Way] = {}

    def prepare(self, name: str) -> Way:
        """A method's way: calibrated where it is to be, compiled and captured before the clock starts."""
        model, z, blocks = self.model, self.z, len(self.model.blocks)
        plan, steps = [Decoding()] * blocks, None
        sweeps: list[int | None] = [None] * blocks
        if name in ("compiled", "compiled auto"):
            steps = self.compiled = self.compiled or FastSteps()
        elif name in ("graphs", "graphs auto"):
            steps = self.graphs = self.graphs or FastSteps(None)
        if name in ("auto", "fast", "graphs auto", "compiled auto"):
            tolerance = FAST_TOLERANCE if name == "fast" else DEFAULT_TOLERANCE
            choices = self.choices = calibrate(model, z, *self.conditions, tolerance, steps, self.limit)
            plan, sweeps = decodings(choices, tolerance), [choice.sweeps for choice in choices]
        elif name == "jacobi":
            plan = [Decoding("jacobi")] * blocks
            sweeps = count_sweeps(model, z, plan, *self.conditions)

        def draw() -> Tensor:
            if name == "published":
                return generate_as_published(model, z, *self.conditions, limit=self.published_limit)
            return generate(model, z, *self.conditions, decoding=plan, fast=steps)[0]

        if name in ("graphs", "compiled"):
            draw()
        return Way(plan, draw, sweeps)

    def measure(self, name: str) -> None:
        """Draw once by a method, after it has been prepared, and remember the time."""
        way, device = self.ways[name], self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = clock(device)
        sample = way.draw()
        way.seconds.append(clock(device) - start)
        if device.type == "cuda":
            way.peak_mb = torch.cuda.max_memory_allocated() / 2**20
        if way.sample is None:
            way.sample = sample
            worst, mean = residual(self.model, sample, self.z, *self.conditions)
            way.residual = float(worst.max()), float(mean.mean())

    def rows(self) -> list[Speed]:
        """What has been measured so far."""
        return [self.row(name, way) for name, way in self.ways.items() if way.seconds]

    def row(self, name: str, way: Way) -> Speed:
        seconds, exact = statistics.median(way.seconds), self.ways.get("sequential")
        published = self.ways["published"].seconds if "published" in self.ways else []
        ratios = [slow / ours for slow, ours in zip(published, way.seconds, strict=False)]
        difference = None
        if exact is not None and exact.sample is not None and way.sample is not None:
            difference = float((way.sample - exact.sample).abs().max())
        return Speed(
            name,
            self.batch,
            seconds,
            self.batch / seconds,
            statistics.median(ratios) if ratios else None,
            1e3 * seconds / (self.grid[0] * self.grid[1] * len(self.model.blocks)),
            [f"{one.method} {one.segment}" if one.segment else one.method for one in way.plan],
            way.sweeps,
            *way.residual,
            difference,
            self.cache_mb,
            way.peak_mb,
            max(way.seconds) - min(way.seconds),
            list(way.seconds),
        )


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What is measured.

    Attributes:
        methods: some of `METHODS`.
        repeats: how often each is measured, in turns.
        deadline: of `time.perf_counter`; after it only the published and the sequential method are measured, once, and
            the others left out.
        report: called with all rows so far after each measurement.
    """

    methods: Sequence[str] = PLAIN
    repeats: int = 5
    deadline: float = math.inf
    report: Callable[[list[Speed]], None] = lambda rows: None


@torch.no_grad()
def compare(
    model: Any,
    batch: int,
    cond: Tensor | None,
    null: Tensor | None,
    guidance: Guidance | None,
    plan: SamplingPlan | None = None,
) -> list[Speed]:
    """Methods on the same noise, one after the other.

    Args:
        model, cond, null, guidance: as of `Comparison`.
        plan: what is measured; None is a `SamplingPlan` as it is.
    """
    plan = plan or SamplingPlan()
    comparison = Comparison(model, batch, cond, null, guidance)
    for repeat in range(plan.repeats):
        for name in (name for name in METHODS if name in plan.methods):
            needed = repeat == 0 and name in ("published", "sequential")
            if time.perf_counter() > plan.deadline and not needed:
                continue
            if repeat == 0:
                comparison.ways[name] = comparison.prepare(name)
            if name in comparison.ways:
                comparison.measure(name)
                plan.report(comparison.rows())
    return comparison.rows()


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
            x, _, count = decode_jacobi(run, reorder(tokens, block.config.order, grid).float(), decoding)
            tokens = restore(x, block.config.order, grid)
            sweeps.append(count)
    return sweeps[::-1]


@dataclass(frozen=True)
class Roofline:
    """What bounds a sequential step of one block.

    Attributes:
        step_ms: measured, the median of steps in the middle of the sequence, each of which is waited for.
        graph_ms: the same as a CUDA graph, replayed many times before waiting, with guidance and the affine map; None on
            other devices.
        bytes_ms: reading weights and cache once, at the measured bandwidth of a copy.
        flops_ms: the arithmetic, at the measured speed of a large matrix product.
        share: the larger of the two over the shortest measured time; 1 is the roof.
        bound: which of the two, "bandwidth" or "arithmetic".
    """

    block: int
    batch: int
    step_ms: float
    graph_ms: float | None
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
        inputs = run.doubled(torch.randn(batch, block.proj_in.in_features, device=device))
        times = []
        for _ in range(steps):
            run.cache.truncate(middle)
            start = clock(device)
            step(inputs)
            times.append(clock(device) - start)
        run.cache.truncate(run.context.prefix_length)
        graph_ms = graphed_step_ms(run, middle, steps) if device.type == "cuda" else None
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
        share = max(bytes_ms, flops_ms) / min(step_ms, graph_ms or step_ms)
        results.append(Roofline(index, batch, step_ms, graph_ms, bytes_ms, flops_ms, share, bound))
    return results


def graphed_step_ms(run: InversionState, middle: int, steps: int) -> float:
    """Milliseconds of a token as a CUDA graph, of several around the middle of the cache, one right after the other."""
    fast, times = FastSteps(None).get(run, torch.float32), []
    if not isinstance(fast, FastStep) or fast.graph is None:
        raise ValueError("this block's steps go through its modules, which are no graph")
    steps = min(steps, fast.num_tokens - fast.first)
    begin = min(middle - steps // 2, fast.prefix_length + fast.num_tokens - fast.first - steps)
    for _ in range(3):
        fast.position.fill_(max(fast.prefix_length, begin))
        start = clock(fast.position.device)
        for _ in range(steps):
            fast.graph.replay()
        times.append(clock(fast.position.device) - start)
    return 1e3 * min(times) / steps
