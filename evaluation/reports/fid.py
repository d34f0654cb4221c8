"""One evaluation of generated pictures: all numbers, and everything that they depend on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.common.processes import on_main
from tarflow.evaluation.features.clip_score import clip_score
from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.features.metrics import calculate, chosen_metrics, warnings_of
from tarflow.evaluation.features.names import KEPT_FEATURES, Metric
from tarflow.evaluation.features.statistics import MOMENTS, Statistics, compute_statistics
from tarflow.evaluation.images.sets import ImageSet, open_images
from tarflow.evaluation.samples.record import read_record
from tarflow.evaluation.samples.told import matching_shares, read_conditions

PACKAGES = ("tarflow", "torch", "torchvision", "transformers", "torch-fidelity", "numpy", "pillow")


def reference_statistics(
    images: ImageSet, extractor: Extractor, out: str, batch_size: int = 64, keep_features: int = KEPT_FEATURES
) -> tuple[Statistics, bool]:
    """Statistics in the folder ``out``: computed, unless they are there already.

    Returns:
        the statistics, and whether they had to be computed.

    Raises:
        ValueError: if the folder holds statistics of other pictures or of another extractor.
    """
    folder = Path(out).expanduser()
    if on_main(lambda: (folder / MOMENTS).is_file()):
        found = Statistics.load(folder, extractor)
        if found.data != on_main(lambda: images.fingerprint):
            raise ValueError(
                f"{out!r} holds statistics of other pictures ({found.count} of {found.source}): remove them or give "
                "another folder"
            )
        kept = 0 if found.features is None else len(found.features)
        if kept >= min(keep_features, len(images)):
            return found, False
    statistics = compute_statistics(images, extractor, batch_size, keep_features=keep_features)
    on_main(lambda: statistics.save(folder))
    return statistics, True


def open_reference(
    ref: str, extractor: Extractor, batch_size: int, cache_dir: str | None, image_size: int | None, keep_features: int
) -> Statistics:
    """Statistics that were saved in a folder, or those of the pictures that the path has."""
    if (Path(ref).expanduser() / MOMENTS).is_file():
        return Statistics.load(ref, extractor)
    images = open_images(ref, image_size=image_size)
    return compute_statistics(images, extractor, batch_size, cache_dir, keep_features)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compute of samples and a reference.

    Attributes:
        metrics: see `calculate`; None takes all that the extractor allows.
        clip: a CLIP model's folder or hub id for the CLIP score of the captions in the samples' folder.
        match: add the shares of drawings that are what their caption or class says.
        batch_size: pictures per pass and process.
        image_size: side to fit pictures to that are not of one size.
        cache_dir: where statistics of pictures are kept; None keeps none.
    """

    metrics: Sequence[Metric] | None = None
    clip: str | None = None
    match: bool = False
    batch_size: int = 64
    image_size: int | None = None
    cache_dir: str | None = None


def evaluate(ref: str, samples: str, extractor: Extractor, wanted: Comparison) -> dict[str, Any]:
    """Compare samples with a reference.

    Args:
        ref: a folder of statistics, or pictures as `open_images` takes them.
        samples: generated pictures, in the same forms.
        extractor: of features.
        wanted: what to compute.

    Returns:
        "metrics" by name, "names" of them for readers, "reference", "samples", "extractor", "versions", "warnings".

    Raises:
        ValueError: in one sentence, for all that does not fit.
    """
    images, batch_size = open_images(samples, image_size=wanted.image_size), wanted.batch_size
    folder = Path(samples).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    conditions: list[Any] = []
    kind = ""
    if wanted.clip or wanted.match:  # before the long work
        kind, conditions = read_conditions(images, folder)
    if wanted.clip and kind != "caption":
        raise ValueError(f"the CLIP score needs captions, but {str(folder)!r} has only labels")
    metrics = chosen_metrics(extractor, wanted.metrics)
    keep = KEPT_FEATURES if set(metrics) - {"frechet"} else 0
    reference = open_reference(ref, extractor, batch_size, wanted.cache_dir, wanted.image_size, keep)
    drawn = compute_statistics(images, extractor, batch_size, wanted.cache_dir, keep)
    # One process computes, as the others would only compete with it for processors.
    values = on_main(lambda: calculate(reference, drawn, extractor, metrics))
    if wanted.clip:
        values["clip_score"] = clip_score(images, conditions, wanted.clip, batch_size, extractor.device)
    if wanted.match:
        values |= matching_shares(images, kind, conditions)
    return {
        "metrics": values,
        "names": {name: readable(name, extractor) for name in values},
        "reference": reference.about(),
        "samples": drawn.about(),
        "extractor": extractor.description | {"fingerprint": extractor.fingerprint, "dims": extractor.dims},
        "versions": versions(),
        "warnings": warnings_of(reference, drawn, extractor) + unfinished(folder, len(images)),
    }


def readable(name: str, extractor: Extractor) -> str:
    """A metric's name for readers; never FID or KID for other extractors than Inception."""
    name, spread = name.removesuffix("_std"), name.endswith("_std")
    known = {
        "fid": "FID",
        "frechet_distance": extractor.metric_name,
        "kid": "KID",
        "kernel_distance": f"kernel distance ({extractor.name})",
        "inception_score": "Inception Score",
        "clip_score": "CLIP score",
        "precision": f"precision ({extractor.name})",
        "recall": f"recall ({extractor.name})",
    }
    text = known.get(name, name.replace("match_", "matching samples, "))
    return f"{text}, standard deviation" if spread else text


def unfinished(folder: Path, count: int) -> list[str]:
    """A sentence if the folder's generation was not finished, or it has other pictures than were generated."""
    record = read_record(folder) or {}
    if not record.get("complete", True):
        return [f"samples: the generation in {str(folder)!r} is not complete"]
    if record.get("num", count) != count:
        return [f"samples: {record['num']} pictures were generated in {str(folder)!r}, but it has {count}"]
    return []


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(report: dict[str, Any]) -> str:
    """The metrics, counts and warnings of a report as text."""
    values, names = report["metrics"], report["names"]
    rows = []
    for name, value in values.items():
        if not name.endswith("_std"):
            spread = f" ± {values[f'{name}_std']:.6g}" if f"{name}_std" in values else ""
            rows.append((names[name], f"{value:.6g}{spread}"))
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    counts = [f"{report[side]['count']} {side}" for side in ("reference", "samples")]
    lines.append(f"pictures: {counts[0]}, {counts[1]}; extractor {report['extractor']['name']}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report["warnings"])])
