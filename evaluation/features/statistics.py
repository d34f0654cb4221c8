"""Moments of features over a set of pictures: computed in one pass, kept in files, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tarflow.common.files import replaced
from tarflow.common.processes import gather, gather_objects, on_main, process_and_count
from tarflow.common.progress import progress_bar
from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.features.names import KEPT_FEATURES
from tarflow.evaluation.images.conversions import notes_of
from tarflow.evaluation.images.sets import ImageSet

FORMAT = "tarflow-statistics-1"
MOMENTS, FEATURES = "moments.safetensors", "features.safetensors"


class Moments:
    """Mean and covariance of features that come batch by batch, in float64.

    Batches are joined by the sums of squares about their own means (Chan, Golub & LeVeque, 1979): nothing large
    cancels, unlike in sums of squares about zero.
    """

    def __init__(self, dims: int):
        self.count = 0
        self.mean = torch.zeros(dims, dtype=torch.float64)
        self.scatter = torch.zeros(dims, dims, dtype=torch.float64)  # sum of (x − mean)(x − mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Add a batch (B, D).

        Raises:
            ValueError: if the shape is another, or a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"expected features (B, {len(self.mean)}), got the shape {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError("the extractor gave features that are not finite")
        if not len(features):
            return
        batch = Moments(len(self.mean))
        features = features.cpu().double()  # GPUs of Apple have no float64
        batch.count, batch.mean = len(features), features.mean(0)
        centred = features - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Add everything that the other moments have seen."""
        total = self.count + other.count
        if not total:
            return
        delta = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by count − 1 as NumPy does.

        Raises:
            ValueError: of fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return self.scatter / (self.count - 1)


