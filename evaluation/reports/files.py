"""What other commands have written, for a report: a training's logs, and metrics of samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tarflow.evaluation.reports.svg_charts import Series


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
            events = [event for event in log.Scalars(tag) if math.isfinite(event.value)]
            if not events:
                continue
            likelihood = tag.endswith(("nats_per_dim", "bits_per_dim"))
            title = "likelihood, nats per dimension" if likelihood else tag
            curves.setdefault(title, {})[tag] = ([event.step for event in events], [event.value for event in events])
    if not curves:
        raise ValueError(f"{run!r} has no TensorBoard logs with scalars (files events.out.tfevents…)")
    return curves


def read_metrics(path: str) -> tuple[dict[str, str], list[str]]:
    """Names and values of a JSON file that ``tarflow evaluate fid calc`` wrote, and its warnings.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        values = found["metrics"]
        names = {name: found.get("names", {}).get(name, name) for name in values}
        metrics = {names[name]: f"{value:.5g}" for name, value in values.items() if math.isfinite(value)}
        for side in ("reference", "samples"):
            if side in found:
                metrics[f"{side} pictures"] = f"{found[side]['count']:,}"
        return metrics, list(found.get("warnings", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path!r} is no JSON file of metrics that tarflow evaluate fid calc wrote: {error}"
        ) from error
