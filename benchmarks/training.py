"""How fast each way of training is, against the published step, and against what the machine can do."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarflow.benchmarks.choices import PRECISIONS, VARIANTS
from tarflow.benchmarks.published_training import optimizer_as_published, step_as_published
from tarflow.benchmarks.random_models import random_inputs
from tarflow.common.clock import clock
from tarflow.flows.likelihood import flow_loss
from tarflow.flows.token_model import CHECKPOINTED


@dataclass(frozen=True)
class TrainingSpeed:
    """One variant in one precision at one batch size; times are medians over interleaved repeats.

    Attributes:
        precision: "float32", or "bfloat16" for float32 weights under autocast.
        step_ms: one step of the optimizer; images_per_second and tokens_per_second (of images) follow.
        ratio: how many times faster than the published step of the same precision, the median over repeats of one
            after the other; None without it.
        utilization: model FLOPs (`step_flops`) per second over the machine's peak.
        loss: of the last of ``steps`` steps from the same weights on the same batch; all variants take as many.
        peak_mb: of the device's memory, CUDA only.
        error: why there are no numbers: out of memory.
        timings: milliseconds of a step in each repeat.
    """

    variant: str
    precision: str
    batch: int
    step_ms: float | None = None
    images_per_second: float | None = None
    tokens_per_second: float | None = None
    ratio: float | None = None
    utilization: float | None = None
    loss: float | None = None
    steps: int | None = None
    peak_mb: float | None = None
    error: str | None = None
    timings: list[float] = field(default_factory=list)


@dataclass
class Run:
    """A variant in one precision while it is measured: a model of its own on the shared weights, and what was found."""

    variant: str
    precision: str
    model: Any
    seconds: list[float] = field(default_factory=list)
    loss: float | None = None
    peak_mb: float | None = None
    error: str | None = None


def step_flops(model: Any, batch: int, prefix_length: int) -> float:
    """Model FLOPs of one training step: what the mathematics needs, whatever an implementation does.

    A weight takes 6 per slot of the sequence that it is used in (2 forward, 4 backward); causal attention 6·S²·H·d per
    layer, half of what the full square would take. Norms, rotations and computing again count nothing.
    """
    tokens = (model.config.sample_size // model.config.patch_size) ** 2
    total = 0.0
    for block in model.blocks:
        length = 0
        if block.proj_cond is not None:
            length = 1 if block.config.conditioning == "class_prefix" else prefix_length
            total += 6 * length * block.proj_cond.weight.numel()
        slots = tokens + length
        for layer in block.layers:
            linears = (layer.attention.qkv, layer.attention.proj, layer.mlp.up, layer.mlp.down)
            total += 6 * slots * sum(linear.weight.numel() for linear in linears)
            total += 6 * slots**2 * block.config.transformer.num_heads * block.config.transformer.head_dim
        total += 6 * tokens * (block.proj_in.weight.numel() + block.proj_out.weight.numel())
    return batch * total


def with_shared_weights(model: Any, variant: str) -> Any:
    """The same parameters in a module of its own, compiled and checkpointed as the variant says.

    Raises:
        ValueError: if there is no such variant.
    """
    parts = variant.split("+")
    units = [part for part in parts if part in CHECKPOINTED]
    if set(parts) - {*VARIANTS, *units} or len(units) > 1:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}, and compiled+layer or +block")
    own = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    own.set_checkpointing(units[0] if units else "none")
    if "compiled" in parts:
        # Static shapes: blocks with and without a prefix are two graphs, and both are fast.
        own.compile_repeated_blocks(dynamic=False, fullgraph=True)
    return own


def step(
    model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor], bfloat16: bool, max_norm: float = 1.0
) -> Tensor:
    """One step of training as the trainer takes it; arguments as of `step_as_published`; returns the loss, detached."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        loss = flow_loss(*model(**inputs))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def take_steps(run: Run, inputs: dict[str, Tensor], steps: int, learning_rate: float) -> None:
    """One repeat: a new optimizer, a step that does not count, then ``steps`` that do; fills in the run."""
    model, device, bfloat16 = run.model, run.model.device, run.precision == "bfloat16"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if run.variant == "published":
        optimizer, one = optimizer_as_published(model, learning_rate), step_as_published
    else:
        optimizer, one = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4, fused=True), step
        optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    one(model, optimizer, inputs, bfloat16)
    start = clock(device)
    for _ in range(steps):
        loss = one(model, optimizer, inputs, bfloat16)
    run.seconds.append((clock(device) - start) / steps)
    if run.loss is None:
        run.loss = float(loss)
    if device.type == "cuda":
        run.peak_mb = torch.cuda.max_memory_allocated() / 2**20


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is measured.

    Attributes:
        variants, precisions: each of these with each of those.
        repeats: how often each is measured, in turns.
        steps: of a repeat, after one that does not count.
        deadline: of `time.perf_counter`; no repeat begins after it, and variants without one are left out.
        learning_rate: of these steps.
        report: called with all rows so far after each repeat of a variant.
    """

    variants: tuple[str, ...] = VARIANTS
    precisions: tuple[str, ...] = PRECISIONS
    repeats: int = 5
    steps: int = 3
    deadline: float = math.inf
    learning_rate: float = 1e-4
    report: Callable[[list[TrainingSpeed]], None] = lambda rows: None


def compare_training(
    model: Any,
    batch: int,
    prefix_length: int,
    peaks: dict[str, float],
    plan: TrainingPlan | None = None,
) -> list[TrainingSpeed]:
    """Variants in turn on the same batch and from the same weights; the model is trained.

    Args:
        model: a `TARFlowModel` in float32.
        prefix_length: tokens of the condition, see `random_inputs`.
        peaks: FLOP/s of the machine for each precision.
        plan: what is measured; None is a `TrainingPlan` as it is.
    """
    plan = plan or TrainingPlan()
    torch.compiler.reset()  # graphs of other batch sizes would count against the limit of recompilations
    inputs = random_inputs(model, batch, prefix_length)
    weights = host_copies(list(model.parameters()))
    runs = [
        Run(variant, precision, with_shared_weights(model, variant))
        for precision in plan.precisions
        for variant in plan.variants
    ]
    tokens = (model.config.sample_size // model.config.patch_size) ** 2
    flops = step_flops(model, batch, prefix_length)
    baselines = {run.precision: run.seconds for run in runs if run.variant == "published"}

    def rows() -> list[TrainingSpeed]:
        return [
            summary(run, batch, tokens, flops / peaks[run.precision], plan.steps + 1, baselines.get(run.precision, []))
            for run in runs
            if run.seconds or run.error
        ]

    for repeat in range(plan.repeats):
        for run in runs:
            if run.error is not None or time.perf_counter() > plan.deadline:
                continue
            if repeat == 0:
                with torch.no_grad():
                    for parameter, start in zip(model.parameters(), weights, strict=True):
                        parameter.copy_(start, non_blocking=True)
            try:
                take_steps(run, inputs, plan.steps, plan.learning_rate)
            except torch.OutOfMemoryError:
                run.error = "out of memory"
            model.zero_grad()
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            plan.report(rows())
    return rows()


def host_copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in the host's memory, of a GPU's tensors in pinned memory: brought once, and sent back at the bus's speed."""
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda") for tensor in tensors
    ]
    for copy_, tensor in zip(copies, tensors, strict=True):
        copy_.copy_(tensor.detach(), non_blocking=True)
    if tensors:
        clock(tensors[0].device)  # waits for the copies
    return copies