@dataclasses.dataclass
class Statistics:
    """What is known about a set of pictures.

    Attributes:
        moments: of all features.
        extractor: the description of the extractor that they come from.
        data: fingerprint of the pictures.
        source: where they came from, in words.
        size: height and width of the pictures.
        notes: sentences on what was done to them.
        features: (K, D) float32 of pictures that lie evenly in the set; None if none were kept.
    """

    moments: Moments
    extractor: dict[str, str]
    data: str
    source: str
    size: tuple[int, int]
    notes: list[str]
    features: Tensor | None = None

    @property
    def count(self) -> int:
        return self.moments.count

    @property
    def fingerprint(self) -> str:
        """SHA-256 of pictures and extractor."""
        return fingerprint_of(self.extractor, self.data)

    def about(self) -> dict[str, Any]:
        """Everything but numbers of the features, for JSON."""
        kept = 0 if self.features is None else len(self.features)
        return {
            "source": self.source,
            "count": self.count,
            "kept_features": kept,
            "size": list(self.size),
            "fingerprint": self.data,
            "notes": self.notes,
        }

    def save(self, folder: str | Path) -> None:
        """Write ``moments.safetensors`` and ``features.safetensors``, each whole or not at all."""
        folder = Path(folder).expanduser()
        about = {"format": FORMAT, "extractor": self.extractor, "fingerprint": self.fingerprint, **self.about()}
        if self.features is None:
            (folder / FEATURES).unlink(missing_ok=True)
        else:
            write({"features": self.features.contiguous()}, about | {"data": self.data}, folder / FEATURES)
        tensors = {"mean": self.moments.mean, "scatter": self.moments.scatter.contiguous()}
        write(tensors, about | {"data": self.data}, folder / MOMENTS)

    @classmethod
    def load(cls, folder: str | Path, extractor: Extractor | None = None) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ValueError: if there is nothing whole, or (given an extractor) it is of another one, with what differs.
        """
        folder = Path(folder).expanduser()
        tensors, about = read(folder / MOMENTS)
        if extractor is not None and about["extractor"] != extractor.description:
            raise ValueError(f"the statistics in {str(folder)!r} cannot be used: {difference(about, extractor)}")
        moments = Moments(0)
        moments.count, moments.mean, moments.scatter = about["count"], tensors["mean"], tensors["scatter"]
        features = None
        if about["kept_features"]:
            kept, belongs = read(folder / FEATURES)
            if belongs["fingerprint"] != about["fingerprint"]:
                raise ValueError(f"{FEATURES} and {MOMENTS} in {str(folder)!r} are of different pictures or extractors")
            features = kept["features"]
        size = (about["size"][0], about["size"][1])
        return cls(moments, about["extractor"], about["data"], about["source"], size, about["notes"], features)


def difference(about: dict[str, Any], extractor: Extractor) -> str:
    """In what the extractor of saved statistics differs from the one that is wanted."""
    parts = []
    for key, wanted in extractor.description.items():
        found = about["extractor"].get(key)
        if found != wanted:
            short = [str(value)[:12] for value in (found, wanted)] if key == "weights" else [found, wanted]
            parts.append(f"their extractor's {key} is {short[0]!r}, expected {short[1]!r}")
    return "; ".join(parts)


def fingerprint_of(extractor: dict[str, str], data: str) -> str:
    return hashlib.sha256(json.dumps([extractor, data], sort_keys=True).encode()).hexdigest()


def write(tensors: dict[str, Tensor], about: dict[str, Any], path: Path) -> None:
    """Write a file, whole or not at all."""
    with replaced(path) as temporary:
        save_file(tensors, temporary, {"statistics": json.dumps(about)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of one file."""
    if not path.is_file():
        raise ValueError(f"there are no statistics in {str(path.parent)!r}: make them with tarflow evaluate fid ref")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("statistics", "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"{str(path)!r} has the format {about.get('format')!r}, expected {FORMAT!r}")
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is cut off or broken: {error}") from error


def compute_statistics(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    keep_features: int = KEPT_FEATURES,
) -> Statistics:
    """Statistics of a set of pictures, the same with one process or several.

    Args:
        images: the pictures.
        extractor: of their features.
        batch_size: pictures per pass and process. Batches are cut the same way for any number of processes.
        cache_dir: where statistics are kept under a hash of pictures, preprocessing, extractor and weights, and taken
            from if they are there; None keeps none.
        keep_features: of how many pictures, at most, features are kept for metrics that compare samples.

    Raises:
        ValueError: if a picture cannot be read, or there are fewer than two.
    """
    if len(images) < 2:
        raise ValueError(f"{images.name!r} has {len(images)} picture: a covariance needs at least 2")
    data = on_main(lambda: images.fingerprint)
    folder = None
    if cache_dir is not None:
        kept = f"{fingerprint_of(extractor.description, data)[:24]}-{min(keep_features, len(images))}"
        folder = Path(cache_dir).expanduser() / kept
        if on_main(lambda: (folder / MOMENTS).is_file()):
            return Statistics.load(folder, extractor)
    moments, kept_rows = Moments(extractor.dims), []
    wanted = torch.zeros(len(images), dtype=torch.bool)
    count = min(keep_features, len(images))
    wanted[torch.arange(count) * len(images) // max(count, 1)] = True
    for features in extract(images, extractor, batch_size):
        first = moments.count
        moments.update(features)
        kept_rows.append(features[wanted[first : moments.count]])
    notes = notes_of(sum(gather_objects(images.conversions), Counter()))
    stored = torch.cat(kept_rows) if count else None
    statistics = Statistics(moments, extractor.description, data, images.name, images.size, notes, stored)
    if folder is not None:
        on_main(lambda: statistics.save(folder))
    return statistics


def extract(images: ImageSet, extractor: Extractor, batch_size: int) -> Iterator[Tensor]:
    """Features (B, D) of all batches in order on the CPU, each batch computed by one of the processes.

    Raises:
        ValueError: in all processes alike, if one of them cannot read a picture.
    """
    process, processes = process_and_count()
    own = images.batches(batch_size, process, processes)
    number = -(-len(images) // batch_size)
    for start in progress_bar(
        range(0, number, processes), desc=f"features of {images.name}", disable=process > 0, leave=False
    ):
        padded = torch.zeros(batch_size, extractor.dims, device=extractor.device)
        error: ValueError | OSError | None = None
        if start + process < number:
            try:
                features = extractor(next(own))
                padded[: len(features)] = features
            except (ValueError, OSError) as caught:
                error = caught
                padded.fill_(float("nan"))  # lets the others, who wait for these rows, know of it
        gathered = gather(padded)
        if any(bool(rows.isnan().any()) for rows in gathered):
            for found in gather_objects(error):
                if found is not None:
                    raise found
        for batch, rows in enumerate(gathered, start=start):
            if batch < number:
                yield rows[: min(batch_size, len(images) - batch * batch_size)].cpu()
