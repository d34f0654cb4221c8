"""Tables and plots of a sweep."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from tarflow.common.charts import figure, markdown_table
from tarflow.common.files import replaced, write_text
from tarflow.evaluation.reports.settings import SWEPT

#: Metrics of which more is better; of all others, which are distances, less is.
MORE_IS_BETTER = ("precision", "recall", "inception_score", "clip_score", "match")


def more_is_better(metric: str) -> bool:
    return metric.startswith(MORE_IS_BETTER)


def metric_names(rows: list[dict[str, Any]]) -> list[str]:
    """All metrics that some row has, the first row's first."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def rank_metric(names: list[str], rank: str | None = None) -> str:
    """What rows are ranked by: the wanted metric, or the first one; of shares of matching drawings the last, of all."""
    if rank is None:
        return "match_all" if names[0].startswith("match") and "match_all" in names else names[0]
    if rank not in names:
        raise ValueError(f"rank is {rank!r}, but the metrics are {', '.join(names)}")
    return rank


def best_row(rows: list[dict[str, Any]], rank: str | None = None) -> int | None:
    """Position of the best row by a metric, see `rank_metric`; None if no row has a number for it.

    Raises:
        ValueError: if no row has a metric of this name.
    """
    names = metric_names(rows)
    if not names:
        return None
    rank = rank_metric(names, rank)
    values = {i: row["metrics"].get(rank, math.nan) for i, row in enumerate(rows)}
    finite = {i: value for i, value in values.items() if math.isfinite(value)}
    if not finite:
        return None
    return (max if more_is_better(rank) else min)(finite, key=lambda i: finite[i])


def row_name(settings: dict[str, Any]) -> str:
    """A row in words that can name a folder: ``guidance-1.5_score_sigma-0.3_sequential``."""
    return f"guidance-{settings['guidance_scale']:g}_{line_name(settings, '_')}"


def line_name(settings: dict[str, Any], separator: str = ", ") -> str:
    """Everything about a row but its guidance."""
    kind = {True: "score", False: "raw"}.get(settings["denoise"], settings["denoise"])
    kind = "finetuned" if settings["decoder"] == "finetuned" else kind
    sigma = [] if settings["noise_std"] is None else [f"sigma-{settings['noise_std']:g}"]
    count, factor = settings.get("num_inference_steps"), settings.get("temperature", 1)
    steps = [] if count is None else [f"steps-{count}"]
    temperature = [] if factor == 1 else [f"temperature-{factor:g}"]
    return separator.join([kind, *sigma, settings["decoding"], *steps, *temperature])


def cells(row: dict[str, Any], names: list[str]) -> list[Any]:
    """Settings, images per second and metrics of a row; None where there is none."""
    values = [row["settings"][name] for name in SWEPT]
    return [*values, row["images_per_second"], *(row["metrics"].get(name) for name in names)]


def write_tables(rows: list[dict[str, Any]], out: Path, rank: str | None = None) -> None:
    """Write ``sweep.csv`` and ``sweep.md``, with the best row marked in both."""
    best, names = best_row(rows, rank), metric_names(rows)
    header = [*SWEPT, "images_per_second", *names]
    with replaced(out / "sweep.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "best"])
        writer.writerows([*cells(row, names), "best" if i == best else ""] for i, row in enumerate(rows))
    write_text(out / "sweep.md", markdown(rows, header, names, best, rank))


def write_plots(rows: list[dict[str, Any]], out: Path, rank: str | None = None) -> None:
    """Draw ``guidance.png`` and ``speed.png``, with the best row marked in both; nothing without numbers."""
    best, names = best_row(rows, rank), metric_names(rows)
    shown = [name for name in names if not name.endswith("_std")]
    if shown:
        plot_guidance(rows, shown, best, out / "guidance.png")
        plot_speed(rows, shown, best, out / "speed.png")


def markdown(
    rows: list[dict[str, Any]], header: list[str], names: list[str], best: int | None, rank: str | None
) -> str:
    """The table, with the best row in bold, and a line that says by what."""

    def text(value: Any, bold: bool) -> str:
        shown = "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
        return f"**{shown}**" if bold else shown

    titles = [name.replace("_", " ").replace("noise std", "σ") for name in header]
    lines = [
        markdown_table(titles, [[text(value, i == best) for value in cells(row, names)] for i, row in enumerate(rows)])
    ]
    if best is not None:
        rank = rank_metric(names, rank)
        lines += ["", f"Bold: the best by {rank} ({'more' if more_is_better(rank) else 'less'} is better)."]
    return "\n".join(lines) + "\n"


def plot_guidance(rows: list[dict[str, Any]], names: list[str], best: int | None, path: Path) -> None:
    """Each metric against guidance, a line for each way of denoising and decoding."""
    with figure(len(names), "metrics against guidance; the star is the best row", path) as axes:
        for axis, name in zip(axes, names, strict=True):
            for line in dict.fromkeys(line_name(row["settings"]) for row in rows):
                points = sorted(
                    (row["settings"]["guidance_scale"], row["metrics"][name])
                    for row in rows
                    if line_name(row["settings"]) == line and name in row["metrics"]
                )
                axis.plot(*zip(*points, strict=True), "o-", label=line, markersize=4)
            if best is not None:
                point = (rows[best]["settings"]["guidance_scale"], rows[best]["metrics"][name])
                axis.plot(*point, "*", color="black", markersize=12, zorder=5)
            axis.set(xlabel="guidance scale", ylabel=f"{name} ({'↑' if more_is_better(name) else '↓'})")
        axes[0].legend(fontsize=6)


def plot_speed(rows: list[dict[str, Any]], names: list[str], best: int | None, path: Path) -> None:
    """Each metric against images per second, a colour for each way of denoising and decoding."""
    timed = [(i, row) for i, row in enumerate(rows) if row["images_per_second"] is not None]
    with figure(len(names), "quality against speed; numbers are guidance scales", path) as axes:
        for axis, name in zip(axes, names, strict=True):
            for line in dict.fromkeys(line_name(row["settings"]) for row in rows):
                found = [row for _, row in timed if line_name(row["settings"]) == line and name in row["metrics"]]
                speeds, values = ([row["images_per_second"] for row in found], [row["metrics"][name] for row in found])
                axis.plot(speeds, values, "o", label=line, markersize=4)
                for row, speed, value in zip(found, speeds, values, strict=True):
                    label = f"{row['settings']['guidance_scale']:g}"
                    axis.annotate(label, (speed, value), (3, 3), textcoords="offset points", fontsize=6)
            for i, row in timed:
                if i == best:
                    axis.plot(row["images_per_second"], row["metrics"][name], "*", color="black", markersize=12)
            axis.set(xlabel="images per second", ylabel=f"{name} ({'↑' if more_is_better(name) else '↓'})")
        axes[0].legend(fontsize=6)
