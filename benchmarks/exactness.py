"""How far each decoding method's latents are from exact ones, by the guidance scale."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tarflow.benchmarks.choices import SAMPLES, SCALES
from tarflow.common.charts import markdown_table
from tarflow.flows.decoding.method import FAST_TOLERANCE, Decoding
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.layers.condition import Condition, parts_of, with_level
from tarflow.flows.layers.guidance import Guidance
from tarflow.pipeline.loading.examples import example_captions
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline


@dataclass(frozen=True)
class Exactness:
    """One method at one guidance scale.

    Attributes:
        pipeline: its name.
        guidance_scale: 1 is off.
        method: as of `plans`.
        largest: |x − x*| over all numbers of all samples; x* is sequential decoding in float64. Latents are of about
            unit size.
        median: over the samples, of each one's largest.
    """

    pipeline: str
    guidance_scale: float
    method: str
    largest: float
    median: float


def plans(model: Any) -> dict[str, list[Decoding]]:
    """The decodings to measure: each method with its default tolerance, the mixtures that "auto" chooses most often
    (the deep block sequentially and the others by Jacobi; or all in segments of half of the tokens), and the tolerance
    of "fast"."""
    count = len(model.blocks)
    tokens = (model.config.sample_size // model.config.patch_size) ** 2
    quarter, half = -(-tokens // 4), -(-tokens // 2)
    return {
        "sequential": [Decoding()] * count,
        "jacobi": [Decoding("jacobi")] * count,
        "gs_jacobi": [Decoding("gs_jacobi", segment=quarter)] * count,
        "auto: jacobi, deep block sequential": [Decoding("jacobi")] * (count - 1) + [Decoding()],
        "auto: gs_jacobi of halves": [Decoding("gs_jacobi", segment=half)] * count,
        "fast: jacobi": [Decoding("jacobi", FAST_TOLERANCE)] * count,
    }


@torch.no_grad()
def exactness(
    name: str,
    model: Any,
    cond: Condition,
    null: Condition,
    method: str = "gaussian",
    scales: Sequence[float] = SCALES,
    samples: int = SAMPLES,
) -> Iterator[Exactness]:
    """Each method of `plans` at each guidance scale, on the same noise.

    Args:
        name: of the pipeline.
        model: a `TARFlowModel` in float32.
        cond, null: conditions of the samples, as the blocks take them.
        method: how guidance acts, see `Guidance`.
    """
    side = model.config.sample_size
    noise = torch.randn(samples, model.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    z = model.scale_noise(noise.to(model.device))
    exact = copy.deepcopy(model).double()
    for scale in scales:
        guidance = Guidance(scale - 1, method) if scale > 1 else None
        expected, _ = generate(exact, z.double(), as_double(cond), as_double(null), guidance)
        for plan, decoding in plans(model).items():
            x, _ = generate(model, z, cond, null, guidance, decoding=decoding)
            error = (x.double() - expected).abs().flatten(1).amax(1)
            yield Exactness(name, scale, plan, float(error.max()), float(error.median()))


def as_double(condition: Condition) -> Condition:
    """A condition of floats in float64; labels, and none, as they are."""
    given, level = parts_of(condition)
    given = given.double() if given is not None and given.is_floating_point() else given
    return with_level(given, None if level is None else level.double())


def exactness_table(rows: Sequence[Exactness]) -> str:
    """A line for each pipeline and method, a column for each guidance scale: the largest difference."""
    scales = sorted({row.guidance_scale for row in rows})
    found = {(row.pipeline, row.method, row.guidance_scale): row.largest for row in rows}
    lines = [
        [pipeline, method, *(found.get((pipeline, method, scale)) for scale in scales)]
        for pipeline, method in dict.fromkeys((row.pipeline, row.method) for row in rows)
    ]
    return markdown_table(["pipeline", "method", *(f"{scale:g}" for scale in scales)], lines, ".1e")


def captions_of(pipe: TARFlowPipeline, count: int) -> list[str]:
    """Captions for a pipeline: of its folder's ``examples.json`` in turn, or of drawings."""
    captions = example_captions(pipe)
    if not captions:
        shapes = ("circle", "square", "triangle", "star", "ring", "cross")
        captions = [f"a {('small', 'large')[i % 2]} red {shape} on a dark background" for i, shape in enumerate(shapes)]
    return [captions[i % len(captions)] for i in range(count)]
