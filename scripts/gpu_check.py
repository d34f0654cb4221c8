"""All checks that need a GPU, within nine minutes: for whoever has one for that long.

    python scripts/gpu_check.py --output runs/gpu_check

It writes gpu_check.json and gpu_check.md: agreement with the CPU, bf16, CUDA graphs and compiled steps; training: a
short run, compiled, sharded over one process and resumed, its memory against what was counted, its speed with the
1.4-billion-parameter shape; and the sampling benchmark of that shape with guidance. Each check has a share of the time;
what one leaves over is the next ones'. A check that fails or runs out of time is reported, not hidden; the exit status
is 1 if any did. ``--small`` takes a small model and any device, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow.evaluation import gpu_checks
from tarflow.evaluation.gpu_checks import require
from tarflow.pipeline.device import best_device
from tarflow.training.arguments import parse_config
from tarflow.training.trainer import Trainer

RUN = ["--config", "configs/quickstart_class.yaml", "--log.trackers", "[]", "--log.eval_images", "64"]
SHARDED = "configs/accelerate/fsdp2.yaml"


class SkippedError(Exception):
    """The check does not apply to this machine."""


def check_training(device: str, small: bool, deadline: float) -> dict[str, float]:
    """Two hundred steps of the class quick start: the likelihood improves."""
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for count in (1, 10 if small else 200):
            minutes = max(0.1, (deadline - time.perf_counter()) / 60)
            changes = [
                "--output",
                f"{folder}/run",
                "--train.steps",
                str(count),
                "--train.max_minutes",
                f"{minutes:.2f}",
            ]
            config, resolved = parse_config([*RUN, *changes])
            start = time.perf_counter()
            results[f"nats after {count} steps"] = Trainer(config, resolved).run()["latent_nats_per_dim"]
            results[f"seconds for {count} steps"] = time.perf_counter() - start
    values = [value for name, value in results.items() if name.startswith("nats")]
    require(values[-1] < values[0], results)
    return results


def check_sharded_training(device: str, small: bool, deadline: float) -> dict[str, float]:
    """FSDP2 over one process: a few steps, and a few more from the checkpoint."""
    if device != "cuda":
        raise SkippedError("needs a GPU")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SHARDED, "--num_processes", "1"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        run = [*RUN, "--output", f"{folder}/run", "--train.max_minutes", "null", "--log.checkpoint_every", "5"]
        for steps, more in ((5, []), (10, ["--resume", "latest"])):
            start = time.perf_counter()
            done = subprocess.run(
                [*launch, "train_latent.py", *run, "--train.steps", str(steps), *more],
                check=False,
                timeout=max(1, deadline - start),
                capture_output=True,
                text=True,
                env={**os.environ, "TQDM_DISABLE": "1"},
            )
            require(done.returncode == 0, {"steps": steps, "stderr": done.stderr[-2000:]})
            results[f"seconds for steps to {steps}"] = time.perf_counter() - start
            pipeline = Path(folder) / "run" / "pipeline" / "model_index.json"
            require(pipeline.is_file(), {"steps": steps, "pipeline": "none was saved"})
    return results


#: Each check, and its share of the time.
CHECKS: dict[str, tuple[Callable[[str, bool, float], dict[str, Any]], float]] = {
    "float32 against the CPU": (gpu_checks.check_against_cpu, 0.05),
    "bfloat16": (gpu_checks.check_bfloat16, 0.06),
    "training": (check_training, 0.09),
    "memory": (gpu_checks.check_memory, 0.06),
    "training speed": (gpu_checks.check_training_speed, 0.30),
    "compiled training": (gpu_checks.check_compiled_training, 0.10),
    "sharded training": (check_sharded_training, 0.12),
    "graphs and compiled steps": (gpu_checks.check_fast_steps, 0.08),
    "sampling": (gpu_checks.check_sampling, 0.14),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/gpu_check")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all checks together")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="some of the checks")
    parser.add_argument("--small", action="store_true", help="a small model on any device")
    arguments = parser.parse_args(argv)
    device = best_device()
    if device != "cuda" and not arguments.small:
        parser.exit(2, "error: no CUDA device here; --small runs the script itself on any machine\n")
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "small": arguments.small, "checks": {}}
    chosen = {title: check for title, check in CHECKS.items() if title in arguments.only}
    deadline, whole = time.perf_counter(), sum(share for _, share in chosen.values())
    for title, (check, share) in chosen.items():
        deadline += arguments.minutes * 60 * share / whole
        entry = report["checks"][title] = outcome(check, device, arguments.small, deadline)
        print(f"{title}: {entry['state']} ({entry['seconds']:.0f} s)", flush=True)
        (folder / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "gpu_check.md").write_text(markdown(report), encoding="utf-8")
    raise SystemExit(int(any(entry["state"] in ("failed", "no time left") for entry in report["checks"].values())))


def outcome(check: Callable[..., dict[str, Any]], device: str, small: bool, deadline: float) -> dict[str, Any]:
    """A check's state, with its results or the reason for none, and the seconds it took."""
    begun = time.perf_counter()
    if begun > deadline:
        return {"state": "no time left", "seconds": 0.0}
    try:
        entry: dict[str, Any] = {"state": "passed", "results": check(device, small, deadline)}
    except SkippedError as reason:
        entry = {"state": "skipped", "error": str(reason)}
    except Exception as error:  # noqa: BLE001 (a check that fails must not hide the others)
        entry = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {**entry, "seconds": time.perf_counter() - begun}


def markdown(report: dict[str, Any]) -> str:
    """The report for people: states, then numbers, then tables."""
    lines = [f"# GPU checks on {report['device']}, torch {report['torch']}", ""]
    lines += ["| check | state | seconds |", "| --- | --- | --- |"]
    lines += [f"| {title} | {entry['state']} | {entry['seconds']:.0f} |" for title, entry in report["checks"].items()]
    for title, entry in report["checks"].items():
        results = entry.get("results", {"error": entry["error"]} if "error" in entry else {})
        lines += ["", f"## {title}", ""] if results else []
        lines += [f"- {name}: {cell(value)}" for name, value in results.items() if not isinstance(value, list)]
        for name, rows in results.items():
            if isinstance(rows, list) and rows:
                columns = [key for key in rows[0] if key not in ("methods", "sweeps")]
                lines += ["", f"{name}:", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
                lines += ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(part)}" for key, part in value.items() if part is not None)
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
