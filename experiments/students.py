"""A student beside its flow: speed, distance from the exact inverse, and pictures of the same noise."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tarflow.common.charts import markdown_table
from tarflow.common.files import check_writable, write_json, write_picture, write_text
from tarflow.common.machine import machine, timed
from tarflow.common.progress import announce
from tarflow.common.seeds import image_generators
from tarflow.data.images import bytes_of
from tarflow.evaluation.conditions import make_conditions
from tarflow.evaluation.samples.student_error import exact_samples
from tarflow.experiments.decoding import labelled_rows
from tarflow.experiments.settings import StudentComparisonConfig
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.student_sampling import student_samples

#: What is timed: the latents as they come, with or without the training noise, and whole calls.
TIMED: dict[str, dict[str, Any]] = {
    "latents": {"output_type": "latent", "denoise": False},
    "pictures": {"output_type": "pt"},
}


@torch.no_grad()
def compare_student(config: StudentComparisonConfig, pipe: FlowPipeline) -> dict[str, Any]:
    """Compare, and write tables and pictures.

    Args:
        config: what to compare.
        pipe: the pipeline, on its device.

    Returns:
        "speed": a row for each batch size and each of `TIMED`, with the medians of "flow" and "student" in images per
        second and the median of their ratios; "errors": of the samples and after each block, see `block_errors`.

    Raises:
        ValueError: if settings and pipeline do not fit.
    """
    out = Path(config.out).expanduser()
    check_writable(out, folder=True)
    pipe.check_outputs(None, "pt", None, STUDENT)
    student = pipe.check_student()
    student.to(getattr(torch, config.student_dtype))
    if config.compile:
        pipe.enable_fast_decoding()
    scale = config.guidance_scale
    if scale is None:
        scale = min(pipe.config.guidance_scale, student.config.max_guidance_scale)
    conditions = make_conditions(pipe, config.seed, config.labels, None, config.captions, config.data, config.split)

    def call(count: int, decoding: str, **options: Any) -> Any:
        generators = image_generators(config.seed, range(count))
        arguments = conditions.arguments(range(count))
        return pipe(**arguments, generator=generators, guidance_scale=scale, decoding=decoding, **options).images

    announce(
        f"batches of {', '.join(map(str, config.batch_sizes))} are timed, --repeats {config.repeats}: on a CPU that takes "
        "minutes, fewer of them less"
    )
    speed = []
    for batch in config.batch_sizes:
        for name, options in TIMED.items():
            ways = {
                "flow": partial(call, batch, config.decoding, **options),
                "student": partial(call, batch, STUDENT, **options),
            }
            speed.append({"batch": batch, "timed": name, **timed(ways, batch, config.repeats, pipe.flow.device)})
    arguments, method = conditions.arguments(range(config.num)), student.config.guidance_method
    exact = exact_samples(pipe, arguments, config.num, scale, method, config.seed)
    _, noisy = student_samples(student, exact.noise, exact.class_labels, exact.cond, exact.guidance_weight)
    report = {
        "speed": speed,
        "errors": exact.errors(pipe.flow, noisy),
        "guidance_scale": scale,
        "settings": dataclasses.asdict(config),
        "machine": machine(pipe.flow.device),
    }
    write_tables(report, pipe, out)
    rows = {name: call(config.columns, name, output_type="pt") for name in (config.decoding, STUDENT)}
    rows = {name: bytes_of(images) for name, images in rows.items()}
    picture = labelled_rows({"flow": rows[config.decoding], "student": rows[STUDENT]})
    write_picture(out / "samples.png", picture, optimize=True)
    return report


def write_tables(report: dict[str, Any], pipe: FlowPipeline, out: Path) -> None:
    """Write ``student.json`` and ``student.md``."""
    write_json(out / "student.json", report, nan_as_null=True)
    size = pipe.flow.config.sample_size // pipe.flow.config.patch_size
    decoding = report["settings"]["decoding"]
    header = ["batch", "timed", f"flow, {decoding}, images/s", "student, images/s", "ratio"]
    rows = [
        [row["batch"], row["timed"], row["flow"], row["student"], format(row["ratio"], ".3g")]
        for row in report["speed"]
    ]
    lines = [markdown_table(header, rows)]
    settings = f"guidance scale {report['guidance_scale']:g}, student in {report['settings']['student_dtype']}"
    settings += ", both compiled" if report["settings"]["compile"] else ""
    lines += ["", f"{size * size} tokens, {settings}; {report['machine']}; medians."]
    after = ", ".join(f"{error:.3g}" for error in report["errors"][1:])
    header = ["mean error of the samples", "after each block, data to noise"]
    lines += ["", markdown_table(header, [[report["errors"][0], after]], ".3g")]
    write_text(out / "student.md", "\n".join(lines) + "\n")
