"""Checks of models that are worth doing on a GPU. Each returns what it found, or raises if that is outside its limits.

All take the device, whether to take a small model (to see that the check itself works), and the time by
`time.perf_counter` at which they stop by themselves with what they have.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from tarflow.benchmarks.memory import training_memory
from tarflow.benchmarks.random_models import random_inputs, random_model, shape_of
from tarflow.benchmarks.sampling import compare, roofline
from tarflow.benchmarks.training import (
    Run,
    best,
    compare_training,
    loss_differences,
    take_steps,
    with_shared_weights,
)
from tarflow.common.machine import product_speed, timed
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import Decoding, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel
from tarflow.flows.student import StudentModel

#: What small models, and checks that need no size, change of a configuration's model.
SMALL = {"layers_per_block": [1, 2], "width": 128, "sample_size": 8}
NAME = "starflow_imagenet256"
#: A student of 133 million parameters, as the best published one has.
STUDENT = {"num_layers": 18, "width": 768}
#: What utilization is a share of: TFLOP/s of an H200 in bfloat16.
PEAK_TFLOPS = 790
TARGETS = {"utilization": 0.45, "ratio": 1.5}


def require(condition: bool, results: dict[str, Any]) -> None:
    if not condition:
        raise AssertionError(f"outside its limits: {results}")


def time_is_up(deadline: float) -> bool:
    return time.perf_counter() > deadline


def noise_and_labels(model: TARFlowModel, batch: int) -> tuple[torch.Tensor, Any, Any]:
    noise = random_inputs(model, batch, 0, seed=1)["x"]
    labels = torch.arange(batch, device=model.device) % model.config.num_classes
    return noise, model.condition(labels, None, batch), model.condition(None, None, batch)


def check_against_cpu(device: str, small: bool, deadline: float) -> dict[str, float]:
    """Forward and guided sampling in float32 on the device and on the CPU."""
    model = random_model(NAME, "cpu", torch.float32, **SMALL)
    noise, cond, null = noise_and_labels(model, 3)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected_z, expected_log_det = model(noise, labels)
    expected, _ = generate(model, noise, cond, null, Guidance(1.5))
    model.to(device)
    with torch.no_grad():
        z, log_det = model(noise.to(device), labels.to(device))
    results = {"z": float((z.cpu() - expected_z).abs().max())}
    results["log_det"] = float((log_det.cpu() - expected_log_det).abs().max() / noise[0].numel())
    for decoding in (Decoding(), Decoding("jacobi"), Decoding("gs_jacobi", segment=16)):
        x, _ = generate(model, noise.to(device), cond.to(device), null.to(device), Guidance(1.5), decoding=decoding)
        results[decoding.method] = float((x.cpu() - expected).abs().max())
    require(max(results.values()) < 1e-3, results)
    return results


def check_fast_steps(device: str, small: bool, deadline: float) -> dict[str, float]:
    """Graphs and compiled steps give what eager ones give."""
    model = random_model(NAME, device, torch.float32, **SMALL)
    results = {}
    for backend in (None, "inductor"):
        steps = FastSteps(backend)
        for batch in (1, 4, 1):
            if results and time_is_up(deadline):
                continue
            noise, cond, null = noise_and_labels(model, batch)
            expected, _ = generate(model, noise, cond, null, Guidance(1.5))
            x, _ = generate(model, noise, cond, null, Guidance(1.5), fast=steps)
            results[f"{backend} {batch}"] = float((x - expected).abs().max())
    require(max(results.values()) < 1e-3, results)
    return results


def check_bfloat16(device: str, small: bool, deadline: float) -> dict[str, float]:
    """A bf16 network with float32 affine arithmetic: finite, and a residual of rounding only."""
    model = random_model(NAME, device, torch.bfloat16, **(SMALL if small else {}))
    noise, cond, null = noise_and_labels(model, 2)
    start = time.perf_counter()
    x, _ = generate(model, noise, cond, null, Guidance(1.0))
    worst, mean = residual(model, x, noise, cond, null, Guidance(1.0))
    results = {"seconds": time.perf_counter() - start, "residual_max": float(worst.max())}
    results["residual_mean"] = float(mean.mean())
    require(bool(x.isfinite().all()) and results["residual_mean"] < 0.05, results)
    return results


def check_compiled_training(device: str, small: bool, deadline: float) -> dict[str, Any]:
    """Compiled layers, alone and with checkpointing, train to the eager losses in float32."""
    model = random_model(NAME, device, torch.float32, **SMALL)
    losses: dict[str, float] = {}
    for variant in ("compiled", "compiled+layer", "compiled+block"):
        if losses and time_is_up(deadline):
            break
        rows = compare_training(model, 4, 0, {"float32": 1e12}, ("eager", variant), ("float32",), repeats=1, steps=2)
        losses[variant] = loss_differences(rows)["float32"]
    require(max(losses.values()) < 1e-4, losses)
    return losses


def check_memory(device: str, small: bool, deadline: float) -> dict[str, Any]:
    """The counted peak of a step against the measured one, in megabytes; on a CPU, of fake tensors against real."""
    arguments = {**shape_of(NAME).arguments, **(SMALL if small else {})}
    model = random_model(NAME, device, torch.float32, **(SMALL if small else {}))
    batch, results = 2 if small else 8, {}
    for mode in ("none", "layer", "block"):
        if results and time_is_up(deadline):
            break
        counted = training_memory(arguments, batch, mode=mode, device=device).peak / 2**20
        if device == "cuda":
            run = Run("eager", "bfloat16", with_shared_weights(model, "eager" if mode == "none" else mode))
            take_steps(run, random_inputs(model, batch, 0), 1, 1e-4)
            model.zero_grad()
            measured = run.peak_mb
        else:
            measured = training_memory(arguments, batch, mode=mode, device=device, fake=False).peak / 2**20
        results[mode] = {"counted_mb": counted, "measured_mb": measured, "ratio": counted / measured}
    require(all(0.9 < row["ratio"] < 1.1 for row in results.values()), results)
    return results


def check_training_speed(device: str, small: bool, deadline: float) -> dict[str, Any]:
    """The 1.4 B shape in bf16 at several batch sizes; whether the targets are reached is told, not required."""
    model = random_model(NAME, device, torch.float32, **(SMALL if small else {}))
    peak = product_speed(model.device, torch.bfloat16) if small else PEAK_TFLOPS * 1e12
    variants = ("published", "compiled", "eager", "compiled+layer")
    # The likely best batch comes first, for when time runs out.
    speeds = []
    for batch in (2,) if small else (32, 16, 64):
        speeds += compare_training(
            model, batch, 0, {"bfloat16": peak}, variants, ("bfloat16",), repeats=2, steps=2, deadline=deadline
        )
    fastest, differences = best(speeds), loss_differences(speeds)
    results: dict[str, Any] = {
        "peak_tflops": peak / 1e12,
        "loss_difference": differences.get("bfloat16"),
        "best": fastest and dataclasses.asdict(fastest),
        "speeds": [dataclasses.asdict(row) for row in speeds],
    }
    require(fastest is not None and differences["bfloat16"] < 0.05, results)
    for name, target in TARGETS.items():
        value = getattr(fastest, name)
        results[f"{name} of at least {target}"] = value is not None and value >= target
    return results


def check_sampling(device: str, small: bool, deadline: float) -> dict[str, Any]:
    """The benchmark: class-conditional 1.4 B shape, 1,024 tokens, guidance, bf16."""
    model = random_model(NAME, device, torch.bfloat16, **(SMALL if small else {}))
    results: dict[str, Any] = {}
    for batch in (1, 16):
        if time_is_up(deadline):
            break
        _, cond, null = noise_and_labels(model, batch)
        speeds = compare(model, batch, cond, null, Guidance(1.0), repeats=1, compiled=True, deadline=deadline)
        results[f"batch {batch}"] = [dataclasses.asdict(speed) for speed in speeds]
        rows = roofline(model, batch, cond, null, Guidance(1.0))
        results[f"roofline {batch}"] = [dataclasses.asdict(row) for row in rows]
    require(bool(results), {"batches": "no time for any"})
    return results


def check_student(device: str, small: bool, deadline: float) -> dict[str, Any]:
    """Compare a student's pass in float32 on the device and on the CPU. Then, in bf16 and without a decoder, measure
    how many times as many images per second it makes as guided sequential decoding of the 1.4 B shape."""
    model = random_model(NAME, device, torch.bfloat16, **(SMALL if small else {}))
    shared = {name: model.config[name] for name in ("in_channels", "sample_size", "patch_size", "num_classes")}
    torch.manual_seed(0)
    size = {"num_layers": 2, "width": 128} if small else STUDENT
    student = StudentModel(**shared, **size, conditioning="class_prefix", max_guidance_scale=3.0).eval()
    torch.nn.init.normal_(student.head[1].weight, std=0.02)
    noise, cond, null = noise_and_labels(model, 1)
    labels, guidance = torch.zeros(1, dtype=torch.long), Guidance(1.0)
    with torch.no_grad():
        expected = student(noise.cpu(), labels, guidance_weight=1.0)
        student.to(device)
        found = student(noise, labels.to(device), guidance_weight=1.0)
        results: dict[str, Any] = {"difference": float((found.cpu() - expected).abs().max())}
        require(results["difference"] < 1e-3, results)
        student.to(torch.bfloat16)
        steps = FastSteps(None) if device == "cuda" else None
        ways = {
            "flow": lambda: generate(model, noise, cond, null, guidance, fast=steps),
            "student": lambda: student(noise.to(torch.bfloat16), labels.to(device), guidance_weight=1.0),
        }
        if not time_is_up(deadline):
            results |= timed(ways, 1, 1, model.device)
    return results