def summary(run: Run, batch: int, tokens: int, ideal: float, steps: int, baseline: list[float]) -> TrainingSpeed:
    """The row of a run; ``ideal`` is the seconds of a step at the machine's peak."""
    if run.error is not None:
        return TrainingSpeed(run.variant, run.precision, batch, error=run.error)
    seconds = statistics.median(run.seconds)
    ratios = [published / ours for published, ours in zip(baseline, run.seconds, strict=False)]
    return TrainingSpeed(
        run.variant,
        run.precision,
        batch,
        1e3 * seconds,
        batch / seconds,
        batch * tokens / seconds,
        statistics.median(ratios) if ratios else None,
        ideal / seconds,
        run.loss,
        steps,
        run.peak_mb,
        timings=[1e3 * one for one in run.seconds],
    )


def best(speeds: list[TrainingSpeed]) -> TrainingSpeed | None:
    """Ours with the most images per second."""
    ours = [speed for speed in speeds if speed.images_per_second is not None and speed.variant != "published"]
    return max(ours, key=lambda speed: speed.images_per_second or 0.0, default=None)


def loss_differences(speeds: list[TrainingSpeed]) -> dict[str, float]:
    """For each precision, the largest difference of a loss, relative if it is above 1, to the published float32 one of the same batch (or,
    without it, to the batch's first row)."""
    differences: dict[str, float] = {}
    for batch in sorted({speed.batch for speed in speeds}):
        rows = [speed for speed in speeds if speed.batch == batch and speed.loss is not None]
        rows.sort(key=lambda row: (row.precision != "float32", row.variant != "published"))
        losses = [(row.precision, row.loss) for row in rows if row.loss is not None]
        for precision, loss in losses:
            difference = abs(loss - losses[0][1]) / max(1.0, abs(losses[0][1]))  # losses may be near 0
            differences[precision] = max(differences.get(precision, 0.0), difference)
    return differences
