"""All checks that need a GPU, within nine minutes: for whoever has one for that long.

    python -m tarflow.scripts.gpu_check --output runs/gpu_check

It writes gpu_check.json and gpu_check.md: agreement with the CPU, bf16, CUDA graphs and compiled steps; training: a
short run, compiled, checkpointed, sharded and resumed, its tests, its memory against what was counted, its speed with
the 1.4-billion-parameter shape; a student's pass against
sequential decoding; and the sampling benchmark of that shape with guidance. Each check has a share of the time;
what one leaves over is the next ones'. A check that fails or runs out of time is reported, not hidden; the exit status
is 1 if any did. ``--small`` takes a small model and any device, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow import configs
from tarflow.benchmarks import gpu_checks
from tarflow.benchmarks.gpu_checks import require
from tarflow.common.command import ending
from tarflow.common.files import check_writable, write_text
from tarflow.pipeline.loading.device import best_device
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.trainer import Trainer

RUN = ["--config", configs.resolve("quickstart_class"), "--log.trackers", "[]", "--log.eval_images", "64"]
SHARDED = str(configs.FOLDER / "accelerate" / "fsdp2.yaml")
#: Of a clone; the package has none.
TESTS = Path(__file__).resolve().parents[1] / "tests"


def check_training(device: str, small: bool, deadline: float) -> dict[str, float]:
    """Two hundred steps of the class quick start: the likelihood improves, compiled and checkpointed as well."""
    count = 10 if small else 200
    runs = {"1 step": (1, []), f"{count} steps": (count, [])}
    runs[f"{count} steps, compiled"] = (count, ["--train.compile", "true"])
    runs[f"{count} steps, checkpointed"] = (count, ["--train.checkpointing", "both"])
    nats, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (steps, options) in runs.items():
            minutes = max(0.1, (deadline - time.perf_counter()) / 60)
            limits = ["--train.steps", str(steps), "--train.max_minutes", f"{minutes:.2f}"]
            start = time.perf_counter()
            trainer = Trainer(*parse_config([*RUN, "--output", f"{folder}/run", *limits, *options]))
            nats.append(trainer.run()["latent_nats_per_dim"])
            results |= {f"nats after {name}": nats[-1], f"seconds for {name}": time.perf_counter() - start}
    require(all(later < nats[0] and abs(later - nats[1]) < 0.05 for later in nats[1:]), results)
    return results


def check_sharded_training(device: str, small: bool, deadline: float) -> dict[str, float]:
    """FSDP2 over one process: a few steps, and a few more from the checkpoint."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SHARDED, "--num_processes", "1"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        run = [*RUN, "--output", f"{folder}/run", "--train.max_minutes", "null", "--log.checkpoint_every", "5"]
        for steps, more in ((5, []), (10, ["--resume", "latest"])):
            start = time.perf_counter()
            quietly([*launch, "-m", "tarflow.cli", "train", *run, "--train.steps", str(steps), *more], deadline)
            results[f"seconds for steps to {steps}"] = time.perf_counter() - start
            pipeline = Path(folder) / "run" / "pipeline" / "model_index.json"
            require(pipeline.is_file(), {"steps": steps, "pipeline": "none was saved"})
    return results


def check_tests(device: str, small: bool, deadline: float) -> dict[str, str]:
    """The tests of training, which then run on the device."""
    if not (TESTS / "test_recipes.py").is_file():
        return {"pytest": "left out: the tests are in the project's repository"}
    names = ["test_recipes.py"] if small else ["test_recipes.py", "test_training.py"]
    command = [sys.executable, "-m", "pytest", "-q", *(str(TESTS / name) for name in names)]
    command += ["-k", "not bit_identical"]  # which a GPU does not promise
    output = quietly(command, deadline, TARFLOW_TEST_DEVICE=device)
    return {"pytest": output.strip().splitlines()[-1]}


def quietly(command: list[str], deadline: float, **environment: str) -> str:
    """What a command prints; a failure is an error with the end of that."""
    environment = {**os.environ, "TQDM_DISABLE": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=max(1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes would go on using the device
            raise
    require(process.returncode == 0, {"stdout": output[-2000:], "stderr": errors[-2000:]})
    return output


#: Each check, and its share of the time.
CHECKS: dict[str, tuple[Callable[[str, bool, float], dict[str, Any]], float]] = {
    "float32 against the CPU": (gpu_checks.check_against_cpu, 0.05),
    "bfloat16": (gpu_checks.check_bfloat16, 0.06),
    "training": (check_training, 0.12),
    "memory": (gpu_checks.check_memory, 0.06),
    "training speed": (gpu_checks.check_training_speed, 0.18),
    "compiled training": (gpu_checks.check_compiled_training, 0.05),
    "sharded training": (check_sharded_training, 0.09),
    "tests": (check_tests, 0.10),
    "graphs and compiled steps": (gpu_checks.check_fast_steps, 0.08),
    "student": (gpu_checks.check_student, 0.07),
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
    folder = Path(arguments.output).expanduser()
    with ending():
        check_writable(folder, folder=True)
        run_checks(arguments, device, folder)


def run_checks(arguments: argparse.Namespace, device: str, folder: Path) -> None:
    """Run the wanted checks and write what they found after each; the exit status is 1 if one failed."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "small": arguments.small, "checks": {}}
    chosen = {title: check for title, check in CHECKS.items() if title in arguments.only}
    deadline, whole = time.perf_counter(), sum(share for _, share in chosen.values())
    for title, (check, share) in chosen.items():
        deadline += arguments.minutes * 60 * share / whole
        entry = report["checks"][title] = outcome(check, device, arguments.small, deadline)
        print(f"{title}: {entry['state']} ({entry['seconds']:.0f} s)", flush=True)
        write_text(folder / "gpu_check.json", json.dumps(report, indent=2) + "\n")
        write_text(folder / "gpu_check.md", markdown(report))
    raise SystemExit(int(any(entry["state"] in ("failed", "no time left") for entry in report["checks"].values())))


def outcome(check: Callable[..., dict[str, Any]], device: str, small: bool, deadline: float) -> dict[str, Any]:
    """A check's state, with its results or the reason for none, and the seconds it took."""
    begun = time.perf_counter()
    if begun > deadline:
        return {"state": "no time left", "seconds": 0.0}
    try:
        entry: dict[str, Any] = {"state": "passed", "results": check(device, small, deadline)}
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
