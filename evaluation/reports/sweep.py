"""Sweeps over how to draw: guidance × denoising × decoder × σ × decoding, each measured on its own images; resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow.common.charts import check_matplotlib
from tarflow.common.files import check_writable, read_json_lines, write_text
from tarflow.common.processes import process_and_count
from tarflow.common.progress import write_line
from tarflow.data.shards import file_hash
from tarflow.evaluation.features.names import KEPT_FEATURES
from tarflow.evaluation.features.statistics import MOMENTS
from tarflow.evaluation.images.sets import open_images
from tarflow.evaluation.reports.fid import Comparison, evaluate, reference_statistics
from tarflow.evaluation.reports.settings import SWEPT, SweepConfig, unique
from tarflow.evaluation.reports.sweep_tables import best_row, row_name, write_plots, write_tables
from tarflow.evaluation.samples.generation import conditions_of, generate_images, pipeline_of
from tarflow.evaluation.samples.record import condition_rows, pipeline_hash
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.evaluation.samples.told import matching_shares, read_conditions
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.student_sampling import check_student_scale
from tarflow.pipeline.call.trajectory_sampling import trajectory_steps
from tarflow.pipeline.call.walk import resolve_steps

Measure = Callable[[Path], dict[str, float]]
ROWS, FIXED = "rows.jsonl", "sweep.json"


def run_sweep(
    config: SweepConfig,
    measure: Measure | None = None,
    process: int = 0,
    processes: int = 1,
    device: str | torch.device = "cpu",
    wait: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure all rows that were not measured before; tables are written anew after each, plots at the end or a stop.

    Args:
        config: what to do.
        measure: metrics of a folder of images, called in all processes; None is what the configuration says.
        process, processes, device, wait: as of `generate_images`.

    Returns:
        all rows in order: ``settings``, ``metrics`` and ``images_per_second`` of all processes.

    Raises:
        ValueError: if settings do not fit the model or each other, or the folder holds another sweep.
        OSError: if the pipeline cannot be loaded, or a file cannot be written.
    """
    check_matplotlib()
    out = Path(config.gen.out).expanduser()
    check_writable(out, folder=True)
    pipe = pipeline_of(config.gen, device)
    check_rank(config.rank, pipe.flow.config.conditioning)
    fixed = fixed_settings(config, pipe)
    wanted = unique([resolved(values, pipe) for values in combinations_of(config, pipe)])
    rows = read_rows(out, fixed)
    measure = make_measure(config, device) if measure is None else measure
    show = write_line if process == 0 else lambda _: None
    try:
        for number, settings in enumerate(wanted, start=1):
            if any(row["settings"] == settings for row in rows):
                continue
            show(f"row {number} of {len(wanted)}: {row_name(settings)}")
            folder = out / "images" / row_name(settings)
            own = {**settings, "noise_std": settings["noise_std"] if settings["denoise"] else None}
            if any(steps_down(other, pipe) > 1 for other in wanted) and steps_down(settings, pipe) < 2:
                own["walk"] = None  # which is for the other rows
            gen = dataclasses.replace(config.gen, **own, out=str(folder))
            speed = generate_images(gen, process, processes, device, wait, pipe)["images_per_second"]
            speed = None if speed is None else speed * processes
            rows.append({"settings": settings, "metrics": measure(folder), "images_per_second": speed})
            rows.sort(key=lambda row: wanted.index(row["settings"]) if row["settings"] in wanted else len(wanted))
            if process == 0:
                write_rows(out, fixed, rows)
                write_tables(rows, out, config.rank)
                if not config.keep_images:
                    shutil.rmtree(folder)
            if wait is not None:
                wait()
    finally:
        if process == 0:
            write_plots(rows, out, config.rank)
    if process == 0:
        write_tables(rows, out, config.rank)
        best = best_row(rows, config.rank)
        show("no row has a number to rank by" if best is None else f"best: {row_name(rows[best]['settings'])}")
    return rows


def check_rank(rank: str | None, conditioning: str) -> None:
    """An error for a share of drawings that a model with this conditioning has not."""
    if rank == "match_background" and conditioning != "prefix":
        raise ValueError(f"rank is {rank!r}, but classes of drawings have no background: take match_all")


def resolved(values: dict[str, Any], pipe: FlowPipeline) -> dict[str, Any]:
    """A row's settings with the pipeline's own values in place of None; σ only where it matters."""
    names = ("guidance_scale", "noise_std", "num_inference_steps", "temperature")
    own = {name: getattr(pipe.config, name) for name in names}
    own["denoise"], own["decoder"] = pipe.check_outputs(values["denoise"], "np", values["decoder"], values["decoding"])
    found: dict[str, Any] = {name: own.get(name) if value is None else value for name, value in values.items()}
    steps = values["num_inference_steps"]
    along = trajectory_steps(pipe, steps, values["decoding"], values["denoise"])
    if pipe.noise_levels is None and along is None:
        resolve_steps(None, steps, 1, True, None)  # an error for more than one
    walks = pipe.noise_levels is not None and bool(found["denoise"])
    if not found["denoise"] or (values["noise_std"] is None and (walks or along is not None)):
        found["noise_std"] = None  # steps have levels of their own
    if not walks:
        found["num_inference_steps"] = along
    if values["decoding"] == STUDENT and pipe.student is not None:
        check_student_scale(pipe.student, float(found["guidance_scale"]))
    return found


