"""The fastest decoding method of each block on this device, found by trying: what "auto" means."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.common.clock import clock
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.jacobi import GaveUpError, decode_jacobi
from tarflow.flows.decoding.method import Decoding, InversionState
from tarflow.flows.decoding.sequential import decode_sequential
from tarflow.flows.layers.affine import at_least_float32
from tarflow.flows.layers.block import Block, Flow
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.layers.prepared import at_hand, compute_device, compute_dtype, offload_group

#: Steps that are timed in each turn, and turns of steps and of a sweep; the time of all follows from the least.
TIMED_STEPS, TURNS = 12, 3
#: Segments that are tried, as parts of the sequence, and the fewest tokens worth a segment.
SEGMENT_PARTS, SHORTEST_SEGMENT = (1, 2, 4), 16
#: Another method must be faster than sequential decoding by this factor, each time that both decode the whole block
#: one after the other, so that a busy machine or a noisy clock does no harm.
MARGIN, COMPARISONS = 0.9, 3
#: Sweeps below which no method of sweeps ends.
FEWEST_SWEEPS = 3


@dataclass(frozen=True)
class BlockChoice:
    """What was found for one block.

    Attributes:
        method, segment: as of `Decoding`; "parallel" where there is one pass and nothing to choose, whose time is all
            of the following.
        step_ms, sweep_ms: one sequential step; one parallel pass over all tokens.
        sweeps: passes that the fastest sweeping method needed; None if none was worth trying.
        sequential_ms, best_ms: the whole block, sequentially (estimated by the steps, or measured where something else
            came near) and by the chosen method; the least of what was measured.
    """

    method: str
    segment: int | None
    step_ms: float
    sweep_ms: float
    sweeps: int | None
    sequential_ms: float
    best_ms: float


@torch.no_grad()
def calibrate(
    model: Flow,
    z: Tensor,
    cond: Condition,
    null_cond: Condition,
    guidance: Guidance | None,
    tolerance: float,
    fast: FastSteps | None = None,
    limit: float = math.inf,
) -> list[BlockChoice]:
    """Try the methods on given noise, block after block from the deep one on; one choice for each of model.blocks.

    Args, conditions: as of `generate`, and besides
        limit: seconds for all. A block that has used up its share is decoded sequentially if nothing has won by then;
            what is under way is ended, but for the sequential decoding that gives the next block its input.
    """
    tokens, grid = model.patchify(z)
    choices: list[BlockChoice] = []
    end = clock(z.device) + limit
    with torch.autocast(z.device.type, enabled=False):
        for block in reversed(model.blocks):
            ordered = at_least_float32(reorder(tokens, block.config.order, grid))
            now = clock(z.device)
            deadline = now + (end - now) / (len(model.blocks) - len(choices))
            own = None if guidance is None else guidance.of_block(not choices)
            trial = BlockTrial(block, ordered, grid, cond, null_cond, own, fast, deadline)
            with at_hand(block):
                choice, ordered = trial.one_pass() if block.one_pass else trial.choose(tolerance)
            choices.append(choice)
            tokens = restore(ordered, block.config.order, grid)
    return choices[::-1]


class BlockTrial:
    """One block's inverse of given noise by one method and another, and the time of each.

    Args:
        z: tokens in the block's order (B, T, C), at least float32.
        deadline: by `clock`, after which nothing is tried any more.
        others: as of `calibrate`.
    """

    def __init__(
        self,
        block: Block,
        z: Tensor,
        grid: tuple[int, int],
        cond: Condition,
        null_cond: Condition,
        guidance: Guidance | None,
        fast: FastSteps | None,
        deadline: float = math.inf,
    ):
        self.block, self.z, self.grid, self.fast, self.deadline = block, z, grid, fast, deadline
        self.conditions = (cond, null_cond, guidance)

    def new_run(self) -> InversionState:
        return InversionState(self.block, len(self.z), self.grid, *self.conditions)

    def timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds, and what the function gave."""
        start = clock(self.z.device)
        result = function()
        return 1e3 * (clock(self.z.device) - start), result

    def one_pass(self) -> tuple[BlockChoice, Tensor]:
        """Of a block that has but one way."""
        order, grid = self.block.config.order, self.grid
        whole, (x, _) = self.timed(lambda: self.block.inverse(restore(self.z, order, grid), grid, *self.conditions))
        whole = round(whole, 4)
        return BlockChoice("parallel", None, whole, whole, 1, whole, whole), reorder(x, order, grid)

    def sequential(self) -> tuple[float, Tensor]:
        """Milliseconds of the whole block, and its inverse."""
        milliseconds, (x, _) = self.timed(lambda: decode_sequential(self.new_run(), self.z, self.fast))
        return milliseconds, x

    def swept(self, decoding: Decoding, most: float) -> tuple[float, int] | None:
        """Milliseconds and sweeps of the whole block; None as soon as they are more than ``most`` milliseconds."""
        start = clock(self.z.device)

        def give_up() -> bool:
            now = clock(self.z.device)
            return 1e3 * (now - start) > most or now > self.deadline

        if start > self.deadline:
            return None
        try:
            milliseconds, (_, _, sweeps) = self.timed(lambda: decode_jacobi(self.new_run(), self.z, decoding, give_up))
        except GaveUpError:
            return None
        return (milliseconds, sweeps) if milliseconds <= most else None

    def probe(self) -> tuple[float, float]:
        """Milliseconds of a sequential step and of a sweep over all tokens, the least of turns."""
        run, count = self.new_run(), min(TIMED_STEPS, self.z.shape[1])
        base = run.cache.length
        steps: list[float] = []
        sweeps: list[float] = []

        def first_steps() -> None:
            run.cache.truncate(base)
            decode_sequential(run, self.z[:, :count], self.fast)

        def sweep() -> None:
            run.cache.truncate(base)
            if run.num_tokens > run.first:
                run.parameters(self.z, run.first, run.num_tokens)

        for _ in range(TURNS):
            steps.append(self.timed(first_steps)[0] / max(count - run.first, 1))
            sweeps.append(self.timed(sweep)[0])
        return min(steps), min(sweeps)

    def choose(self, tolerance: float) -> tuple[BlockChoice, Tensor]:
        """The choice, and the block's inverse of ``z`` (B, T, C).

        Methods of sweeps are tried once each, no longer than sequential decoding would take; then the fastest and
        sequential decoding take turns, and it must win each time, before the deadline.
        """
        step, sweep = self.probe()
        sequential = step * (self.z.shape[1] - self.new_run().first)
        best, best_time, best_sweeps, x = Decoding(), sequential, None, None
        for decoding in candidates(self.z.shape[1], tolerance) if FEWEST_SWEEPS * sweep < sequential else ():
            found = self.swept(decoding, min(MARGIN * sequential, best_time))
            if found is not None:
                best, (best_time, best_sweeps) = decoding, found
        measured: list[float] = []
        times = [best_time]
        while best.method != "sequential" and len(measured) < COMPARISONS:
            exact_time, x = self.sequential()
            measured.append(exact_time)
            found = self.swept(best, MARGIN * exact_time)
            if found is None:
                best, best_sweeps = Decoding(), None
            else:
                times.append(found[0])
        sequential = min(measured, default=sequential)
        best_time = sequential if best.method == "sequential" else min(times)
        x = self.sequential()[1] if x is None else x
        step, sweep, sequential, best_time = (round(value, 4) for value in (step, sweep, sequential, best_time))
        return BlockChoice(best.method, best.segment, step, sweep, best_sweeps, sequential, best_time), x


