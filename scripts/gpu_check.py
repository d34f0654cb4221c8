"""All checks that need a GPU, within ten minutes: for whoever has one for that long.

    python scripts/gpu_check.py --output runs/gpu_check

It writes gpu_check.json and gpu_check.md: agreement with the CPU, bf16, CUDA graphs and compiled steps, a short training, and the sampling benchmark of the 1.4-billion-parameter shape with
guidance, with its share of the bandwidth roof. A check that fails or runs out of time is reported, not hidden; the exit
status is 1 if any did. ``--small`` takes a small model and any device, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow import TARFlowModel
from tarflow.evaluation.random_models import random_model
from tarflow.evaluation.sampling_speed import compare, roofline
from tarflow.flows.decoding import Decoding, residual
from tarflow.flows.fast_step import FastSteps
from tarflow.flows.guidance import Guidance
from tarflow.flows.sampling import generate
from tarflow.pipeline.device import best_device
from tarflow.training.arguments import parse_config
from tarflow.training.trainer import Trainer

#: What --small, and checks that need no size, change of a configuration's model.
SMALL = {"layers_per_block": [1, 2], "width": 128, "sample_size": 8}
NAME = "starflow_imagenet256"


def noise_and_labels(model: TARFlowModel, batch: int) -> tuple[torch.Tensor, Any, Any]:
    size = model.config.sample_size
    noise = torch.randn(batch, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(batch, device=model.device) % model.config.num_classes
    return noise.to(model.device), model.condition(labels, None, batch), model.condition(None, None, batch)


def check_against_cpu(device: str, small: bool) -> dict[str, float]:
    """Forward and guided sampling in float32 on the device and on the CPU."""
    model = random_model(NAME, "cpu", torch.float32, **SMALL)
    noise, cond, null = noise_and_labels(model, 3)
    labels = torch.tensor([0, 1, 2])
    expected_z, expected_log_det = model(noise, labels)
    expected, _ = generate(model, noise, cond, null, Guidance(1.5))
    model.to(device)
    z, log_det = model(noise.to(device), labels.to(device))
    results = {"z": float((z.cpu() - expected_z).abs().max())}
    results["log_det"] = float((log_det.cpu() - expected_log_det).abs().max() / noise[0].numel())
    for decoding in (Decoding(), Decoding("jacobi"), Decoding("gs_jacobi", segment=16)):
        x, _ = generate(model, noise.to(device), cond.to(device), null.to(device), Guidance(1.5), decoding=decoding)
        results[decoding.method] = float((x.cpu() - expected).abs().max())
    require(max(results.values()) < 1e-3, results)
    return results


def check_fast_steps(device: str, small: bool) -> dict[str, float]:
    """Graphs and compiled steps give what eager ones give."""
    model = random_model(NAME, device, torch.float32, **SMALL)
    results = {}
    for backend in (None, "inductor"):
        steps = FastSteps(backend)
        for batch in (1, 4, 1):
            noise, cond, null = noise_and_labels(model, batch)
            expected, _ = generate(model, noise, cond, null, Guidance(1.5))
            x, _ = generate(model, noise, cond, null, Guidance(1.5), fast=steps)
            results[f"{backend} {batch}"] = float((x - expected).abs().max())
    require(max(results.values()) < 1e-3, results)
    return results


def check_bfloat16(device: str, small: bool) -> dict[str, float]:
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


def check_training(device: str, small: bool) -> dict[str, float]:
    """Two hundred steps of the class quick start: the likelihood improves."""
    with tempfile.TemporaryDirectory() as folder:
        steps = ["--train.max_minutes", "null", "--log.trackers", "[]", "--output", f"{folder}/run"]
        base = ["--config", "configs/quickstart_class.yaml", *steps, "--log.eval_images", "64"]
        results = {}
        for count in (1, 10 if small else 200):
            config, resolved = parse_config([*base, "--train.steps", str(count)])
            start = time.perf_counter()
            results[f"nats after {count} steps"] = Trainer(config, resolved).run()["latent_nats_per_dim"]
            results[f"seconds for {count} steps"] = time.perf_counter() - start
    values = [value for name, value in results.items() if name.startswith("nats")]
    require(values[-1] < values[0], results)
    return results


def check_sampling(device: str, small: bool) -> dict[str, Any]:
    """The benchmark: class-conditional 1.4 B shape, 1,024 tokens, guidance, bf16."""
    model = random_model(NAME, device, torch.bfloat16, **(SMALL if small else {}))
    results: dict[str, Any] = {}
    for batch in (1, 16):
        _, cond, null = noise_and_labels(model, batch)
        speeds = compare(model, batch, cond, null, Guidance(1.0), repeats=1, compiled=True)
        results[f"batch {batch}"] = [dataclasses.asdict(speed) for speed in speeds]
        results[f"roofline {batch}"] = [
            dataclasses.asdict(row) for row in roofline(model, batch, cond, null, Guidance(1.0))
        ]
    return results


def require(condition: bool, results: dict[str, Any]) -> None:
    if not condition:
        raise AssertionError(f"outside its limits: {results}")


CHECKS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "float32 against the CPU": check_against_cpu,
    "graphs and compiled steps": check_fast_steps,
    "bfloat16": check_bfloat16,
    "training": check_training,
    "sampling": check_sampling,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/gpu_check")
    parser.add_argument("--minutes", type=float, default=9.0, help="no check begins after this")
    parser.add_argument("--small", action="store_true", help="a small model on any device")
    arguments = parser.parse_args(argv)
    device = best_device()
    if device != "cuda" and not arguments.small:
        parser.exit(2, "error: no CUDA device here; --small runs the script itself on any machine\n")
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "small": arguments.small, "checks": {}}
    started = time.perf_counter()
    for title, check in CHECKS.items():
        begun = time.perf_counter()
        if begun - started > arguments.minutes * 60:
            entry: dict[str, Any] = {"state": "no time left"}
        else:
            try:
                entry = {"state": "passed", "results": check(device, arguments.small)}
            except Exception as error:  # noqa: BLE001 (a check that fails must not hide the others)
                entry = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
        entry["seconds"] = time.perf_counter() - begun
        report["checks"][title] = entry
        print(f"{title}: {entry['state']} ({entry['seconds']:.0f} s)", flush=True)
        (folder / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "gpu_check.md").write_text(markdown(report), encoding="utf-8")
    raise SystemExit(int(any(entry["state"] != "passed" for entry in report["checks"].values())))


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"# GPU checks on {report['device']}, torch {report['torch']}", ""]
    lines += ["| check | state | seconds |", "| --- | --- | --- |"]
    lines += [f"| {title} | {entry['state']} | {entry['seconds']:.0f} |" for title, entry in report["checks"].items()]
    sampling = report["checks"].get("sampling", {}).get("results", {})
    for title, rows in sampling.items():
        lines += ["", f"## {title}", ""]
        columns = [name for name in rows[0] if name not in ("batch", "methods", "sweeps")]
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for row in rows:
            cells = (row[name] for name in columns)
            lines.append(
                "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
