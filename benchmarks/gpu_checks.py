"""Checks of models that are worth doing on a GPU. Each returns what it found, or raises if that is outside its limits."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from tarflow.benchmarks.cards import largest_batch, training_batches, what_cards_can_do
from tarflow.benchmarks.memory import training_memory
from tarflow.benchmarks.random_models import random_inputs, random_model, shape_of
from tarflow.benchmarks.training import (
    Run,
    TrainingPlan,
    TrainingSpeed,
    best,
    compare_training,
    loss_differences,
    take_steps,
    with_shared_weights,
)
from tarflow.common.machine import copy_bandwidth, product_speed
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import Decoding, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel

#: What small models, and checks that need no size, change of a configuration's model.
SMALL = {"layers_per_block": [1, 2], "width": 128, "sample_size": 8}
NAME = "starflow_imagenet256"
#: What utilization is a share of: TFLOP/s of an H200 in bfloat16.
PEAK_TFLOPS = 790
TARGETS = {"utilization": 0.45, "ratio": 1.5}
#: Timings of each way.
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """What a check is asked to do.

    Attributes:
        device: where.
        small: a small model, to see that the check itself works.
        deadline: by `time.perf_counter`, when it stops by itself with what it has.
        tell: takes what was found so far, each time that there is more.
        data: an archive of captioned pictures for small trainings, or None for drawings.
    """

    device: str
    small: bool
    deadline: float
    tell: Callable[[dict[str, Any]], None] = lambda results: None
    data: str | None = None

    @property
    def over(self) -> bool:
        return time.perf_counter() > self.deadline


class LeftOutError(Exception):
    """Of a check that has nothing to work with here; says why."""


def free_memory() -> None:
    """Give back what is used no more. Models and their graphs can be in cycles, which only a collection finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require(condition: bool, results: dict[str, Any]) -> None:
    if not condition:
        raise AssertionError(f"outside its limits: {results}")


def memory_gib(device: str) -> float:
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def noise_and_labels(model: TARFlowModel, batch: int) -> tuple[torch.Tensor, Any, Any]:
    noise = random_inputs(model, batch, 0, seed=1)["x"]
    labels = torch.arange(batch, device=model.device) % model.config.num_classes
    return noise, model.condition(labels, None, batch), model.condition(None, None, batch)


def check_against_cpu(task: Task) -> dict[str, Any]:
    """Forward and guided sampling in float32 on the device and on the CPU."""
    model = random_model(NAME, "cpu", torch.float32, **SMALL)
    noise, cond, null = noise_and_labels(model, 3)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected_z, expected_log_det = model(noise, labels)
    expected, _ = generate(model, noise, cond, null, Guidance(1.5))
    model.to(task.device)
    with torch.no_grad():
        z, log_det = model(noise.to(task.device), labels.to(task.device))
    results = {"z": float((z.cpu() - expected_z).abs().max())}
    results["log_det"] = float((log_det.cpu() - expected_log_det).abs().max() / noise[0].numel())
    for decoding in (Decoding(), Decoding("jacobi"), Decoding("gs_jacobi", segment=16)):
        x, _ = generate(
            model, noise.to(task.device), cond.to(task.device), null.to(task.device), Guidance(1.5), decoding=decoding
        )
        results[decoding.method] = float((x.cpu() - expected).abs().max())
    require(max(results.values()) < 1e-3, results)
    return results


def check_fast_steps(task: Task) -> dict[str, Any]:
    """Graphs and compiled steps give what eager ones give, log-determinants too."""
    model = random_model(NAME, task.device, torch.float32, **SMALL)
    results: dict[str, Any] = {}
    for backend in (None, "inductor"):
        steps = FastSteps(backend)
        for batch in (1,) if task.small and backend else (1, 4, 1):
            if results and task.over:
                continue
            noise, cond, null = noise_and_labels(model, batch)
            expected, expected_log_det = generate(model, noise, cond, null, Guidance(1.5))
            x, log_det = generate(model, noise, cond, null, Guidance(1.5), fast=steps)
            name = f"{backend or 'graph'}, batch {batch}"
            results[name] = float((x - expected).abs().max())
            difference = float((log_det - expected_log_det).abs().max())
            results[f"{name}, log_det per dimension"] = difference / noise[0].numel()
            task.tell(results)
    require(max(results.values()) < 1e-3, results)
    return results