def candidates(tokens: int, tolerance: float) -> Iterator[Decoding]:
    """What is tried against sequential decoding of so many tokens."""
    for part in SEGMENT_PARTS:
        segment = -(-tokens // part)
        if part == 1:
            yield Decoding("jacobi", tolerance)
        elif segment >= SHORTEST_SEGMENT:
            yield Decoding("gs_jacobi", tolerance, segment)


def decodings(choices: list[BlockChoice], tolerance: float) -> list[Decoding]:
    """What `generate` takes."""
    return [Decoding(choice.method, tolerance, choice.segment) for choice in choices]


@lru_cache
def cpu_name() -> str:
    """The processor, as the system calls it, with the instructions that are used of it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def conditions_key(
    model: Flow, batch: int, grid: tuple[int, int], guidance: Guidance | None, tolerance: float, fast: bool = False
) -> str:
    """The conditions under which a calibration is valid: device and dtype of the computation, batch (rounded up to a
    power of two), grid, guidance, tolerance, whether steps are compiled, and whether weights are fetched for each
    use."""
    last = model.blocks[-1]
    device = compute_device(last.proj_in, last, model)
    dtype = str(compute_dtype(last.proj_in)).removeprefix("torch.")
    offloaded = any(offload_group(part) is not None for part in model.modules())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    active = guidance if guidance is not None and guidance.active else None
    temperature = None if active is None else active.temperature
    bucket = 1 << max(0, batch - 1).bit_length()
    return (
        f"{name} | {dtype} | batch {bucket} | grid {grid[0]}x{grid[1]} | guided {active is not None} | tolerance {tolerance:g}"
        + (f" | attention {temperature:g}" if temperature not in (None, 1) else "")
        + (" | deep block alone" if active is not None and active.blocks == "deep" else "")
        + (" | compiled" if fast else "")
        + (" | offloaded" if offloaded else "")
    )
