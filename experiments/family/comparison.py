"""NICE, RealNVP, Glow, IAF, TARFlow and STARFlow side by side: the same data, parameters and steps; tables, pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from tarflow.benchmarks.memory import training_memory
from tarflow.common.charts import check_matplotlib, markdown_table
from tarflow.common.files import check_writable, keep_settings, write_text
from tarflow.data.drawings import CLASS_NAMES
from tarflow.experiments.family import pictures
from tarflow.experiments.family.data import points
from tarflow.experiments.family.family import FAMILY
from tarflow.experiments.family.images import ABLATIONS as DIGIT_ABLATIONS
from tarflow.experiments.family.images import DISTILLED, DRAWINGS, SLOW_ABLATIONS, digit_results
from tarflow.experiments.family.latents import latent_results
from tarflow.experiments.family.plane import ABLATED, OUTSIDE, plane_results
from tarflow.experiments.family.plane import ABLATIONS as PLANE_ABLATIONS
from tarflow.experiments.family.runs import Result, Runs
from tarflow.experiments.family.settings import PARTS, FlowComparison

#: Steps of each part: in the quick form, and in the other.
QUICK, LONG = {"plane": 400, "digits": 600, "latents": 500}, {"plane": 4000, "digits": 4000, "latents": 6000}
QUICK_DRAWINGS, LONG_DRAWINGS = 3000, 12000
#: The model whose memory is counted, by the number of its blocks and by what is computed again.
MEMORY_SHAPE: dict[str, Any] = {
    "in_channels": 8,
    "sample_size": 8,
    "width": 96,
    "head_dim": 32,
    "block": "coupling",
    "mixing": "lu",
    "actnorm": True,
}
#: Columns of the tables: training, and drawing one or a hundred together.
SPEEDS = ("images/s, training", "sampling, batch 1", "batch 100")
#: Columns of the picture of drawings.
SHOWN_CLASSES = 12
MEMORY_BLOCKS, MEMORY_MODES, MEMORY_BATCH = (2, 4, 8, 16), ("none", "block", "reversible"), 16


def compare_flows(config: FlowComparison) -> Path:
    """Make the runs that are not there yet, then tables and pictures; returns the path of ``flows.md``."""
    folder = Path(config.output).expanduser()
    check_writable(folder, folder=True)
    check_matplotlib()
    keep_settings(folder / "settings.json", {"quick": config.quick, "seed": config.seed}, "a comparison")
    runs, steps = Runs(folder / "runs"), QUICK if config.quick else LONG
    text = []
    for part in PARTS:
        if part not in config.parts:
            continue
        if part == "plane":
            text += plane_report(plane_results(runs, steps["plane"], config.seed), folder)
        elif part == "digits" and importlib.util.find_spec("sklearn") is None:
            print("scikit-learn is not installed, so its digits are left out: pip install 'tarflow[family]'")
        elif part == "digits":
            left_out = SLOW_ABLATIONS if config.quick else ()
            text += digit_report(digit_results(runs, steps["digits"], config.seed, left_out), folder)
        elif part == "latents":
            count = QUICK_DRAWINGS if config.quick else LONG_DRAWINGS
            text += latent_report(latent_results(runs, steps["latents"], count, config.seed), folder)
        else:
            text += memory_report(memory_by_depth(runs), folder)
    path = folder / "flows.md"
    write_text(path, "\n\n".join(text) + "\n")
    return path


def memory_by_depth(runs: Runs) -> dict[str, dict[str, int]]:
    """Most bytes of activations in a step, by mode and number of blocks of one layer."""
    settings = {"shape": MEMORY_SHAPE, "blocks": MEMORY_BLOCKS, "batch": MEMORY_BATCH}

    def count() -> Result:
        sizes = {
            mode: {
                str(blocks): training_memory(
                    {**MEMORY_SHAPE, "layers_per_block": [1] * blocks}, MEMORY_BATCH, precision="float32", mode=mode
                ).activations
                for blocks in MEMORY_BLOCKS
            }
            for mode in MEMORY_MODES
        }
        return {"activations": sizes}, {}

    return runs.get("memory", settings, count)[0]["activations"]


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A table: text as it is, large numbers whole, others with three decimals, None as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    return markdown_table(header, [[cell(value) for value in row] for row in rows])


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def plane_report(results: dict[str, dict[str, Result]], folder: Path) -> list[str]:
    """Table and pictures of the plane."""
    data = {density: points(density, 20000, 2).view(-1, 2) for density in results}
    main = {
        density: {name: result for name, result in flows.items() if name not in PLANE_ABLATIONS}
        for density, flows in results.items()
    }
    pictures.plane_picture(main, data, folder / "flows_plane.png")
    wanted = [*PLANE_ABLATIONS, "TARFlow"]
    ablated = {ABLATED: {name: results[ABLATED][name] for name in wanted}}
    pictures.plane_picture(ablated, data, folder / "flows_blocks.png")
    rows = []
    for name in [*FAMILY, *OUTSIDE, *PLANE_ABLATIONS]:
        found = [flows[name][0] if name in flows else None for flows in results.values()]
        first = next((numbers for numbers in found if numbers is not None), None)
        if first is not None:
            nats = [None if numbers is None else numbers["nats"] for numbers in found]
            speeds = [first["images_per_second"], first.get("samples_per_second")]
            rows.append([name, first["parameters"], *nats, *speeds])
    header = ["flow", "parameters", *(f"{name}, nats per number" for name in results)]
    return [markdown([*header, "points/s, training", "points/s, sampling"], rows)]


def digit_report(results: dict[str, Result], folder: Path) -> list[str]:
    """Tables and pictures of digits."""
    tensors = {name: result[1] for name, result in results.items()}
    flows = [*FAMILY, DISTILLED]
    pictures.rows_picture({name: tensors[name]["samples"] for name in flows}, folder / "flows_digits.png", 4)
    rows = {"TARFlow": tensors["TARFlow"]["samples"], **tensors["TARFlow"]["drawings"]}
    for name in (name for name in DIGIT_ABLATIONS if name in results):
        rows[name] = tensors[name]["samples"]
        if "denoised" in tensors[name]:
            rows[f"{name}, score step"] = tensors[name]["denoised"]
    pictures.rows_picture(rows, folder / "flows_digits_ablations.png", 4)
    header = ["flow", "parameters", "bits per dimension", "read as their class"]
    lines, ablations = [], []
    for name, (numbers, _) in results.items():
        line = [name, numbers["parameters"], numbers.get("bits"), percent(numbers["accuracy"])]
        speeds = [numbers[f"{kind}_per_second"] for kind in ("images", "single_samples", "samples")]
        if name in flows:
            lines.append([*line, *speeds, numbers.get("divergence")])
        else:
            ablations.append([*line, percent(numbers.get("denoised_accuracy")), *speeds])
    for name in DRAWINGS:
        ablations.append([name, None, None, percent(results["TARFlow"][0]["accuracies"][name]), *[None] * 4])
    return [
        markdown([*header, *SPEEDS, "nats per number from the teacher"], lines),
        markdown([*header, "after the score step", *SPEEDS], ablations),
    ]


def latent_report(results: dict[str, Result], folder: Path) -> list[str]:
    """Table and picture of drawings."""
    shown = 7 * torch.arange(SHOWN_CLASSES) % len(CLASS_NAMES)  # both colour and shape change
    rows = {}
    for name, (_, tensors) in results.items():
        rows[name] = tensors["samples"][shown]
        if "guided" in tensors:
            rows[f"{name}, guided"] = tensors["guided"][shown]
    pictures.rows_picture(rows, folder / "flows_drawings.png", 1, SHOWN_CLASSES)
    header = ["flow", "parameters", "nats per latent dimension", "colour", "shape", "colour, guided", "shape, guided"]
    lines = [
        [
            name,
            numbers["parameters"],
            numbers["nats"],
            percent(numbers["colour"]),
            percent(numbers["shape"]),
            percent(numbers.get("guided_colour")),
            percent(numbers.get("guided_shape")),
            numbers["images_per_second"],
            numbers["single_samples_per_second"],
            numbers["samples_per_second"],
            numbers.get("divergence"),
        ]
        for name, (numbers, _) in results.items()
    ]
    return [markdown([*header, *SPEEDS, "nats per number from the teacher"], lines)]


def memory_report(memory: dict[str, dict[str, int]], folder: Path) -> list[str]:
    """Table and chart of memory against depth, in MB."""
    pictures.memory_picture(memory, folder / "flows_memory.png")
    rows = [
        [int(blocks), *(float(memory[mode][blocks]) / 2**20 for mode in memory)]
        for blocks in next(iter(memory.values()))
    ]
    return [markdown(["coupling blocks", *(f"{mode}, MB" for mode in memory)], rows)]
