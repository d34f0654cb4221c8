"""The fastest decoding method of each block on this device, found by trying: what "auto" means."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.flows.affine import at_least_float32
from tarflow.flows.decoding import BlockRun, Decoding
from tarflow.flows.fast_step import FastSteps
from tarflow.flows.guidance import Guidance
from tarflow.flows.jacobi import decode_jacobi
from tarflow.flows.order import reorder
from tarflow.flows.sequential import decode_sequential

FILE_NAME = "decoding.json"
#: Steps that are timed; the time of all follows from theirs.
TIMED_STEPS = 12
#: Segments that are tried, as parts of the sequence, and the fewest tokens worth a segment.
SEGMENT_PARTS, SHORTEST_SEGMENT = (1, 2, 4), 16
#: Another method must be faster than sequential decoding by this factor, so that a noisy clock does no harm.
MARGIN = 0.9


@dataclass(frozen=True)
class BlockChoice:
    """What was found for one block.

    Attributes:
        method, segment: as of `Decoding`; "parallel" where there is one pass and nothing to choose, whose time is all
            of the following.
        step_ms, sweep_ms: one sequential step; one parallel pass over all tokens.
        sweeps: passes that the fastest sweeping method needed; None if none was worth trying.
        sequential_ms, best_ms: the whole block, sequentially (estimated, or measured if that is less) and by the
            chosen method.
    """

    method: str
    segment: int | None
    step_ms: float
    sweep_ms: float
    sweeps: int | None
    sequential_ms: float
    best_ms: float


def clock(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.no_grad()
def calibrate(
    model: Any,
    z: Tensor,
    cond: Tensor | None,
    null_cond: Tensor | None,
    guidance: Guidance | None,
    tolerance: float,
    fast: FastSteps | None = None,
) -> list[BlockChoice]:
    """Try the methods on given noise, block after block from the deep one on; one choice for each of model.blocks.

    Args, conditions: as of `generate`.
    """
    tokens, grid = model.patchify(z)
    choices = []
    with torch.autocast(z.device.type, enabled=False):
        for block in reversed(model.blocks):
            ordered = at_least_float32(reorder(tokens, block.config.order))
            choice, ordered = calibrate_block(block, ordered, grid, cond, null_cond, guidance, tolerance, fast)
            choices.append(choice)
            tokens = reorder(ordered, block.config.order)
    return choices[::-1]


def calibrate_block(
    block: Any,
    z: Tensor,
    grid: tuple[int, int],
    cond: Tensor | None,
    null_cond: Tensor | None,
    guidance: Guidance | None,
    tolerance: float,
    fast: FastSteps | None = None,
) -> tuple[BlockChoice, Tensor]:
    """The choice for one block, and its inverse of ``z`` (B, T, C), in the block's order."""

    def new_run() -> BlockRun:
        return BlockRun(block, len(z), grid, cond, null_cond, guidance)

    def timed(function: Any) -> tuple[float, Any]:
        start = clock(z.device)
        result = function()
        return clock(z.device) - start, result

    if block.one_pass:
        row_major = reorder(z, block.config.order)
        seconds, (x, _) = timed(lambda: block.inverse(row_major, grid, cond, null_cond, guidance))
        whole = round(1e3 * seconds, 4)
        return BlockChoice("parallel", None, whole, whole, 1, whole, whole), reorder(x, block.config.order)
    run, count = new_run(), min(TIMED_STEPS, z.shape[1])
    base = run.cache.length

    def first_steps() -> None:
        run.cache.truncate(base)
        decode_sequential(run, z[:, :count], fast)

    step = min(timed(first_steps)[0] for _ in range(2)) / max(count - run.first, 1)
    sequential = step * (run.num_tokens - run.first)

    def sweep_once() -> None:
        run.cache.truncate(base)
        if run.num_tokens > run.first:
            run.parameters(z, run.first, run.num_tokens)

    sweep = min(timed(sweep_once)[0] for _ in range(2))
    best, best_time, best_sweeps, x = Decoding(), sequential, None, None
    for part in SEGMENT_PARTS:
        segment = -(-z.shape[1] // part)
        # A whole-sequence method needs at least three passes; segments cost at least as much together.
        if 3 * sweep > sequential or (part > 1 and segment < SHORTEST_SEGMENT):
            break
        decoding = Decoding("jacobi", tolerance) if part == 1 else Decoding("gs_jacobi", tolerance, segment)
        seconds, (x, _, sweeps) = timed(lambda decoding=decoding: decode_jacobi(new_run(), z, decoding))
        if seconds < MARGIN * sequential and seconds < best_time:
            best, best_time, best_sweeps = decoding, seconds, sweeps
        if seconds > 2 * sequential:
            break
    if best.method != "sequential":  # something may have disturbed the few steps: the whole decides
        sequential = min(sequential, timed(lambda: decode_sequential(new_run(), z, fast))[0])
        if best_time >= MARGIN * sequential:
            best, best_time = Decoding(), sequential
    if x is None:
        x, _ = decode_sequential(new_run(), z, fast)
    milliseconds = (round(1e3 * value, 4) for value in (step, sweep, sequential, best_time))
    step_ms, sweep_ms, sequential_ms, best_ms = milliseconds
    return BlockChoice(best.method, best.segment, step_ms, sweep_ms, best_sweeps, sequential_ms, best_ms), x


def decodings(choices: list[BlockChoice], tolerance: float) -> list[Decoding]:
    """What `generate` takes."""
    return [Decoding(choice.method, tolerance, choice.segment) for choice in choices]


def fingerprint(model: Any) -> str:
    """A short name of a model's settings and weights, from a few numbers of each tensor."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in model.config.items() if k[0] != "_"}, default=str).encode())
    for name, value in model.state_dict().items():
        numbers = value.flatten()[:: max(1, value.numel() // 64)][:64].float().cpu()
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()[:16]


def conditions_key(
    model: Any, batch: int, grid: tuple[int, int], guidance: Guidance | None, tolerance: float, fast: bool = False
) -> str:
    """What a calibration holds for: device, dtype, batch (to the next power of two), grid, guidance, tolerance, and
    whether steps are compiled."""
    device, dtype = model.device, str(model.dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name = f"cpu, {torch.get_num_threads()} threads"
    guided = guidance is not None and guidance.weight > 0
    bucket = 1 << max(0, batch - 1).bit_length()
    return (
        f"{name} | {dtype} | batch {bucket} | grid {grid[0]}x{grid[1]} | guided {guided} | tolerance {tolerance:g}"
        + (" | compiled" if fast else "")
    )


class CalibrationStore:
    """Calibrations of one model, in memory and, if there is a folder, in its ``decoding.json``.

    A file that is damaged, or of another model, is not used, and is replaced at the next calibration.
    """

    def __init__(self, folder: str | Path | None, model_fingerprint: str):
        self.path = Path(folder) / FILE_NAME if folder is not None and Path(folder).is_dir() else None
        self.fingerprint = model_fingerprint
        self.choices: dict[str, list[BlockChoice]] = self._read()

    def _read(self) -> dict[str, list[BlockChoice]]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["model"] != self.fingerprint:
                return {}
            choices = {
                key: [BlockChoice(**choice) for choice in blocks] for key, blocks in content["calibrations"].items()
            }
            for blocks in choices.values():
                decodings(blocks, 1.0)  # raises for a method or segment that does not exist
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return choices

    def put(self, key: str, choices: list[BlockChoice]) -> None:
        """Keep and, where that is possible, write."""
        self.choices[key] = choices
        if self.path is None:
            return
        content = {
            "model": self.fingerprint,
            "calibrations": {name: [asdict(choice) for choice in blocks] for name, blocks in self.choices.items()},
        }
        temporary = self.path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary.rename(self.path)
        except OSError:  # a folder that is read-only, or a full disk: the calibration is only a convenience
            temporary.unlink(missing_ok=True)
