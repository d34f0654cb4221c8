"""A flow of one noise level beside one of all levels up to it, both trained for the same time: what many levels, and
walking down them in some steps, are worth on some pictures (iTARFlow, arXiv 2604.20041)."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.common.charts import markdown_table
from tarflow.common.files import check_writable, keep_settings, write_json, write_picture, write_text
from tarflow.common.machine import machine
from tarflow.common.seeds import image_generators
from tarflow.data.images import bytes_of
from tarflow.evaluation.conditions import make_conditions
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import Measure, run_sweep
from tarflow.evaluation.samples.generation import pipeline_of
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.experiments.decoding import labelled_rows
from tarflow.experiments.settings import LevelComparisonConfig

#: One level, which one score step removes; or all levels up to it.
KINDS = ("fixed", "levels")
#: What decides the trainings: another value wants another folder.
DECIDE = ("train", "options", "minutes", "low")


def training_options(config: LevelComparisonConfig, kind: str, high: float, folder: Path) -> list[str]:
    """What `tarflow train` is given for one run."""
    own = ["--train.noise_levels", "null", "--train.noise_std", f"{high:g}", "--log.num_inference_steps", "null"]
    if kind == "levels":
        own = ["--train.noise_levels.low", f"{config.low:g}", "--train.noise_levels.high", f"{high:g}"]
    time = ["--resume", "auto", "--output", str(folder)]
    time += [] if config.minutes is None else ["--train.max_minutes", f"{config.minutes:g}"]
    time += ["--log.sample_every", "0"]  # grids would take of the time, more with more steps
    return ["--config", config.train, *config.options, *own, *time]


def train(options: list[str]) -> None:
    """A training in a process of its own. Ctrl-C, which reaches that one too, waits for its checkpoint.

    Raises:
        ValueError: if it fails; it has said why.
    """
    process = subprocess.Popen([sys.executable, "-m", "tarflow.cli", "train", *options])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        raise ValueError(f"the training failed: tarflow train {' '.join(options)}")


def compare_noise_levels(
    config: LevelComparisonConfig,
    device: str | torch.device = "cpu",
    trained: Callable[[list[str]], None] = train,
    measure: Measure | None = None,
) -> list[dict[str, Any]]:
    """Train what is not trained yet, draw, measure, and write noise_levels.md, noise_levels.json and a grid for each level.

    Args:
        config: what to compare.
        device: where to draw.
        trained: trains with such options.
        measure: as of `run_sweep`.

    Returns:
        a row for each way to draw: "high", "kind", "steps", "images_per_second" and "metrics".

    Raises:
        ValueError: if settings do not fit, or a training fails.
    """
    out = Path(config.out).expanduser()
    check_writable(out, folder=True)
    settings = dataclasses.asdict(config)
    keep_settings(out / "settings.json", {name: settings[name] for name in DECIDE}, "trainings")
    rows: list[dict[str, Any]] = []
    for high in config.highest:
        shown: dict[str, Tensor] = {}
        for kind in KINDS:
            folder = out / f"{kind}_{high:g}"
            if not (folder / "pipeline").is_dir():
                trained(training_options(config, kind, high, folder))
                if not (folder / "pipeline").is_dir():
                    raise ValueError(f"the training in {str(folder)!r} was stopped: the same command goes on")
            sweep = sweep_of(config, folder, kind)
            for row in run_sweep(sweep, measure, device=device):
                steps = row["settings"]["num_inference_steps"] or 1
                found = {"high": high, "kind": kind, "steps": steps, "images_per_second": row["images_per_second"]}
                rows.append({**found, "metrics": row["metrics"]})
            shown |= examples(config, sweep.gen, kind, device)
        write_picture(out / f"samples_{high:g}.png", labelled_rows(shown), optimize=True)
        write_tables(config, rows, out, device)
    return rows


def sweep_of(config: LevelComparisonConfig, folder: Path, kind: str) -> SweepConfig:
    """How a run's pipeline is measured."""
    gen = GenerationConfig(
        pipeline=str(folder / "pipeline"),
        out=str(folder / "sweep"),
        num=config.num,
        batch_size=config.batch_size,
        guidance_scale=config.guidance_scale,
        captions=config.captions,
        labels=config.labels,
        seed=config.seed,
    )
    return SweepConfig(
        gen=gen,
        num_inference_steps=config.steps if kind == "levels" else None,
        ref=config.ref,
        match=config.match,
        extractor=config.extractor,
        extractor_weights=config.extractor_weights,
        extractor_normalize=config.extractor_normalize,
        keep_images=False,
    )


@torch.no_grad()
def examples(
    config: LevelComparisonConfig, gen: GenerationConfig, kind: str, device: str | torch.device
) -> dict[str, Tensor]:
    """Some samples by the name of their row, uint8 (N, 3, H, W); the same noise for all rows."""
    pipe = pipeline_of(gen, device)
    conditions = make_conditions(pipe, config.seed, config.labels, None, config.captions, None, "train")
    rows = {}
    for steps in config.steps if kind == "levels" else [1]:
        generators = image_generators(config.seed, range(config.columns))
        output: Any = pipe(
            **conditions.arguments(range(config.columns)),
            generator=generators,
            guidance_scale=config.guidance_scale,
            decoding="sequential",
            num_inference_steps=steps,
            output_type="pt",
        )
        name = "one level" if kind == "fixed" else f"{steps} step{'s' if steps > 1 else ''}"
        rows[name] = bytes_of(output.images)
    return rows


def write_tables(
    config: LevelComparisonConfig, rows: list[dict[str, Any]], out: Path, device: str | torch.device
) -> None:
    """Write ``noise_levels.json`` and ``noise_levels.md``."""
    report = {"rows": rows, "settings": dataclasses.asdict(config), "machine": machine(torch.device(device))}
    write_json(out / "noise_levels.json", report, nan_as_null=True)
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    header = ["σ of the drawing", "trained for", "steps", "images/s", *(name.replace("_", " ") for name in names)]
    cells = []
    for row in rows:
        what = "this level" if row["kind"] == "fixed" else f"{config.low:g} to {row['high']:g}"
        values = [row["images_per_second"], *(row["metrics"].get(name) for name in names)]
        cells.append([row["high"], what, row["steps"], *values])
    long = "alike" if config.minutes is None else f"for {config.minutes:g} minutes"
    note = f"The flows were trained {long}; {config.num} samples for each row; {report['machine']}."
    write_text(out / "noise_levels.md", f"{markdown_table(header, cells, '.4g')}\n\n{note}\n")