def combinations_of(config: SweepConfig, pipe: FlowPipeline) -> list[dict[str, Any]]:
    """The swept settings of each row; a student of clean latents, which have no noise to remove, is combined with no
    ``denoise`` but false.

    Raises:
        ValueError: if there is none.
    """
    rows = config.combinations()
    if pipe.student is None or pipe.student.config.target == "noisy":
        return rows
    found = [row for row in rows if not (row["decoding"] == STUDENT and row["denoise"])]
    if not found:
        raise ValueError(
            "no row is left: this student's latents have no noise left to remove, so give denoise [false] too"
        )
    return found


def steps_down(settings: dict[str, Any], pipe: FlowPipeline) -> int:
    """In how many steps a row of `resolved` settings goes down from noise level to noise level."""
    return 0 if pipe.noise_levels is None else settings["num_inference_steps"] or 0


def fixed_settings(config: SweepConfig, pipe: FlowPipeline) -> dict[str, Any]:
    """Everything that all rows of a folder share, as JSON has it."""
    gen = {k: v for k, v in dataclasses.asdict(config.gen).items() if k not in (*SWEPT, "out", "pipeline")}
    names = ("ref", "metrics", "match", "extractor", "extractor_weights", "extractor_normalize")
    measured = {name: getattr(config, name) for name in names}
    if config.ref is not None and (moments := Path(config.ref).expanduser() / MOMENTS).is_file():
        measured["ref"] = file_hash(moments)
    measured["conditions"] = conditions_hash(config.gen, pipe)
    return json.loads(json.dumps({"pipeline": pipeline_hash(pipe), **gen, **measured}))


def conditions_hash(gen: GenerationConfig, pipe: FlowPipeline) -> str:
    """SHA-256 of what all images are drawn from, as captions of data may change under the same settings."""
    conditions = conditions_of(pipe, gen)
    digest = hashlib.sha256()
    for row in condition_rows(conditions, gen.num, gen.batch_size):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def make_measure(config: SweepConfig, device: str | torch.device) -> Measure:
    """The metrics of a folder of images that the configuration asks for. Reference pictures are read here, once.

    Raises:
        ValueError: if the extractor or the reference cannot be loaded.
    """
    if config.ref is None:

        def shares(folder: Path) -> dict[str, float]:
            images = open_images(folder)
            return matching_shares(images, *read_conditions(images, folder))

        return shares

    extractor = config.load_extractor(device)
    ref = config.ref
    if not (Path(ref).expanduser() / MOMENTS).is_file():
        ref = str(Path(config.gen.out).expanduser() / "reference")
        keep = KEPT_FEATURES if set(config.metrics) - {"frechet"} else 0
        reference_statistics(open_images(config.ref), extractor, ref, config.batch_size, keep)

    wanted = Comparison(metrics=config.metrics, match=config.match, batch_size=config.batch_size)
    said: set[str] = set()

    def compared(folder: Path) -> dict[str, float]:
        report = evaluate(ref, str(folder), extractor, wanted)
        for warning in report["warnings"]:
            if warning not in said and process_and_count()[0] == 0:
                write_line(f"warning: {warning}")
            said.add(warning)
        return report["metrics"]

    return compared


def read_rows(out: Path, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that earlier runs measured.

    Raises:
        ValueError: if they share other settings.
    """
    if not (out / FIXED).exists() or not (out / ROWS).exists():
        return []
    try:
        there = json.loads((out / FIXED).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(out / FIXED)!r} cannot be read: {error}") from error
    there.setdefault("conditions", fixed["conditions"])  # of which sweeps of earlier versions do not tell
    said = {"pipeline": "the pipeline is another one", "conditions": "the captions or labels were others"}
    for name, here in fixed.items():
        if there.get(name) != here:
            what = said.get(name, f"{name} was {there.get(name)!r}")
            raise ValueError(f"{str(out)!r} holds another sweep: {what}; take another folder or remove it")
    rows = [row for _, row in read_json_lines(out / ROWS)]
    # Which rows of earlier versions do not name.
    older = {"decoder": "vae", "num_inference_steps": None, "temperature": 1.0}
    return [{**row, "settings": {**older, **row["settings"]}} for row in rows]


def write_rows(out: Path, fixed: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write all rows, whole or as before."""
    for name, text in (
        (FIXED, json.dumps(fixed, indent=1) + "\n"),
        (ROWS, "".join(json.dumps(row) + "\n" for row in rows)),
    ):
        write_text(out / name, text)
