"""Checks of sampling on a GPU: how fast, what a token is made of, what calibration finds. As of `tarflow.benchmarks.gpu_checks`."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from tarflow.benchmarks.gpu_checks import NAME, REPEATS, SMALL, Task, noise_and_labels, require
from tarflow.benchmarks.random_models import random_model
from tarflow.benchmarks.sampling import Comparison, roofline
from tarflow.benchmarks.token_profile import token_profile
from tarflow.common.machine import timed
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import InversionState
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.student import StudentModel

#: A student of 133 million parameters, as the best published one has.
STUDENT = {"num_layers": 18, "width": 768}
#: Of a calibration here, at most.
CALIBRATION_SECONDS = 40.0
#: Of the published algorithm, at most: the host, which it waits for, has been slow enough for 36 seconds a picture.
PUBLISHED_SECONDS = 60.0
#: Ways of sampling in the order in which they are measured, each with a batch size; None is the roofline. What is compared
#: comes first, so that a call that is cut off has it; it takes the most time and is measured once. Ours are repeated, and
#: the eager steps come last.
COMPARED, OURS = (
    tuple((batch, name) for batch in (1, 16) for name in names)
    for names in (("compiled auto", "published"), ("compiled", "graphs", None))
)
AGAIN = tuple(way for way in (*COMPARED, *OURS) if way[1] not in ("published", None))
EAGER = ((1, "sequential"), (16, "sequential"))
#: What is measured of small models.
SMALL_WAYS = ("graphs", "compiled", None, "published", "sequential")


@torch.no_grad()
def check_sampling(task: Task) -> dict[str, Any]:
    """The benchmark: class-conditional 1.4 B shape, 1,024 tokens, guidance, bf16; methods in turn, ours again as long as
    there is time."""
    model = random_model(NAME, task.device, torch.bfloat16, **(SMALL if task.small else {}))
    comparisons: dict[int, Comparison] = {}
    results: dict[str, Any] = {}
    ways = [*COMPARED, *OURS, *(REPEATS - 1) * AGAIN, *EAGER]
    for batch, name in [(1, name) for name in SMALL_WAYS] if task.small else ways:
        if results and task.over:
            break
        _, cond, null = noise_and_labels(model, batch)
        if name is None:
            rows = roofline(model, batch, cond, null, Guidance(1.0))
            results[f"roofline {batch}"] = [dataclasses.asdict(row) for row in rows]
            continue
        if batch not in comparisons:
            comparisons[batch] = Comparison(model, batch, cond, null, Guidance(1.0))
        comparison, left = comparisons[batch], max(1.0, task.deadline - time.perf_counter())
        comparison.limit, comparison.published_limit = min(CALIBRATION_SECONDS, left / 2), min(PUBLISHED_SECONDS, left)
        if name not in comparison.ways:
            comparison.ways[name] = comparison.prepare(name)
        try:
            comparison.measure(name)
        except TimeoutError as error:
            results[f"{name} {batch}"] = str(error)
        results[f"batch {batch}"] = [dataclasses.asdict(row) for row in comparison.rows()]
        task.tell(results)
    return results


@torch.no_grad()
def check_calibration(task: Task) -> dict[str, Any]:
    """What "auto" chooses for each block of the 1.4 B shape with graphs, within its own limit of time, and what a batch
    takes then, beside graphs alone."""
    model = random_model(NAME, task.device, torch.bfloat16, **(SMALL if task.small else {}))
    results: dict[str, Any] = {}
    for batch in (1,) if task.small else (1, 16):
        if results and task.over:
            break
        _, cond, null = noise_and_labels(model, batch)
        left = max(1.0, task.deadline - time.perf_counter())
        comparison = Comparison(model, batch, cond, null, Guidance(1.0), min(CALIBRATION_SECONDS, left / 2))
        start = time.perf_counter()
        for name in ("graphs", "graphs auto"):
            comparison.ways[name] = comparison.prepare(name)
        results[f"seconds to calibrate batch {batch}"] = time.perf_counter() - start
        results[f"blocks {batch}"] = [
            {"block": i, **dataclasses.asdict(row)} for i, row in enumerate(comparison.choices)
        ]
        task.tell(results)
        for _ in range(1 if task.small else REPEATS):
            for name in ("graphs", "graphs auto"):
                comparison.measure(name)
            results[f"batch {batch}"] = [dataclasses.asdict(row) for row in comparison.rows()]
            task.tell(results)
    return results


def check_profile(task: Task) -> dict[str, Any]:
    """What a token of the guided deep block, and of a shallow one, is made of: as a graph, and compiled. A table of each,
    for one screen."""
    model = random_model(NAME, task.device, torch.bfloat16, **(SMALL if task.small else {}))
    side = model.config.sample_size // model.config.patch_size
    results: dict[str, Any] = {}
    for backend in (None,) if task.small else (None, "inductor"):
        for batch in (1,) if task.small else (1, 16):
            _, cond, null = noise_and_labels(model, batch)
            for place, block in (("deep", model.blocks[-1]), ("shallow", model.blocks[0])):
                if results and task.over:
                    break
                with torch.no_grad():
                    run = InversionState(block, batch, (side, side), cond, null, Guidance(1.0))
                    found = token_profile(run, FastSteps(backend))
                name = f"{place}, batch {batch}, {backend or 'graph'}"
                results[f"{name}, table"] = found.pop("table")
                results[name] = found
                task.tell(results)
    return results


def check_student(task: Task) -> dict[str, Any]:
    """Compare a student's pass in float32 on the device and on the CPU. Then, in bf16 and without a decoder, measure
    how many times as many images per second it makes as guided sequential decoding of the 1.4 B shape."""
    model = random_model(NAME, task.device, torch.bfloat16, **(SMALL if task.small else {}))
    shared = {name: model.config[name] for name in ("in_channels", "sample_size", "patch_size", "num_classes")}
    torch.manual_seed(0)
    size = {"num_layers": 2, "width": 128} if task.small else STUDENT
    student = StudentModel(**shared, **size, conditioning="class_prefix", max_guidance_scale=3.0).eval()
    torch.nn.init.normal_(student.head[1].weight, std=0.02)
    noise, cond, null = noise_and_labels(model, 1)
    labels, guidance = torch.zeros(1, dtype=torch.long), Guidance(1.0)
    with torch.no_grad():
        expected = student(noise.cpu(), labels, guidance_weight=1.0)
        student.to(task.device)
        found = student(noise, labels.to(task.device), guidance_weight=1.0)
        results: dict[str, Any] = {"difference": float((found.cpu() - expected).abs().max())}
        require(results["difference"] < 1e-3, results)
        student.to(torch.bfloat16)
        steps = FastSteps(None) if task.device == "cuda" else None
        ways = {
            "flow": lambda: generate(model, noise, cond, null, guidance, fast=steps),
            "student": lambda: student(noise.to(torch.bfloat16), labels.to(task.device), guidance_weight=1.0),
        }
        if not task.over:
            results |= timed(ways, 1, REPEATS, model.device)
    return results
