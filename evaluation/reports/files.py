"""What other commands have written, for a report: a training's logs, and metrics of samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tarflow.evaluation.reports.svg_charts import Series

#: Names of likelihoods end in these, and are measured so.
UNITS = {"nats_per_dim": "nats per dimension", "bits_per_dim": "bits per dimension"}


def read_curves(run: str) -> dict[str, Series]:
    """Scalars of a training's TensorBoard logs by chart; likelihoods of training and held-out pictures share one.

    Raises:
        ValueError: if there are no logs with scalars.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted({file.parent for file in Path(run).expanduser().rglob("events.out.tfevents*")})
    curves: dict[str, Series] = {}
    for folder in folders:
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        log.Reload()
        for tag in log.Tags()["scalars"]:
            values = {step: value for step, value in last_of(log.Scalars(tag)).items() if math.isfinite(value)}
            if values:
                ending = next((one for one in UNITS if tag.endswith(one)), "")
                title = f"likelihood, {UNITS[ending]}" if ending else tag
                curves.setdefault(title, {})[tag] = (list(values), list(values.values()))
    if not curves:
        raise ValueError(f"{run!r} has no TensorBoard logs with scalars (files events.out.tfevents…)")
    return curves


def last_of(events: Iterable[Any]) -> dict[int, float]:
    """Values by step of a log's events, in the order in which they were written. What was written of a step and later ones
    before a run went back to it, or a new one began, is not of this run any more."""
    found: dict[int, float] = {}
    last = -1
    for event in events:
        if event.step <= last:
            found = {step: value for step, value in found.items() if step < event.step}
        found[event.step], last = event.value, event.step
    return found


def read_metrics(path: str) -> tuple[dict[str, str], list[str]]:
    """Names and values of a JSON file that ``tarflow evaluate fid calc`` wrote, and its warnings.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        values = found["metrics"]
        names = {name: found.get("names", {}).get(name, name) for name in values}
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        metrics = {names[name]: f"{value:.5g}" for name, value in known.items()}
        for side in ("reference", "samples"):
            if side in found:
                metrics[f"{side} pictures"] = f"{found[side]['count']:,}"
        return metrics, list(found.get("warnings", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path!r} is no JSON file of metrics that tarflow evaluate fid calc wrote: {error}"
        ) from error
