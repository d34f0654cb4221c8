"""Tables and charts of measured speeds and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tarflow.benchmarks.choices import PRECISIONS
from tarflow.benchmarks.memory import MODES, TrainingMemory
from tarflow.benchmarks.sampling import METHODS, Speed
from tarflow.benchmarks.training import TrainingSpeed
from tarflow.common.charts import figure, table


def sampling_chart(speeds: list[Speed], title: str, path: Path) -> None:
    """Bars of images per second, grouped by batch size, with the ratio to the published algorithm."""
    batches = sorted({speed.batch for speed in speeds})
    with figure(len(batches), title, path) as axes:
        for axis, batch in zip(axes, batches, strict=True):
            rows = {speed.method: speed for speed in speeds if speed.batch == batch}
            names = [name for name in METHODS if name in rows]
            bars = axis.bar(names, [rows[name].images_per_second for name in names])
            axis.bar_label(bars, [f"{rows[name].ratio:.1f}×" for name in names])
            axis.set(title=f"batch {batch}", ylabel="images per second")
            axis.tick_params(axis="x", rotation=30)
            axis.margins(y=0.12)  # room for the labels


def training_table(speeds: list[TrainingSpeed]) -> str:
    header = ["precision", "variant", "batch", "images/s", "tokens/s", "× published", "utilization", "ms/step"]
    rows = [
        [
            row.precision,
            row.variant,
            row.batch,
            row.images_per_second,
            row.tokens_per_second,
            row.ratio,
            None if row.utilization is None else f"{row.utilization:.1%}",
            row.step_ms,
            row.peak_mb,
            row.error or f"{row.loss:.6f}",
        ]
        for row in speeds
    ]
    return table([*header, "peak MiB", f"loss after {max((row.steps or 0 for row in speeds), default=0)} steps"], rows)


def training_chart(speeds: list[TrainingSpeed], title: str, path: Path) -> None:
    """Bars of images per second for each precision, at each variant's best batch size, with the ratio to the published
    step at that size."""
    precisions = [name for name in PRECISIONS if any(speed.precision == name for speed in speeds)]
    with figure(len(precisions), title, path) as axes:
        for axis, precision in zip(axes, precisions, strict=True):
            rows: dict[str, TrainingSpeed] = {}
            for speed in speeds:
                if speed.precision == precision and speed.images_per_second is not None:
                    old = rows.get(speed.variant)
                    if old is None or speed.images_per_second > (old.images_per_second or 0.0):
                        rows[speed.variant] = speed
            bars = axis.bar(list(rows), [row.images_per_second for row in rows.values()])
            labels = ["" if row.ratio is None else f"{row.ratio:.2f}×" for row in rows.values()]
            axis.bar_label(
                bars, [f"{label}\nbatch {row.batch}" for label, row in zip(labels, rows.values(), strict=True)]
            )
            axis.set(title=precision, ylabel="images per second")
            axis.tick_params(axis="x", rotation=30)
            axis.margins(y=0.2)


def memory_table_text(rows: list[dict[str, Any]]) -> str:
    """Megabytes of activations by blocks and layers, and of the blocks' inputs that any mode keeps."""
    header = ["blocks", "layers", *MODES, "block inputs"]
    lines = []
    for row in rows:
        modes: dict[str, TrainingMemory] = row["modes"]
        inputs = modes["block"].block_inputs
        sizes = [*(modes[mode].activations for mode in MODES), inputs]
        lines.append([row["blocks"], row["layers"], *(size / 2**20 for size in sizes)])
    return table(header, lines)


def memory_parts_text(modes: dict[str, TrainingMemory]) -> str:
    """GiB of each kind for one model, by mode."""
    kinds = ["parameters", "gradients", "optimizer", "weight_copies", "activations", "kept", "peak"]
    rows = [[mode, *(getattr(memory, kind) / 2**30 for kind in kinds)] for mode, memory in modes.items()]
    return table(["GiB", *(kind.replace("_", " ") for kind in kinds)], rows)


def memory_chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Activations against the number of blocks, a line for each mode, side by side for each number of layers."""
    depths = sorted({row["layers"] for row in rows})
    with figure(len(depths), title, path, 3.4) as axes:
        for axis, depth in zip(axes, depths, strict=True):
            chosen = [row for row in rows if row["layers"] == depth]
            blocks = [row["blocks"] for row in chosen]
            for mode in MODES:
                axis.plot(blocks, [row["modes"][mode].activations / 2**20 for row in chosen], "o-", label=mode)
            axis.set(title=f"{depth} layers in a block" if depth > 1 else "1 layer in a block", xlabel="blocks")
            axis.set(ylabel="activations, MiB", xscale="log", yscale="log", xticks=blocks, xticklabels=blocks)
            axis.minorticks_off()
        axes[0].legend(fontsize=7)
