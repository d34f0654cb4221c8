"""A cheap measure of samples while training: the Fréchet distance to held-out pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tarflow.data.images import to_uint8
from tarflow.data.latents import CachedLatents
from tarflow.evaluation.features.extractors import load_extractor
from tarflow.evaluation.features.frechet import frechet_distance
from tarflow.evaluation.features.statistics import Moments
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.flow.config import MetricConfig
from tarflow.training.flow.setup import Data
from tarflow.training.loop.batches import fixed_batches, read_batch


class SampleMetric:
    """Fréchet distance of samples to held-out pictures, or of a cache to what its latents are decoded to.

    The held-out pictures are those of `fixed_batches`. Sample i has the condition of the i-th of them (in turn, if there
    are fewer) and noise of its own seed, so the distance changes with the weights alone.

    Args:
        config: how many, and by which extractor.
        held_out: pictures or cached latents of the validation split, square ones.
        device: of the extractor.

    Raises:
        ValueError: if the extractor cannot be loaded.
    """

    def __init__(self, config: MetricConfig, held_out: Data, device: torch.device):
        self.config, self.held_out = config, held_out
        self.extractor = load_extractor(config.extractor, config.weights, device, config.normalize)
        self.reference: Moments | None = None
        self.batches = fixed_batches(held_out, config.images, config.batch_size)

    def measure(self, pipe: TARFlowPipeline) -> dict[str, float]:
        """The distance, by its name: "fid" only with Inception, else "frechet_distance_" and the extractor."""
        if self.reference is None:
            self.reference = self.moments(self.pictures(pipe))
        samples = self.moments(self.samples(pipe))
        distance = frechet_distance(samples.mean, samples.covariance, self.reference.mean, self.reference.covariance)
        name = "fid" if self.extractor.is_fid else f"frechet_distance_{self.extractor.name}"
        return {name: distance}

    def moments(self, batches: Iterator[Tensor]) -> Moments:
        moments = Moments(self.extractor.dims)
        for images in batches:
            moments.update(self.extractor(images))
        return moments

    def pictures(self, pipe: TARFlowPipeline) -> Iterator[Tensor]:
        """Held-out pictures, uint8 (B, 3, H, W)."""
        for indices in self.batches:
            batch = read_batch(self.held_out, indices)
            if not isinstance(self.held_out, CachedLatents):
                yield batch["image"]
                continue
            with torch.no_grad():
                latents = pipe.codec.normalise(batch["latent_mean"].to(pipe.flow.device))
                yield to_uint8(pipe.codec.decode(latents))

    def samples(self, pipe: TARFlowPipeline) -> Iterator[Tensor]:
        """Samples with the held-out conditions, uint8 (B, 3, H, W)."""
        kind, total = pipe.flow.config.conditioning, self.config.images
        every = [place for indices in self.batches for place in indices]
        for first in range(0, total, self.config.batch_size):
            numbers = range(first, min(first + self.config.batch_size, total))
            places = [every[number % len(every)] for number in numbers]
            conditions: dict[str, Any] = {"num_images": len(numbers)}
            if kind == "prefix":
                conditions = {"prompt": [self.held_out.caption(place) for place in places]}
            elif kind != "none":
                conditions = {"class_labels": read_batch(self.held_out, places)["label"].tolist()}
            generators = [torch.Generator().manual_seed(10_000_019 + number) for number in numbers]
            images, *_ = pipe(
                **conditions, generator=generators, decoding="sequential", output_type="np", return_dict=False
            )
            yield torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
