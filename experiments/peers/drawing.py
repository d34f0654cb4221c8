"""Drawing with what was trained, each in the same form: conditions in, pictures out, and the way back to noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from tarflow.common.seeds import image_generators
from tarflow.data.images import to_uint8
from tarflow.data.latents import CachedLatents
from tarflow.evaluation.samples.match import generate
from tarflow.evaluation.samples.student_error import exact_samples
from tarflow.experiments.peers.diffusion import sample, to_noise
from tarflow.experiments.peers.diffusion_task import load_model
from tarflow.experiments.peers.settings import DiffusionConfig
from tarflow.flows.decoding import sampling
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.student_sampling import student_samples
from tarflow.pipeline.opening import open_pipeline
from tarflow.vae.codec import LatentCodec, load_autoencoder

BATCH = 54


class Drawer(Protocol):
    """What draws."""

    def draw(self, values: list[Any], seed: int) -> list[Image.Image]:
        """Pictures of captions or labels; picture i depends on the seed and i alone."""

    def round_trip(self, values: list[Any]) -> float:
        """Mean |z' − z| of noise z that goes to latents and back, without guidance where there is a choice."""


@dataclass
class FlowDrawer:
    """A pipeline's flow, or its student. All of the noise is taken, as by a DiT, whatever the pipeline's temperature.

    Args:
        folder: of the pipeline.
        condition: "caption" or "class".
        scale: of the guidance.
        decoding: "sequential" or "student".
    """

    folder: Path
    condition: str
    scale: float
    decoding: str = "sequential"

    def __post_init__(self) -> None:
        self.pipe = open_pipeline(str(self.folder))
        self.pipe.set_progress_bar_config(disable=True)
        self.name = "prompt" if self.condition == "caption" else "class_labels"

    def draw(self, values: list[Any], seed: int) -> list[Image.Image]:
        options = {"guidance_scale": self.scale, "decoding": self.decoding, "temperature": 1.0}
        return generate(self.pipe, {self.name: values}, BATCH, seed, **options)

    @torch.no_grad()
    def round_trip(self, values: list[Any]) -> float:
        pipe, flow = self.pipe, self.pipe.flow
        if self.decoding == STUDENT and pipe.student is not None:  # against the guided flow, which it learned from
            method = pipe.student.config.guidance_method
            exact = exact_samples(pipe, {self.name: values}, len(values), self.scale, method, 0)
            _, noisy = student_samples(pipe.student, exact.noise, exact.class_labels, exact.cond, exact.guidance_weight)
            return exact.errors(flow, noisy)[-1]
        noise = torch.randn(len(values), *pipe.latent_shape(None, None), generator=torch.Generator().manual_seed(0))
        given: dict[str, Any] = {"class_labels": torch.tensor(values)} if self.name == "class_labels" else {}
        if self.name == "prompt":
            given["cond"] = pipe.encode_prompt(values, pipe.device, do_classifier_free_guidance=False)[0]
        level = pipe.drawing_level
        condition = flow.condition(given.get("class_labels"), given.get("cond"), len(values), level)
        x, _ = sampling.generate(flow, noise, condition)
        return float((flow(x, **given, noise_level=level)[0] - noise).abs().mean())


@dataclass
class DiffusionDrawer:
    """A DiT.

    Args:
        config: of its training.
        scale: of the guidance.
        steps: of the sampler.
    """

    config: DiffusionConfig
    scale: float
    steps: int

    def __post_init__(self) -> None:
        self.model, self.tokens = load_model(self.config)
        cache = CachedLatents(self.config.cache, "train")
        vae = load_autoencoder(str(cache.autoencoder_folder())).eval()
        self.codec = LatentCodec(vae, cache.latents_mean, cache.latents_std)

    @torch.no_grad()
    def conditions(self, values: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of captions or labels, and none."""
        if self.tokens is None:
            labels = torch.tensor(values)
            return {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.model.null_label)}
        given, null = (self.model.encode(*self.tokens(texts)) for texts in (values, [""] * len(values)))
        return given, null

    @torch.no_grad()
    def draw(self, values: list[Any], seed: int) -> list[Image.Image]:
        images = []
        for first in range(0, len(values), BATCH):
            part = values[first : first + BATCH]
            generators = image_generators(seed, range(first, first + len(part)))
            noise = torch.stack([torch.randn(self.model.shape, generator=generator) for generator in generators])
            latents = sample(self.model, noise, *self.conditions(part), self.scale, self.steps)
            pictures = to_uint8(self.codec.decode(latents)).permute(0, 2, 3, 1).contiguous().numpy()
            images += [Image.fromarray(picture) for picture in pictures]
        return images

    def round_trip(self, values: list[Any]) -> float:
        noise = torch.randn(len(values), *self.model.shape, generator=torch.Generator().manual_seed(0))
        condition, _ = self.conditions(values)
        latents = sample(self.model, noise, condition, None, 1.0, self.steps)
        return float((to_noise(self.model, latents, condition, self.steps) - noise).abs().mean())