def check_bfloat16(task: Task) -> dict[str, Any]:
    """A bf16 network with float32 affine arithmetic: finite, and a residual of rounding only."""
    model = random_model(NAME, task.device, torch.bfloat16, **(SMALL if task.small else {}))
    noise, cond, null = noise_and_labels(model, 2)
    start = time.perf_counter()
    x, _ = generate(model, noise, cond, null, Guidance(1.0))
    worst, mean = residual(model, x, noise, cond, null, Guidance(1.0))
    results = {"seconds": time.perf_counter() - start, "residual_max": float(worst.max())}
    results["residual_mean"] = float(mean.mean())
    require(bool(x.isfinite().all()) and results["residual_mean"] < 0.05, results)
    return results


def check_compiled_training(task: Task) -> dict[str, Any]:
    """Compiled layers, alone and with checkpointing, train to the eager losses in float32."""
    model = random_model(NAME, task.device, torch.float32, **SMALL)
    losses: dict[str, float] = {}
    for variant in ("compiled",) if task.small else ("compiled", "compiled+layer", "compiled+block"):
        if losses and task.over:
            break
        plan = TrainingPlan(variants=("eager", variant), precisions=("float32",), repeats=1, steps=2)
        rows = compare_training(model, 4, 0, {"float32": 1e12}, plan)
        losses[variant] = loss_differences(rows)["float32"]
    require(max(losses.values()) < 1e-4, losses)
    return losses


def check_memory(task: Task) -> dict[str, Any]:
    """The counted peak of a step against the measured one, in megabytes; on a CPU, of fake tensors against real."""
    arguments = {**shape_of(NAME).arguments, **(SMALL if task.small else {})}
    model = random_model(NAME, task.device, torch.float32, **(SMALL if task.small else {}))
    batch = 2 if task.small else 8
    results: dict[str, Any] = {}
    if task.device == "cuda" and not task.small:
        batch = max(1, min(batch, largest_batch("none", memory_gib(task.device))))
    for mode in ("none", "layer", "block"):
        if results and task.over:
            break
        counted = training_memory(arguments, batch, mode=mode, device=task.device).peak / 2**20
        if task.device == "cuda":
            run = Run("eager", "bfloat16", with_shared_weights(model, "eager" if mode == "none" else mode))
            take_steps(run, random_inputs(model, batch, 0), 1, 1e-4)
            model.zero_grad()
            measured = run.peak_mb or float("nan")
        else:
            measured = training_memory(arguments, batch, mode=mode, device=task.device, fake=False).peak / 2**20
        results[mode] = {"counted_mb": counted, "measured_mb": measured, "ratio": counted / measured}
    require(all(0.9 < row["ratio"] < 1.1 for row in results.values()), results)
    return results


def check_training_speed(task: Task) -> dict[str, Any]:
    """The 1.4 B shape in bf16 at several batch sizes; whether the targets are reached is told, not required."""
    model = random_model(NAME, task.device, torch.float32, **(SMALL if task.small else {}))
    on_gpu = task.device == "cuda"
    peak = PEAK_TFLOPS * 1e12 if on_gpu and not task.small else product_speed(model.device, torch.bfloat16)
    memory = memory_gib(task.device) if on_gpu else 0.0
    results: dict[str, Any] = {"peak_tflops": peak / 1e12, "copy_tb_s": copy_bandwidth(model.device) / 1e12}
    results["product_tflops"] = product_speed(model.device, torch.bfloat16) / 1e12
    speeds: list[TrainingSpeed] = []
    for batch in (2,) if task.small else training_batches(memory):
        if speeds and task.over:
            break

        def told(rows: list[TrainingSpeed], earlier: tuple[TrainingSpeed, ...] = tuple(speeds)) -> None:
            task.tell({**results, "speeds": [dataclasses.asdict(row) for row in (*earlier, *rows)]})

        variants = ("published", "eager") if task.small else ("published", "compiled", "eager", "compiled+layer")
        plan = TrainingPlan(
            variants=variants, precisions=("bfloat16",), repeats=REPEATS, steps=2, deadline=task.deadline, report=told
        )
        speeds += compare_training(model, batch, 0, {"bfloat16": peak}, plan)
    fastest, differences = best(speeds), loss_differences(speeds)
    results |= {
        "loss_difference": differences.get("bfloat16"),
        "best": fastest and dataclasses.asdict(fastest),
        "speeds": [dataclasses.asdict(row) for row in speeds],
    }
    require(fastest is not None and differences["bfloat16"] < 0.05, results)
    for name, target in TARGETS.items():
        value = getattr(fastest, name)
        results[f"{name} of at least {target}"] = value is not None and value >= target
    return results


def check_cards(task: Task) -> dict[str, Any]:
    """What cards of some sizes can do with the 1.4 B shape, counted; and this one's memory."""
    results: dict[str, Any] = {"cards": what_cards_can_do()}
    if task.device == "cuda":
        memory = memory_gib(task.device)
        results |= {"memory_gib": memory, "training batches here": str(training_batches(memory))}
    return results
