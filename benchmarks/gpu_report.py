"""The checks that need a GPU, in the order of what is worth most, and the report that is written as they go on."""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow.benchmarks import gpu_checks, gpu_runs, gpu_sampling
from tarflow.benchmarks.gpu_checks import LeftOutError, Task, free_memory
from tarflow.common.files import write_text

CHECKS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "agreement": gpu_checks.check_against_cpu,
    "sampling": gpu_sampling.check_sampling,
    "training-speed": gpu_checks.check_training_speed,
    "emoji": gpu_runs.check_emoji,
    "cards": gpu_checks.check_cards,
    "profile": gpu_sampling.check_profile,
    "calibration": gpu_sampling.check_calibration,
    "graphs": gpu_checks.check_fast_steps,
    "bfloat16": gpu_checks.check_bfloat16,
    "student": gpu_sampling.check_student,
    "memory": gpu_checks.check_memory,
    "training": gpu_runs.check_training,
    "compiled-training": gpu_checks.check_compiled_training,
    "tests": gpu_runs.check_tests,
    "sharded": gpu_runs.check_sharded_training,
}
#: Columns of a row that are too long for a table.
LONG = ("methods", "sweeps", "timings")
#: The times are for a GPU; a small check on a busy CPU may take longer.
SMALL_FACTOR = 4


class Report:
    """What was found, in ``gpu_check.json`` and ``gpu_check.md`` of a folder, written anew each time there is more. What the
    folder has of checks of the same device that are not made again stays.

    Args:
        folder: of the two files.
        device: "cuda" or another.
        small: of the models.
    """

    def __init__(self, folder: Path, device: str, small: bool):
        self.folder = folder
        name = torch.cuda.get_device_name() if device == "cuda" else device
        facts = {"device": name, "torch": torch.__version__, "small": small}
        self.content: dict[str, Any] = {**facts, "checks": {}}
        file = folder / "gpu_check.json"
        if file.is_file():
            earlier = read_report(file)
            if all(earlier.get(key) == value for key, value in facts.items()):
                self.content["checks"] = earlier["checks"]

    def put(self, title: str, entry: dict[str, Any]) -> None:
        self.content["checks"][title] = entry
        write_text(self.folder / "gpu_check.json", json.dumps(self.content, indent=2) + "\n")
        write_text(self.folder / "gpu_check.md", markdown(self.content))


def read_report(file: Path) -> dict[str, Any]:
    """What an earlier call wrote.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not (isinstance(found, dict) and isinstance(found.get("checks"), dict)):
        raise ValueError(f"{str(file)!r} is no report of earlier checks: move it away, or give another --output")
    return found


def run_checks(folder: Path, chosen: dict[str, float], minutes: float, task: Task) -> bool:
    """Run checks one after the other; returns whether all passed.

    Args:
        folder: of the report.
        chosen: seconds of each; what one leaves over is the next ones'.
        minutes: of all together; none begins after that.
        task: device, size and data.
    """
    report, begun, passed = Report(folder, task.device, task.small), time.perf_counter(), True
    end, deadline = begun + 60 * minutes, begun
    for title, given in chosen.items():
        seconds = given * (SMALL_FACTOR if task.small else 1)
        deadline = min(max(deadline, time.perf_counter()) + seconds, end)
        entry = outcome(title, dataclasses.replace(task, deadline=deadline), report)
        report.put(title, entry)
        print(f"{title}: {entry['state']} ({entry['seconds']:.0f} s)", flush=True)
        passed &= entry["state"] in ("passed", "left out")
    return passed


def outcome(title: str, task: Task, report: Report) -> dict[str, Any]:
    """A check's state, with its results or the reason for none, and the seconds it took."""
    begun = time.perf_counter()
    if task.over:
        return {"state": "no time left", "seconds": 0.0}
    found: dict[str, Any] = {}

    def tell(results: dict[str, Any]) -> None:
        found.update(results)
        report.put(title, {"state": "running", "results": dict(found), "seconds": time.perf_counter() - begun})

    try:
        entry: dict[str, Any] = {"state": "passed", "results": CHECKS[title](dataclasses.replace(task, tell=tell))}
    except LeftOutError as error:
        entry = {"state": "left out", "error": str(error), "results": found}
    except Exception as error:  # noqa: BLE001 (a check that fails must not hide the others)
        entry = {"state": "failed", "error": f"{type(error).__name__}: {error}", "results": found}
        traceback.print_exc()
    free_memory()
    return {**entry, "seconds": time.perf_counter() - begun}


def markdown(report: dict[str, Any]) -> str:
    """The report for people: states, then numbers, then tables."""
    lines = [f"# GPU checks on {report['device']}, torch {report['torch']}", ""]
    lines += ["| check | state | seconds |", "| --- | --- | --- |"]
    lines += [f"| {title} | {entry['state']} | {entry['seconds']:.0f} |" for title, entry in report["checks"].items()]
    for title, entry in report["checks"].items():
        results = {**({"error": entry["error"]} if "error" in entry else {}), **entry.get("results", {})}
        lines += ["", f"## {title}", ""] if results else []
        plain = {name: value for name, value in results.items() if not isinstance(value, list)}
        screens = {name: value for name, value in plain.items() if isinstance(value, str) and "\n" in value}
        lines += [f"- {name}: {cell(value)}" for name, value in plain.items() if name not in screens]
        for name, text in screens.items():
            lines += ["", f"{name}:", "", "```", text, "```"]
        for name, rows in results.items():
            if isinstance(rows, list) and rows:
                columns = [key for key in rows[0] if key not in LONG]
                lines += ["", f"{name}:", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
                lines += ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(part)}" for key, part in value.items() if part is not None)
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
